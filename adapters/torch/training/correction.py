"""Fixed-point correction: losses on intermediate states of a solve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

from torch import Tensor

from implicit_core import checks
from implicit_core.arrays import H, Operator, State, Z
from implicit_core.carry import Point
from implicit_core.estimators import Estimator, Unroll
from implicit_core.fixed_point import fixed_point
from implicit_core.problem import Map, Problem
from implicit_core.solution import Solution
from implicit_core.solvers import Anderson, Solver
from implicit_core.solvers.here import Here
from implicit_core.system import System

HERE = Here(rtol=0.0, atol=0.0)
"""Nothing need have converged there."""


class Trajectory(NamedTuple, Generic[H]):
    """A solution, and intermediate states of its solve, all of them differentiable.

    Attributes
    ----------
    solution
        As :func:`fixed_point` returns it.
    states
        The estimator's value at each requested step that the solve reached, by step, in ascending order.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> z = torch.ones(2, requires_grad=True)
    >>> trajectory = ict.fixed_point_correction(lambda h, z: 0.5 * h + z, torch.zeros(2), z, at=[2])
    >>> trajectory.loss(lambda h: h.square().mean()).requires_grad
    True
    """

    solution: Solution[H]
    states: dict[int, H]

    def loss(self, criterion: Callable[[H], Tensor], gamma: float = 0.8) -> Tensor:
        r"""The weighted loss :math:`\sum_{i=1}^n γ^{n-i} \ell(h_i)` over the n - 1 states and the solution, in order.

        Parameters
        ----------
        criterion
            The loss of one state, shaped as h0.
        gamma
            γ in [0, 1]: the weight of a state, relative to the next one.

        Raises
        ------
        TypeError, ValueError
            If an argument is of a wrong kind.
        """
        checks.function("criterion", criterion)
        gamma = checks.real("gamma", gamma, 0.0, 1.0)
        total = criterion(self.solution.value)
        for age, state in enumerate(reversed(self.states.values()), start=1):
            total = total + gamma**age * criterion(state)
        return total


def fixed_point_correction(
    f: Problem[H, Z] | Map[H, Z],
    h0: H,
    z: Z,
    *,
    at: Sequence[int],
    solver: Solver = Anderson(),
    gradient: Estimator = Unroll(k=5, lam=0.5),
    batch_ndim: int | None = None,
    throw: bool = False,
    trace: bool = False,
) -> Trajectory[H]:
    """:func:`fixed_point`, which also returns the states of the solve ``at`` some steps.

    The gradient estimator is applied at each of these states, as at the solution, so losses on them train z and all
    tensors that f closes over. They pull the whole path of the solver towards the target, which makes later solves
    shorter and steadier. The solve is the same as without. Each state costs one more evaluation of F, and the
    estimator's value.

    Parameters
    ----------
    f, h0, z, gradient, batch_ndim, throw, trace
        As for :func:`fixed_point`.
    at
        Steps, at least 1 and ascending. ``at=(2, 5)`` takes h_2 and h_5, where h_0 = h0 and h_i is the point at which
        the solver evaluates F after i steps. A step that the solve does not go beyond yields no state. A sample that
        was finished earlier than the others stays where it was.
    solver
        A :class:`Solver`. The steps of a callable are not available.

    Returns
    -------
    Trajectory
        The solution, the states, and a method for their weighted loss.

    Raises
    ------
    SolveError
        With ``throw``, if a sample did not converge.
    TypeError, ValueError
        If an argument, or the result of F, has a wrong type, structure, shape, dtype or device; for an estimator that
        does not follow a solve.

    References
    ----------
    S. Bai, Z. Geng, Y. Savani and J. Z. Kolter, Deep equilibrium optical flow estimation, CVPR 2022.

    Examples
    --------
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import torch as ict
    >>> cell = torch.nn.Linear(3, 3)
    >>> x, target = torch.ones(4, 3), torch.zeros(4, 3)
    >>> trajectory = ict.fixed_point_correction(
    ...     lambda h, z: torch.tanh(0.3 * cell(h) + z), torch.zeros(4, 3), x, at=(1, 2), batch_ndim=1
    ... )
    >>> list(trajectory.states)
    [1, 2]
    >>> trajectory.loss(lambda h: (h - target).square().mean()).backward()
    >>> cell.weight.grad.shape
    torch.Size([3, 3])
    """
    steps = _ascending(at)
    checks.instance("solver", solver, Solver, "Anderson(), whose steps are available")
    checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
    if gradient.starts_from_h0:
        raise ValueError(f"{gradient!r} does not follow a solve, so it has no states to correct")
    points: dict[int, H] = {}
    observed = _KeepingPoints(solver=solver, steps=frozenset(steps), points=points)
    solution = fixed_point(
        f, h0, z, solver=observed, gradient=gradient, batch_ndim=batch_ndim, throw=throw, trace=trace
    )
    states = {
        step: fixed_point(f, h, z, solver=HERE, gradient=gradient, batch_ndim=batch_ndim).value
        for step, h in points.items()
    }
    return Trajectory(solution, states)


@dataclass(frozen=True, kw_only=True)
class _KeepingPoints(Solver):
    """A solver that keeps its points at some steps, unless the solve ends there."""

    solver: Solver
    steps: frozenset[int]
    points: dict[int, Any]

    def __post_init__(self) -> None:
        for name in Solver.__annotations__:
            object.__setattr__(self, name, getattr(self.solver, name))

    @property
    def absolute_tolerance(self) -> float:
        return self.solver.absolute_tolerance

    def init(self, system: System, x: State) -> Any:
        return self.solver.init(system, x)

    def observe(self, system: System, memory: Any, point: Point, operator: Operator | None) -> Any:
        return self.solver.observe(system, memory, point, operator)

    def step(self, system: System, memory: Any, point: Point) -> tuple[State, Any]:
        if point.index in self.steps:
            # A copy: F may write its next result to the memory of this point.
            self.points[point.index] = system.space.unpack(system.space.copy(point.x))
        return self.solver.step(system, memory, point)


def _ascending(at: object) -> list[int]:
    if not isinstance(at, Sequence) or isinstance(at, str):
        raise TypeError(f"at must be a sequence of integers, such as (2, 5), got {at!r} of type {type(at).__name__}")
    steps = [checks.integer("each step of at", step, 1) for step in at]
    if not steps or sorted(set(steps)) != steps:
        raise ValueError(f"at must hold at least one step, in ascending order and each once, got {at!r}")
    return steps

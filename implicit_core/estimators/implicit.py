"""The exact gradient by the implicit function theorem (Eq. 4)."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self, TypeVar

from .. import checks
from ..arrays import Array, H, Operator, PyTree, State, Z
from ..backend import Backend
from ..linear_solvers import GMRES, LinearSolver
from ..preconditioner import AtPoint, Preconditioner
from ..problem import Problem
from ..records import Data, Record
from ..registry import find_backend
from ..solvers.jacobian import complement, factorized
from ..space import Space
from .base import AtFixedPoint, Derivative
from .inexact import OnFailure, check_on_failure, settled

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Start(Record):
    """Where the adjoint solves at a point start.

    Attributes
    ----------
    data
        A pytree like h.
    """

    data: Data

    def state(self, space: Space) -> State:
        """The start of a solve in ``space``, whose batch may have more axes, the first ones."""

        def repeated(x: Array, like: Array) -> Array:
            return x if x.shape == like.shape else space.xp.broadcast_to(x, like.shape)

        return space.pack(space.backend.map(repeated, self.data.tree, space.like))


@dataclass(frozen=True, repr=False)
class Implicit(AtFixedPoint):
    r"""The exact gradient, Eq. (2) and (4): the adjoint system (I - ∂F/∂h)ᵀ w = v, solved per sample.

    .. math::
        \frac{∂h^*}{∂z} = \frac{∂F}{∂z} \left(I - \frac{∂F}{∂h}\right)^{-1}

    F is linearized once, at the solver's point. A pullback costs K h-VJPs, as many as the linear solver needs, and one
    z-VJP. A linear solve that does not converge is never silent: see ``on_failure``.

    Of a :class:`Problem` with a ``jacobian`` the matrix is factorized once, and the linear solver only refines the
    solution: K is about 2.

    Parameters
    ----------
    linear_solver
        A :class:`LinearSolver`.
    on_failure
        What to do with samples whose linear solve did not converge: ``"raise"`` a :class:`SolveError`, ``"warn"`` and
        use the last iterate, make their part of the gradient ``"nan"``, or ``"ignore"`` it and use the last iterate. A
        cotangent that is not finite is not such a failure: it gives NaN. Code that JAX traces cannot raise: there
        ``"raise"`` is ``"nan"``. There ``"warn"`` is one call back to Python, which JAX's persistent compilation cache
        does not store, and ``"nan"`` in a program that ``jax.export`` exports; the others call nothing.

    preconditioner
        A :class:`Preconditioner`, an approximate inverse of I - ∂F/∂h, instead of the ``jacobian`` of the problem.
        Transforms of ``torch.func`` leave both out, and the gradient is the same.
    x0
        Where the solve of a pullback starts, shaped as h: a guess of w, such as that of the training step before. It is
        a constant, saves products if it is close, and changes no gradient beyond the tolerance of the linear solver.
        Samples in which its residual is not below ‖v‖ start from zero. It costs one product more.

        w is the gradient with respect to a term b = 0 that is added to F, h = F(h, z) + b; of a root, to g. A
        pushforward solves another system, and starts from zero. So do the pullbacks of ``torch.func``.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range, or if ``x0`` is not shaped as h.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 2 and 4.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.Implicit().vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))
    array([2.])

    The adjoint of one step as the start of the next, with a term b in z that is added to F:

    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z[0] + z[1], vjp=lambda h, z, v: (0.5 * v, (v, v)))
    >>> h, z = np.array([2.0]), (np.array([1.0]), np.zeros(1))
    >>> z_bar, w = ic.Implicit().vjp(problem, h, z)[1](np.array([1.0]))
    >>> z_bar, w = ic.Implicit(x0=w).vjp(problem, h, z)[1](np.array([1.1]))
    >>> w
    array([2.2])
    """

    linear_solver: LinearSolver = field(default=GMRES())
    on_failure: OnFailure = "raise"
    preconditioner: Preconditioner | AtPoint | None = field(default=None, repr=False)
    x0: PyTree | Data | Start | None = field(default=None, repr=False)

    derivative: ClassVar[Derivative] = Derivative.OF_SOLUTION
    relaxes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.instance("linear_solver", self.linear_solver, LinearSolver, "GMRES()")
        check_on_failure(self.on_failure)
        if self.preconditioner is not None and not isinstance(self.preconditioner, AtPoint):
            checks.instance("preconditioner", self.preconditioner, Preconditioner, "Preconditioner(apply, transposed)")
        if self.x0 is not None and not isinstance(self.x0, (Data, Start)):
            object.__setattr__(self, "x0", Data(_constants(find_backend(self.x0, "x0"), self.x0)))

    def prepared(self, problem: Problem[H, Z], h: H, z: Z) -> Self:
        """See :class:`AtFixedPoint`: the preconditioner, or the factorized Jacobian of the problem, and the start."""
        preconditioner, x0 = self._preconditioner_at(problem, h, z), self._start_at(problem, h)
        if preconditioner is self.preconditioner and x0 is self.x0:
            return self
        return replace(self, preconditioner=preconditioner, x0=x0)

    def _preconditioner_at(self, problem: Problem[H, Z], h: H, z: Z) -> Preconditioner | AtPoint | None:
        given = self.preconditioner
        if isinstance(given, AtPoint) or (given is None and problem.jacobian is None):
            return given
        space = problem.space(h)
        backend = space.backend
        h, z = _constants(backend, h), _constants(backend, z)
        with backend.on_device_of(h), backend.solving():
            return factorized(space, complement(problem, space, h, z)) if given is None else given.at(h, z)

    def _start_at(self, problem: Problem[H, Z], h: H) -> Start | None:
        given = self.x0
        if not isinstance(given, Data):
            return given
        backend = find_backend(h)
        w = checks.like(backend, "x0 of Implicit", checks.numbers_as_arrays(backend, given.tree, h), h, "h")
        if problem.row_factors is not None:  # b is added to g, and F is x - factors g
            w = backend.map(lambda x, factor: -x / factor, w, problem.row_factors)
        return Start(Data(w))

    # Decision 24.
    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """The w with (I - J) w = v (Eq. 4)."""
        return self._solved(space, jacobian, v, None, None)

    def directed(self, space: Space, jacobian: Operator, v: State, *, transposed: bool) -> State:
        """See :class:`AtFixedPoint`: a preconditioner of the transposed system is transposed too."""
        at, start = self.preconditioner, self.x0
        precondition = x0 = None  # also where they could not be prepared
        if isinstance(at, AtPoint):
            precondition = partial(at.solve, space, transposed=transposed)
        if isinstance(start, Start) and transposed:
            x0 = start.state(space)
        if precondition is None and x0 is None:
            return self.inverse(space, jacobian, v)
        return self._solved(space, jacobian, v, precondition, x0)

    def _solved(
        self, space: Space, jacobian: Operator, v: State, precondition: Operator | None, x0: State | None
    ) -> State:
        with space.backend.solving():
            result = self.linear_solver.run(
                space, lambda w: space.sub(w, jacobian(w)), v, x0=x0, precondition=precondition
            )
            # Decisions 24 and 53.
            return settled(
                space,
                result.x,
                result.status,
                result.residual,
                self.on_failure,
                "the linear solve of Implicit did not converge",
                f"Raise max_steps or rtol of {self.linear_solver!r}, try another linear solver, or use Neumann or "
                "Unroll, which need none",
            )

    def inverse_error(self, contraction: float, eps: float = 0.0, rounding: float = 0.0) -> float:
        """η (1 + L_h) / (1 - L_h), if a sample with a relative residual of its linear solve above η raises.

        η is what the solver accepts, and what rounding hides from it. NaN for another ``on_failure``.
        """
        # Decision 85. The error is A⁻¹ r, ‖b‖ ≤ (1 + L_h) ‖u‖, and the computed residual is wrong by rounding errors
        # of ‖A‖ ‖x‖ + ‖b‖, where ‖x‖ ≤ (1 + η condition) ‖u‖.
        condition = (1 + contraction) / (1 - contraction)
        accepted = self.linear_solver.accepted(contraction, eps)
        hidden = rounding * (2 + accepted * condition)
        return (accepted + hidden) * condition if self.on_failure == "raise" else math.nan


def _constants(backend: Backend, tree: T) -> T:
    """A pytree, its arrays without derivatives."""
    constants: T = backend.map(lambda x: backend.stop_gradient(x) if backend.is_array(x) else x, tree)
    return constants

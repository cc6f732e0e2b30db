"""One step at a time, for a loop of the user's own."""

from typing import Any, Generic, NamedTuple, TypeVar

from . import checks
from .arrays import Array, H, Mask, Numbers, PyTree, Z
from .backend import Backend
from .carry import Carry
from .iteration import Iteration
from .problem import Map, Problem, as_problem
from .progress import Start
from .registry import find_backend, not_compiled
from .solution import Solution, Status
from .solvers import Anderson, Compacting, Solver
from .start import with_start

Tree = TypeVar("Tree")

COMPACTING = (
    "Stepper needs states of fixed shapes, and Compacting takes finished samples out of them: pass the solver that it "
    "contains"
)
WITHOUT_STEPS = (
    "Stepper makes the steps of a solver that has init and step, and the loop of Solver.solve, such as Anderson(); got "
    "{solver!r}, which solves in one call: use implicit_core.solve"
)
OTHER_MEMORY = (
    "the state's memory is not the one that {solver!r} has: it is from another solver, other settings or other shapes; "
    "begin with this one, stepper.init(state.value, z)"
)


class StepperMemory(NamedTuple):
    """What the next step needs: what the loop carries, and what its start found out."""

    carry: Carry
    start: Start | None
    units: Numbers | None
    unread: Mask | None


class StepperState(NamedTuple, Generic[H]):
    """A point of a loop of the user's own, and what is known of it; a pytree of arrays and integers.

    Attributes
    ----------
    value
        The current point h, shaped as h0: the one that F was evaluated at last. It is there to be read: to go on from
        another point, begin again there.
    residual
        ‖F(h) - h‖₂ there, of the batch's shape.
    status
        A :class:`Status` for each sample at this point, integers of the batch's shape: MAX_STEPS while it goes on.
    finished
        The samples that take no more steps, booleans of the batch's shape. With ``freeze=True`` they keep their points.
    steps
        Evaluations of F until each sample was finished, integers of the batch's shape.
    memory
        The solver's memory and the rest of the loop, for the next step.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> state = ic.Stepper(lambda h, z: 0.5 * h + z).init(np.zeros(2), np.ones(2))
    >>> state.value, state.residual.round(3), bool(state.finished), int(state.steps)
    (array([0., 0.]), np.float64(1.414), False, 1)
    """

    value: H
    residual: Array
    status: Array
    finished: Array
    steps: Array
    memory: Any

    def __repr__(self) -> str:
        return f"<StepperState: value {self.value!r}, residual {self.residual!r}, status {self.status!r}>"

    @property
    def converged(self) -> Array:
        """Whether each sample converged, booleans of the batch's shape."""
        return self.status == Status.CONVERGED.value


class Stepper(Generic[H, Z]):
    """A solver's steps one by one, for a loop of your own: to log, to stop on another test, to go on later.

    ``init`` evaluates F at the start, and each ``step`` moves and evaluates F once. After n evaluations the points,
    residuals and counts are those of :func:`solve` with ``max_steps=n``. The ``max_steps`` and ``check_every`` of the
    solver play no part, nor does its ``check`` for coupled samples: nothing is read from the device after the start.

    States are constants, without derivatives, and a step changes no earlier state. In JAX a stepper's methods can be
    compiled, and a state carried through ``lax.while_loop`` and ``lax.scan``. Where arrays can be written to, a step
    copies the solver's memory first, some states (2m for Anderson).

    Parameters
    ----------
    problem
        A :class:`Problem`, or F itself, ``f(h, z)``.
    solver
        A :class:`Solver`. Not :class:`Compacting`, and no callable.
    batch_ndim
        How many first axes of every leaf of h index independent samples; for a plain F only (default 0).
    scale
        The units of the unknown, see :class:`Problem`; for a plain F only.

    Raises
    ------
    TypeError, ValueError
        If an argument, or what F returns, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> stepper = ic.Stepper(lambda h, z: np.cos(h) + z, solver=ic.Anderson(rtol=1e-9))
    >>> z = np.array(0.0)
    >>> state = stepper.init(np.array(1.0), z)
    >>> while not state.finished:
    ...     state = stepper.step(state, z)
    >>> round(float(state.value), 6), int(state.steps), bool(state.converged)
    (0.739085, 6, True)
    """

    def __init__(
        self,
        problem: Problem[H, Z] | Map[H, Z],
        *,
        solver: Solver = Anderson(),
        batch_ndim: int | None = None,
        scale: PyTree = None,
    ) -> None:
        _require_steps(solver)
        self.problem, self.solver = as_problem(problem, batch_ndim, scale), solver

    def __repr__(self) -> str:
        return f"Stepper({self.problem!r}, solver={self.solver!r})"

    @not_compiled
    def init(self, h0: H, z: Z) -> StepperState[H]:
        """The state at h0, after one evaluation of F.

        Parameters
        ----------
        h0
            Where to start: an array or a pytree of real floating arrays, (batch..., state...). As for :func:`solve`,
            leaves may be Python numbers or arrays of NumPy.
        z
            Inputs and parameters, handed to F as they are.

        Returns
        -------
        StepperState
            The state at h0. Where h0 solves the equation, its samples are finished.

        Raises
        ------
        TypeError, ValueError
            If h0, or what F returns, has a wrong type, structure, shape, dtype or device; if F writes to h.
        """
        checks.no_masks("z", z)

        def begin(h0: H) -> StepperState[H]:
            backend = find_backend(h0)
            with backend.on_device_of(h0), backend.solving():
                iteration = Iteration(self.problem, h0, z, self.solver, stepwise=True)
                return _state(iteration, iteration.first())

        return with_start(begin, self.problem, h0, z)

    @not_compiled
    def step(self, state: StepperState[H], z: Z) -> StepperState[H]:
        """The state after one step of the samples that are not finished.

        Parameters
        ----------
        state
            From :meth:`init` or :meth:`step`.
        z
            As for :meth:`init`. It may be another one: the step uses what F was at the last z, and residual, status
            and ``finished`` are those at the new one. But the solver's memory, and the first residual that a status
            compares with, are of earlier z, so that a sample whose residual does not fall ends as STAGNATED. If z goes
            on changing, use ``rtol=0, atol=0``, which takes a step of every sample that is finite; for another problem
            begin again, ``init(state.value, z)``.

        Returns
        -------
        StepperState
            The next state. Samples that are finished keep their value.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is no state, or another solver's, or what F returns has a wrong type, structure, shape, dtype
            or device.
        """
        checks.no_masks("z", z)
        iteration, carry = self._resumed(state, z)
        space = iteration.space
        backend = space.backend
        with backend.on_device_of(state.value), backend.solving():
            if not backend.immutable:  # Decision 107.
                carry = carry._replace(memory=_copied(backend, carry.memory))
            try:
                return _state(iteration, iteration.advance(carry, iteration.masks(carry)))
            except Exception as error:
                # Only now, since to make a memory takes as long as a step.
                own = self.solver.init(iteration.system, carry.point.x)
                if _shapes(backend, carry.memory) != _shapes(backend, own):
                    raise TypeError(OTHER_MEMORY.format(solver=self.solver)) from error
                raise

    @not_compiled
    def solution(self, state: StepperState[H]) -> Solution[H]:
        """What :func:`solve` returns if its steps run out here: the best point of a solver that keeps one.

        Parameters
        ----------
        state
            From :meth:`init` or :meth:`step`, with the same z all along.

        Returns
        -------
        Solution
            Value, status and stats, as for :func:`solve`. Where both tolerances are zero the value may be one step
            beyond ``state.value``, see :class:`Solver`.

        Raises
        ------
        TypeError
            If ``state`` is no state.
        """
        iteration, carry = self._resumed(state, None)
        backend = iteration.space.backend
        with backend.on_device_of(state.value), backend.solving():
            if not backend.immutable:  # a forced number of steps ends with one more
                carry = carry._replace(memory=_copied(backend, carry.memory))
            return iteration.finish(carry)

    def _resumed(self, state: StepperState[H], z: Any) -> tuple[Iteration, Carry]:
        checks.instance("state", state, StepperState, "stepper.init(h0, z)")
        backend = find_backend(state.value, "state")
        with backend.on_device_of(state.value):
            iteration = Iteration(self.problem, state.value, z, self.solver, stepwise=True)
            carry, *found = state.memory
            iteration.resume(*found)
            iteration.space.shard_as(carry.point.f)
            return iteration, carry


def _require_steps(solver: object) -> None:
    if isinstance(solver, Compacting):
        raise TypeError(COMPACTING)
    if not isinstance(solver, Solver) or type(solver).solve is not Solver.solve:
        raise TypeError(WITHOUT_STEPS.format(solver=solver))


def _state(iteration: Iteration, carry: Carry) -> StepperState[Any]:
    space, point = iteration.space, carry.point
    backend = space.backend
    iteration.refuse_writes(carry)
    # Of the current point, not of the best one.
    status = iteration.outcome(carry._replace(best=None)).status
    public = (
        space.unpack(point.x),
        space.per_sample(iteration.in_units(point.norm)),
        space.per_sample(status),
        space.per_sample(~point.active),
        space.per_sample(carry.steps.array(space)),
    )
    if not backend.immutable:  # they share memory with what the next step needs
        public = _copied(backend, public)
        if not iteration.solver.copies_results:  # F may reuse the memory of its result, or return z
            point = point._replace(f=space.copy(point.f), residual=space.copy(point.residual))
            carry = carry._replace(point=point)
    start = None if iteration.forced else iteration.start
    state = StepperState(*public, StepperMemory(carry, start, iteration.units, iteration.unread))
    if backend.has_autodiff:  # without a graph, a framework may still carry forward-mode tangents
        state = backend.map(lambda x: backend.stop_gradient(x) if backend.is_array(x) else x, state)
    return state


def _shapes(backend: Backend, memory: Any) -> Any:
    leaves, structure = backend.flatten(memory)
    return structure, [backend.is_array(x) and x.shape for x in leaves]


def _copied(backend: Backend, tree: Tree) -> Tree:
    """A pytree whose arrays are in memory of their own."""
    copied: Tree = backend.map(lambda x: backend.xp.asarray(x, copy=True) if backend.is_array(x) else x, tree)
    return copied

"""What a solver is: anything with ``solve``; most are a frozen record of settings and one step of their method."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from .. import checks, settings
from ..arrays import Count, H, Mask, Numbers, Operator, Real, State, Z
from ..carry import Point
from ..iteration import Iteration
from ..problem import Problem
from ..records import Record
from ..solution import Solution
from ..system import System


@runtime_checkable
class FixedPointSolver(Protocol):
    """What the library takes for a solver: whatever has this method (Decision 13).

    A solver with ``runs_user_code = False`` promises that it uses the problem through the core's operations alone. An
    adapter may then add a batch axis, and need not expect that the solver closes over differentiated arrays.
    """

    def solve(self, problem: Problem[H, Z], h0: H, z: Z, *, trace: bool) -> Solution[H]:
        """The fixed point of every sample, with a status for each; ``trace`` asks for every residual.

        Called by :func:`implicit_core.solve`, which turns a plain F into a :class:`Problem`.
        """
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class Solver(Record, ABC):
    """Base of the solvers that are given by a step. The loop, the stop test and the statuses are shared.

    To write one, derive a frozen dataclass with two methods: ``init(system, x) -> memory``, a pytree of arrays of fixed
    shapes (or None), and ``step(system, memory, point) -> (x, memory)``, the next point to evaluate F at. Arithmetic on
    states is in ``system.space``. The caller freezes samples that are finished.

    Settings that are numbers, such as tolerances, ``max_steps`` and ``damping``, may be arrays without axes, which JAX
    may trace or map; then the record is a pytree with these arrays as leaves, and has no hash. An array that is out of
    range and cannot be read becomes NaN. Settings have no derivatives. Tolerances, ``max_steps`` and the ``damping`` of
    :class:`FixedPointIteration` may be one for each sample, in an array that broadcasts to the batch.

    Parameters
    ----------
    rtol, atol
        A sample is finished once ‖F(h) - h‖₂ ≤ atol + rtol ‖F(h)‖₂, and its residual is at most a tenth of the first
        one (for an rtol above 0.01, ten times rtol, at most half). A start within ten tolerances needs the tolerance
        alone, but twice the tolerance at the start is the most. For solvers with the Jacobian a residual
        that rounding errors of F explain is enough, see Decision 121. atol is rtol / 1000 unless
        given, so that a fixed point at zero can be reached and asking for a smaller rtol gives one. An rtol below 8 ε,
        with ε the machine precision of the coarsest leaf, counts as 8 ε. With both zero, as numbers and not as arrays,
        the number of steps is forced: only a value that is not finite ends a sample. A solver that does not keep its
        best point, as :class:`FixedPointIteration`, then makes ``max_steps`` steps with as many evaluations of F, and
        does not evaluate F at its result: status and residual are those of the point before it. It may make none. See
        :func:`~implicit_core.steps`.
    max_steps
        Most evaluations of F: a number, or an array of integers, one for each sample. A
        sample ends earlier, as DIVERGED, if its residual or its state grows far beyond the start, and as STAGNATED if
        the second half of 64, 128, ... evaluations brought no smaller residual. If a traced array, there can be no
        trace of the residuals.
    check_every
        Steps between two tests of whether all samples are finished. Each test waits for the device.
    patience
        A sample ends, as STAGNATED, if its least residual was not halved within so many evaluations; None for no such
        limit.
    freeze
        Whether a finished sample keeps its point, so that no sample's result depends on another's. False: it takes
        steps as long as others do, for the same evaluations, and is more accurate for it.
    stop
        A test of your own that ends samples beside the tolerance, ``stop(h, f) -> mask``: h and F(h), or x and g(x) of
        a root, as F takes and returns them, to booleans of the batch's shape, or to one boolean for the whole batch.
        Such a sample is CONVERGED by your test, at this point. For your test alone, set both tolerances to zero. JAX
        runs a solver with such a test as it is, and compiles it only within ``jax.jit``.
    check
        Whether a solve raises where the residual of a finished sample changed, although its point is kept. It looks
        only where samples freeze and numbers can be read, at no evaluation more.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Halfway(ic.Solver):
    ...     def init(self, system, x):
    ...         return None
    ...
    ...     def step(self, system, memory, point):
    ...         return system.space.axpy(0.5, point.residual, point.x), None
    >>> solution = ic.solve(lambda h, z: -0.9 * h + z, np.zeros(2), np.ones(2), solver=Halfway(rtol=1e-9))
    >>> solution.value.round(6)
    array([0.526316, 0.526316])
    """

    rtol: Real = 1e-5
    atol: Real | None = None
    max_steps: Count = 100
    check_every: int = 1
    patience: int | None = field(default=None, repr=False)
    freeze: bool = field(default=True, repr=False)
    check: bool = field(default=True, repr=False)
    stop: Callable[[Any, Any], Any] | None = field(default=None, repr=False)

    of_samples: ClassVar[frozenset[str]] = frozenset(("rtol", "atol", "max_steps"))

    keeps_best: ClassVar[bool] = True
    """Whether to return the point of least residual if no point meets the tolerance; False: the last one."""
    copies_results: ClassVar[bool] = True
    """Whether the loop copies what F and ``step`` return. F may reuse its output memory, of which a solver may keep a
    part, and a step may be memory that the solver reuses. A solver whose memory holds no part of ``point.f``, and whose
    step is always new arrays or ``point.f`` itself, sets this to False."""
    uses_jacobian: ClassVar[bool] = False
    """Whether ``observe`` needs the Jacobian, which the arrays' framework makes for a problem without callbacks."""
    overshoots: ClassVar[bool] = False
    """Whether a residual far beyond the first one, where others have diverged, may still fall."""
    undoes_steps: ClassVar[bool] = False
    """Whether a solver goes back from points that it does not accept, so that a sample where F is not finite stays
    active, until no step from its best point has been finite for a while."""

    ends_samples: ClassVar[bool] = False
    """Whether samples end by the solver's own test, ``ended``, and need no tolerance."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "rtol", checks.real("rtol", self.rtol, 0.0))
        if self.atol is not None:
            set_field(self, "atol", checks.real("atol", self.atol, 0.0))
        forced = settings.is_zero(self.rtol) and settings.is_zero(self.absolute_tolerance)
        least = 0 if forced and not self.keeps_best else 1
        set_field(self, "max_steps", checks.count("max_steps", self.max_steps, least))
        set_field(self, "check_every", checks.integer("check_every", self.check_every, 1))
        if self.patience is not None:
            set_field(self, "patience", checks.integer("patience", self.patience, 1))
        checks.instance("freeze", self.freeze, bool, "True")
        checks.instance("check", self.check, bool, "False")
        if self.stop is not None:
            checks.function("stop", self.stop)

    @property
    def runs_user_code(self) -> bool:
        """See :class:`FixedPointSolver`."""
        return self.stop is not None

    @property
    def absolute_tolerance(self) -> Real:
        """``atol``, or its default, rtol / 1000 (Decision 4)."""
        return 1e-3 * self.rtol if self.atol is None else self.atol

    def absolute_tolerance_of(self, *, root: bool) -> Real:
        """The same; zero for a root unless given, since any other number would be in the units of somebody else's g."""
        return 0.0 if root and self.atol is None else self.absolute_tolerance

    def solve(self, problem: Problem[H, Z], h0: H, z: Z, *, trace: bool = False) -> Solution[H]:
        """See :class:`FixedPointSolver`."""
        return Iteration(problem, h0, z, self, trace=trace).run()

    def linearizes(self, system: System) -> bool:
        """Whether ``observe`` is given an operator."""
        return self.uses_jacobian

    def start(self, system: System, x: State) -> State:
        """Where the solve starts: at h0, which is x, unless a solver knows better."""
        return x

    @abstractmethod
    def init(self, system: System, x: State) -> Any:
        """The method's memory before the first step, which starts at ``x``."""

    def observe(self, system: System, memory: Any, point: Point, operator: Operator | None) -> Any:
        """The memory after F was evaluated at a point.

        ``operator`` is ``v -> (I - ∂F/∂h) v`` at ``point.x``, where minus the residual has this derivative, if
        ``linearizes`` says so. It can be used here alone. In the last evaluation of such a solver ``point.active``
        holds in no sample, if no step follows.
        """
        return memory

    def accepts(self, system: System, memory: Any, point: Point) -> Mask | None:
        """The samples that go on from a point, (N, 1), which ``step`` finds in ``point.accepted``; None stands for all.

        A loop that can read finds out at no further wait for the device whether these are all samples, or none:
        ``point.accepted`` is True or False then.
        """
        return None

    def ended(self, memory: Any) -> Numbers | None:
        """A :class:`Status` in the samples that the solver itself has ended, (N, 1), and -1 in others.

        Where it is CONVERGED the last point is returned, whatever its residual. None ends no sample.
        """
        return None

    @abstractmethod
    def step(self, system: System, memory: Any, point: Point) -> tuple[State, Any]:
        """The next point, and the memory after it."""

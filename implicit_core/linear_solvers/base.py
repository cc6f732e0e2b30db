"""What a linear solver is: settings, one cycle of its method, and the loop that measures what each cycle achieved."""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from .. import checks, settings
from ..arrays import Count, Index, Mask, Numbers, Operator, Real, State
from ..backend import Known, Watch
from ..coupling import as_mask, halves, random_state
from ..records import Record, is_array
from ..solution import CoupledSamplesError, Status
from ..space import Space

Cycle = tuple[State, int] | tuple[State, int, Numbers] | tuple[State, int, Numbers, Mask]
"""A correction, the number of products with A that it took, and, if the method knows one, a lower bound of ‖A‖₂.

The bound, (N, 1), is how much longer A v is than v, at most, among the v that were multiplied. A method for singular
systems adds where the correction solves its system as well as any can, (N, 1)."""

FLOOR = 16.0
"""Times ε (‖A‖ ‖x‖ + ‖b‖): the residual of an answer that is as good as rounding allows."""

LARGE = 4.0
"""A growth ‖A v‖ / ‖v‖ that is unusual for A = I - J."""

MOVED = 64.0
"""A change of a finished sample's residual that rounding may cause, in units of ε (‖A‖ ‖x‖ + ‖b‖)."""
MOST_LOOKS = 8
"""Where sums have no fixed order, as on a GPU, residuals move by rounding, too."""

COUPLED = (
    "A couples what batch_ndim takes for samples: a product is not zero in a sample in which the vector is. For one "
    "coupled system pass batch_ndim=0; check=False of the linear solver switches this off"
)

RECORDED = (
    "Linear solvers cannot run while a program is recorded (a CUDA graph, torch.export, torch.jit.trace), because they "
    "stop on a data-dependent test. Use Neumann, Unroll or OneStep instead of Implicit or NeumannSeries, and a solver "
    "other than NewtonKrylov"
)


class LinearResult(NamedTuple):
    """The solution of A x = b.

    Attributes
    ----------
    x, r
        The solution and its residual b - A x.
    status, residual, relative, error, steps
        For each sample, (N, 1): its :class:`Status`, ‖b - A x‖₂, the same divided by ‖b‖₂, the error of its stop test,
        and the products with A until it was finished. See :func:`relative`.
    products
        Products with A, each for the whole batch.
    """

    x: State
    r: State
    status: Numbers
    residual: Numbers
    relative: Numbers
    error: Numbers
    steps: Numbers
    products: int


class Best(NamedTuple):
    """The iterate of a cycle with the least residual: zero, unless one reduces it by more than a rounding error.

    Attributes
    ----------
    x
        The correction.
    bound
        What :meth:`LinearSolver.bound_of_residual` has to be below.
    """

    x: State
    bound: Numbers

    @classmethod
    def of(cls, solver: "LinearSolver", space: Space, norm: Numbers) -> "Best | None":
        """The best iterate before the first step, where the residual is ``norm``; None if the last one is wanted."""
        return cls(space.zeros(), (1 - space.coarsest_eps) * norm) if solver.keeps_best else None

    def updated(
        self, solver: "LinearSolver", space: Space, x: State, norm: Numbers, growth: Numbers, valid: Mask
    ) -> "Best":
        """The better one of this and ``x``, where that is ``valid``; see :meth:`LinearSolver.bound_of_residual`."""
        bound = solver.bound_of_residual(space, norm, growth, space.norm(x))
        better = valid & (bound < self.bound)
        return Best(space.where(better, x, self.x), space.select(better, bound, self.bound))


class _Carry(NamedTuple):
    x: State
    r: State
    norm: Numbers
    growth: Numbers
    error: Numbers
    active: Mask
    steps: Numbers
    products: int
    moved: Numbers | None


@dataclass(frozen=True, kw_only=True, repr=False)
class LinearSolver(Record, ABC):
    """Base of the matrix-free linear solvers: A x = b for every sample, with A given by its products.

    A method writes one ``cycle``: from a residual r, a correction d with A d ≈ r. The loop does not rely on the
    residual that the method computes along the way: after each cycle it recomputes b - A x, and the next cycle
    starts from there.

    Settings that are numbers may be arrays without axes, as for :class:`Solver`.

    Parameters
    ----------
    rtol, atol
        A sample is finished once ‖b - A x‖₂ ≤ atol + rtol ‖b‖₂, or once the residual is at the level of rounding
        errors, 16 ε (‖A‖₂ ‖x‖₂ + ‖b‖₂), below which products with A need not be right. The largest ‖A v‖₂ / ‖v‖₂ of
        the solve stands for ‖A‖₂. A residual above ‖b‖₂ / 1000 is never accepted for its size alone, unless ε is so
        coarse that 8 ε ‖b‖₂ is larger. ε is the machine precision of the coarsest leaf.
    max_steps
        No cycle starts after this many products with A.
    check_every
        Steps of a method between two checks whether all samples are finished. Each check waits for the device.
    check
        Whether a solve raises if A couples samples. It looks where numbers are read anyway, at one product more only if
        something is odd: the residual of a finished sample changed, say. In a traced program such a sample ends as
        STAGNATED instead.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type or is out of range.

    Examples
    --------
    >>> import implicit_core as ic
    >>> isinstance(ic.GMRES(restart=10, rtol=1e-3), ic.LinearSolver)
    True
    """

    rtol: Real = 1e-6
    atol: Real = 0.0
    max_steps: Count = 200
    check_every: int = 1
    check: bool = field(default=True, repr=False)

    monotone: ClassVar[bool] = True
    """Whether a cycle that does not reduce a sample's residual is undone and ends that sample."""
    undoes: ClassVar[bool] = True
    """Whether a cycle that is not accepted is undone. Otherwise a number that is not finite stays in the result."""
    uses_transpose: ClassVar[bool] = False
    """Whether the method needs products with Aᵀ."""
    loops: ClassVar[bool] = True
    """Whether a cycle has a loop of its own. Otherwise it is a single step."""
    recomputes: ClassVar[bool] = True
    """Whether the residual after a cycle is computed as b - A x. Otherwise it is r - A d, which rounding errors of x do
    not reach."""
    keeps_best: ClassVar[bool] = False
    """Whether a cycle makes ``max_steps`` products at most, which may be none, and returns the iterate with the least
    residual, by :meth:`bound_of_residual`: zero where none reduces it. Otherwise it returns the last one. See
    :meth:`within`."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "rtol", checks.real("rtol", self.rtol, 0.0))
        set_field(self, "atol", checks.real("atol", self.atol, 0.0))
        set_field(self, "max_steps", checks.count("max_steps", self.max_steps, 1))
        set_field(self, "check_every", checks.integer("check_every", self.check_every, 1))
        checks.instance("check", self.check, bool, "False")

    @abstractmethod
    def cycle(self, space: Space, operator: Operator, r: State, norm: Numbers, target: Numbers, active: Mask) -> Cycle:
        """A correction d with A d ≈ r in the active samples.

        ``norm`` is ‖r‖₂, and ``target`` the residual to stop at. Without a lower bound of ‖A‖ in the result, the loop
        finds one from d alone, ‖A d‖ / ‖d‖. It is a poor one after a cycle that reduces the residual by much.
        """

    def preconditioned_cycle(
        self,
        space: Space,
        operator: Operator,
        precondition: Operator,
        r: State,
        norm: Numbers,
        target: Numbers,
        active: Mask,
    ) -> Cycle:
        """:meth:`cycle` with M⁻¹, an approximate inverse of A.

        Here M⁻¹ stands to the right of A: with A M⁻¹ y ≈ r the correction is M⁻¹ y, and the residuals that the method
        sees are those of A. A method whose A has to be symmetric overrides this.
        """
        y, used, *_ = self.cycle(space, lambda y: operator(precondition(y)), r, norm, target, active)
        return precondition(y), used

    # The stop test: a sample is finished once its error is at most the goal. A method may have a test of its own.

    def error(self, space: Space, x: State, r: State, norm: Numbers, before: Numbers, products: int) -> Numbers:
        """The error of x.

        Here it is ``norm``, the norm of the residual r. ``before`` is the norm before the last cycle, and ``products``
        the number of products so far.
        """
        return norm

    def goal(self, space: Space, x: State, growth: Numbers, size: Numbers, target: Numbers) -> Numbers | float:
        """The largest error that is accepted.

        ``growth`` is a lower bound of ‖A‖₂, ``size`` is ‖b‖₂ and ``target`` is atol + rtol ‖b‖₂.
        """
        # Decision 23.
        xp, eps = space.xp, space.coarsest_eps
        rounding = FLOOR * eps * (growth * space.norm(x) + size)
        goal: Numbers = xp.maximum(target, xp.minimum(rounding, largest_relative(eps) * size))
        return goal

    def accepted(self, contraction: float, eps: float) -> float:
        """The largest residual that :meth:`goal` accepts for A = I - J, with a bound of ‖J‖₂ below one.

        It is relative to (1 + ‖J‖) ‖u‖ with u = A⁻¹ b, which is at least ‖b‖. ``eps`` is the machine precision of the
        coarsest leaf. NaN with an ``atol``, relative to which nothing is known.
        """
        if self.atol:
            return math.nan
        # As in `goal`, with ‖A‖ ≤ 1 + ‖J‖, and ‖x - u‖ ≤ ‖r‖ / (1 - ‖J‖) where ‖r‖ is at most the cap.
        rounding = FLOOR * eps * (2 + largest_relative(eps) * (1 + contraction) / (1 - contraction))
        return max(self.rtol, min(rounding, largest_relative(eps)))

    def bound_of_residual(self, space: Space, norm: Numbers, growth: Numbers, length: Numbers) -> Numbers:
        """How large ‖b - A x‖₂ may be, for an x of length ``length`` whose residual is ``norm`` by a recurrence.

        The two differ by rounding errors of the products, in proportion to ‖x‖₂ and to ‖A‖₂, here the larger one of
        ``growth`` and one, since A = I - J. Where A is close to singular, x grows without limit as the recurrence
        falls.
        """
        # A product is rounded to the user's precision once, at random, and to that of states many times. F may be less
        # precise than h, as under autocast: 8 ε is the smallest tolerance that can be reached.
        eps = settings.at_least(space, self.rtol / 8, space.coarsest_eps)
        size = space.xp.maximum(growth, space.xp.ones_like(growth)) * length
        bound: Numbers = space.xp.hypot(norm, eps / 2 * size) + FLOOR * space.eps * size
        return bound

    def run(
        self,
        space: Space,
        operator: Operator,
        b: State,
        *,
        x0: State | None = None,
        rtol: Numbers | Real | None = None,
        precondition: Operator | None = None,
    ) -> LinearResult:
        """Solve A x = b.

        Parameters
        ----------
        space
            The space of states.
        operator
            Products with A.
        b
            The right-hand side, a state.
        x0
            A state to start from, for one product more; None for zero. Samples in which its residual is not below ‖b‖
            start from zero. Tolerances refer to ‖b‖ all the same.
        rtol
            A relative tolerance instead of the solver's: a number, or one for each sample, (N, 1).
        precondition
            Products with M⁻¹, an approximate inverse of A: a fixed linear map. It changes how many products with A a
            solve takes, and not what stops it, the residual b - A x.

        Raises
        ------
        CoupledSamplesError
            If A couples samples, where that can be seen for nothing.
        """
        if space.backend.capturing(b[0]):
            raise NotImplementedError(RECORDED)
        solver = settings.bound(self, space, constant=True)
        b = settings.with_settings(space, solver, b)
        rtol = solver.rtol if rtol is None else rtol
        return solver._run(space, operator, b, x0, rtol, precondition)

    def within(self, products: Count) -> Self:
        """The solver whose cycle makes so many products at most, and returns its best iterate."""
        limited = copy.copy(self)
        vars(limited).update(max_steps=products, keeps_best=True)  # without a check: none may be left
        return limited

    def one_cycle(self, space: Space, operator: Operator, b: State, *, rtol: Numbers) -> State:
        """An approximate solution of A x = b by one cycle of the method, whose residual is not computed.

        That is one product less than :meth:`run`, for those who find out in another way how good x is. It is zero where
        it is not finite. Without a loop in a cycle it is the solution of :meth:`run`.

        Parameters
        ----------
        space, operator, b, rtol
            As for :meth:`run`, ``rtol`` for each sample, (N, 1).
        """
        if not self.loops:
            x = self.run(space, operator, b, rtol=rtol).x
            return space.where(space.largest(x) < float("inf"), x, space.zeros())
        if space.backend.capturing(b[0]):
            raise NotImplementedError(RECORDED)
        solver = settings.bound(self, space, constant=True)
        b, scale, size, target = solver.in_range(space, settings.with_settings(space, solver, b), rtol)
        x, *_ = solver.cycle(space, operator, b, size, target, size > target)
        return space.where(space.norm(x) < float("inf"), space.scale(scale, x), space.zeros())

    def in_range(self, space: Space, b: State, rtol: Numbers | Real) -> tuple[State, Numbers, Numbers, Numbers]:
        """The right-hand side in units in which its square is a number, these units, its norm, and the target."""
        space.shard_as(b)
        # A cotangent of 1e-25 is not zero in float32, nor is one of 1e-7 in float16. With a unit for each sample a
        # system of coupled samples is another one, whose residuals show nothing: only samples that need one get it.
        scale = space.magnitude(b)
        if not space.rounds:
            scale = space.select(space.out_of_range(scale), scale, space.xp.ones_like(scale))
        b = space.divide(b, scale)
        size = space.norm(b)
        return b, scale, size, rtol * size + space.scalar(settings.absolute(space, self.atol)) / scale

    def _run(
        self,
        space: Space,
        operator: Operator,
        b: State,
        x0: State | None,
        rtol: Numbers | Real,
        precondition: Operator | None,
    ) -> LinearResult:
        """:meth:`run`, with settings to compute with."""
        xp, backend = space.xp, space.backend
        b, scale, size, target = self.in_range(space, b, rtol)
        nothing, zeros = space.full(0.0), space.zeros()
        x, r, norm, used, active = zeros, b, size, 0, size > target
        if x0 is not None:
            x, r, norm = start(space, operator, b, size, space.divide(x0, scale))
            used = 1
            active = (norm > target) & (used < self.max_steps)
        checked = self.check and space.samples > 1
        # b may be a constant of a program that is traced, or be mapped while new arrays are not.
        watched = checked and backend.readable(nothing) and backend.readable(size)

        def body(c: _Carry, masks: tuple[Known, ...]) -> _Carry:
            known: list[Any]
            if precondition is None:
                d, used, *known = self.cycle(space, operator, c.r, c.norm, target / 2, c.active)
            else:
                d, used, *known = self.preconditioned_cycle(
                    space, operator, precondition, c.r, c.norm, target / 2, c.active
                )
            some_finished = masks[0] is not True
            if checked and some_finished:
                d = space.where(c.active, d, zeros)
            x = space.add(c.x, d)
            # Decision 22.
            r = space.sub(b, operator(x)) if self.recomputes else space.sub(c.r, operator(d))
            norm = space.norm(r)
            growth = c.growth
            if self.recomputes and self.measures(c.products):  # Decision 74.
                seen = known[0] if known else measured_growth(space, d, space.sub(c.r, r), x)
                larger = (seen > growth) & (seen < float("inf"))
                growth = space.select(c.active & larger, seen, growth)
            # Comparisons with NaN are false, so a cycle that failed is undone.
            accept = c.active & ((norm < c.norm) if self.monotone else xp.isfinite(norm))
            moved = c.moved
            if watched and self.monotone:
                moved = space.select(accept, nothing, norm - c.norm)
            elif checked and some_finished:
                moved = space.select(c.active, nothing, norm - c.norm)
            kept = accept if self.undoes else c.active
            x, r = space.where(kept, x, c.x), space.where(kept, r, c.r)
            norm = space.select(kept, norm, c.norm)
            products = c.products + used + 1
            error = self.error(space, x, r, norm, c.norm, products)
            if len(known) > 1:  # which a correction of zero does, too, and is not accepted
                error = space.select(known[1] & (accept | (space.largest(d) == 0)), nothing, error)
            error = space.select(c.active, error, c.error)
            steps = space.select(c.active, space.full(products, xp.int32), c.steps)
            active = accept & (error > self.goal(space, x, growth, size, target)) & (products < self.max_steps)
            return _Carry(x, r, norm, growth, error, active, steps, products, moved)

        # Without a step this is the error to report. Otherwise the first step replaces it.
        error = norm
        if settings.is_zero(self.max_steps) or is_array(self.max_steps):
            without = self.error(space, x, r, norm, norm, used)
            error = space.select(self.max_steps == 0, without, norm)
        moved = nothing if checked and not watched else None
        carry = _Carry(x, r, norm, nothing, error, active, space.full(used, xp.int32), used, moved)
        check_every = 1 if self.loops else self.check_every
        watcher = _Watcher(self, space, operator, target)
        watch = Watch(watcher.suspects, watcher.look) if watched else None
        # One more step is none, since no sample is active then, but a look at the last one.
        steps = settings.if_positive(space, self.max_steps, self.max_steps + int(check_every == 1))
        carry = backend.while_loop(lambda c: (c.active,), body, carry, steps, check_every, watch)
        ran_out = carry.steps >= self.max_steps
        converged = carry.error <= self.goal(space, carry.x, carry.growth, size, target)
        if carry.moved is not None and not watched:  # nothing can be raised: no answer, if it is not a rounding error
            rounding = MOVED * space.coarsest_eps * (carry.growth * space.norm(carry.x) + size)
            converged = converged & ~(carry.moved > rounding)
        status = space.select(ran_out, Status.MAX_STEPS.value, space.full(Status.STAGNATED, xp.int32))
        status = space.select(converged, Status.CONVERGED.value, status)
        status = space.select(~xp.isfinite(size), Status.NONFINITE.value, status)
        x, r = space.scale(scale, carry.x), space.scale(scale, carry.r)
        if self.undoes:  # an answer that leaves the range of the user's dtype is none
            status = space.select(converged & out_of_range(space, x), Status.NONFINITE.value, status)
        return LinearResult(
            x,
            r,
            status,
            scale * carry.norm,
            space.blanked(relative(space, carry.norm, size), status == Status.NONFINITE.value),
            carry.error,
            carry.steps,
            carry.products + watcher.products,
        )

    def measures(self, products: Index) -> bool:
        """Whether a cycle after so many products measures ‖A‖: of single steps the first, second, fourth and so on."""
        # Later ones move along the slow directions, where A is small.
        return self.loops or not isinstance(products, int) or products & (products + 1) == 0


class PreconditionedSolver(LinearSolver):
    """Base of the methods that are written with a preconditioner, and without one if it is None."""

    def cycle(self, space: Space, operator: Operator, r: State, norm: Numbers, target: Numbers, active: Mask) -> Cycle:
        return self.preconditioned_cycle(space, operator, None, r, norm, target, active)

    @abstractmethod
    def preconditioned_cycle(
        self,
        space: Space,
        operator: Operator,
        precondition: Operator | None,
        r: State,
        norm: Numbers,
        target: Numbers,
        active: Mask,
    ) -> Cycle:
        """See :class:`LinearSolver`."""


class _Watcher:
    """Looks whether A couples samples, where something makes one suspect it.

    A residual of its own does not change while x is kept. One that did, or whose last cycle was undone, is suspect. So
    is an answer that is accepted for rounding errors of a large A: the growth of a sample may be that of another.

    Attributes
    ----------
    products
        Products with A that were made.
    """

    # Decision 89.

    def __init__(self, solver: LinearSolver, space: Space, operator: Operator, target: Numbers) -> None:
        self.solver, self.space, self.operator, self.target = solver, space, operator, target
        self.products = 0

    def suspects(self, carry: _Carry) -> Mask | None:
        """The samples to look at, (N, 1), if any may be."""
        moved = None if carry.moved is None else carry.moved > 0
        if not self.solver.recomputes or not carry.products:
            return moved
        if self.solver.loops:
            large = (carry.growth > LARGE) & (carry.error > self.target)
        elif self.solver.measures(carry.products - 1):
            large = carry.growth > LARGE
        else:
            return moved
        return large if moved is None else large | moved

    def look(self, carry: _Carry) -> None:
        """Raise if the product of a vector that is zero in the suspects is not, there."""
        suspects = self.suspects(carry)
        if suspects is None or self.products == MOST_LOOKS:
            return
        space, xp = self.space, self.space.xp
        # All samples at once would not show anything.
        others = xp.where(xp.all(suspects), as_mask(space, halves(space.samples)), ~suspects)
        image = self.operator(space.where(others, random_state(space, 0), space.zeros()))
        self.products += 1
        if bool(xp.any(~others & (space.largest(image) > 0))):
            raise CoupledSamplesError(COUPLED)


def start(space: Space, operator: Operator, b: State, size: Numbers, x0: State) -> tuple[State, State, Numbers]:
    """x0, its residual and the norm of it, where it is below ‖b‖; else zero, b and ‖b‖."""
    r = space.sub(b, operator(x0))
    norm = space.norm(r)
    usable = norm < size  # false for NaN
    return space.where(usable, x0, space.zeros()), space.where(usable, r, b), space.select(usable, norm, size)


def out_of_range(space: Space, x: State) -> Mask:
    """Where a state leaves the range of the user's dtypes."""
    outside: Mask = ~space.xp.isfinite(space.largest(space.round(x)))
    return outside


def measured_growth(space: Space, d: State, product: State, x: State) -> Numbers:
    """‖A d‖ / ‖d‖, where ``product`` is A d, the difference of two residuals, and ``x`` the solution with d in it."""
    # A residual has an error of ε ‖A‖ ‖x‖, which must not be taken for the product of a tiny d.
    length = space.xp.maximum(space.norm(d), space.coarsest_eps**0.5 * space.norm(x))
    return space.norm(product) / positive(length, space)


def positive(length: Numbers, space: Space) -> Numbers:
    """A length to divide by: at least the smallest normal number."""
    smallest = float(space.backend.finfo(space.dtype).smallest_normal)
    positive: Numbers = space.xp.maximum(length, space.xp.full_like(length, smallest))
    return positive


def largest_relative(eps: float) -> float:
    """The largest relative residual that is accepted for its size alone."""
    return max(1e-3, 8 * eps)


def ratio(numerator: Numbers, denominator: Numbers, space: Space) -> Numbers:
    """``numerator / denominator``, zero where the denominator is zero."""
    xp, zero = space.xp, denominator == 0
    quotient = numerator / space.select(zero, xp.ones_like(denominator), denominator)
    return space.select(zero, denominator, quotient)


def relative(space: Space, norm: Numbers, size: Numbers) -> Numbers:
    """The residual ‖b - A x‖ relative to ‖b‖: zero where both are zero, NaN where one is not finite."""
    finite = (norm < math.inf) & (size < math.inf)
    quotient: Numbers = space.blanked(ratio(norm, space.select(finite, size, space.xp.ones_like(size)), space), ~finite)
    return quotient

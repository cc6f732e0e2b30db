"""One unknown for each sample, between two points where g has different signs: what bracketing solvers share."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, SupportsFloat

from array_api_compat import to_device

from .. import checks
from ..arrays import Array, Index, Mask, Numbers, Operator, Real, State
from ..backend import Known
from ..carry import GOING_ON, Point
from ..progress import both
from ..records import is_array
from ..registry import find_backend
from ..solution import Status
from ..space import Space
from ..system import System
from .base import Solver

SLACK = 10
"""How many evaluations later than in bisection a bracket may have any width."""
MANY, FALLEN = 1024, 0.25
"""A sign change between neighbouring floats is a root if |g| at both, together, fell to this fraction since there were
so many floats between them, or 1/√ε in half precision. At a jump it does not fall, and at a pole it grows."""

ONE_UNKNOWN = (
    "{solver} finds one unknown for each sample, but each sample of {x0}, of shape {shape}, has {n}: for independent "
    "scalar equations pass batch_ndim={x0}.ndim, so that each number is a sample; for a system take another solver, "
    "such as Broyden()"
)
NOT_LIKE = "{name} of {solver} must be a number, or an array that broadcasts to {x0} of shape {shape}; got {came}"
NO_NUMBERS = "{name} must be a number, or an array that broadcasts to x0; got {came!r} of type {kind}"


class Memory(NamedTuple):
    """A bracket and what is known of it, numbers (N, 1). From the third evaluation on, signs differ at its ends.

    Attributes
    ----------
    start, at_start
        The first point, and the residual there.
    b, c, at_b, at_c
        The ends, and the residuals there. The one at b is no larger.
    a, at_a
        Another point where the residual is known: the one before b, or c.
    middle
        The float in the middle. It is one of the ends if there is none between them.
    move, before
        The last move of b, and the one before.
    limit
        The width that the bracket may have after the next evaluation.
    size
        The sum of both residuals when there last were many floats between the ends.
    status
        A :class:`Status` where the solver ended a sample, else ``GOING_ON``.
    """

    start: Numbers
    at_start: Numbers
    b: Numbers
    c: Numbers
    at_b: Numbers
    at_c: Numbers
    a: Numbers
    at_a: Numbers
    middle: Numbers
    move: Numbers
    before: Numbers
    limit: Numbers
    size: Numbers
    status: Numbers


@dataclass(frozen=True, repr=False)
class Bracketing(Solver):
    """Base of the solvers that shrink a bracket. The first evaluations are at x0, ``lower`` and ``upper``.

    An x0 that lies outside is replaced by the middle.
    """

    lower: Array
    upper: Array
    rtol: Real = field(default=1e-6, kw_only=True)

    undoes_steps: ClassVar[bool] = True
    """Also an infinite g has a sign."""
    overshoots: ClassVar[bool] = True
    ends_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lower", "upper"):
            end = getattr(self, name)
            if not (isinstance(end, SupportsFloat) or is_array(end)):
                raise TypeError(NO_NUMBERS.format(name=name, came=end, kind=type(end).__name__))
            object.__setattr__(self, name, checks.real(name, end, float("-inf"), low_open=True))

    @abstractmethod
    def proposed(self, space: Space, memory: Memory) -> Numbers | None:
        """The next move of b. It is not made if it leaves the bracket, or a wider one than the limit; None bisects."""

    def init(self, system: System, x: State) -> Memory:
        space = system.space
        nothing = space.full(0.0)
        # A part's memory is taken from that of all samples.
        b, c = (nothing, nothing) if system.parted else self.ends(space)
        status = space.full(GOING_ON, space.xp.int32)
        return Memory(_number(x), nothing, b, c, *9 * (nothing,), status)

    def start(self, system: System, x: State) -> State:
        """x0 where it lies within the bracket, else the middle: a point outside says nothing of the root within."""
        space, (b, c) = system.space, self.ends(system.space)
        number, xp = _number(x), space.xp
        within = (number >= xp.minimum(b, c)) & (number <= xp.maximum(b, c))
        return space.round(_state(space.select(within, number, 0.5 * b + 0.5 * c), x))

    def observe(self, system: System, memory: Memory, point: Point, operator: Operator | None) -> Memory:
        space, i = system.space, point.index
        x, f = _number(point.x), _number(point.residual)
        m = _begun(space, memory, x, f, i)
        # x0 is the first point within, if it is there.
        at_upper, is_open = i == 2, i >= 2
        m = _shrunk(space, m, space.select(at_upper, m.start, x), space.select(at_upper, m.at_start, f), is_open)
        middle = space.round(_state(0.5 * m.b + 0.5 * m.c, point.x))
        m = m._replace(middle=_number(middle), limit=0.5 * m.limit)
        m = _judged(space, m, x, f, is_open)
        going_on = point.active & (memory.status == GOING_ON)
        return _select(space, going_on, m, memory)

    def ended(self, memory: Memory) -> Numbers:
        return memory.status

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, i, m = system.space, point.index, memory
        xp, select = space.xp, space.select
        x, half = m.middle, m.middle - m.b
        move, before = half, half
        d = self.proposed(space, m)
        if d is not None:
            least = spacing(space, xp.abs(m.b))  # a shorter move may be none
            moved = m.b + select(xp.abs(d) > least, d, select(half < 0, -least, least))
            moved = _number(space.round(_state(moved, point.x)))
            width = xp.maximum(xp.abs(moved - m.b), xp.abs(m.c - moved))
            taken = _is_within(space, m, moved) & (width <= m.limit)
            x, move, before = select(taken, moved, x), select(taken, d, half), select(taken, m.move, half)
        x = select(_are_neighbours(m), m.b, x)
        x = select(i == 0, m.b, select(i == 1, m.c, x))
        return _state(x, point.x), m._replace(move=move, before=before)

    def ends(self, space: Space) -> tuple[Numbers, Numbers]:
        """``lower`` and ``upper`` in the units of states.

        Raises
        ------
        TypeError, ValueError
            If one does not broadcast to the unknown, or a sample has more than one number.
        """
        return self._end(space, "lower"), self._end(space, "upper")

    def _end(self, space: Space, name: str) -> Numbers:
        backend = space.backend
        leaves, structure = backend.flatten(space.like)
        solver, x0 = type(self).__name__, space.name
        if space.dimension != 1:
            shapes = [tuple(leaf.shape) for leaf in leaves]
            shape = shapes[0] if len(shapes) == 1 else shapes
            raise ValueError(ONE_UNKNOWN.format(solver=solver, x0=x0, shape=shape, n=space.dimension))
        place = next(k for k, (_, d) in enumerate(space.flat_shapes) if d)
        like, end = leaves[place], getattr(self, name)
        xp, shape = space.xp, tuple(like.shape)
        came = f"an array of shape {tuple(getattr(end, 'shape', ()))}"
        wrong = NOT_LIKE.format(name=name, solver=solver, x0=x0, shape=shape, came=came)
        if isinstance(end, float):
            end = xp.full(shape, end, dtype=like.dtype, device=space.device)
        elif (of := find_backend(end, name)) is backend:
            end = xp.astype(end, like.dtype)
            end = end if backend.device(end) == space.device else to_device(end, space.device)
        elif of.name == "numpy":
            end = xp.asarray(end, dtype=like.dtype, device=space.device)
        else:
            raise TypeError(f"{wrong} of {of.name}, while {x0} is one of {backend.name}")
        try:
            leaves[place] = xp.broadcast_to(end, shape)
        except (ValueError, RuntimeError, TypeError):
            raise ValueError(wrong) from None
        return _number(space.shard(space.pack(backend.unflatten(structure, leaves))))


def spacing(space: Space, size: Numbers) -> Numbers:
    """At least the distance of neighbouring floats of a size, in the precision of the user's numbers; at most twice."""
    return space.coarsest_eps * size + float(space.backend.finfo(space.dtype).smallest_normal)


def _begun(space: Space, m: Memory, x: Numbers, f: Numbers, i: Index) -> Memory:
    """The bracket after one of the first three evaluations, at x0 and at its ends; unchanged later."""
    xp, select, at_lower, at_upper = space.xp, space.select, i == 1, i == 2
    m = m._replace(
        at_start=select(i == 0, f, m.at_start),
        b=select(at_lower, x, m.b),
        at_b=select(at_lower, f, m.at_b),
        c=select(at_upper, x, m.c),
        at_c=select(at_upper, f, m.at_c),
    )
    if at_upper is False:
        return m
    width, size = xp.abs(m.c - m.b), xp.abs(m.at_b) + xp.abs(m.at_c)
    same_sign: Any = (m.at_b < 0) == (m.at_c < 0)
    status = select(same_sign, Status.UNBRACKETED.value, m.status)
    status = select(xp.isfinite(width), status, space.full(Status.NONFINITE, xp.int32))
    at_ends = m._replace(
        a=m.c, at_a=m.at_c, move=width, before=width, limit=2.0**SLACK * width, size=size, status=status
    )
    return _select(space, at_upper, at_ends, m)


def _shrunk(space: Space, m: Memory, x: Numbers, f: Numbers, when: Known) -> Memory:
    """The bracket with a point within it as the new b, unless the residual at c is smaller: then they change places."""
    xp, select = space.xp, space.select
    opposite, move = (f < 0) != (m.at_c < 0), x - m.b
    moved = m._replace(
        a=m.b,
        at_a=m.at_b,
        b=x,
        at_b=f,
        c=select(opposite, m.c, m.b),
        at_c=select(opposite, m.at_c, m.at_b),
        move=select(opposite, m.move, move),
        before=select(opposite, m.before, move),
    )
    m = _select(space, both(_is_within(space, m, x), when), moved, m)
    larger = both(xp.abs(m.at_c) < xp.abs(m.at_b), when)
    return _select(space, larger, m._replace(a=m.b, at_a=m.at_b, b=m.c, at_b=m.at_c, c=m.b, at_c=m.at_b), m)


def _judged(space: Space, m: Memory, x: Numbers, f: Numbers, is_open: Known) -> Memory:
    """The bracket with a status where x, the last point, ends the solve."""
    xp, size, width = space.xp, space.xp.abs(m.at_b) + space.xp.abs(m.at_c), space.xp.abs(m.c - m.b)
    enough = min(MANY, space.coarsest_eps**-0.5)
    many = width >= enough * spacing(space, xp.maximum(xp.abs(m.b), xp.abs(m.c)))
    m = m._replace(size=space.select(both(many, is_open), size, m.size))
    neighbours = both(_are_neighbours(m) & (m.status == GOING_ON), is_open)
    is_root = (size <= FALLEN * m.size) & (size < float("inf"))
    status = m.status
    for mask, code in (
        (neighbours & ~is_root, Status.STAGNATED),
        (neighbours & is_root & (x == m.b), Status.CONVERGED),
        (f == 0, Status.CONVERGED),
        (f != f, Status.NONFINITE),
    ):
        status = space.select(mask, code.value, status)
    return m._replace(status=status)


def _is_within(space: Space, m: Memory, x: Numbers) -> Mask:
    within: Mask = (space.xp.minimum(m.b, m.c) < x) & (x < space.xp.maximum(m.b, m.c))
    return within


def _are_neighbours(m: Memory) -> Mask:
    return (m.middle == m.b) | (m.middle == m.c)


def _select(space: Space, mask: Known, x: Memory, y: Memory) -> Memory:
    return Memory(*(a if a is b else space.select(mask, a, b) for a, b in zip(x, y, strict=True)))


def _number(x: State) -> Numbers:
    """The one number of each sample."""
    number: Numbers = next(a for a in x if a.shape[-1])
    return number


def _state(number: Numbers, like: State) -> State:
    return State(tuple(number if a.shape[-1] else a for a in like))

"""What a linear solver is: settings, one cycle of its method, and the loop that measures what the cycle did."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks
from ..backend import Array
from ..solution import Status
from ..space import Operator, Space, State

Cycle = tuple[State, Any]
"""A correction, and the products with A spent on it."""


RECORDED = (
    "a linear solver stops by what it finds, which it can't look at while a CUDA graph is captured: take Neumann, "
    "Unroll or OneStep in the place of Implicit, and another solver than NewtonKrylov"
)


class LinearResult(NamedTuple):
    """The solution of A x = b as a state: x, a status for each sample (N, 1), ‖b - A x‖₂, and what it took."""

    x: State
    status: Array
    residual: Array
    steps: Array
    applications: Any


class _Carry(NamedTuple):
    x: State
    r: State
    norm: Array
    active: Array
    steps: Array
    applications: Any


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Base of the matrix-free linear solvers: A x = b for every sample, A given by its products.

    A method writes one ``cycle``: a correction from the residual it starts at. What it says of its own residual is not
    believed: after each cycle b - A x is computed anew, and the next cycle starts from there.

    Parameters
    ----------
    rtol, atol
        A sample is finished once ‖b - A x‖₂ ≤ atol + rtol ‖b‖₂, or once the residual is rounding error of x,
        16 ε (‖x‖₂ + ‖b‖₂), below which products with A need not be right; never with one above ‖b‖₂ / 1000, or 8 ε ‖b‖₂
        where the products are that coarse. ε is that of the coarsest leaf.
    max_steps
        No cycle starts after this many products with A.
    check_every
        Steps of a method between two looks at whether all samples are finished: each look waits for the device.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    Examples
    --------
    >>> import implicit_core as ic
    >>> isinstance(ic.GMRES(restart=10, rtol=1e-3), ic.LinearSolver)
    True
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int = 200
    check_every: int = 1

    monotone: ClassVar[bool] = True
    """Whether a cycle that does not reduce a sample's residual is taken back and ends it."""
    loops: ClassVar[bool] = True
    """Whether a cycle has steps of its own. Otherwise it is one step."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "rtol", checks.real("rtol", self.rtol, 0.0))
        set_field(self, "atol", checks.real("atol", self.atol, 0.0))
        set_field(self, "max_steps", checks.integer("max_steps", self.max_steps, 1))
        set_field(self, "check_every", checks.integer("check_every", self.check_every, 1))

    @abstractmethod
    def cycle(self, space: Space, operator: Operator, r: State, norm: Array, target: Array, active: Array) -> Cycle:
        """A correction d with A d ≈ r in the active samples.

        ``norm`` is ‖r‖₂ and ``target`` the residual to stop at, both (N, 1).
        """

    def run(self, space: Space, operator: Operator, b: State) -> LinearResult:
        """Solve A x = b from x = 0."""
        xp, backend = space.xp, space.backend
        if backend.recorded(b[0]):
            raise NotImplementedError(RECORDED)
        space.spread_as(b)
        scale = space.magnitude(b)  # a cotangent of 1e-25 is not zero in float32
        b = space.divide(b, scale)
        size = space.norm(b)
        target = backend.axpy(self.rtol, size, space.scalar(self.atol) / scale)

        def goal(x: State) -> Array:
            rounding = 16 * space.coarsest_eps * (space.norm(x) + size)
            return xp.maximum(target, xp.minimum(rounding, max(1e-3, 8 * space.coarsest_eps) * size))

        def body(c: _Carry) -> _Carry:
            correction, used = self.cycle(space, operator, c.r, c.norm, target / 2, c.active)
            x = space.add(c.x, correction)
            r = space.sub(b, operator(x))
            norm = space.norm(r)
            # NaN is less than nothing: a cycle that went wrong is taken back.
            accept = c.active & ((norm < c.norm) if self.monotone else xp.isfinite(norm))
            x, r = space.where(accept, x, c.x), space.where(accept, r, c.r)
            norm = xp.where(accept, norm, c.norm)
            applications = c.applications + used + 1
            active = accept & (norm > goal(x)) & (applications < self.max_steps)
            steps = xp.where(c.active, space.full(0, xp.int32) + applications, c.steps)
            return _Carry(x, r, norm, active, steps, applications)

        carry = _Carry(space.zeros(), b, size, size > target, space.full(0, xp.int32), 0)
        check_every = 1 if self.loops else self.check_every
        carry = backend.while_loop(lambda c: xp.any(c.active), body, carry, self.max_steps, check_every)
        finite = xp.isfinite(size)
        status = xp.where(
            carry.steps >= self.max_steps,
            space.full(Status.MAX_STEPS, xp.int32),
            space.full(Status.STAGNATED, xp.int32),
        )
        status = xp.where(carry.norm <= goal(carry.x), space.full(Status.CONVERGED, xp.int32), status)
        status = xp.where(finite, status, space.full(Status.NONFINITE, xp.int32))
        return LinearResult(space.scale(scale, carry.x), status, scale * carry.norm, carry.steps, carry.applications)


def ratio(xp: Any, numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``, zero where the denominator is."""
    zero = denominator == 0
    return xp.where(zero, xp.zeros_like(numerator), numerator / xp.where(zero, xp.ones_like(denominator), denominator))

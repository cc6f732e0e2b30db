"""F as a function of h and of arrays alone, and its derivatives."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import jax

from implicit_core import checks
from implicit_core.arrays import H, Z
from implicit_core.backends.jax import BACKEND, zeros_like
from implicit_core.backends.jax_internals import Tracer
from implicit_core.problem import Map

from .closure import depending_on, hoist
from .leaves import Arrays, Static, Units, replaced
from .programs import KEPT, Program, compiled

CLOSED_OVER = (
    "f closes over arrays that are differentiated, and with jit=False it is not traced, so that they would get no "
    "gradient: pass them in z"
)


@dataclass(frozen=True)
class TracedMap(Generic[H]):
    """F as a program of h and of its inputs: the arrays of z, followed by the arrays that F closes over.

    It refers neither to tracers nor to the user's F, because JAX keeps it with the programs that it traces. Equal ones
    have equal programs.

    Attributes
    ----------
    program
        ``program(h, arrays of z, closed-over arrays)``.
    batch_ndim, units
        As for :class:`Problem`.
    g_units
        The units of g where this is the g of a root.
    """

    program: Program[H]
    batch_ndim: int
    units: Units
    g_units: Units | None = None

    traced = True

    def __call__(self, h: H, inputs: Arrays) -> H:
        """F(h, z)."""
        size = len(inputs) - self.program.constants
        return self.program(h, inputs[:size], inputs[size:])

    @property
    def shared(self) -> bool:
        """See :class:`Program`."""
        return self.program.shared

    @property
    def axes(self) -> tuple[str, ...]:
        """The named axes that F communicates over."""
        return self.program.axes

    @property
    def has_named_axes(self) -> bool:
        """See :class:`Program`."""
        return self.program.has_named_axes

    @property
    def has_custom_vjp(self) -> bool:
        """See :class:`Program`."""
        return self.program.has_custom_vjp

    def linearized(self, h: H, inputs: Arrays, indices: Sequence[int]) -> "Linearized[H]":
        """F and its derivatives with respect to h and to the inputs at ``indices``, for one evaluation of F."""
        make = _kept_linearization if self.shared else _linearization
        made = make(_OfMap(self, h, inputs), tuple(indices))
        value, residuals = made.program(h, list(inputs), made.constants)
        return Linearized(value, residuals, made.pushes)


@dataclass(frozen=True, eq=False)
class EagerMap(Generic[H, Z]):
    """F as it is, which is never traced: its inputs are the arrays of z."""

    f: Map[H, Z]
    static: Static[Z]
    batch_ndim: int
    units: Units
    g_units: Units | None = None

    traced = shared = has_named_axes = has_custom_vjp = False
    axes: tuple[str, ...] = ()

    def __call__(self, h: H, inputs: Arrays) -> H:
        """F(h, z)."""
        result: H = checks.structured(BACKEND, self.f(h, self.static.combine(inputs)), h)
        if _holds_tracers(result) and not _holds_tracers((h, inputs)):
            raise ValueError(CLOSED_OVER)
        return result

    def linearized(self, h: H, inputs: Arrays, indices: Sequence[int]) -> "Linearized[H]":
        """As :meth:`TracedMap.linearized`."""
        return _linearized(self, h, inputs, indices)


def _holds_tracers(tree: object) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


class _Push(NamedTuple):
    """A linear function, and which residuals of a linearization it needs."""

    program: Program[Any]
    indices: Sequence[int]


class Linearized(NamedTuple, Generic[H]):
    """F and its derivatives at one point, as programs.

    Attributes
    ----------
    value
        F(h, z).
    residuals
        The arrays that the derivatives need.
    pushes
        ∂F/∂h, ∂F/∂z, and both at once.
    """

    value: H
    residuals: Arrays
    pushes: Sequence[_Push]

    def of_h(self) -> tuple[Program[H], Arrays]:
        """∂F/∂h, a program that serves every F and every point that have the same one, and its residuals."""
        return self._push(0)

    def push_h(self, dh: H) -> H:
        """(∂F/∂h) dh."""
        return self._pushed(0, dh)

    def push_z(self, tangents: Arrays) -> H:
        """(∂F/∂z) dz."""
        return self._pushed(1, tangents)

    def dependent_push_z(self, tangents: Arrays) -> H:
        """The same, known to depend on the tangents even where it is zero."""
        program, residuals = self._push(1)
        tangent: H = compiled(_dependent_pushforward, program)(tangents, residuals)
        return tangent

    def push(self, dh: H, tangents: Arrays) -> H:
        """The sum of both."""
        return self._pushed(2, (dh, tangents))

    def pull_h(self, v: H, like: H) -> H:
        """(∂F/∂h)ᵀ v, shaped as ``like``, a point."""
        v_h: H = self._pulled(0, v, like)
        return v_h

    def pull_z(self, v: H, like: Arrays) -> Arrays:
        """(∂F/∂z)ᵀ v."""
        v_z: Arrays = self._pulled(1, v, like)
        return v_z

    def pull(self, v: H, like: tuple[H, Arrays]) -> tuple[H, Arrays]:
        """Both."""
        both: tuple[H, Arrays] = self._pulled(2, v, like)
        return both

    def _push(self, which: int) -> tuple[Program[Any], Arrays]:
        program, indices = self.pushes[which]
        return program, [self.residuals[i] for i in indices]

    def _pushed(self, which: int, tangents: Any) -> H:
        program, residuals = self._push(which)
        tangent: H = compiled(_pushforward, program)(tangents, residuals)
        return tangent

    def _pulled(self, which: int, v: H, like: Any) -> Any:
        program, residuals = self._push(which)
        return compiled(_pullback, program)(v, residuals, like)


def _pushforward(program: Program[H]) -> Callable[[Any, Arrays], H]:
    return program.__call__


def _dependent_pushforward(program: Program[H]) -> Callable[[Any, Arrays], H]:
    return lambda tangents, residuals: depending_on(jax.tree.leaves(tangents), program(tangents, residuals))


def _pullback(program: Program[H]) -> Callable[[H, Arrays, Any], Any]:
    return lambda v, residuals, like: jax.linear_transpose(lambda x: program(x, residuals), like)(v)[0]


def _linearized(f: TracedMap[H] | EagerMap[H, Any], h: H, inputs: Arrays, indices: Sequence[int]) -> Linearized[H]:
    varied = [inputs[i] for i in indices]
    value, push = jax.linearize(lambda h, varied: f(h, replaced(inputs, indices, varied)), h, varied)
    push_h, push_z = partial_pushforwards(push, h, varied)
    hoisted = hoist(push_h, h), hoist(push_z, varied), hoist(lambda tangents: push(*tangents), (h, varied))
    # They share residuals, each of which is to be held once.
    residuals = {id(x): x for made in hoisted for x in made.closed_over}
    places = {key: i for i, key in enumerate(residuals)}
    pushes = [_Push(made.program, [places[id(x)] for x in made.closed_over]) for made in hoisted]
    return Linearized(value, list(residuals.values()), pushes)


def partial_pushforwards(
    push: Callable[[H, Arrays], H], h: H, arrays: Arrays
) -> tuple[Callable[[H], H], Callable[[Arrays], H]]:
    """``dh -> push(dh, 0)`` and ``d -> push(0, d)``, without the operations on the zeros (Decision 47).

    Parameters
    ----------
    push
        ``push(dh, d)``, linear.
    h, arrays
        The point of linearization, for the shapes.
    """
    zero_h, zero_arrays = jax.tree.map(zeros_like, (h, arrays))
    # Linearized here and not at the first call, which may be in a loop: its tracers would leak.
    push_h = jax.linearize(lambda dh: push(dh, zero_arrays), zero_h)[1]
    push_arrays = jax.linearize(lambda d: push(zero_h, d), zero_arrays)[1]
    return push_h, push_arrays


# The linearization of a traced F is itself a program, which is traced once.


class _Linearization(NamedTuple):
    """``program(h, inputs, constants)``: the value and the residuals."""

    program: Program[tuple[Any, Arrays]]
    constants: Arrays
    pushes: Sequence[_Push]


class _OfMap:
    """F and a point. F alone is compared, as its program has the types of the point."""

    def __init__(self, f: TracedMap[Any], h: Any, inputs: Arrays) -> None:
        self.f, self.point = f, [(h, inputs)]

    def __hash__(self) -> int:
        return hash(self.f.program)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OfMap) and self.f.program is other.f.program


def _linearization(of: _OfMap, indices: tuple[int, ...]) -> _Linearization:
    h, inputs = of.point.pop()  # what is kept must not refer to arrays
    pushes: list[_Push] = []

    def linearize(h: Any, inputs: Arrays) -> tuple[Any, Arrays]:
        at: Linearized[Any] = _linearized(of.f, h, inputs, indices)
        pushes[:] = at.pushes
        return at.value, at.residuals

    hoisted = hoist(linearize, h, list(inputs))
    return _Linearization(hoisted.program, hoisted.closed_over, pushes)


_kept_linearization = functools.lru_cache(maxsize=KEPT)(_linearization)

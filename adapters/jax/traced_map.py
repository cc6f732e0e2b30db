"""F as a program, and its linearization as programs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import jax

from implicit_core.arrays import H
from implicit_core.problem import Problem

from .batching import MapOfArrays
from .closure import depending_on, hoist
from .leaves import Arrays, Units, replaced
from .problem import partial_pushforwards, problem
from .programs import KEPT, Program


@dataclass(frozen=True)
class TracedMap(Generic[H]):
    """F as a program of h and of its inputs: the arrays of z, followed by the arrays that F closes over.

    It refers neither to tracers nor to the user's F, because JAX keeps it with the programs that it traces. Equal ones
    have equal programs.

    Attributes
    ----------
    program
        ``program(h, arrays of z, closed-over arrays)``.
    batch_ndim
        As for :class:`Problem`.
    units
        The units of h.
    """

    program: Program[H]
    batch_ndim: int
    units: Units

    def __call__(self, h: H, inputs: Arrays) -> H:
        """F(h, z)."""
        size = len(inputs) - len(self.program.jaxpr.constvars)
        return self.program(h, inputs[:size], inputs[size:])

    def problem(self, f: MapOfArrays[H], batch_ndim: int) -> Problem[H, Arrays]:
        """``f``, which is F or F mapped over an axis of the batch, as a problem in its inputs."""
        return problem(f, batch_ndim=batch_ndim, scale=self.units.scale)

    def linearized(self, h: H, inputs: Arrays, indices: Sequence[int]) -> "Linearized[H]":
        """F's derivatives at a point, with respect to h and to the inputs at ``indices``, for one evaluation of F."""
        make = _kept_linear_programs if self.program.shared else _linear_programs
        made = make(_Same(self, h, inputs), tuple(indices))
        residuals = made.residuals(h, inputs, made.constants)
        return Linearized(made, residuals)


class _LinearPrograms(NamedTuple, Generic[H]):
    """The programs of a linearization.

    Attributes
    ----------
    residuals
        ``residuals(h, inputs, constants)``: what the others need of the point.
    constants
        Arrays.
    push_h, push_z
        ∂F/∂h and ∂F/∂z, each with the indices of its residuals.
    """

    residuals: Program[Arrays]
    constants: Arrays
    push_h: tuple[Program[H], Sequence[int]]
    push_z: tuple[Program[H], Sequence[int]]


class Linearized(NamedTuple, Generic[H]):
    """F's derivatives at one point."""

    programs: _LinearPrograms[H]
    residuals: Arrays

    def push_z(self, tangents: Arrays) -> H:
        """(∂F/∂z) dz."""
        program, indices = self.programs.push_z
        tangent: H = program.compiled(_pushed)(tangents, [self.residuals[i] for i in indices])
        return tangent

    def jacobian(self) -> tuple[Program[H], Arrays]:
        """∂F/∂h as a program of its own: what is compiled for it serves every F and every point that have the same."""
        program, indices = self.programs.push_h
        return program, [self.residuals[i] for i in indices]


def _pushed(program: Program[H]) -> Callable[[Arrays, Arrays], H]:
    return lambda tangents, residuals: depending_on(tangents, program(tangents, residuals))


class _Same:
    """F and a point, of which F alone is compared: its program has the types of the point."""

    def __init__(self, f: TracedMap[Any], h: Any, inputs: Arrays) -> None:
        self.f, self.at = f, [(h, inputs)]

    def __hash__(self) -> int:
        return hash(self.f.program)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.f.program is other.f.program


def _linear_programs(same: _Same, indices: tuple[int, ...]) -> _LinearPrograms[Any]:
    f, (h, inputs) = same.f, same.at.pop()  # what is kept must not refer to arrays
    pushes: list[tuple[Program[Any], Sequence[int]]] = []

    def residuals(h: Any, inputs: Arrays) -> Arrays:
        varied = [inputs[i] for i in indices]
        _, push = jax.linearize(lambda h, varied: f(h, replaced(inputs, indices, varied)), h, varied)
        push_h, push_z = partial_pushforwards(push, h, varied)
        of_h, of_z = hoist(push_h, h), hoist(push_z, varied)
        both = [*of_h.closed_over, *of_z.closed_over]
        places = {id(x): i for i, x in reversed(list(enumerate(both)))}
        unique = sorted(set(places.values()))
        for made in (of_h, of_z):
            pushes.append((made.program, [unique.index(places[id(x)]) for x in made.closed_over]))
        return [both[i] for i in unique]

    hoisted = hoist(residuals, h, list(inputs))
    return _LinearPrograms(hoisted.program, hoisted.closed_over, *pushes)


_kept_linear_programs = functools.lru_cache(maxsize=KEPT)(_linear_programs)

"""What F does besides computing: it communicates over named axes, and reads mutable arrays."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from implicit_core.backends.jax_internals import ClosedJaxpr, Jaxpr, Literal, eval_jaxpr, jaxprs_in_params, run_state

from .leaves import replaced

_name_of = operator.attrgetter("name")
WRITES = (
    "f writes to a mutable array that it closes over (jax.new_ref). How often a solve and its derivatives evaluate f "
    "depends on the solver, and so would what is written. Let f return it, with has_aux=True: f is then evaluated once "
    "more, at the result"
)


class _Kinds(NamedTuple):
    """JAX's classes of effects: a named axis, a mutable array made, read and written."""

    axis: frozenset[type]
    local: frozenset[type]
    read: frozenset[type]
    write: frozenset[type]


@functools.cache
def _kinds() -> _Kinds:
    """JAX's classes of effects, from programs that have them: they have no public names."""

    def of(function: Callable[[jax.Array], object]) -> frozenset[type]:
        program = jax.make_jaxpr(function, axis_env=[("axis", 1)])(0.0)
        return frozenset(type(effect) for eqn in program.eqns for effect in eqn.effects)

    local = of(lambda x: jax.ref.freeze(jax.new_ref(x)))
    read = of(lambda x: jax.ref.get(jax.new_ref(x), ())) - local
    written = of(lambda x: jax.ref.swap(jax.new_ref(x), (), x)) | of(lambda x: jax.ref.addupdate(jax.new_ref(x), (), x))
    return _Kinds(of(lambda _: jax.lax.axis_index("axis")), local, read, written - local - read)


def _is_named_axis(effect: object) -> bool:
    return type(effect) in _kinds().axis


def has_named_axes(jaxpr: Jaxpr) -> bool:
    """Whether a program refers to named axes that are bound outside of it."""
    return any(map(_is_named_axis, jaxpr.effects)) or bool(_unrecorded_axes(jaxpr))


def communication_axes(jaxpr: Jaxpr) -> set[str]:
    """The named axes that a program communicates over, without those that it binds itself."""
    return _recorded_axes(jaxpr) | _unrecorded_axes(jaxpr)


def _recorded_axes(jaxpr: Jaxpr) -> set[str]:
    """Those of operations whose effects name them."""
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        names = {str(_name_of(effect)) for effect in eqn.effects if _is_named_axis(effect)}
        inner = list(jaxprs_in_params(eqn.params))
        if names and inner:
            found |= names & set().union(*map(_recorded_axes, inner))
        elif eqn.primitive.name != "axis_index":  # it reads a position and communicates nothing
            found |= names
    return found


def _unrecorded_axes(jaxpr: Jaxpr) -> set[str]:
    """Those of operations without an effect, as ``ppermute`` is (JAX 0.10): a parameter names them."""
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        if inner := list(jaxprs_in_params(eqn.params)):
            found |= set().union(*map(_unrecorded_axes, inner)) - _bound_axes(eqn.params)
        elif not eqn.effects:
            found |= _names(eqn.params.get("axis_name", ()))
    return found


def _bound_axes(params: Mapping[str, Any]) -> set[str]:
    """The named axes that an operation binds for the programs within it, as ``shard_map`` and ``pmap`` do."""
    manual = params.get("newly_manual_axes", params.get("manual_axes", ()))
    return _names(manual) | _names(params.get("axis_name", ()))


def _names(axes: Any) -> set[str]:
    """The names in a parameter, one or several; numbers are positions."""
    several = axes if isinstance(axes, tuple | list | set | frozenset) else (axes,)
    return {axis for axis in several if isinstance(axis, str)}


def without_references(program: ClosedJaxpr, arguments: Sequence[Any]) -> ClosedJaxpr:
    """The same program of arrays alone: mutable arrays that it closes over are read now. Decision 104.

    Parameters
    ----------
    program
        A program, and what it closes over.
    arguments
        Its arguments, for their types.

    Raises
    ------
    ValueError
        If the program writes to a mutable array that it closes over.
    """
    effects = frozenset(map(type, program.effects))
    if not effects or not effects & (_kinds().local | _kinds().read | _kinds().write):
        return program
    if effects & _kinds().write:
        raise ValueError(WRITES)
    indices = [i for i, const in enumerate(program.consts) if isinstance(jax.typeof(const), jax.ref.AbstractRef)]
    contents = [program.consts[i][...] for i in indices]
    return jax.make_jaxpr(lambda *arguments: _evaluated(program, indices, contents, arguments))(*arguments)


def _evaluated(
    program: ClosedJaxpr, indices: Sequence[int], contents: Sequence[jax.Array], arguments: Sequence[jax.Array]
) -> list[Any]:
    """The results of a program with mutable arrays of these contents, in operations on arrays.

    JAX's ``run_state`` is a primitive that neither ``vmap`` nor ``grad`` knows; its evaluation has no mutable arrays.
    """

    def body(state: tuple[list[Any], list[Any]]) -> None:
        references, results = state
        consts = replaced(program.consts, indices, references)
        for result, value in zip(results, eval_jaxpr(program.jaxpr, consts, *arguments), strict=True):
            result[...] = value

    state = list(contents), [jnp.zeros(aval.shape, aval.dtype) for aval in program.out_avals]
    recorded = jax.make_jaxpr(run_state(body))(state)
    (eqn,) = recorded.eqns
    inputs, given = [*recorded.jaxpr.constvars, *recorded.jaxpr.invars], [*recorded.consts, *jax.tree.leaves(state)]
    known = dict(zip(inputs, given, strict=True))
    operands = [x.val if isinstance(x, Literal) else known[x] for x in eqn.invars]
    values = list(eqn.primitive.impl(*operands, **eqn.params))
    return values[len(values) - len(program.out_avals) :]

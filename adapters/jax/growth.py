"""Whether an estimate grows, in programs that JAX differentiates, transposes and compiles (Decision 78).

Two primitives, each the transpose of the other, do what no function of JAX's can: a linear operation that looks at its
argument. ``fork`` is v ↦ (v, v): the second result is a reference. ``compare`` is (w, last, reference) ↦ w: it tests
whether ``last`` outgrew the reference. Transposed, ``compare`` is a fork of the cotangent, whose reference then arrives
at the transposed ``fork``, a comparison. So the test of a pullback is made at the end of the pullback. The true
transpose has zeros in place of the references, and only another comparison reads these: no derivative changes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from implicit_core.arrays import H, PyTree, State
from implicit_core.backends.jax import BACKEND, staging
from implicit_core.backends.jax_internals import (
    Primitive,
    Zero,
    bdim_at_front,
    fancy_primitive_batchers,
    instantiate_zeros,
    is_undefined_primal,
    lower_fun,
    primitive_jvps,
    primitive_transposes,
    register_lowering,
)
from implicit_core.estimators.growth import GrowthTest
from implicit_core.space import Space

from .leaves import Arrays

Tangents = Sequence[jax.Array | Zero]


class Growth:
    """A test, and what the terms are measured in that it compares.

    Parameters
    ----------
    test
        The test.
    batch_ndim
        How many first axes of every leaf index independent samples.
    scale
        The units of h.
    dual
        Whether the terms are cotangents. The unit of a cotangent is 1 / scale.
    """

    def __init__(self, test: GrowthTest, batch_ndim: int, scale: PyTree, *, dual: bool = False) -> None:
        self.test, self.batch_ndim, self.scale, self.dual = test, batch_ndim, scale, dual
        # JAX hashes the parameters of a primitive. Arrays have no hash, so their identity stands for them.
        units = (x if isinstance(x, (int, float)) else id(x) for x in jax.tree.leaves(scale))
        self._key = (test, batch_ndim, dual, *units)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Growth) and self._key == other._key

    def watches(self, axes: Sequence[str]) -> bool:
        """Whether the test can do something: a compiled program cannot warn.

        A sample that extends over named ``axes`` is not tested: each device has only a part of its norms.
        """
        return self.test.active and not axes and not self.is_mute()

    def is_mute(self) -> bool:
        """Whether a warning is asked for, and the program is compiled."""
        return self.test.on_growth == "warn" and staging()

    def transposed(self) -> "Growth":
        """The same of the transposed terms."""
        return Growth(self.test, self.batch_ndim, self.scale, dual=not self.dual)

    def batched(self) -> "Growth":
        """The same with one more axis of samples, the first."""
        return Growth(self.test, self.batch_ndim + 1, self.scale, dual=self.dual)

    def space(self, leaves: Arrays) -> Space:
        """The space of a term, a list of arrays."""
        space = BACKEND.space_of_leaves(leaves, self.batch_ndim, "the term", self.scale)
        return space.dual if self.dual else space.every_leaf


def fork(h: H, growth: Growth, *, primal: bool = False) -> tuple[H, H]:
    """``h``, and a reference of it for :func:`compare`.

    Parameters
    ----------
    h
        A pytree.
    growth
        The test.
    primal
        h is a value, and its cotangents are to be tested, not h itself.
    """
    leaves, structure = jax.tree.flatten(h)
    results = _fork.bind(*leaves, growth=growth, primal=primal)
    n = len(leaves)
    return jax.tree.unflatten(structure, results[:n]), jax.tree.unflatten(structure, results[n:])


def compare(w: H, last: H, reference: H, growth: Growth, *, primal: bool = False) -> H:
    """``w``, after a test whether ``last`` outgrew the reference, which is a result of :func:`fork`."""
    leaves, structure = jax.tree.flatten(w)
    operands = (*leaves, *jax.tree.leaves(last), *jax.tree.leaves(reference))
    params = {"growth": growth, "primal": primal, "tests": not primal}
    result: H = jax.tree.unflatten(structure, _compare.bind(*operands, **params))
    return result


# The primitives. Their operands and results are leaves. The operands of `compare` are the leaves of w, then of the last
# term, then of the reference. `primal`: they are values, not tangents or cotangents. `tests`: a comparison that tests;
# one that does not marks where a fork begins when it is transposed.

_fork, _compare = Primitive("fork_for_growth"), Primitive("compare_growth")
_fork.multiple_results = _compare.multiple_results = True


def _forked(*operands: Any, **params: Any) -> list[Any]:
    return [*operands, *operands]


def _first_third(*operands: Any, **params: Any) -> list[Any]:
    return list(operands[: len(operands) // 3])


def _compared(*operands: jax.Array, growth: Growth, primal: bool, tests: bool) -> Sequence[jax.Array]:
    """The comparison, on arrays whose numbers are known or in a program that is compiled."""
    n = len(operands) // 3
    w, last, reference = (list(operands[i : i + n]) for i in (0, n, 2 * n))
    if not tests or growth.is_mute():
        return w
    space = growth.space(w)
    packed: list[State] = [space.pack(x) for x in (reference, last, w)]
    checked = growth.test.checked(space, *packed)
    leaves: Sequence[jax.Array] = w if checked is packed[2] else space.unpack(checked)
    return leaves


for _primitive, _implementation, _types in ((_fork, _forked, _forked), (_compare, _compared, _first_third)):
    _primitive.def_impl(_implementation)
    _primitive.def_abstract_eval(_types)
    register_lowering(_primitive, lower_fun(_implementation, multiple_results=True))


def _jvp_of_fork(primals: Arrays, tangents: Tangents, *, primal: bool, **params: Any) -> tuple[Arrays, Tangents]:
    """The tangent of a value is forked in its place, so that the derivative of the tangent is not tested again."""
    if primal and not _all_zero(tangents):
        return [*primals, *primals], _fork.bind(*_instantiated(tangents), primal=False, **params)
    values: Arrays = [*primals, *primals] if primal else _fork.bind(*primals, primal=False, **params)
    return values, [*tangents, *tangents]


def _jvp_of_compare(primals: Arrays, tangents: Tangents, *, primal: bool, **params: Any) -> tuple[Arrays, Tangents]:
    n = len(primals) // 3
    if primal and not _all_zero(tangents):
        return primals[:n], _compare.bind(*_instantiated(tangents), primal=False, **params)
    values: Arrays = primals[:n] if primal else _compare.bind(*primals, primal=False, **params)
    return values, tangents[:n]


def _transpose_of_fork(cotangents: Tangents, *_: Any, growth: Growth, primal: bool) -> Tangents:
    n = len(cotangents) // 2
    v, reference = cotangents[:n], cotangents[n:]
    if _all_zero(v) or _all_zero(reference):
        return v
    v = _instantiated(v)
    operands = [*v, *v, *_instantiated(reference)]
    compared: Tangents = _compare.bind(*operands, growth=growth.transposed(), primal=False, tests=True)
    return compared


def _transpose_of_compare(
    cotangents: Tangents, *operands: Any, growth: Growth, primal: bool, tests: bool
) -> list[jax.Array | Zero | None]:
    n = len(cotangents)
    v: Tangents = [*cotangents, *cotangents]
    if not _all_zero(cotangents):
        v = _fork.bind(*_instantiated(cotangents), growth=growth.transposed(), primal=False)
    last = [Zero(v.aval) if isinstance(v, Zero) else Zero(jax.typeof(v)) for v in cotangents]
    pairs = zip([*v[:n], *last, *v[n:]], operands, strict=True)
    return [v if is_undefined_primal(operand) else None for v, operand in pairs]


def _all_zero(tangents: Tangents) -> bool:
    return all(isinstance(t, Zero) for t in tangents)


def _instantiated(tangents: Tangents) -> list[jax.Array]:
    return [instantiate_zeros(t) for t in tangents]


def _batched(primitive: Primitive) -> Callable[..., tuple[Arrays, Sequence[int | None]]]:
    """An axis of ``vmap`` becomes the first of the batch."""

    def batch(axis: Any, operands: Arrays, dims: Sequence[int | None], **params: Any) -> Any:
        if all(dim is None for dim in dims):
            results = primitive.bind(*operands, **params)
            return results, [None] * len(results)
        operands = [bdim_at_front(x, dim, axis.size) for x, dim in zip(operands, dims, strict=True)]
        results = primitive.bind(*operands, **params | {"growth": params["growth"].batched()})
        return results, [0] * len(results)

    return batch


primitive_jvps[_fork], primitive_jvps[_compare] = _jvp_of_fork, _jvp_of_compare
primitive_transposes[_fork], primitive_transposes[_compare] = _transpose_of_fork, _transpose_of_compare
fancy_primitive_batchers[_fork] = _batched(_fork)
fancy_primitive_batchers[_compare] = _batched(_compare)

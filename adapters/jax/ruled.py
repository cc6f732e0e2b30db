"""A value with a derivative rule that stays with it, whatever JAX does to the program it is part of.

Where JAX takes the differentiated body of a ``scan`` apart it puts the function of a ``jax.custom_jvp`` in the place of
the rule. A second derivative then takes the value for a constant, and is zero in silence. A primitive is left whole.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

PyTree = Any
Arrays = list[Any]
Rule = Callable[[PyTree, Arrays, list[int], Arrays], PyTree]


def ruled(value: PyTree, others: Arrays, rule: Rule) -> PyTree:
    """``value``, a constant but for its dependence on ``others``.

    Parameters
    ----------
    value
        A pytree of arrays. No derivative passes through it.
    others
        The arrays it is a function of.
    rule
        ``rule(value, others, places, tangents)``, the tangent of the value for these tangents of the others in these
        places; those of all others are zero. It refers to no arrays. The value it is given has this rule too.
    """
    leaves, structure = jax.tree.flatten(value)
    count = len(leaves)

    def on_leaves(operands: Arrays, places: list[int], tangents: Arrays) -> Arrays:
        whole = jax.tree.unflatten(structure, operands[:count])
        result: Arrays = jax.tree.leaves(rule(whole, operands[count:], places, tangents))
        return result

    return jax.tree.unflatten(structure, _ruled.bind(*leaves, *others, count=count, rule=on_leaves))


_ruled = Primitive("ruled")
_ruled.multiple_results = True


def _value(*operands: Any, count: int, rule: Any) -> Arrays:
    return list(operands[:count])


_ruled.def_impl(_value)
_ruled.def_abstract_eval(_value)
mlir.register_lowering(_ruled, mlir.lower_fun(_value, multiple_results=True))


def _jvp(operands: Arrays, tangents: Arrays, *, count: int, rule: Any) -> tuple[Arrays, Arrays]:
    value = _ruled.bind(*operands, count=count, rule=rule)
    directions = tangents[count:]
    places = [i for i, direction in enumerate(directions) if not isinstance(direction, ad.Zero)]
    if not places:
        return value, [ad.Zero(jax.typeof(leaf).to_tangent_aval()) for leaf in value]
    return value, rule([*value, *operands[count:]], places, [directions[i] for i in places])


def _batch(axis: Any, operands: Arrays, dims: list[Any], *, count: int, rule: Any) -> tuple[Arrays, list[Any]]:
    if all(dim is None for dim in dims):
        return _ruled.bind(*operands, count=count, rule=rule), [None] * count
    everywhere = [i < count or dim is not None for i, dim in enumerate(dims)]
    operands = [
        batching.bdim_at_front(operand, dim, axis.size) if mapped else operand
        for operand, dim, mapped in zip(operands, dims, everywhere, strict=True)
    ]
    axes = [0 if mapped else None for mapped in everywhere]

    def mapped_rule(operands: Arrays, places: list[int], tangents: Arrays) -> Arrays:
        result: Arrays = jax.vmap(
            lambda operands, tangents: rule(operands, places, tangents),
            in_axes=(axes, [axes[count + i] for i in places]),
            axis_size=axis.size,
            axis_name=axis.name,
        )(operands, tangents)
        return result

    return _ruled.bind(*operands, count=count, rule=mapped_rule), [0] * count


ad.primitive_jvps[_ruled] = _jvp
batching.fancy_primitive_batchers[_ruled] = _batch

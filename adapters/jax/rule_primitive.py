"""A value with a differentiation rule, as a primitive that JAX's transformations keep whole.

When JAX differentiates a ``scan`` it may replace a ``jax.custom_jvp`` in the body by its function. A second derivative
then treats the value as a constant and is silently zero. JAX never replaces a primitive (Decision 48).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

import jax

from implicit_core.arrays import H
from implicit_core.backends.jax_internals import (
    Primitive,
    Zero,
    bdim_at_front,
    fancy_primitive_batchers,
    lower_fun,
    primitive_jvps,
    primitive_transposes,
    register_lowering,
)

from .leaves import Arrays

T = TypeVar("T", bound=Arrays)
Rule = Callable[[H, Arrays, Sequence[int], Arrays], H]
"""``rule(value, inputs, indices, tangents)``: the tangent of the value, see :func:`with_rule`."""


def with_rule(value: H, inputs: Arrays, rule: Rule[H], *, parameters: Arrays = ()) -> H:
    """``value``, differentiated by ``rule`` as a function of ``inputs``.

    Parameters
    ----------
    value
        A pytree of arrays. How it was computed is not differentiated.
    inputs
        The arrays that it is a function of.
    rule
        ``rule(value, inputs, indices, tangents)`` is the tangent of the value, given the tangents of the inputs at
        ``indices``; the tangents of the other inputs are zero. It must not refer to arrays. Its argument ``value`` has
        this rule too, which makes derivatives of every order right. Its ``inputs`` end with the parameters.
    parameters
        Arrays that the value does not depend on, but its tangent does.
    """
    leaves, structure = jax.tree.flatten(value)
    size = len(leaves)

    def rule_on_leaves(operands: Arrays, indices: Sequence[int], tangents: Arrays) -> Arrays:
        value: H = jax.tree.unflatten(structure, operands[:size])
        tangent: Arrays = jax.tree.leaves(rule(value, operands[size:], indices, tangents))
        return tangent

    end = size + len(inputs)
    results = _value_with_rule.bind(*leaves, *inputs, *parameters, size=size, end=end, rule=rule_on_leaves)
    result: H = jax.tree.unflatten(structure, results)
    return result


# The primitive. Its operands are the `size` leaves of the value, the inputs up to `end`, and the parameters. Its
# results are the leaves.

_RuleOnLeaves = Callable[[Arrays, Sequence[int], Arrays], Arrays]


class _MappedAxis(Protocol):
    """The axis of a ``jax.vmap``."""

    size: int
    name: Hashable


_value_with_rule = Primitive("value_with_rule")
_value_with_rule.multiple_results = True


def _leaves_of_value(*operands: T, size: int, end: int, rule: _RuleOnLeaves) -> list[T]:
    return list(operands[:size])


_value_with_rule.def_impl(_leaves_of_value)
_value_with_rule.def_abstract_eval(_leaves_of_value)
register_lowering(_value_with_rule, lower_fun(_leaves_of_value, multiple_results=True))


def _jvp(
    operands: Arrays, tangents: Sequence[jax.Array | Zero], *, size: int, end: int, rule: _RuleOnLeaves
) -> tuple[Arrays, Sequence[jax.Array | Zero]]:
    leaves: Arrays = _value_with_rule.bind(*operands, size=size, end=end, rule=rule)
    nonzero = {i: tangent for i, tangent in enumerate(tangents[size:end]) if not isinstance(tangent, Zero)}
    if not nonzero:
        return leaves, [Zero(jax.typeof(leaf).to_tangent_aval()) for leaf in leaves]
    return leaves, rule([*leaves, *operands[size:]], list(nonzero), list(nonzero.values()))


def _batch(
    axis: _MappedAxis, operands: Arrays, dims: Sequence[int | None], *, size: int, end: int, rule: _RuleOnLeaves
) -> tuple[Arrays, Sequence[int | None]]:
    if all(dim is None for dim in dims):
        return _value_with_rule.bind(*operands, size=size, end=end, rule=rule), [None] * size
    # The value depends on the inputs, so its leaves are mapped if any input is.
    axes = [0 if i < size or dim is not None else None for i, dim in enumerate(dims)]
    operands = [
        operand if at is None else bdim_at_front(operand, dim, axis.size)
        for operand, dim, at in zip(operands, dims, axes, strict=True)
    ]

    def mapped_rule(operands: Arrays, indices: Sequence[int], tangents: Arrays) -> Arrays:
        tangent: Arrays = jax.vmap(
            lambda operands, tangents: rule(operands, indices, tangents),
            in_axes=(axes, [axes[size + i] for i in indices]),
            axis_size=axis.size,
            axis_name=axis.name,
        )(operands, tangents)
        return tangent

    return _value_with_rule.bind(*operands, size=size, end=end, rule=mapped_rule), [0] * size


def _transpose(
    cotangents: Sequence[jax.Array | Zero], *operands: object, size: int, end: int, rule: _RuleOnLeaves
) -> None:
    """For ``jax.linear_transpose`` of the layer itself: derivatives transpose the operations of the rule instead."""
    raise NotImplementedError(
        "jax.linear_transpose has no rule for the loop of a solve: take pullback = jax.vjp(layer, x)[1], which is the "
        "transpose of a linear layer at any x"
    )


primitive_jvps[_value_with_rule] = _jvp
primitive_transposes[_value_with_rule] = _transpose
fancy_primitive_batchers[_value_with_rule] = _batch

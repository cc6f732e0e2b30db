"""Derivatives of an F that JAX differentiates in forward mode alone, such as one with a ``while_loop``."""

from collections.abc import Callable
from typing import Any

import jax

from implicit_core.arrays import H
from implicit_core.backends.jax_internals import (
    Jaxpr,
    Primitive,
    fancy_primitive_batchers,
    jaxprs_in_params,
    lower_fun,
    primitive_jvps,
    primitive_transposes,
    register_lowering,
)

MESSAGE = (
    "f contains a loop without a static number of steps (lax.while_loop), so JAX has its derivative in forward mode "
    "alone: take jax.jvp or jax.jacfwd, write the loop as lax.scan, or give its VJP to Problem(f, vjp=...)"
)


def can_be_transposed(jaxpr: Jaxpr, function: Callable[[H], H], x: H) -> bool:
    """Whether JAX can transpose a linear function, which is traced again only if its program has a ``while_loop``."""
    if not _has_while(jaxpr):
        return True
    try:
        jax.eval_shape(lambda v: jax.linear_transpose(function, x)(v), x)
    except ValueError:  # it is the loop of a linear operation
        return False
    return True


def forward_only(x: H) -> H:
    """``x``, whose transpose is an error that says why."""
    leaves, structure = jax.tree.flatten(x)
    result: H = jax.tree.unflatten(structure, _forward_only.bind(*leaves))
    return result


def _has_while(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name == "while" or any(map(_has_while, jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns
    )


_forward_only = Primitive("forward_only")
_forward_only.multiple_results = True


def _same(*operands: Any) -> list[Any]:
    return list(operands)


def _jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _forward_only.bind(*primals), list(tangents)


def _transpose(cotangents: Any, *operands: Any) -> Any:
    raise NotImplementedError(MESSAGE)


def _batch(axis: Any, operands: Any, dims: Any) -> tuple[Any, Any]:
    return _forward_only.bind(*operands), dims


_forward_only.def_impl(_same)
_forward_only.def_abstract_eval(_same)
register_lowering(_forward_only, lower_fun(_same, multiple_results=True))
primitive_jvps[_forward_only] = _jvp
primitive_transposes[_forward_only] = _transpose
fancy_primitive_batchers[_forward_only] = _batch

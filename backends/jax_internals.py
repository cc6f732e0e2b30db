"""Names of JAX outside of its stable interface: a new release may move or drop any of them, without a deprecation.

Everything else takes them from here. What JAX promises to keep is in its `API compatibility
<https://docs.jax.dev/en/latest/api_compatibility.html>`_.
"""

from collections.abc import Callable
from typing import Any

import jax

try:
    from jax.core import ShapedArray as ShapedArray  # annotates the type of a traced result
    from jax.core import Tracer as Tracer  # has no numbers that can be read
    from jax.core import eval_jaxpr as eval_jaxpr  # evaluates F, which is traced once
    from jax.custom_batching import custom_vmap as custom_vmap  # makes an axis of `vmap` a batch axis
    from jax.custom_derivatives import SymbolicZero as SymbolicZero  # is the tangent of what is not differentiated
    from jax.experimental import checkify as checkify  # reports errors of compiled programs
    from jax.extend.core import ClosedJaxpr as ClosedJaxpr  # is a program within a program
    from jax.extend.core import Jaxpr as Jaxpr  # is a traced program
    from jax.extend.core import JaxprEqn as JaxprEqn  # is an operation in it
    from jax.extend.core import Literal as Literal  # is a number in it
    from jax.extend.core import Primitive as Primitive  # is an operation that no transformation takes apart
    from jax.extend.core import Var as Var  # is a result in it
    from jax.extend.core import jaxprs_in_params as jaxprs_in_params  # finds programs within a program
    from jax.interpreters.ad import Zero as Zero  # is the tangent of a primitive's argument that has none
    from jax.interpreters.ad import instantiate_zeros as instantiate_zeros  # makes it an array
    from jax.interpreters.ad import is_undefined_primal as is_undefined_primal  # says what a primitive is linear in
    from jax.interpreters.ad import primitive_jvps as primitive_jvps  # has the derivatives of primitives
    from jax.interpreters.ad import primitive_transposes as primitive_transposes  # has their transposes
    from jax.interpreters.batching import bdim_at_front as bdim_at_front  # moves the axis of `vmap`
    from jax.interpreters.batching import fancy_primitive_batchers as fancy_primitive_batchers  # has rules of `vmap`
    from jax.interpreters.mlir import lower_fun as lower_fun  # compiles a function of JAX as a primitive
    from jax.interpreters.mlir import register_lowering as register_lowering  # tells XLA how to compile one
except ImportError as error:
    raise ImportError(f"implicit_core does not work with JAX {jax.__version__}: {error}") from error


def run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    """``body``, which writes to mutable arrays, as a function of arrays."""
    try:
        from jax.experimental.pallas import run_state  # takes long to import, for an F that asks for it alone
    except ImportError as error:
        raise ImportError(f"implicit_core does not work with JAX {jax.__version__}: {error}") from error
    function: Callable[[Any], Any] = run_state(body)
    return function


def without_constants(jaxpr: Jaxpr) -> Jaxpr:
    """``jaxpr`` without the values of its constants, which newer versions of JAX keep in it.

    Its constants are arguments of ``eval_jaxpr`` in every version. Their values may be tracers.
    """
    program: Jaxpr = jaxpr.replace(constvars=jaxpr.constvars)
    return program

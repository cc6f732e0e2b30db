"""The start of a solve as arrays of the framework that F computes in (Decision 105)."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from . import checks
from .arrays import H, Z
from .backend import Backend
from .problem import Problem
from .registry import find_adapter, find_backend, leaves_of, load_backend

R = TypeVar("R")


def with_start(run: Callable[[H], R], problem: Problem[H, Z], h0: H, z: Z) -> R:
    """``run(h0)``, with the numbers and NumPy arrays of ``h0`` as arrays of the framework that F computes in.

    ``run`` solves with F and the start that it gets. If h0 holds numbers alone and z no arrays that say where they
    belong, F is evaluated once at the numbers. If h0 holds NumPy arrays, F's first result may show that they belong
    elsewhere, or F may refuse them beside the arrays of z, and ``run`` starts again.
    """
    if not _has_dtype(h0) and (leaves := leaves_of(h0)) and not any(map(_has_dtype, leaves)):
        h0 = _from_numbers(problem, h0, z)
    try:
        return run(h0)
    except TypeError as error:  # what F returned, or F itself, which got arrays of two frameworks
        foreign = error.leaf if isinstance(error, checks.ForeignArrayError) else z
        if find_adapter(foreign) is None or find_backend(h0).name != "numpy":
            raise
    backend = find_backend(foreign)
    return run(_arrays(backend, h0, [leaf for leaf in leaves_of(foreign) if backend.is_array(leaf)]))


def _from_numbers(problem: Problem[H, Z], h0: H, z: Z) -> H:
    """A start of numbers alone as arrays of z's framework, or else with the dtypes and devices of F's results there."""
    if not all(isinstance(leaf, (int, float)) and not isinstance(leaf, bool) for leaf in leaves_of(h0)):
        return h0  # it is refused later
    if find_adapter(z) is not None:
        backend, leaves = find_backend(z), leaves_of(z)
        return _arrays(backend, h0, [leaf for leaf in leaves if backend.is_array(leaf)])
    h0, (function, _, start_name, *_) = load_backend("numpy").map(float, h0), problem.names
    try:
        result = problem.f(h0, z)
    except Exception as error:
        error.add_note(
            f"{function} was called with the Python numbers of {start_name}, to see which framework's arrays it "
            f"returns: make {start_name} an array, or pass arrays of that framework in z"
        )
        raise
    if not any(map(_has_dtype, leaves_of(result))):
        return _arrays(load_backend("numpy"), h0, [])
    start: H = checks.numbers_as_arrays(find_backend(result, f"the result of {function}"), h0, result)
    return start


def _arrays(backend: Backend, h0: H, like: Sequence[Any]) -> H:
    """``h0``, its numbers and NumPy arrays as arrays on the device of the first array in ``like``.

    Numbers also get the dtype of the first floating-point array in it.
    """
    xp, device = backend.xp, backend.device(like[0]) if like else None
    dtype = next((x.dtype for x in like if backend.isdtype(x.dtype, "real floating")), None)

    def array(leaf: Any) -> Any:
        if isinstance(leaf, (int, float)) and not _has_dtype(leaf):
            return xp.asarray(float(leaf), dtype=dtype, device=device)
        return xp.asarray(leaf, device=device, copy=True) if hasattr(leaf, "__array__") else leaf

    start: H = backend.map(array, h0)
    return start


def _has_dtype(leaf: object) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")

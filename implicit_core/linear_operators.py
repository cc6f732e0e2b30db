"""What stands for a linear map: a function, a matrix, a SciPy sparse array, or a LinearOperator."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from . import checks
from .arrays import PyTree
from .backend import Backend
from .records import is_array

LinearMap = Any
"""A function of pytrees, a matrix (n, n) or one for each sample, a SciPy sparse array, or a SciPy LinearOperator."""


def require_real(name: str, matrix: Any) -> None:
    """Refuse a complex matrix, whose imaginary part would be lost.

    Raises
    ------
    TypeError
        If it is complex.
    """
    if "complex" in str(matrix.dtype):
        raise TypeError(f"{name} must be real, got the dtype {matrix.dtype}")


def is_sparse(x: object) -> bool:
    """Whether ``x`` is a sparse array or matrix as SciPy has them."""
    return hasattr(x, "tocsc") and hasattr(x, "shape")


def as_function(name: str, given: LinearMap, backend: Backend, like: PyTree, batch_ndim: int) -> Callable[[Any], Any]:
    """A linear map as a function of pytrees shaped as ``like``.

    Raises
    ------
    TypeError, ValueError
        If ``given`` is no linear map, or has another shape. The error calls it ``name``.
    """
    if is_sparse(given) or hasattr(given, "matvec"):
        if backend.name != "numpy":
            raise TypeError(f"{name} of SciPy is for arrays of NumPy: pass an array of {backend.name}, or a function")
        require_real(name, given)
        n = _numbers_of_a_sample(name, backend, like, batch_ndim)
        if tuple(given.shape) != (n, n):
            raise ValueError(f"{name} must have the shape {(n, n)}, got {tuple(given.shape)}")
        return partial(_multiply_columns, backend, given)
    if is_array(given) and not callable(given):
        if not backend.is_array(given):
            raise TypeError(
                f"{name} is an array of type {type(given).__name__}, and b one of {backend.name}: pass an array of "
                f"{backend.name}, or a function, lambda v: {name} @ v, if it multiplies such arrays"
            )
        if backend.name == "numpy":  # of PyTorch a sparse tensor, which is no state, is a matrix all the same
            checks.supported_leaf(backend, name, given)
        n = _numbers_of_a_sample(name, backend, like, batch_ndim)
        batch = tuple(like.shape[:batch_ndim])
        if tuple(given.shape) not in ((n, n), (*batch, n, n)):
            expected = f"{(n, n)}" if not batch else f"{(n, n)} or {(*batch, n, n)}"
            raise ValueError(f"{name} must have the shape {expected}, got {tuple(given.shape)}")
        if not backend.same_dtype(given.dtype, like.dtype):
            raise TypeError(f"{name} must have the dtype {like.dtype} of b, got {given.dtype}")
        return partial(_multiply_matrix, backend, given)
    if not callable(given):
        raise TypeError(
            f"{name} must be callable, a matrix, a SciPy sparse array or a LinearOperator, got {given!r} of type "
            f"{type(given).__name__}"
        )
    function: Callable[[Any], Any] = given
    return function


def transpose_of(given: LinearMap, backend: Backend) -> LinearMap | None:
    """The transpose of a matrix in one of its forms; None of a function."""
    if is_sparse(given) or hasattr(given, "matvec"):
        return getattr(given, "T", None)
    return backend.xp.matrix_transpose(given) if backend.is_array(given) else None


def _numbers_of_a_sample(name: str, backend: Backend, like: PyTree, batch_ndim: int) -> int:
    if not backend.is_array(like):
        raise TypeError(f"{name} must be a function where b is a pytree, got a matrix")
    return math.prod(like.shape[batch_ndim:])


def _multiply_matrix(backend: Backend, matrix: Any, v: Any) -> Any:
    xp, n = backend.xp, matrix.shape[-1]
    transposed = xp.matrix_transpose(matrix)
    if matrix.ndim == 2:
        return xp.reshape(xp.reshape(v, (-1, n)) @ transposed, v.shape)
    return xp.reshape(xp.reshape(v, (*matrix.shape[:-2], 1, n)) @ transposed, v.shape)


def _multiply_columns(backend: Backend, operator: Any, v: Any) -> Any:
    """The product of a sparse array or a LinearOperator, whose vectors are columns, with each sample."""
    xp, n = backend.xp, operator.shape[1]
    columns = xp.reshape(v, (-1, n)).T
    product = operator @ columns
    return xp.astype(xp.reshape(product.T, v.shape), v.dtype)

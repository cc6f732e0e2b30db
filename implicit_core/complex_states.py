"""Complex states, by their real and imaginary parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import checks
from .arrays import Array, PyTree, Z
from .problem import Problem
from .registry import find_backend


class ComplexParts(NamedTuple):
    """The real and the imaginary part of a complex array, as a node of a pytree.

    Attributes
    ----------
    real, imag
        Real arrays of the shape of the complex one.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> ic.to_real(np.array([1 + 2j]))
    ComplexParts(real=array([1.]), imag=array([2.]))
    """

    real: Array
    imag: Array


def to_real(tree: PyTree) -> PyTree:
    """A pytree, with :class:`ComplexParts` for each complex array. Other leaves stay.

    Parameters
    ----------
    tree
        An array, or a pytree of arrays.

    Returns
    -------
    pytree
        Real, and linear over the real numbers as a function of ``tree``. Inner products of parts are the real parts of
        complex ones, and norms are equal.

    Raises
    ------
    TypeError
        If there is no array.

    Notes
    -----
    The parts are views of a NumPy array, and of a tensor.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> ic.to_real({"psi": np.array([3 - 4j]), "E": np.array(0.5)})
    {'psi': ComplexParts(real=array([3.]), imag=array([-4.])), 'E': array(0.5)}
    """
    backend = find_backend(tree, "tree")
    xp = backend.xp

    def parts(x: Any) -> Any:
        is_complex = backend.is_array(x) and backend.isdtype(x.dtype, "complex floating")
        return ComplexParts(xp.real(x), xp.imag(x)) if is_complex else x

    with backend.on_device_of(tree):
        return backend.map(parts, tree)


def to_complex(tree: PyTree) -> PyTree:
    """The inverse of :func:`to_real`.

    Parameters
    ----------
    tree
        A pytree with :class:`ComplexParts`.

    Returns
    -------
    pytree
        With a complex array for each of them.

    Raises
    ------
    TypeError
        If there is no array.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> ic.to_complex(ic.to_real(np.array([1 + 2j, 3j])))
    array([1.+2.j, 0.+3.j])
    """
    backend = find_backend(tree, "tree")
    leaves, structure = backend.flatten(tree, is_leaf=_is_parts)
    with backend.on_device_of(tree):
        return backend.unflatten(structure, [backend.complex(*x) if _is_parts(x) else x for x in leaves])


def as_real(f: Callable[[Any, Z], Any], *, has_aux: bool = False) -> Callable[[Any, Z], Any]:
    """An F of complex states, as one of their real and imaginary parts.

    Solvers and estimators work with real numbers. An F that conjugates, or takes an absolute value, has no complex
    derivative, but as a function of the parts it is as smooth as any. z may hold complex arrays: they reach f as they
    are, and have the gradients that the framework gives complex numbers.

    Parameters
    ----------
    f
        ``f(h, z)``, which returns the structure, shapes and dtypes of h. Some or all arrays of h are complex.
    has_aux
        Whether f returns ``(h, aux)``, for :func:`fixed_point` with ``has_aux=True``. ``aux`` may be complex.

    Returns
    -------
    callable
        ``to_real(f(to_complex(parts), z))``, for ``h0 = to_real(...)``. Where you write derivatives yourself, pass it
        to :class:`Problem` with the derivatives of the parts: for F = A h the pullback of v is
        ``to_real(A.conj().T @ to_complex(v))``. A ``scale`` that is no single number has the structure of the parts.

    Raises
    ------
    TypeError
        If f is not callable, or a Problem. In a call, if f does not return what it has to.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> f = ic.as_real(lambda h, z: 0.5j * np.conj(h) + z)
    >>> solution = ic.solve(f, ic.to_real(np.zeros(1, complex)), np.array([1.0 + 0j]), solver=ic.Anderson(rtol=1e-9))
    >>> ic.to_complex(solution.value).round(6)
    array([1.333333+0.666667j])
    """
    checks.function("f", f)
    if isinstance(f, Problem):
        raise TypeError(
            f"as_real takes a plain function f(h, z), got {f!r}: make the Problem of as_real(f), with the derivatives "
            "of the real and imaginary parts"
        )

    def of_parts(h: Any, z: Z) -> Any:
        state = to_complex(h)
        backend = find_backend(state, "h")
        value, *aux = checks.with_aux(f(state, z)) if has_aux else (f(state, z),)
        value = to_real(checks.like(backend, "the result of f", value, state, "h"))
        return (value, *aux) if has_aux else value

    return of_parts


def _is_parts(x: object) -> bool:
    return isinstance(x, ComplexParts)

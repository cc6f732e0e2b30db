"""A problem on CuPy arrays from callbacks of the user's."""

from collections.abc import Callable
from typing import Any

from implicit_core.problem import Linearization, Map, Problem

PyTree = Any

NO_DERIVATIVE = (
    "CuPy has no autodiff: give problem() a vjp, a jvp or a linearize, or borrow derivatives with from_torch or "
    "from_jax. A solve alone needs none of them: ic.solve(f, h0, z)"
)


def problem(
    f: Map,
    *,
    vjp: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
    jvp: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree] | None = None,
    linearize: Callable[[PyTree, PyTree], Linearization] | None = None,
    batch_ndim: int = 0,
) -> Problem:
    """A :class:`Problem` on CuPy arrays, whose derivatives are yours.

    An ``ElementwiseKernel`` is such a function as it stands: F one of (h, z), its ``vjp`` one of (h, z, v) with the
    outputs v_h and v_z. So is any function that launches kernels, among them a ``RawKernel``. They are called with the
    device of h current, on the stream that is current there; they return new arrays.

    Parameters
    ----------
    f, vjp, jvp, linearize, batch_ndim
        As for :class:`implicit_core.Problem`. Where F and its derivatives share work ``linearize`` saves it, see
        :class:`Pointwise`.

    Raises
    ------
    TypeError
        If no derivative is given, or an argument isn't callable.

    Examples
    --------
    Two kernels, one for F and one for both its cotangents:

    >>> import cupy
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import cupy as icc
    >>> f = cupy.ElementwiseKernel("T h, T z", "T y", "y = tanh(h / 2 + z)", "f")
    >>> vjp = cupy.ElementwiseKernel(
    ...     "T h, T z, T v",
    ...     "T v_h, T v_z",
    ...     "const T y = tanh(h / 2 + z); v_z = v * (1 - y * y); v_h = v_z / 2",
    ...     "f_vjp",
    ... )
    >>> problem = icc.problem(f, vjp=vjp)
    >>> z = cupy.ones(3)
    >>> solution = ic.solve(problem, cupy.zeros(3), z)
    >>> value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, solution.value, z)
    >>> pullback(cupy.ones(3)).shape
    (3,)
    """
    if vjp is None and jvp is None and linearize is None:
        raise TypeError(NO_DERIVATIVE)
    return Problem(f, vjp=vjp, jvp=jvp, linearize=linearize, batch_ndim=batch_ndim)

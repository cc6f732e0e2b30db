"""A problem on CuPy arrays from the user's callbacks."""

from collections.abc import Callable

from implicit_core.arrays import H, PyTree, Z
from implicit_core.problem import Linearization, Map, Problem

NO_DERIVATIVE = (
    "CuPy has no autodiff: give problem() a vjp, a jvp or a linearize, or borrow derivatives with from_torch or "
    "from_jax. A solve alone needs no derivatives: ic.solve(f, h0, z)"
)


def problem(
    f: Map[H, Z],
    *,
    vjp: Callable[[H, Z, H], tuple[H, Z]] | None = None,
    jvp: Callable[[H, Z, H, Z], H] | None = None,
    linearize: Callable[[H, Z], Linearization[H, Z]] | None = None,
    batch_ndim: int = 0,
    scale: PyTree = None,
) -> Problem[H, Z]:
    """A :class:`Problem` on CuPy arrays with derivatives that you write.

    F and its derivatives can be CuPy functions, functions that launch a ``RawKernel``, or an ``ElementwiseKernel``: F
    with the inputs h and z, ``vjp`` with the inputs h, z and v and the outputs v_h and v_z. They are called on the
    device of h and on its current stream. They return new arrays.

    Parameters
    ----------
    f, vjp, jvp, linearize, batch_ndim, scale
        As for :class:`implicit_core.Problem`. If F and its derivatives share work, use ``linearize``, see
        :class:`Pointwise`.

    Raises
    ------
    TypeError
        If no derivative is given, or an argument isn't callable.

    Examples
    --------
    Two kernels, one for F and one for both cotangents:

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
    return Problem(f, vjp=vjp, jvp=jvp, linearize=linearize, batch_ndim=batch_ndim, scale=scale)

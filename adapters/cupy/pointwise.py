"""A function of each element with its derivatives, each one kernel."""

from collections.abc import Sequence
from typing import Any

import cupy

from implicit_core import checks

Array = Any


RESERVED = ("i", "n", "v", "y", "T")
"""Names that the kernels have for other things."""


class Pointwise:
    """y = φ(a, b, ...), element by element, with the kernels of its derivatives.

    What is pointwise in F, between its matrix products, then costs one launch forward and one backward.

    Parameters
    ----------
    arguments
        Names of the arguments, e.g. ``"a, x"``; none of i, n, v, y and T, nor one that begins with ``g_`` or ``d_``.
    value
        φ, an expression of these in CUDA C++.
    slopes
        ∂φ/∂a, ∂φ/∂b, ...: an expression each, of the arguments and of y; or one, if they are all the same.
    preamble
        CUDA C++ that these refer to.

    Raises
    ------
    TypeError, ValueError
        If the names and the expressions don't fit together. An expression that doesn't compile is an error of CuPy's
        at the first call.

    Examples
    --------
    The layer tanh(W h + x), of one product and one kernel; a pullback is one kernel and one product:

    >>> import cupy
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import cupy as icc
    >>> phi = icc.Pointwise("a, x", "tanh(a + x)", slopes="1 - y * y")
    >>> def linearize(h, z):
    ...     x, w = z
    ...     a = h @ w.T
    ...     y = phi(a, x)
    ...
    ...     def vjp(v):
    ...         g, x_bar = phi.vjp(v, y, a, x)
    ...         return g @ w, (x_bar, g.T @ h)
    ...
    ...     return ic.Linearization(y, vjp=vjp, vjp_h=lambda v: phi.vjp(v, y, a, x)[0] @ w)
    >>> problem = icc.problem(lambda h, z: phi(h @ z[1].T, z[0]), linearize=linearize, batch_ndim=1)
    >>> z = cupy.ones((4, 8)), 0.5 * cupy.eye(8)
    >>> solution = ic.solve(problem, cupy.zeros((4, 8)), z)
    >>> value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, solution.value, z)
    >>> [leaf.shape for leaf in pullback(2 * value)]
    [(4, 8), (8, 8)]
    """

    def __init__(self, arguments: str, value: str, *, slopes: str | Sequence[str], preamble: str = "") -> None:
        checks.instance("arguments", arguments, str, '"a, x"')
        checks.instance("value", value, str, '"tanh(a + x)"')
        checks.instance("slopes", slopes, Sequence, '"1 - y * y"')
        names = [name.strip() for name in arguments.split(",")]
        for name in names:
            if not name.isidentifier() or name in RESERVED or name.startswith(("g_", "d_")):
                raise ValueError(
                    f"arguments must be names other than {', '.join(RESERVED)}, g_... and d_..., got {name!r}"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"arguments must be different names, got {arguments!r}")
        expressions = [slopes] if isinstance(slopes, str) else list(slopes)
        for expression in expressions:
            checks.instance("each of slopes", expression, str, '"1 - y * y"')
        of_each = expressions * len(names) if isinstance(slopes, str) else expressions
        if len(of_each) != len(names):
            raise ValueError(f"slopes must be one expression, or one for each of {names}, got {expressions!r}")
        self._names = names
        inputs = ", ".join(f"T {name}" for name in names)
        cotangents = [f"g_{j}" for j in range(len(expressions))]
        tangent = " + ".join(f"({slope}) * d_{name}" for slope, name in zip(of_each, names, strict=True))

        def kernel(inputs: str, outputs: str, operation: str, name: str) -> Any:
            return cupy.ElementwiseKernel(
                inputs, outputs, operation, f"implicit_core_pointwise_{name}", preamble=preamble
            )

        self._value = kernel(inputs, "T y", f"y = {value}", "value")
        self._vjp = kernel(
            f"T v, T y, {inputs}",
            ", ".join(f"T {g}" for g in cotangents),
            "; ".join(f"{g} = v * ({slope})" for g, slope in zip(cotangents, expressions, strict=True)),
            "vjp",
        )
        self._jvp = kernel(
            f"{', '.join(f'T d_{name}' for name in names)}, T y, {inputs}", "T v", f"v = {tangent}", "jvp"
        )

    def __repr__(self) -> str:
        return f"Pointwise({', '.join(self._names)!r}, {self._value.operation.removeprefix('y = ')!r})"

    def __call__(self, *arguments: Array) -> Array:
        """φ(a, b, ...); arguments are broadcast, and of one dtype."""
        self._check("arguments", arguments)
        return self._value(*arguments)

    def vjp(self, v: Array, y: Array, *arguments: Array) -> tuple[Array, ...]:
        """The cotangent v of y, pulled back to each argument.

        Parameters
        ----------
        v, y
            The cotangent, and the value; shaped as φ(a, b, ...).
        *arguments
            What φ was called with.

        Returns
        -------
        tuple
            A cotangent for each argument, shaped as it is: summed over the axes along which it was broadcast. Two may
            be one array.
        """
        self._check("arguments", arguments)
        found = self._vjp(v, y, *arguments)
        cotangents = found if isinstance(found, tuple) else (found,) * len(arguments)
        return tuple(_summed(g, a) for g, a in zip(cotangents, arguments, strict=True))

    def jvp(self, tangents: Sequence[Array], y: Array, *arguments: Array) -> Array:
        """The tangent of y, from one for each argument; shaped as y.

        Parameters
        ----------
        tangents
            Shaped as the arguments; a number, such as 0.0, stands for an array of it.
        y
            The value, φ(a, b, ...).
        *arguments
            What φ was called with.
        """
        self._check("tangents", tangents)
        self._check("arguments", arguments)
        return self._jvp(*tangents, y, *arguments)

    def _check(self, name: str, given: Sequence[Array]) -> None:
        if len(given) != len(self._names):
            raise TypeError(f"{name} must be one for each of {self._names}, got {len(given)}")


def _summed(g: Array, like: Array) -> Array:
    """``g`` summed to the shape of what was broadcast to its own."""
    shape = getattr(like, "shape", ())
    if g.shape == shape:
        return g
    missing = g.ndim - len(shape)
    axes = (*range(missing), *(missing + j for j, size in enumerate(shape) if size == 1 and g.shape[missing + j] != 1))
    return g.sum(axis=axes, keepdims=True).reshape(shape)

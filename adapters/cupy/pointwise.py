"""An elementwise function and its derivatives, one kernel each (Decision 55)."""

from collections.abc import Sequence
from typing import TypeAlias

import cupy

from implicit_core import checks

RESERVED = ("i", "n", "v", "y", "T")
"""Names that the kernels use themselves."""
Operand: TypeAlias = "cupy.ndarray | float"


class Pointwise:
    """y = φ(a, b, ...), element by element, with the kernels of its derivatives.

    The elementwise part of F, between its matrix products, then costs one launch forward and one backward.

    Parameters
    ----------
    arguments
        Names of the arguments, e.g. ``"a, x"``. The names i, n, v, y and T, and those that begin with ``g_`` or
        ``d_``, are reserved.
    value
        φ, a CUDA C++ expression in the arguments.
    slopes
        ∂φ/∂a, ∂φ/∂b, ...: one expression in the arguments and y for each; or a single one, if they are all the same.
    preamble
        CUDA C++ code that the expressions use.

    Raises
    ------
    TypeError, ValueError
        If the names and the expressions don't fit together. If an expression doesn't compile, CuPy raises at the
        first call.

    Examples
    --------
    The layer tanh(W h + x) with one product and one kernel. A pullback takes one kernel and one product:

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

        def kernel(inputs: str, outputs: str, operation: str, name: str) -> cupy.ElementwiseKernel:
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

    def __call__(self, *arguments: Operand) -> cupy.ndarray:
        """φ(a, b, ...). The arguments are broadcast and have one dtype."""
        self._check("arguments", arguments)
        return self._value(*arguments)

    def vjp(self, v: cupy.ndarray, y: cupy.ndarray, *arguments: Operand) -> tuple[cupy.ndarray, ...]:
        """The cotangent v of y, pulled back to each argument.

        Parameters
        ----------
        v, y
            The cotangent, and the value; shaped as φ(a, b, ...).
        *arguments
            The arguments of φ.

        Returns
        -------
        tuple
            A cotangent for each argument, with the argument's shape: it is summed over broadcast axes. Cotangents of
            several arguments may be the same array.
        """
        self._check("arguments", arguments)
        found = self._vjp(v, y, *arguments)
        cotangents = found if isinstance(found, tuple) else (found,) * len(arguments)
        return tuple(_sum_to_shape(g, getattr(a, "shape", ())) for g, a in zip(cotangents, arguments, strict=True))

    def jvp(self, tangents: Sequence[Operand], y: cupy.ndarray, *arguments: Operand) -> cupy.ndarray:
        """The tangent of y, shaped as y.

        Parameters
        ----------
        tangents
            A tangent for each argument: an array with the argument's shape, or a number for a constant one, as 0.0.
        y
            The value, φ(a, b, ...).
        *arguments
            The arguments of φ.
        """
        self._check("tangents", tangents)
        self._check("arguments", arguments)
        return self._jvp(*tangents, y, *arguments)

    def _check(self, name: str, given: Sequence[Operand]) -> None:
        if len(given) != len(self._names):
            raise TypeError(f"{name} must be one for each of {self._names}, got {len(given)}")


def _sum_to_shape(g: cupy.ndarray, shape: tuple[int, ...]) -> cupy.ndarray:
    """The transpose of broadcasting from ``shape``: the sum over the axes that were added or stretched."""
    if g.shape == shape:
        return g
    added = g.ndim - len(shape)
    stretched = [added + j for j, size in enumerate(shape) if size == 1 and g.shape[added + j] != 1]
    return g.sum(axis=(*range(added), *stretched), keepdims=True).reshape(shape)

"""Systems of equations g(x) = 0 for comparing root finders, each from its usual start.

Two sets. ``TWENTY_THREE`` are the problems of the test set ``test_nonlin`` (J. Burkardt; most are from Moré, Garbow and
Hillstrom), with the sizes and starts of NonlinearSolve.jl. ``SQUARE`` are the systems with as many equations as
unknowns of J. J. Moré, B. S. Garbow and K. E. Hillstrom, Testing unconstrained optimization software, ACM Trans. Math.
Softw. 7 (1981), from its published definitions. Each g is written once, for any array API namespace.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from implicit_core.arrays import Array

TOLERANCE = 1e-4
"""The largest |g_i| of a root, as in the published comparison of the 23 problems."""
SCALES = 1.0, 10.0, 100.0
"""What a start is multiplied by."""


@dataclass(frozen=True)
class RootProblem:
    """g(x) = 0.

    Attributes
    ----------
    name
        Name in the tables.
    function
        ``(xp, x) -> g(x)`` of an array (n,), with the operations of ``xp``.
    start
        The usual start, (n,).
    """

    name: str
    function: Callable[[Any, Array], Array]
    start: np.ndarray

    def scaled(self, factor: float) -> "RootProblem":
        """The same problem from ``factor`` times its start."""
        name = self.name if factor == 1 else f"{self.name}, start x {factor:g}"
        return RootProblem(name, self.function, factor * self.start)

    def largest(self, x: Any) -> float:
        """The largest |g_i| at a point, in float64; infinite where one is not finite."""
        with np.errstate(all="ignore"):
            largest = float(np.max(np.abs(self.function(np, np.asarray(x, np.float64)))))
        return largest if math.isfinite(largest) else math.inf


def _indices(xp: Any, x: Array) -> Array:
    """1, ..., n as numbers like x."""
    return xp.astype(xp.arange(1, x.shape[0] + 1, device=getattr(x, "device", None)), x.dtype)


def _outer(a: Array, b: Array) -> Array:
    return a[:, None] * b[None, :]


def _shifted(xp: Any, x: Array, by: int) -> Array:
    """The entries ``by`` places later, with zeros beyond the ends."""
    zeros = xp.zeros_like(x[: abs(by)])
    return xp.concat([x[by:], zeros]) if by > 0 else xp.concat([zeros, x[:by]])


def _rosenbrock_chain(xp: Any, x: Array) -> Array:
    return xp.concat([1 - x[:1], 10 * (x[1:] - x[:-1] ** 2)])


def _powell_singular(xp: Any, x: Array) -> Array:
    a, b, c, d = x[0], x[1], x[2], x[3]
    return xp.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def _powell_badly_scaled(xp: Any, x: Array) -> Array:
    return xp.stack([1e4 * x[0] * x[1] - 1, xp.exp(-x[0]) + xp.exp(-x[1]) - 1.0001])


def _wood(xp: Any, x: Array) -> Array:
    a, b, c, d = x[0], x[1], x[2], x[3]
    first, second = b - a * a, d - c * c
    return xp.stack(
        [
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        ]
    )


def _helical_valley(xp: Any, x: Array) -> Array:
    a, b, c = x[0], x[1], x[2]
    angle = xp.atan(b / a) / (2 * math.pi) + xp.where(a < 0, xp.full_like(a, 0.5), xp.zeros_like(a))
    angle = xp.where(a == 0, 0.25 * xp.sign(b), angle)
    return xp.stack([10 * (c - 10 * angle), 10 * (xp.sqrt(a * a + b * b) - 1), c])


def _watson(xp: Any, x: Array) -> Array:
    """As in the set of 23, which differs from the gradient of Watson's function in some terms."""
    k = _indices(xp, x)
    t = xp.astype(xp.arange(1, 30, device=getattr(x, "device", None)), x.dtype) / 29
    powers = xp.stack([t ** float(j) for j in range(-1, x.shape[0])], axis=1)
    slope, value = powers[:, 1:-1] @ (k * x)[1:], powers[:, 1:] @ x
    gradient = powers[:, :-1] * (k[None, :] - 2 * (t * value)[:, None])
    out = xp.sum((slope - value**2 - 1)[:, None] * gradient, axis=0)
    a, b = x[0], x[1]
    return xp.concat([out[:2] + xp.stack([a * (3 - 2 * b + 2 * a * a), b * (1 - b) - 1]), out[2:]])


def _chebyquad(xp: Any, x: Array) -> Array:
    n = x.shape[0]
    before, current, sums = xp.ones_like(x), x, []
    for i in range(1, n + 1):
        sums.append(xp.sum(current) / n + (1 / (i * i - 1) if i % 2 == 0 else 0.0))
        before, current = current, 2 * x * current - before
    return xp.stack(sums)


def _brown_almost_linear(xp: Any, x: Array) -> Array:
    return xp.concat([x[:-1] + xp.sum(x) - (x.shape[0] + 1), (xp.prod(x) - 1)[None]])


def _boundary_value(xp: Any, x: Array) -> Array:
    h = 1 / (x.shape[0] + 1)
    return 2 * x - _shifted(xp, x, -1) - _shifted(xp, x, 1) + h**2 / 2 * (x + h * _indices(xp, x) + 1) ** 3


def _integral_equation(xp: Any, x: Array) -> Array:
    h = 1 / (x.shape[0] + 1)
    t = h * _indices(xp, x)
    cubes = (x + t + 1) ** 3
    below, above = t * cubes, (1 - t) * cubes
    from_start = xp.cumsum(below)
    return x + h / 2 * ((1 - t) * from_start + t * (xp.sum(above) - xp.cumsum(above)))


def _integral_equation_counted_twice(xp: Any, x: Array) -> Array:
    """As in the set of 23, where the term j = k is in both sums."""
    h = 1 / (x.shape[0] + 1)
    t = h * _indices(xp, x)
    return _integral_equation(xp, x) + h / 2 * t * (1 - t) * (x + t + 1) ** 3


def _trigonometric(xp: Any, x: Array) -> Array:
    return x.shape[0] - xp.sum(xp.cos(x)) + _indices(xp, x) * (1 - xp.cos(x)) - xp.sin(x)


def _variably_dimensioned(xp: Any, x: Array) -> Array:
    k = _indices(xp, x)
    total = xp.sum(k * (x - 1))
    return x - 1 + k * total * (1 + 2 * total**2)


def _broyden_tridiagonal(xp: Any, x: Array) -> Array:
    return (3 - 2 * x) * x + 1 - _shifted(xp, x, -1) - 2 * _shifted(xp, x, 1)


def _broyden_banded(xp: Any, x: Array) -> Array:
    terms = x * (1 + x)
    neighbours = sum((_shifted(xp, terms, by) for by in (-5, -4, -3, -2, -1, 1)), start=xp.zeros_like(x))
    return x * (2 + 5 * x**2) + 1 - neighbours


def _matrix_square_root(xp: Any, x: Array) -> Array:
    n = math.isqrt(x.shape[0])
    root = xp.reshape(x, (n, n))
    wanted = [1e-4 if i % (n + 1) == 0 else 1.0 if i == 1 else 0.0 for i in range(n * n)]
    return xp.reshape(root @ root, (-1,)) - xp.asarray(wanted, dtype=x.dtype, device=getattr(x, "device", None))


def _circle_and_line(xp: Any, x: Array) -> Array:
    return xp.stack([x[0] + x[1] - 3, x[0] ** 2 + x[1] ** 2 - 9])


def _exponentials(xp: Any, x: Array) -> Array:
    a, b = x[0], x[1]

    def ratio(a: Array) -> Array:
        """(1 - exp(-a²)) / a, which is zero at zero."""
        divisor = xp.where(a == 0, xp.ones_like(a), a)
        return xp.where(a == 0, xp.zeros_like(a), (1 - xp.exp(-a * a)) / divisor)

    return xp.stack([b * b * ratio(a), a * ratio(b)])


def _cubic_norm(xp: Any, x: Array) -> Array:
    return x * xp.sum(x * x)


def _double_root(_: Any, x: Array) -> Array:
    return x * (x - 5) ** 2


def _freudenstein_roth(xp: Any, x: Array) -> Array:
    a, b = x[0], x[1]
    return xp.stack([a - b**3 + 5 * b**2 - 2 * b - 13, a + b**3 + b**2 - 14 * b - 29])


def _boggs(xp: Any, x: Array) -> Array:
    return xp.stack([x[0] ** 2 - x[1] + 1, x[0] - xp.cos(math.pi / 2 * x[1])])


def _chandrasekhar(xp: Any, x: Array) -> Array:
    k = _indices(xp, x)
    kernel = k[:, None] / (k[:, None] + k[None, :])
    return x - 1 / (1 - 0.9 / (2 * x.shape[0]) * (kernel @ x))


def _extended_rosenbrock(xp: Any, x: Array) -> Array:
    odd, even = x[0::2], x[1::2]
    return xp.reshape(xp.stack([10 * (even - odd**2), 1 - odd], axis=1), (-1,))


def _extended_powell_singular(xp: Any, x: Array) -> Array:
    a, b, c, d = x[0::4], x[1::4], x[2::4], x[3::4]
    rows = [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    return xp.reshape(xp.stack(rows, axis=1), (-1,))


def _box(xp: Any, x: Array) -> Array:
    t = 0.1 * _indices(xp, x)
    return xp.exp(-t * x[0]) - xp.exp(-t * x[1]) - x[2] * (xp.exp(-t) - xp.exp(-10 * t))


def _linear_full_rank(xp: Any, x: Array) -> Array:
    return x - 2 / x.shape[0] * xp.sum(x) - 1


def _shifted_chebyquad(xp: Any, x: Array) -> Array:
    return _chebyquad(xp, 2 * x - 1)


def _parabola(n: int) -> np.ndarray:
    t = np.arange(1, n + 1) / (n + 1)
    return t * (t - 1)


_N = 10
TWENTY_THREE = (
    RootProblem("Rosenbrock chain", _rosenbrock_chain, np.array([-1.2, *[1.0] * (_N - 1)])),
    RootProblem("Powell singular", _powell_singular, np.array([3.0, -1.0, 0.0, 1.0])),
    RootProblem("Powell badly scaled", _powell_badly_scaled, np.array([0.0, 1.0])),
    RootProblem("Wood", _wood, np.array([-3.0, -1.0, -3.0, -1.0])),
    RootProblem("helical valley", _helical_valley, np.array([-1.0, 0.0, 0.0])),
    RootProblem("Watson", _watson, np.zeros(2)),
    RootProblem("Chebyquad", _chebyquad, np.array([0.0, 2 / 3])),
    RootProblem("Brown almost linear", _brown_almost_linear, np.full(_N, 0.5)),
    RootProblem("boundary value", _boundary_value, _parabola(_N)),
    RootProblem("integral equation", _integral_equation_counted_twice, _parabola(_N)),
    RootProblem("trigonometric", _trigonometric, np.full(_N, 1 / _N)),
    RootProblem("variably dimensioned", _variably_dimensioned, 1 - np.arange(1, _N + 1) / _N),
    RootProblem("Broyden tridiagonal", _broyden_tridiagonal, np.full(_N, -1.0)),
    RootProblem("Broyden banded", _broyden_banded, np.full(_N, -1.0)),
    RootProblem("2 x 2 square root", _matrix_square_root, np.eye(2).reshape(-1)),
    RootProblem("3 x 3 square root", _matrix_square_root, np.eye(3).reshape(-1)),
    RootProblem("circle and line", _circle_and_line, np.array([1.0, 5.0])),
    RootProblem("exponentials", _exponentials, np.array([2.0, 2.0])),
    RootProblem("cubic norm", _cubic_norm, np.array([3.0, 3.0])),
    RootProblem("double root", _double_root, np.array([1.0])),
    RootProblem("Freudenstein and Roth", _freudenstein_roth, np.array([0.5, -2.0])),
    RootProblem("Boggs", _boggs, np.array([1.0, 0.0])),
    RootProblem("Chandrasekhar", _chandrasekhar, np.ones(_N)),
)
SQUARE = (
    RootProblem("Rosenbrock", _extended_rosenbrock, np.array([-1.2, 1.0])),
    RootProblem("Freudenstein and Roth", _freudenstein_roth, np.array([0.5, -2.0])),
    RootProblem("Powell badly scaled", _powell_badly_scaled, np.array([0.0, 1.0])),
    RootProblem("helical valley", _helical_valley, np.array([-1.0, 0.0, 0.0])),
    RootProblem("Box", _box, np.array([0.0, 10.0, 20.0])),
    RootProblem("Powell singular", _powell_singular, np.array([3.0, -1.0, 0.0, 1.0])),
    RootProblem("extended Rosenbrock", _extended_rosenbrock, np.tile([-1.2, 1.0], 50)),
    RootProblem("extended Powell singular", _extended_powell_singular, np.tile([3.0, -1.0, 0.0, 1.0], 25)),
    RootProblem("trigonometric", _trigonometric, np.full(10, 0.1)),
    RootProblem("Brown almost linear", _brown_almost_linear, np.full(10, 0.5)),
    RootProblem("Brown almost linear, n = 30", _brown_almost_linear, np.full(30, 0.5)),
    RootProblem("boundary value", _boundary_value, _parabola(100)),
    RootProblem("integral equation", _integral_equation, _parabola(100)),
    RootProblem("Broyden tridiagonal", _broyden_tridiagonal, np.full(100, -1.0)),
    RootProblem("Broyden banded", _broyden_banded, np.full(100, -1.0)),
    RootProblem("linear, full rank", _linear_full_rank, np.ones(100)),
    *(RootProblem(f"Chebyquad, n = {n}", _shifted_chebyquad, np.arange(1, n + 1) / (n + 1)) for n in (5, 6, 7, 9)),
)

"""Singular values and spectral radii of operators that are given by their products."""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..arrays import Array, Mask, Matrices, Numbers, Operator, State
from ..linear_solvers.arnoldi import orthogonalize, unit
from ..space import Space, normal

TINY = 100.0
"""Times ε: a number that small relative to the largest of its sample is a rounding error."""
ROUNDING = 8.0
"""Times √n ε and the norm: the largest effect of rounding on a singular value."""
SQUARINGS = 40
"""Gelfand's formula is evaluated at the power 2⁴⁰."""


class Bounds(NamedTuple):
    """A number with bounds. Floats, or arrays of the batch's shape.

    Attributes
    ----------
    low, high
        Bounds: one is certain, the other holds with the requested confidence.
    value
        The estimate, between the bounds: the number itself where the Krylov space was exhausted.

    Examples
    --------
    >>> from implicit_core.theory import Bounds
    >>> Bounds(0.90, 0.90, 0.92).high
    0.92
    """

    low: Any
    value: Any
    high: Any


class Spectrum(NamedTuple):
    """Singular values of an operator, for each sample, (N, 1).

    Attributes
    ----------
    largest, smallest
        Bounds of the extreme ones. The smallest is zero where rounding errors hide it.
    positive
        The smallest one that was found and is not zero.
    exhausted
        Whether the Krylov space is exhausted: then the bounds allow for rounding alone.
    """

    largest: Bounds
    smallest: Bounds
    positive: Numbers
    exhausted: Mask


def singular_values(
    product: Operator,
    transposed: Operator,
    space: Space,
    codomain: Space,
    *,
    steps: int,
    confidence: float,
    seed: int,
) -> Spectrum:
    r"""Golub-Kahan bidiagonalization of every sample's operator A, ``steps`` products with A and as many with Aᵀ.

    The domain's basis is kept, ``steps`` states, and orthogonalized twice. The codomain's basis is not kept: one side
    is enough (Simon and Zha). After k steps the singular values of the bidiagonal matrix lie between the extreme ones
    of A. A theorem bounds the distance: the start is uniform on the sphere, so with probability 1 - δ

    .. math::
        σ_{max}² (1 - ε) ≤ θ_{max}², \quad θ_{min}² - σ_{min}² ≤ ε (σ_{max}² - σ_{min}²), \quad
        ε = \left(\frac{\log(1.648 \sqrt{n} / δ)}{2k - 1}\right)²

    (Kuczyński and Woźniakowski, Theorem 4.1, for AᵀA and for σ_max² I - AᵀA). In addition all bounds allow for
    rounding, in the precision of the coarsest leaf. In a sample in which a number is not finite the value is NaN, with
    bounds (0, ∞).

    Parameters
    ----------
    product, transposed
        A, from states of ``space`` to states of ``codomain``, and its transpose.
    space, codomain
        Spaces with the same number of samples.
    steps
        The most steps. The domain's dimension limits them, too.
    confidence
        The probability that the bounds hold, in all samples together.
    seed
        Seed of the random start.

    References
    ----------
    G. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, SIAM J. Numer. Anal. 2
    (1965).
    H. D. Simon and H. Zha, Low-rank matrix approximation using the Lanczos bidiagonalization process with applications,
    SIAM J. Sci. Comput. 21 (2000).
    J. Kuczyński and H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start, SIAM J. Matrix Anal. Appl. 13 (1992).
    """
    # Decision 61.
    xp = space.xp
    n, eps = space.dimension, max(space.eps, codomain.eps)
    steps = min(steps, n)
    basis = space.history(steps)
    v, u, beta = start(space, seed), codomain.zeros(), space.full(0.0)
    active, finite, largest = space.all_samples(), space.all_samples(), space.full(0.0)
    alphas, betas, used = [], [], []
    for j in range(steps):
        basis = space.set_row(basis, j, v)
        used.append(active)
        u = codomain.axpy(-beta, u, product(v))
        alpha = length(codomain, u)
        largest = xp.maximum(largest, alpha)
        alpha = xp.where(alpha > TINY * eps * largest, alpha, xp.zeros_like(alpha))
        u = unit(codomain, u, alpha)
        _, w = orthogonalize(space, space.axpy(-alpha, v, transposed(u)), basis)
        beta = length(space, w)
        finite = finite & xp.isfinite(largest) & xp.isfinite(beta)
        largest = xp.maximum(largest, beta)
        active = active & finite & (beta > TINY * eps * largest)
        beta = xp.where(active, beta, xp.zeros_like(beta))
        v = _next(space, w, beta, active)
        alphas.append(xp.where(finite, alpha, xp.zeros_like(alpha)))
        betas.append(beta)
        if not bool(xp.any(active)):
            break

    # An unused place holds a number between the extreme singular values, so that it is neither of them.
    diagonal, in_use = xp.concat(alphas, axis=1), xp.concat(used, axis=1)
    diagonal = xp.where(in_use, diagonal, xp.max(diagonal, axis=1, keepdims=True))
    k = len(alphas)
    # At unit scale, where squares neither underflow nor overflow.
    scale = xp.where(finite & (largest > 0), largest, xp.ones_like(largest))
    bidiagonal = diagonal[:, :, None] * space.eye(k)[None, :, :] + _off_diagonal(space, betas, 1)
    values = xp.linalg.svdvals(bidiagonal / scale[:, :, None])
    exhausted = finite & (~active if k < n else space.all_samples())
    share = gap(n, k, 1 - (1 - confidence) / (2 * space.samples))
    rounding = ROUNDING * math.sqrt(n) * max(space.coarsest_eps, codomain.coarsest_eps)
    return _with_bounds(space, values, scale, share, rounding, exhausted, finite)


def _with_bounds(
    space: Space, values: Array, scale: Numbers, share: float, rounding: float, exhausted: Mask, finite: Mask
) -> Spectrum:
    """Spectra of the operators, from the singular values (N, k) of the bidiagonal matrices in units of ``scale``."""
    xp = space.xp
    top, bottom = values[:, :1], values[:, -1:]
    nothing = xp.zeros_like(top)
    slack = rounding * top
    known = share < 1
    above = top / math.sqrt(1 - share) if known else space.filled(top, ~exhausted, math.inf)
    rest = (bottom**2 - share * above**2) / (1 - share) if known else nothing
    above = xp.where(exhausted, top, above) + slack
    below = xp.where(exhausted, bottom, xp.sqrt(xp.maximum(rest, nothing))) - slack
    least = xp.where(bottom > slack, bottom, nothing)
    positive = xp.min(xp.where(values > slack, values, top), axis=1, keepdims=True)

    def at_scale(x: Numbers, otherwise: float) -> Numbers:
        return space.filled(scale * x, ~finite, otherwise)

    return Spectrum(
        Bounds(at_scale(xp.maximum(top - slack, nothing), 0.0), at_scale(top, math.nan), at_scale(above, math.inf)),
        Bounds(
            at_scale(xp.maximum(xp.minimum(below, least), nothing), 0.0),
            at_scale(least, math.nan),
            at_scale(bottom + slack, math.inf),
        ),
        at_scale(positive, math.nan),
        exhausted,
    )


def gap(n: int, steps: int, confidence: float) -> float:
    """ε of :func:`singular_values`: the relative distance of an extreme eigenvalue from its estimate."""
    return (math.log(1.648 * math.sqrt(n) / (1 - confidence)) / (2 * steps - 1)) ** 2


def largest_eigenvalue(product: Operator, space: Space, *, steps: int, seed: int) -> Numbers:
    """The largest modulus of an eigenvalue of every sample's operator, (N, 1), by ``steps`` of Arnoldi's method.

    Where the Krylov space is exhausted it is exact, as far as the eigenvalues are well conditioned, which they are not
    for a matrix far from normal. Otherwise it is an estimate: Arnoldi's method finds the outermost eigenvalues first,
    but for a general matrix there is no bound. NaN in a sample in which a number is not finite.
    """
    xp, eps = space.xp, space.eps
    steps = min(steps, space.dimension)
    basis, v = space.history(steps), start(space, seed)
    active, finite, largest = space.all_samples(), space.all_samples(), space.full(0.0)
    columns, heights = [], []
    for j in range(steps):
        basis = space.set_row(basis, j, v)
        column, rest = orthogonalize(space, product(v), basis)
        height = length(space, rest)
        largest = xp.maximum(largest, space.largest_of(column))
        largest = xp.maximum(largest, height)
        finite = finite & xp.isfinite(largest)
        active = active & finite & (height > TINY * eps * largest)
        height = xp.where(active, height, xp.zeros_like(height))
        columns.append(xp.where(finite, column, xp.zeros_like(column)))
        heights.append(height)
        v = _next(space, rest, height, active)
        if not bool(xp.any(active)):
            break
    k = len(columns)
    hessenberg = xp.stack(columns, axis=2)[:, :k, :] + _off_diagonal(space, heights, -1)
    radius = _largest_modulus(space, hessenberg)
    return space.filled(radius, ~finite, math.nan)


def _next(space: Space, x: State, size: Numbers, active: Mask) -> State:
    """The next vector of a basis, ``x`` at unit length; zero in a sample whose basis is complete."""
    return space.where(active, unit(space, x, size), space.zeros())


def _off_diagonal(space: Space, numbers: Sequence[Numbers], offset: int) -> Matrices:
    """Matrices (N, k, k) with k numbers (N, 1), less the last, next to the diagonal: above it, or below."""
    xp, k = space.xp, len(numbers)
    places = xp.eye(k, k=offset, dtype=space.dtype, device=space.device)[None, :, :]
    along = xp.concat(list(numbers), axis=1)
    matrices: Matrices = (along[:, :, None] if offset > 0 else along[:, None, :]) * places
    return matrices


def _largest_modulus(space: Space, matrix: Matrices) -> Numbers:
    """The spectral radius of small matrices, (N, k, k) -> (N, 1): the limit of ‖Mᵖ‖^(1/p), p = 2, 4, ... (Gelfand)."""
    # Decision 64.
    xp = space.xp
    logarithm, power = space.full(0.0)[:, :, None], 1.0
    of_zero = -float(space.backend.finfo(space.dtype).max) / 4  # all of them add up to twice as much
    for _ in range(SQUARINGS):
        norm = xp.max(xp.abs(matrix), axis=(1, 2), keepdims=True)
        safe = xp.where(norm > 0, norm, xp.ones_like(norm))
        logarithm = logarithm + xp.where(norm > 0, xp.log(safe), xp.full_like(norm, of_zero)) / power
        matrix = matrix / safe
        matrix, power = matrix @ matrix, 2 * power
    radius: Numbers = xp.exp(logarithm)[:, :, 0]
    return radius


def start(space: Space, seed: int, *, shared: bool = False) -> State:
    """A unit vector for each sample, uniform on the sphere; the same in every framework.

    If it is ``shared``, all samples get the same vector, which takes less time to draw.
    """
    draw, samples = random.Random(seed).gauss, 1 if shared else space.samples
    x = State(tuple(normal(space, draw, samples, d) for _, d in space.flat_shapes))
    x = space.divide(x, space.norm(x))
    return space.add(space.zeros(), x) if shared else x


def length(space: Space, x: State) -> Numbers:
    """Euclidean norm of each sample, computed at unit scale: squares neither underflow nor overflow."""
    scale = space.magnitude(x)
    return scale * space.norm(space.divide(x, scale))

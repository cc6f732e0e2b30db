"""Singular values and spectral radii of operators that are known by their products."""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..backend import Array
from ..linear_solvers.base import ratio
from ..space import History, Operator, Space, State

TINY = 100.0
"""Times ε: what is that small beside the largest number of its sample is rounding error."""
ROUNDING = 8.0
"""Times √n ε and the norm: what rounding may do to a singular value."""
SQUARINGS = 40


class Bounds(NamedTuple):
    """A number with bounds. Floats, or arrays of the batch's shape.

    Attributes
    ----------
    low, high
        Bounds: one is certain, the other holds with the confidence that was asked for.
    value
        The estimate, between them: the number itself where the Krylov space was exhausted.

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
        Of all of them. The smallest is zero where it can't be told from zero.
    positive
        The smallest of those that were found and are not zero.
    exhausted
        Whether the Krylov space was: then the bounds are those of rounding.
    """

    largest: Bounds
    smallest: Bounds
    positive: Array
    exhausted: Array


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

    The domain's basis is kept, ``steps`` states, and orthogonalized twice; that of the codomain is not kept: one side
    is enough (Simon and Zha). After k steps the largest and smallest singular values of the bidiagonal matrix are
    within the true ones. By how much is a theorem: the start is uniform on the sphere, so with probability 1 - δ

    .. math::
        σ_{max}² (1 - ε) ≤ θ_{max}², \quad θ_{min}² - σ_{min}² ≤ ε (σ_{max}² - σ_{min}²), \quad
        ε = \left(\frac{\log(1.648 \sqrt{n} / δ)}{2k - 1}\right)²

    (Kuczyński and Woźniakowski, Theorem 4.1, for AᵀA and for σ_max² I - AᵀA). On top of that all bounds allow for
    rounding, in the precision of the coarsest leaf. Where something is not finite the value is NaN, between 0 and ∞.

    Parameters
    ----------
    product, transposed
        A, from states of ``space`` to those of ``codomain``, and its transpose.
    space, codomain
        Of as many samples.
    steps
        At most; no more than the domain has dimensions.
    confidence
        That all bounds hold, of all samples together.
    seed
        Of the start.

    References
    ----------
    G. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, SIAM J. Numer. Anal. 2
    (1965).
    H. D. Simon and H. Zha, Low-rank matrix approximation using the Lanczos bidiagonalization process with applications,
    SIAM J. Sci. Comput. 21 (2000).
    J. Kuczyński and H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start, SIAM J. Matrix Anal. Appl. 13 (1992).
    """
    xp = space.xp
    n, eps = dimension(space), max(space.eps, codomain.eps)
    steps = min(steps, n)
    basis = space.history(steps)
    v, u, beta = start(space, seed), codomain.zeros(), space.full(0.0)
    active, finite, largest = space.full(True, xp.bool), space.full(True, xp.bool), space.full(0.0)
    alphas, betas, used = [], [], []
    for j in range(steps):
        basis = space.set_row(basis, j, v)
        used.append(active)
        u = codomain.axpy(-beta, u, product(v))
        alpha = length(codomain, u)
        largest = xp.maximum(largest, alpha)
        alpha = xp.where(alpha > TINY * eps * largest, alpha, xp.zeros_like(alpha))
        u = codomain.scale(ratio(xp, xp.ones_like(alpha), alpha), u)
        w, _ = orthogonal(space, space.axpy(-alpha, v, transposed(u)), basis)
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
    scale = xp.where(largest > 0, largest, xp.ones_like(largest))
    scale = xp.where(finite, scale, xp.ones_like(scale))
    bidiagonal = diagonal[:, :, None] * space.eye(k) + _beside_diagonal(space, betas, 1)
    values = xp.linalg.svdvals(bidiagonal / scale[:, :, None])
    exhausted = finite & (~active if k < n else space.full(True, xp.bool))
    share = gap(n, k, 1 - (1 - confidence) / (2 * space.samples))
    rounding = ROUNDING * math.sqrt(n) * max(space.coarsest_eps, codomain.coarsest_eps)
    return _with_bounds(space, values, scale, share, rounding, exhausted, finite)


def _with_bounds(
    space: Space, values: Array, scale: Array, share: float, rounding: float, exhausted: Array, finite: Array
) -> Spectrum:
    """Singular values (N, k) of the bidiagonal matrices, in units of ``scale``, as those of the operators."""
    xp = space.xp
    top, bottom = values[:, :1], values[:, -1:]
    nothing, infinite = xp.zeros_like(top), xp.full_like(top, math.inf)
    slack = rounding * top
    known = share < 1
    above = top / math.sqrt(1 - share) if known else infinite
    rest = (bottom**2 - share * above**2) / (1 - share) if known else nothing
    above = xp.where(exhausted, top, above) + slack
    below = xp.where(exhausted, bottom, xp.sqrt(xp.maximum(rest, nothing))) - slack
    least = xp.where(bottom > slack, bottom, nothing)
    positive = xp.min(xp.where(values > slack, values, top), axis=1, keepdims=True)

    def at_scale(x: Array, without: float) -> Array:
        return xp.where(finite, scale * x, xp.full_like(x, without))

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
    """ε: how far, relative to the largest, an extreme eigenvalue may be beyond that of the Krylov space."""
    return (math.log(1.648 * math.sqrt(n) / (1 - confidence)) / (2 * steps - 1)) ** 2


def spectral_radius(product: Operator, space: Space, *, steps: int, seed: int) -> Array:
    """The largest modulus of an eigenvalue of every sample's operator, (N, 1), by ``steps`` of Arnoldi's method.

    Where the Krylov space is exhausted, exact as far as the eigenvalues are well conditioned, which those of a matrix
    far from normal are not. Otherwise an estimate: eigenvalues at the rim of the spectrum are found first, but for a
    general matrix there is no bound. NaN in a sample in which something is not finite.

    References
    ----------
    W. E. Arnoldi, The principle of minimized iterations in the solution of the matrix eigenvalue problem, Quart. Appl.
    Math. 9 (1951).
    """
    xp, eps = space.xp, space.eps
    steps = min(steps, dimension(space))
    basis, v = space.history(steps), start(space, seed)
    active, finite, largest = space.full(True, xp.bool), space.full(True, xp.bool), space.full(0.0)
    columns, heights = [], []
    for j in range(steps):
        basis = space.set_row(basis, j, v)
        rest, column = orthogonal(space, product(v), basis)
        height = length(space, rest)
        largest = xp.maximum(largest, xp.max(xp.abs(column), axis=1, keepdims=True))
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
    hessenberg = xp.stack(columns, axis=2)[:, :k, :] + _beside_diagonal(space, heights, -1)
    radius = _largest_modulus(space, hessenberg)
    return xp.where(finite, radius, xp.full_like(radius, math.nan))


def _next(space: Space, x: State, size: Array, active: Array) -> State:
    """The next vector of a basis, ``x`` at unit length; zero in a sample whose basis is complete."""
    unit = space.scale(ratio(space.xp, space.xp.ones_like(size), size), x)
    return space.where(active, unit, space.zeros())


def _beside_diagonal(space: Space, numbers: Sequence[Array], offset: int) -> Array:
    """Matrices (N, k, k) with k numbers (N, 1), less the last, next to the diagonal: above it, or below."""
    xp, k = space.xp, len(numbers)
    places = xp.eye(k, k=offset, dtype=space.dtype, device=space.device)
    along = xp.concat(list(numbers), axis=1)
    return (along[:, :, None] if offset > 0 else along[:, None, :]) * places


def _largest_modulus(space: Space, matrix: Array) -> Array:
    """The spectral radius of small matrices, (N, k, k) -> (N, 1), as the limit of ‖Mᵖ‖^(1/p) (Gelfand), p = 2, 4, ...

    The array API has no eigenvalues of a general matrix. Powers by squaring need none: p = 2⁴⁰ leaves nothing to see.
    """
    xp = space.xp
    logarithm, power = space.full(0.0)[:, :, None], 1.0
    for _ in range(SQUARINGS):
        norm = xp.max(xp.abs(matrix), axis=(1, 2), keepdims=True)
        safe = xp.where(norm > 0, norm, xp.ones_like(norm))
        logarithm = logarithm + xp.where(norm > 0, xp.log(safe), xp.full_like(norm, -math.inf)) / power
        matrix = matrix / safe
        matrix, power = matrix @ matrix, 2 * power
    return xp.exp(logarithm)[:, :, 0]


def start(space: Space, seed: int) -> State:
    """A unit vector for each sample, uniform on the sphere; the same in every framework."""
    draw = random.Random(seed).gauss  # the array API has no random numbers
    xp = space.xp
    x = tuple(
        xp.reshape(xp.asarray([draw(0.0, 1.0) for _ in range(n * d)], dtype=space.dtype, device=space.device), (n, d))
        for n, d in space.flat_shapes
    )
    return space.divide(x, space.norm(x))


def length(space: Space, x: State) -> Array:
    """Euclidean norm of each sample, (N, 1), by way of unit scale: squares neither underflow nor overflow."""
    scale = space.magnitude(x)
    return scale * space.norm(space.divide(x, scale))


def orthogonal(space: Space, x: State, basis: History) -> tuple[State, Array]:
    """``x`` less its part within the span of a basis, by classical Gram-Schmidt twice, and that part, (N, m)."""
    row = space.row(x)
    first = space.products(row, basis)
    row = space.combine_onto(row, -first, basis)
    second = space.products(row, basis)
    return space.state(space.combine_onto(row, -second, basis)), (first + second)[:, 0, :]


def dimension(space: Space) -> int:
    """Numbers of one sample."""
    return sum(d for _, d in space.flat_shapes)

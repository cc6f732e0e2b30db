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
        Of all of them; the smallest may be zero.
    positive
        The smallest of those that were found and are not zero.
    exhausted
        Whether the Krylov space was: then they are as exact as the arithmetic.
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

    The domain's basis is kept and orthogonalized twice, that of the codomain is not kept: one side is enough (Simon
    and Zha). After k steps the largest and smallest singular values of the bidiagonal matrix are within the true ones.
    By how much is a theorem: the start is uniform on the sphere, so with probability 1 - δ

    .. math::
        σ_{max}² (1 - ε) ≤ θ_{max}², \quad θ_{min}² - σ_{min}² ≤ ε (σ_{max}² - σ_{min}²), \quad
        ε = \left(\frac{\log(1.648 \sqrt{n} / δ)}{2k - 1}\right)²

    (Kuczyński and Woźniakowski, Theorem 4.1, for AᵀA and for σ_max² I - AᵀA).

    Parameters
    ----------
    product, transposed
        A, from states of ``space`` to those of ``codomain``, and its transpose.
    space, codomain
        Of as many samples.
    steps
        At most; no more than the domain has dimensions.
    confidence
        1 - δ.
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
    n, eps = dimension(space), max(space.coarsest_eps, codomain.coarsest_eps)
    steps = min(steps, n)
    basis = space.history(steps)
    v, u, beta = start(space, seed), codomain.zeros(), space.full(0.0)
    active, largest = space.full(True, xp.bool), space.full(0.0)
    alphas, betas, used = [], [], []
    for j in range(steps):
        basis = space.set_row(basis, j, v)
        used.append(active)
        u = codomain.axpy(-beta, u, product(v))
        alpha = codomain.norm(u)
        largest = xp.maximum(largest, alpha)
        alpha = xp.where(alpha > TINY * eps * largest, alpha, xp.zeros_like(alpha))
        u = codomain.scale(ratio(xp, xp.ones_like(alpha), alpha), u)
        w = orthogonal(space, space.axpy(-alpha, v, transposed(u)), basis)
        beta = space.norm(w)
        largest = xp.maximum(largest, beta)
        active = active & (beta > TINY * eps * largest)
        beta = xp.where(active, beta, xp.zeros_like(beta))
        v = space.scale(ratio(xp, xp.ones_like(beta), beta), w)
        alphas.append(alpha)
        betas.append(beta)
        if not bool(xp.any(active)):
            break

    # An unused place holds a number between the extreme singular values, so that it is neither of them.
    diagonal, in_use = xp.concat(alphas, axis=1), xp.concat(used, axis=1)
    diagonal = xp.where(in_use, diagonal, xp.max(diagonal, axis=1, keepdims=True))
    k = len(alphas)
    values = xp.linalg.svdvals(diagonal[:, :, None] * space.eye(k) + _beside_diagonal(space, betas, 1))
    top, bottom = values[:, :1], values[:, -1:]
    exhausted = ~active if k < n else space.full(True, xp.bool)
    zero = TINY * eps * top
    bottom = xp.where(bottom > zero, bottom, xp.zeros_like(bottom))
    positive = xp.min(xp.where(values > zero, values, top), axis=1, keepdims=True)

    share = gap(n, k, confidence)
    if share < 1:
        above_top = xp.where(exhausted, top, top / math.sqrt(1 - share))
    else:
        above_top = xp.where(exhausted, top, space.full(math.inf))
    rest = bottom**2 - (0.0 if share >= 1 else share) * above_top**2
    rest = rest / (1 - share) if share < 1 else xp.zeros_like(rest)
    below = xp.sqrt(xp.maximum(rest, xp.zeros_like(rest)))
    below = xp.where(exhausted, bottom, below)
    return Spectrum(Bounds(top, top, above_top), Bounds(below, bottom, bottom), positive, exhausted)


def gap(n: int, steps: int, confidence: float) -> float:
    """ε: how far, relative to the largest, an extreme eigenvalue may be beyond that of the Krylov space."""
    return (math.log(1.648 * math.sqrt(n) / (1 - confidence)) / (2 * steps - 1)) ** 2


def spectral_radius(product: Operator, space: Space, *, steps: int, seed: int) -> Array:
    """The largest modulus of an eigenvalue of every sample's operator, (N, 1), by ``steps`` of Arnoldi's method.

    Exact, as far as the eigenvalues are well conditioned, where the Krylov space is exhausted. Otherwise an estimate:
    eigenvalues at the rim of the spectrum are found first, but for a general matrix there is no bound.

    References
    ----------
    W. E. Arnoldi, The principle of minimized iterations in the solution of the matrix eigenvalue problem, Quart. Appl.
    Math. 9 (1951).
    """
    xp, eps = space.xp, space.coarsest_eps
    steps = min(steps, dimension(space))
    basis, v = space.history(steps), start(space, seed)
    active, largest = space.full(True, xp.bool), space.full(0.0)
    columns, heights = [], []
    for j in range(steps):
        basis = space.set_row(basis, j, v)
        w = space.row(product(v))
        first = space.products(w, basis)
        w = space.combine_onto(w, -first, basis)
        second = space.products(w, basis)
        rest = space.state(space.combine_onto(w, -second, basis))
        column, height = (first + second)[:, 0, :], space.norm(rest)
        largest = xp.maximum(largest, xp.max(xp.abs(column), axis=1, keepdims=True))
        largest = xp.maximum(largest, height)
        active = active & (height > TINY * eps * largest)
        height = xp.where(active, height, xp.zeros_like(height))
        columns.append(column)
        heights.append(height)
        v = space.scale(ratio(xp, xp.ones_like(height), height), rest)
        if not bool(xp.any(active)):
            break
    k = len(columns)
    hessenberg = xp.stack(columns, axis=2)[:, :k, :] + _beside_diagonal(space, heights, -1)
    return _largest_modulus(space, hessenberg)


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
        norm = xp.sqrt(xp.sum(matrix * matrix, axis=(1, 2), keepdims=True))
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


def orthogonal(space: Space, x: State, basis: History) -> State:
    """``x`` less its part within the span of a basis, by classical Gram-Schmidt twice."""
    row = space.row(x)
    for _ in range(2):
        row = space.combine_onto(row, -space.products(row, basis), basis)
    return space.state(row)


def dimension(space: Space) -> int:
    """Numbers of one sample."""
    return sum(d for _, d in space.flat_shapes)

"""Theorem 1's conditions and Theorem 2's bound, at a point, matrix-free."""

import math
from collections.abc import Callable
from typing import NamedTuple

from .. import checks, settings
from ..arrays import Array, H, Numbers, Z
from ..estimators import AtFixedPoint, Derivative, Estimator, Implicit
from ..estimators.base import bind
from ..estimators.growth import untested
from ..linear_solvers import GMRES, LinearSolver
from ..linear_solvers.arnoldi import unit
from ..problem import Problem
from ..solution import SolveError
from ..space import Space
from .balancing import balance
from .certificate import Certificate, Condition, largest
from .krylov import ROUNDING, Bounds, Spectrum, largest_eigenvalue, length, singular_values
from .operators import CountedProblem, Jacobians, Pair, check, deviation

UNKNOWN = Bounds(0.0, math.nan, math.inf)


def certify(
    problem: Problem[H, Z],
    h: H,
    z: Z,
    gradient: Estimator,
    *,
    cotangent: H | None = None,
    steps: int = 40,
    confidence: float = 0.999,
    seed: int = 0,
    linear_solver: LinearSolver = GMRES(rtol=1e-9, restart=40, max_steps=2000),
) -> Certificate:
    r"""Check the paper's conditions on a gradient estimator, at one point and without a matrix.

    With all Jacobians at the estimator's value, transposed as in the paper (a cotangent goes in), it computes

    - both sides of condition (6), :math:`\|A (I - ∂F/∂h) - ∂F/∂z\| ≤ σ_{min}² / σ_{max}`, under which the estimate is
      a descent direction of every loss (Theorem 1), and of (8), where :math:`A = (∂F/∂z) D`; σ_min alone on the right
      of (6) is enough for that, see :class:`Certificate`;
    - the singular values of ∂F/∂z in these conditions;
    - the contraction L_h, the spectral radius of ∂F/∂h, and Theorem 2's bound of the error.

    Extreme singular values come from ``steps`` steps of Golub-Kahan bidiagonalization, the spectral radius from as many
    of Arnoldi's method. They are exact, up to rounding, where an operator has no more dimensions than ``steps``. Beyond
    that an estimate is a bound from one side, and the bounds from the other side hold with the given confidence, all of
    them together: with the default, a norm in 10⁴ dimensions is known to 1.7 %. For σ_min that takes a condition number
    below about 5; a larger one leaves the conditions open, unless there are more steps. All bounds allow for rounding:
    in half precision that leaves most conditions open, and a float32 copy of the model gives tighter bounds.

    For :class:`Implicit` and :class:`NeumannSeries`, D is not a fixed linear map (they stop on a data-dependent test),
    so its norm cannot be measured with matrix-vector products. The left sides of their conditions are bounded by the
    tolerance that the estimator guarantees, where L_h < 1 is certain.

    All samples of a batch share z, so ∂F/∂z is one operator on the whole batch, and the conditions are about the
    gradient of any loss of the batch. For a single sample, pass that sample alone. Arrays that ``f`` closes over are
    constants here: pass what is trained in z. In PyTorch the certificate lists tensors that require a gradient and are
    left out so, for one more evaluation of F.

    Norms are those of h / scale, where the problem has a scale. The spectral radius and the exact gradient of
    ``cotangent`` do not depend on units: they are computed in units that balance ∂F/∂h.

    It costs, for n steps and an estimator at the fixed point with k terms, at most (4 k + 5) n + 1 products with ∂F/∂h
    and 4 n + 1 with ∂F/∂z, and holds n states: with the defaults as much time as 25 to 140 steps of training in
    PyTorch. For ``Unroll`` k times as many with ∂F/∂z, and k evaluations of F for each product. Call it now and then,
    on a few samples; :func:`spectral_radius` and :func:`contraction` are cheaper.

    Parameters
    ----------
    problem
        With a VJP and a JVP.
    h
        A fixed point, the solver's: shaped (batch..., state...).
    z
        Inputs and parameters. Leaves that are not real floating arrays, or whose cotangent is None, are constants.
    gradient
        The estimator.
    cotangent
        ∂L/∂h, shaped as h: also measure the cosine and the relative error of the estimate to the exact gradient. They
        are NaN if ``linear_solver`` did not converge.
    steps
        At least 1.
    confidence
        In (0, 1).
    seed
        Seed of the random starts.
    linear_solver
        For the exact gradient of ``cotangent``.

    Returns
    -------
    Certificate
        Numbers of the batch and of its samples. Printed, it is a table.

    Raises
    ------
    NotImplementedError
        If the problem lacks its VJP or JVP, or within ``jax.jit``.
    TypeError, ValueError
        If an argument or a callback's result has a wrong structure, shape, dtype or device, or z has no derivative.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Theorems 1 and 2, Eq. 6 to 8.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> from implicit_core.theory import certify
    >>> a = np.array([0.5, -0.2])
    >>> problem = ic.Problem(
    ...     lambda h, z: a * h + z, vjp=lambda h, z, v: (a * v, v), jvp=lambda h, z, dh, dz: a * dh + dz)
    >>> z = np.array([1.0, 2.4])
    >>> certificate = certify(problem, np.array([2.0, 2.0]), z, ic.Neumann(k=3, lam=1.0), cotangent=np.ones(2))
    >>> certificate.descent, round(certificate.condition_6.left.value, 6)  # 0.5³
    (True, 0.125)
    >>> print(certificate)
    Neumann(k=3, lam=1.0)
      h, z                  1 x 2 numbers, 2 numbers
      residual ‖F(h) - h‖   0
      contraction L_h       0.5
      spectral radius       0.5
      error bound (Thm 2)   0.25 ‖∂F/∂z‖
      σ of ∂F/∂z            1 to 1
      condition (6)         0.125 ≤ 1   holds
      condition (8)         0.125 ≤ 1   holds
      left of (6) ≤ σ_min   0.125 ≤ 1   holds
      measured              cosine 0.998610, relative error 0.115
      descent direction     guaranteed (Theorem 1)
    """
    check(problem, h)
    checks.instance("gradient", gradient, Estimator, "Neumann(k=5, lam=0.5)")
    steps, seed = checks.integer("steps", steps, 1), checks.integer("seed", seed, 0)
    confidence = checks.real("confidence", confidence, 0.0, 1.0, low_open=True, high_open=True)
    checks.instance("linear_solver", linear_solver, LinearSolver, "GMRES()")
    gradient = settings.numbers("gradient", gradient)
    linear_solver = settings.numbers("linear_solver", linear_solver)
    backend = bind(problem, h).backend
    if cotangent is not None:
        checks.like(backend, "cotangent", cotangent, h, "h")
    problem = problem.fixed_point_form(h, z)  # Decision 115.
    counted = CountedProblem(problem)
    of_each = 1 - (1 - confidence) / 4  # L_h, both sides of (6), the left side of (8)
    with backend.on_device_of(h), backend.solving():
        value = gradient.value(counted, h, z)
        j = Jacobians(counted, value, z)
        space = j.samples

        def spectrum(pair: Pair, domain: Space, codomain: Space) -> Spectrum:
            return singular_values(*pair, domain, codomain, steps=steps, confidence=of_each, seed=seed)

        contraction = spectrum(j.in_h, space, space).largest
        balanced = space.in_units(balance(j.in_h, space, rounds=steps, seed=seed))
        radius = largest_eigenvalue(j.in_h_of(balanced).product, balanced, steps=steps, seed=seed)
        radius = space.xp.minimum(radius, contraction.high)
        sides = _sides(j, spectrum(j.in_z, j.whole, j.parameters))
        left_6, left_8 = _left_sides(j, gradient, h, spectrum, contraction.high, sides.largest.high)
        measured = _measure(j, gradient, h, cotangent, Implicit(linear_solver), balanced)
    return Certificate(
        gradient=gradient,
        residual=space.per_sample(j.residual),
        contraction=Bounds(*map(space.per_sample, contraction)),
        spectral_radius=space.per_sample(radius),
        error_bound=_error_bound(space, gradient, space.per_sample(contraction.high)),
        sigma_max=sides.largest,
        sigma_min=sides.smallest,
        condition_6=Condition("6", left_6, _threshold(sides.smallest, sides.largest)),
        condition_8=left_8 and Condition("8", left_8, _inverse_square(sides.smallest, sides.largest)),
        condition_sharp=Condition("sharp", left_6, sides.smallest),
        condition_on_range=_on_range(sides, left_6),
        **measured,
        evaluations=counted.evaluations,
        products_h=counted.products_h,
        products_z=counted.products_z,
        samples=space.samples,
        state_size=space.dimension,
        parameters=j.parameters.dimension,
        left_out=problem.left_out(h, z),
    )


class _Sides(NamedTuple):
    """Singular values of ∂F/∂z, floats."""

    largest: Bounds
    smallest: Bounds
    positive: float | None


def _sides(j: Jacobians[H, Z], sigma: Spectrum) -> _Sides:
    largest, smallest = _numbers(sigma.largest), _numbers(sigma.smallest)
    exhausted = bool(sigma.exhausted[0, 0])
    if j.parameters.dimension < j.whole.dimension:
        smallest = Bounds(0.0, 0.0, 0.0)
    positive = float(sigma.positive[0, 0]) if exhausted and smallest.value == 0 and largest.low > 0 else None
    return _Sides(largest, smallest, positive)


def _left_sides(
    j: Jacobians[H, Z],
    gradient: Estimator,
    h: H,
    spectrum: Callable[[Pair, Space, Space], Spectrum],
    contraction: Numbers,
    sigma_max: float,
) -> tuple[Bounds, Bounds | None]:
    """The left sides of (6) and of (8), which is None unless A = (∂F/∂z) D."""
    left_8: Bounds | None = None
    if isinstance(gradient, AtFixedPoint) and gradient.derivative is not Derivative.OF_OPERATIONS:
        left_8 = _guaranteed(j.samples, gradient, contraction)
        left_6 = Bounds(0.0, math.nan, sigma_max * left_8.high)
    else:
        away = deviation(j, gradient, h)
        norm = largest(contraction)
        left_6 = _numbers(spectrum(away.in_z, j.whole, j.parameters).largest)
        left_6 = _widened(left_6, sigma_max, _relative_rounding(j.whole, j.parameters), gradient, norm)
        if away.in_h is not None:
            left_8 = Bounds(*map(largest, spectrum(away.in_h, j.samples, j.samples).largest))
            left_8 = _widened(left_8, 1.0, _relative_rounding(j.samples), gradient, norm)
    finite = bool(j.backend.xp.all(j.finite))
    return (left_6, left_8) if finite else (UNKNOWN, left_8 and UNKNOWN)


def _guaranteed(space: Space, gradient: AtFixedPoint, contraction: Numbers) -> Bounds:
    """The left side of (8) for an estimator that solves to a tolerance, from the accuracy that it guarantees."""
    norm, rounding = largest(contraction), _relative_rounding(space)
    bound = gradient.inverse_error(norm, space.coarsest_eps, rounding) if norm < 1 else math.nan
    return Bounds(0.0, math.nan, math.inf if math.isnan(bound) else bound + rounding)


def _widened(left: Bounds, sigma_max: float, rounding: float, gradient: Estimator, contraction: float) -> Bounds:
    """Bounds of ‖E‖, for the difference E of an estimate and the exact one, that allow for the errors of either."""
    # Decision 85. The terms of E are as long as D (I - J) = I + E, however short their difference is. An error of a
    # product within D reaches E by way of (I - J)⁻¹ and the later products.
    if math.isnan(left.value):
        return UNKNOWN
    largest_term = left.high / sigma_max if sigma_max else 0.0
    inverse = 1 / (1 - contraction) if contraction < 1 else 1.0
    error = rounding * (1 + gradient.accumulated(contraction)) * (1 + contraction) * inverse * (1 + largest_term)
    error = error * sigma_max if sigma_max else 0.0
    return Bounds(max(left.low - error, 0.0), left.value, left.high + error)


def _relative_rounding(*spaces: Space) -> float:
    """The error of a product, relative to the norms of the operator and the vector."""
    return ROUNDING * math.sqrt(spaces[0].dimension) * max(space.coarsest_eps for space in spaces)


def _threshold(smallest: Bounds, largest: Bounds) -> Bounds:
    """σ_min² / σ_max, the right side of (6)."""
    return Bounds(
        smallest.low * _over(smallest.low, largest.high),
        smallest.value * _over(smallest.value, largest.value),
        smallest.high * _over(smallest.high, largest.low),
    )


def _inverse_square(smallest: Bounds, largest: Bounds) -> Bounds:
    """1 / κ², the right side of (8)."""
    return Bounds(
        _over(smallest.low, largest.high) ** 2,
        _over(smallest.value, largest.value) ** 2,
        _over(smallest.high, largest.low) ** 2,
    )


def _on_range(sides: _Sides, left: Bounds) -> Condition | None:
    """(6) without the null space of ∂F/∂z. The left side is taken on the whole space, where it is not smaller."""
    # Decision 63.
    if sides.positive is None:
        return None
    positive = Bounds(sides.positive, sides.positive, sides.positive)
    return Condition("6 on the range", left, _threshold(positive, sides.largest))


def _over(a: float, b: float) -> float:
    return 0.0 if b == 0 or math.isinf(b) else a / b


def _error_bound(space: Space, gradient: Estimator, contraction: Array) -> Array:
    xp = space.xp
    if type(gradient).error_bound is Estimator.error_bound:  # of no number
        return space.blanked(contraction, contraction == contraction)
    certain = contraction < 1
    below_one = xp.where(certain, contraction, xp.zeros_like(contraction))
    bound = gradient.error_bound(below_one)
    # Decision 85.
    bound = bound + _relative_rounding(space) * (1 + gradient.accumulated(largest(below_one))) / (1 - below_one)
    known = bound == bound
    return space.filled(bound, ~certain & known, math.inf)


def _numbers(b: Bounds) -> Bounds:
    return Bounds(*(float(x[0, 0]) for x in b))


def _measure(
    j: Jacobians[H, Z], gradient: Estimator, h: H, cotangent: H | None, implicit: Implicit, balanced: Space
) -> dict[str, float | None]:
    """(7) for one cotangent, and the distance of the two gradients; NaN if the exact one was not found.

    The exact one is solved for in the units of ``balanced``, so that its tolerance holds for small numbers beside large
    ones.
    """
    names = ("inner_product", "cosine", "relative_error")
    if cotangent is None:
        return dict.fromkeys(names)
    space = j.parameters
    pullback = untested(gradient).vjp(j.problem, h, j.z)[1]
    try:
        estimate = space.copy(space.pack(j.cotangent(pullback(cotangent))))
        adjoint = balanced.dual
        w = implicit.apply(adjoint, j.in_h_of(balanced).product, adjoint.pack(cotangent))
        exact = space.copy(space.pack(j.cotangent(j.at.vjp_z(adjoint.unpack(w)))))
    except SolveError:
        return dict.fromkeys(names, math.nan)
    size, exact_size = (float(length(space, x)[0, 0]) for x in (estimate, exact))
    difference = float(length(space, space.sub(estimate, exact))[0, 0])
    cosine = math.nan
    if size and exact_size:
        of_each = (unit(space, x, length(space, x)) for x in (estimate, exact))
        cosine = float(space.dot(*of_each)[0, 0])
    error = difference / exact_size if exact_size else (math.nan if size else 0.0)
    inner = cosine * size * exact_size if size and exact_size else 0.0 * size * exact_size
    return dict(zip(names, (inner, cosine, error), strict=True))

"""Estimates by power iteration, cheap enough to log next to a training loss (Decision 66)."""

import math

from .. import checks
from ..arrays import Array, H, Numbers, Operator, State, Z
from ..coupling import refuse_coupling
from ..estimators.base import on_states
from ..linear_solvers.arnoldi import unit
from ..problem import BoundLinearization, Map, Problem, as_problem
from ..space import Space
from .krylov import length, start


def spectral_radius(
    f: Problem[H, Z] | Map[H, Z], h: H, z: Z, *, batch_ndim: int | None = None, steps: int = 50, seed: int = 0
) -> Array:
    r"""Estimate the spectral radius of ∂F/∂h at h, sample by sample: below 1, fixed-point iteration converges near h.

    .. math::
        \rho(J) = \max_i |\lambda_i(J)| = \lim_{t \to \infty} \|J^t v\|^{1/t}

    Power iteration on the transpose, which has the same eigenvalues. A single step's growth oscillates where the
    largest eigenvalues are a pair, so the estimate is the geometric mean of the growth over the last half of the steps,
    an even number of them. It is not a bound: a gap between the largest moduli narrower than 1/steps is not resolved,
    and the oscillation of a complex pair fades as 1/steps, more slowly in units that differ much. :func:`certify` takes
    several times as long and is more accurate.

    It costs one evaluation of F and ``steps`` h-VJPs, and works within ``jax.jit``. One more h-VJP finds out whether F
    couples samples, if there are several.

    Parameters
    ----------
    f
        A :class:`Problem` with a VJP, or F itself, ``f(h, z)``, in a framework with an adapter. F must give the same
        value at every call: put a PyTorch module in eval mode, or pass ``constant_within_solve`` of it.
    h
        Where to linearize, usually a fixed point: an array or a pytree of arrays, (batch..., state...).
    z
        Inputs and parameters.
    batch_ndim
        How many first axes of every leaf of h index independent samples; for a plain F only (default 0).
    steps
        Power iterations, at least 1.
    seed
        Seed of the random start, which is the same in all samples and in every framework.

    Returns
    -------
    Array
        Of the batch's shape, float32 or wider, without a graph.

    Raises
    ------
    NotImplementedError
        If the problem has no VJP.
    TypeError, ValueError
        If an argument, or a result of f, has a wrong type, structure, shape, dtype or device; or if F couples samples:
        pass ``batch_ndim=0``. Within ``jax.jit`` no error can say so, and the result is NaN.

    References
    ----------
    S. Bai, V. Koltun and J. Z. Kolter, Stabilizing equilibrium models by Jacobian regularization, ICML 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> from implicit_core.theory import spectral_radius
    >>> turn = np.array([[0.0, -0.8], [0.8, 0.0]])  # eigenvalues ± 0.8i
    >>> problem = ic.Problem(lambda h, z: h @ turn.T + z, vjp=lambda h, z, v: (v @ turn, v), batch_ndim=1)
    >>> spectral_radius(problem, np.zeros((2, 2)), np.ones((2, 2))).round(6)
    array([0.8, 0.8])
    """
    steps = checks.integer("steps", steps, 1)
    seed = checks.integer("seed", seed, 0)
    space, at, coupled = _linearize(f, h, z, batch_ndim, "vjp_h")
    xp, backend = space.xp, space.backend
    pull = on_states(at.vjp_h, space.dual, space.dual)
    # An even number: a pair of eigenvalues ±λ grows by turns, by factors that depend on the units.
    measured = min((steps + 3) // 4 * 2, steps)

    def step(v: State) -> State:
        return _image(space, pull, v)[0]

    def measured_step(carry: tuple[State, Numbers]) -> tuple[State, Numbers]:
        v, norm = _image(space, pull, carry[0])
        return v, carry[1] + xp.log(norm)

    with backend.on_device_of(h), backend.solving():
        v = backend.repeat(step, start(space, seed, shared=True), steps - measured)
        _, growth = backend.repeat(measured_step, (v, space.full(0.0)), measured)
        return backend.stop_gradient(space.per_sample(_unless(coupled, space, xp.exp(growth / measured))))


def contraction(
    f: Problem[H, Z] | Map[H, Z], h: H, z: Z, *, batch_ndim: int | None = None, steps: int = 20, seed: int = 0
) -> Array:
    r"""Estimate ‖∂F/∂h‖₂ at h, sample by sample: the local Lipschitz constant L_h of Theorem 2.

    Power iteration on J Jᵀ. Every step's value :math:`\|J^T u\|` with :math:`\|u\| = 1` is a lower bound, and does not
    fall from step to step: the estimate converges from below. :func:`certify` gives an upper bound as well.

    It costs one evaluation of F, ``steps`` h-VJPs and ``steps`` - 1 pushforwards, which are evaluations of F in forward
    mode in PyTorch. It works within ``jax.jit``. One more h-VJP finds out whether F couples samples.

    Parameters
    ----------
    f
        A :class:`Problem` with a VJP and a JVP, or F itself, ``f(h, z)``, in a framework with an adapter. F must give
        the same value at every call, as for :func:`spectral_radius`.
    h, z, batch_ndim, steps, seed
        As for :func:`spectral_radius`.

    Returns
    -------
    Array
        Of the batch's shape, float32 or wider, without a graph.

    Raises
    ------
    NotImplementedError
        If the problem lacks its VJP or JVP.
    TypeError, ValueError
        If an argument, or a result of f, has a wrong type, structure, shape, dtype or device; or if F couples samples:
        pass ``batch_ndim=0``. Within ``jax.jit`` no error can say so, and the result is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> from implicit_core.theory import contraction
    >>> shear = np.array([[0.0, 1.5], [0.0, 0.0]])  # not a contraction, although its spectral radius is 0
    >>> problem = ic.Problem(
    ...     lambda h, z: shear @ h + z, vjp=lambda h, z, v: (shear.T @ v, v), jvp=lambda h, z, dh, dz: shear @ dh + dz)
    >>> contraction(problem, np.zeros(2), np.ones(2))
    array(1.5)
    """
    steps = checks.integer("steps", steps, 1)
    seed = checks.integer("seed", seed, 0)
    space, at, coupled = _linearize(f, h, z, batch_ndim, "vjp_h", "jvp_h")
    backend = space.backend
    pull, push = on_states(at.vjp_h, space.dual, space.dual), on_states(at.jvp_h, space, space)

    def step(carry: tuple[State, Numbers]) -> tuple[State, Numbers]:
        u, _ = _image(space, push, carry[0])
        return _image(space, pull, u)

    with backend.on_device_of(h), backend.solving():
        carry = _image(space, pull, start(space, seed, shared=True))
        _, norm = backend.repeat(step, carry, steps - 1)
        return backend.stop_gradient(space.per_sample(_unless(coupled, space, norm)))


def _linearize(
    f: Problem[H, Z] | Map[H, Z], h: H, z: Z, batch_ndim: int | None, *names: str
) -> tuple[Space, BoundLinearization[H, Z], Array | None]:
    """The space of h, F's derivatives there, and whether F couples samples, where no error can say so."""
    checks.function("f", f)
    problem = as_problem(f, batch_ndim).with_derivatives((h, z)).fixed_point_form(h, z)
    space = problem.space(h).every_leaf
    checks.samples("h", space.batch_shape)
    at = problem.linearize(h, z).require(*names)
    with space.backend.on_device_of(h), space.backend.solving():
        return space, at, refuse_coupling(space, at, problem.f, "the estimate is for each sample")


def _unless(coupled: Array | None, space: Space, numbers: Numbers) -> Numbers:
    """``numbers``; NaN if F couples samples."""
    if coupled is None:
        return numbers
    return space.filled(numbers, coupled, math.nan)


def _image(space: Space, operator: Operator, v: State) -> tuple[State, Numbers]:
    """``operator(v)`` at unit length, zero if it is zero, and its length."""
    image = operator(v)
    norm = length(space, image)
    return unit(space, image, norm), norm

"""The derivative of a fixed point, of every order and in both modes (Eq. 2 and 18)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from implicit_core.arrays import H, Z
from implicit_core.backends.jax import BACKEND, coupled_axes
from implicit_core.estimators import AtFixedPoint, Derivative, Neumann
from implicit_core.estimators.base import on_states
from implicit_core.space import Space

from .growth import Growth, compare, fork
from .leaves import Arrays, Units
from .maps import EagerMap, TracedMap
from .programs import Program, compiled
from .rule_primitive import with_rule


def with_derivative(h: H, inputs: Arrays, f: TracedMap[H] | EagerMap[H, Z], gradient: AtFixedPoint) -> H:
    """``h``, differentiated by ``gradient`` as the fixed point h = F(h, inputs).

    Its tangent is D (∂F/∂z) dz. If D consists of operations, they are linear in the tangent and JAX transposes them. If
    D solves a linear system, the transpose solves the transposed system.

    Parameters
    ----------
    h
        The solver's point.
    inputs
        All arrays besides h that F is a function of.
    f
        F. It closes over no arrays.
    gradient
        The estimator.
    """

    def rule(h: H, inputs: Arrays, indices: Sequence[int], tangents: Arrays) -> H:
        # F is linearized at h, which has this rule too, so the second derivative uses the first one. Decision 47.
        at = f.linearized(h, inputs, indices)
        jacobian, residuals = at.of_h()
        b = at.push_z(tangents)
        inverse = Inverse(gradient, f.batch_ndim, f.units, f.axes)
        if gradient.derivative is Derivative.OF_OPERATIONS:
            return inverse.by_operations(jacobian, residuals, b)
        w: H = compiled(_solution, jacobian, inverse)(b, residuals)
        return w

    return with_rule(h, inputs, rule)


@dataclass(frozen=True)
class Inverse:
    """An estimator's D, which approximates the inverse of I - ∂F/∂h.

    Attributes
    ----------
    gradient
        The estimator.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    units
        The units of h.
    axes
        Named axes that F communicates over.
    """

    gradient: AtFixedPoint
    batch_ndim: int
    units: Units
    axes: tuple[str, ...]

    def space(self, v: H, *, dual: bool = False) -> Space:
        """The space of a tangent, or of a cotangent."""
        space = BACKEND.space(v, self.batch_ndim, "v", self.units.scale)
        return space.dual if dual else space

    def __call__(self, jacobian: Callable[[H], H], v: H, *, dual: bool = False) -> H:
        """D v, with ``jacobian`` the products with ∂F/∂h."""
        space = self.space(v, dual=dual)
        with coupled_axes(self.axes):  # Decision 50.
            w: H = space.unpack(self.gradient.apply(space, on_states(jacobian, space, space), space.pack(v)))
        return w

    def by_operations(self, jacobian: Program[H], residuals: Arrays, v: H) -> H:
        """D v, by operations that JAX transposes."""
        gradient, inverse = self.gradient, self
        watches = False
        if isinstance(gradient, Neumann):
            growth = Growth(gradient.growth, self.batch_ndim, self.units.scale)
            watches = growth.watches(self.axes) and type(gradient).inverse is Neumann.inverse
            # The core's own test depends on the tangents in a way that JAX cannot transpose.
            inverse = replace(self, gradient=replace(gradient, on_growth="ignore"))
        if not watches:
            w: H = compiled(_operations, jacobian, inverse)(v, residuals)
            return w
        start, reference = fork(v, growth)
        total, last = compiled(_series, jacobian, inverse)(start, v, residuals)
        checked: H = compare(total, last, reference, growth)
        return checked


# Functions of arrays alone, to be compiled for a Jacobian.


def _operations(jacobian: Program[H], inverse: Inverse) -> Callable[[H, Arrays], H]:
    return lambda v, residuals: inverse(lambda w: jacobian(w, residuals), v)


def _series(jacobian: Program[H], inverse: Inverse) -> Callable[[H, H, Arrays], tuple[H, H]]:
    """``Neumann.inverse`` and the last term of its sum, which begins at ``start``."""
    gradient = inverse.gradient
    assert isinstance(gradient, Neumann)

    def series(start: H, v: H, residuals: Arrays) -> tuple[H, H]:
        space = inverse.space(v)
        with coupled_axes(inverse.axes):
            product, b = on_states(lambda w: jacobian(w, residuals), space, space), space.pack(v)
            before = gradient.sum_of_terms(space, product, space.pack(start), b, gradient.k - 2)
            total = gradient.sum_of_terms(space, product, before, b, 1)
            return space.unpack(space.scale(gradient.lam, total)), space.unpack(space.sub(total, before))

    return series


def _solution(jacobian: Program[H], inverse: Inverse) -> Callable[[H, Arrays], H]:
    """The solution of (I - ∂F/∂h) w = b."""

    def solution(b: H, residuals: Arrays) -> H:
        def push_h(w: H) -> H:
            return jacobian(w, residuals)

        # JAX differentiates and transposes the linear solve as one operation, to every order. Decision 26.
        w: H = jax.lax.custom_linear_solve(
            lambda w: jax.tree.map(jnp.subtract, w, push_h(w)),
            b,
            solve=lambda _, b: inverse(push_h, b),
            transpose_solve=lambda _, v: inverse(lambda w: jax.linear_transpose(push_h, b)(w)[0], v, dual=True),
        )
        return w

    return solution

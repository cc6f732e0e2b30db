"""The derivative of a fixed point, of every order and in both modes (Eq. 2 and 18)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from implicit_core import settings
from implicit_core.arrays import H, Z
from implicit_core.backends.jax import BACKEND, coupled_axes, setting_placed
from implicit_core.estimators import AtFixedPoint, Derivative, Neumann
from implicit_core.estimators.base import on_states
from implicit_core.space import Space

from .closure import compiled_for
from .forward_only import can_be_transposed, forward_only
from .growth import Growth, compare, fork
from .leaves import Arrays, Static, Units
from .maps import EagerMap, TracedMap
from .programs import Program
from .rule_primitive import with_rule
from .settings import split_record


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
    arrays, static = split_record(gradient)
    n, of_operations = len(inputs), gradient.derivative is Derivative.OF_OPERATIONS

    def rule(h: H, operands: Arrays, indices: Sequence[int], tangents: Arrays) -> H:
        inputs, numbers = operands[:n], operands[n:]
        # F is linearized at h, which has this rule too, so the second derivative uses the first one. Decision 47.
        at = f.linearized(h, inputs, indices)
        jacobian, residuals = at.of_h()
        if of_operations:
            return by_operations(jacobian, residuals, at.push_z(tangents), static.combine(numbers), f)
        b = at.dependent_push_z(tangents)
        # The solution of the system depends on no setting of its solver.
        like_b = jax.typeof(jax.tree.leaves(b)[0])
        numbers = [setting_placed(jax.lax.stop_gradient(x), like_b) for x in numbers]
        w: H = compiled_for(_solution, jacobian, Inverse(static, f.batch_ndim, f.units, f.axes))(b, residuals, numbers)
        return w

    # h itself depends on no setting of the estimator, so the first derivative is zero. Decision 111.
    return with_rule(h, inputs, rule, parameters=arrays)


@dataclass(frozen=True)
class Inverse:
    """An estimator's D, which approximates the inverse of I - ∂F/∂h.

    Attributes
    ----------
    gradient
        The estimator without the arrays in it.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    units
        The units of h.
    axes
        Named axes that F communicates over.
    """

    gradient: Static[AtFixedPoint]
    batch_ndim: int
    units: Units
    axes: tuple[str, ...]

    @property
    def self_contained(self) -> bool:
        """See :class:`Static`."""
        return self.gradient.self_contained

    def space(self, v: H, *, dual: bool = False) -> Space:
        """The space of a tangent, or of a cotangent."""
        space = BACKEND.space(v, self.batch_ndim, "v", self.units.scale)
        return space.dual if dual else space.every_leaf

    def __call__(self, jacobian: Callable[[H], H], v: H, numbers: Arrays, *, dual: bool = False) -> H:
        """D v, with ``jacobian`` the products with ∂F/∂h, and ``numbers`` the arrays in the estimator."""
        space = self.space(v, dual=dual)
        with coupled_axes(self.axes):  # Decision 50.
            gradient = self.gradient.combine(numbers)
            product = on_states(jacobian, space, space)
            w: H = space.unpack(gradient.apply(space, product, space.pack(v), transposed=dual))
        return w


def by_operations(
    jacobian: Program[H], residuals: Arrays, v: H, gradient: AtFixedPoint, f: TracedMap[H] | EagerMap[H, Z]
) -> H:
    """D v, by operations that JAX transposes."""
    w: H
    watches = False
    if isinstance(gradient, Neumann):
        growth = Growth(gradient.growth, f.batch_ndim, f.units.scale)
        watches = growth.watches(f.axes) and type(gradient).inverse is Neumann.inverse
        # The core's own test depends on the tangents in a way that JAX cannot transpose.
        gradient = replace(gradient, on_growth="ignore")
    numbers, static = split_record(gradient)
    inverse = Inverse(static, f.batch_ndim, f.units, f.axes)
    if not watches:
        w = compiled_for(_operations, jacobian, inverse)(v, residuals, numbers)
        return w
    start, reference = fork(v, growth)
    if isinstance(gradient, Neumann) and not isinstance(gradient.k, int):
        reference = compiled_for(_referenced, inverse)(reference, numbers)
    total, last = compiled_for(_series, jacobian, inverse)(start, v, residuals, numbers)
    # λ comes last: transposed, the cotangent that the terms are compared with has it already.
    w = compiled_for(_scaled, inverse)(compare(total, last, reference, growth), numbers)
    return w


# Functions of arrays alone, to be compiled for a Jacobian.


def _operations(jacobian: Program[H], inverse: Inverse) -> Callable[[H, Arrays, Arrays], H]:
    return lambda v, residuals, numbers: inverse(lambda w: jacobian(w, residuals), v, numbers)


def _series(jacobian: Program[H], inverse: Inverse) -> Callable[[H, H, Arrays, Arrays], tuple[H, H]]:
    """The sum of ``Neumann.inverse``, without λ, and its last term. It begins at ``start``."""

    def series(start: H, v: H, residuals: Arrays, numbers: Arrays) -> tuple[H, H]:
        space = inverse.space(v)
        gradient = settings.bound(inverse.gradient.combine(numbers), space)
        assert isinstance(gradient, Neumann)
        with coupled_axes(inverse.axes):
            product, b = on_states(lambda w: jacobian(w, residuals), space, space), space.pack(v)
            total, last = gradient.series(space, product, space.pack(start), b)
            return space.unpack(total), space.unpack(last)

    return series


def _referenced(inverse: Inverse) -> Callable[[H, Arrays], H]:
    """See ``reference`` of the estimator."""

    def referenced(v: H, numbers: Arrays) -> H:
        space = inverse.space(v)
        gradient = settings.bound(inverse.gradient.combine(numbers), space)
        assert isinstance(gradient, Neumann)
        reference: H = space.unpack(gradient.reference(space, space.pack(v)))
        return reference

    return referenced


def _scaled(inverse: Inverse) -> Callable[[H, Arrays], H]:
    """λ times a sum of terms."""

    def scaled(total: H, numbers: Arrays) -> H:
        space = inverse.space(total)
        gradient = settings.bound(inverse.gradient.combine(numbers), space)
        assert isinstance(gradient, Neumann)
        w: H = space.unpack(space.scale(gradient.lam, space.pack(total)))
        return w

    return scaled


def _solution(jacobian: Program[H], inverse: Inverse) -> Callable[[H, Arrays, Arrays], H]:
    """The solution of (I - ∂F/∂h) w = b."""

    def solution(b: H, residuals: Arrays, numbers: Arrays) -> H:
        def push_h(w: H) -> H:
            return jacobian(w, residuals)

        def transposed(_: object, v: H) -> H:
            return inverse(lambda w: jax.linear_transpose(push_h, b)(w)[0], v, numbers, dual=True)

        both_modes = can_be_transposed(jacobian.jaxpr, push_h, b)
        # JAX differentiates and transposes the linear solve as one operation, to every order. Decision 26.
        w: H = jax.lax.custom_linear_solve(
            lambda w: jax.tree.map(jnp.subtract, w, push_h(w)),
            b,
            solve=lambda _, b: inverse(push_h, b, numbers),
            transpose_solve=transposed if both_modes else None,
        )
        return w if both_modes else forward_only(w)

    return solution

"""The matrices in the paper's conditions, as products on states."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple

from .. import checks
from ..arrays import Array, H, Mask, Numbers, Operator, PyTree, State, Z
from ..coupling import refuse_coupling
from ..estimators import Estimator
from ..estimators.base import AtFixedPoint, on_states
from ..estimators.growth import untested
from ..problem import DERIVATIVES, Linearization, Problem, zero_tangent
from ..registry import find_backend
from ..solution import Solution
from ..space import Space
from .krylov import length

TRACED = (
    "certify and suggest stop on data-dependent tests, so they cannot run within jax.jit, jax.grad, jax.vmap or a "
    "captured graph: call them outside, on a Problem whose derivatives may be compiled"
)
NO_PARAMETERS = (
    "z holds no real floating array that F has a derivative in: pass what is trained in z, and not in what f closes "
    "over (for a torch module dict(module.named_parameters()), by torch.func.functional_call); cast integers to float"
)


Product = Callable[..., Any]
"""A function of pytrees."""


class Pair(NamedTuple):
    """An operator and its transpose."""

    product: Operator
    transposed: Operator


class CountedProblem(Problem[H, Z]):
    """A problem that counts its evaluations and products.

    Attributes
    ----------
    evaluations, products_h, products_z
        Evaluations of F, and products with ∂F/∂h and with ∂F/∂z or their transposes.
    """

    def __init__(self, problem: Problem[H, Z]) -> None:
        self.evaluations = self.products_h = self.products_z = 0
        self._given = problem
        super().__init__(self._evaluate, linearize=self._linearized, batch_ndim=problem.batch_ndim, scale=problem.scale)

    def _evaluate(self, h: H, z: Z) -> H:
        self.evaluations += 1
        return self._given.f(h, z)

    def _linearized(self, h: H, z: Z) -> Linearization[H, Z]:
        self.evaluations += 1
        at = self._given.linearize(h, z)
        given = {name: getattr(at, name) for name in DERIVATIVES if at.has(name)}
        return Linearization(at.value, **given).wrap(self._counted)

    def _counted(self, name: str, derivative: Product) -> Product:
        def product(*vectors: PyTree) -> PyTree:
            self.products_h += not name.endswith("_z")
            self.products_z += not name.endswith("_h")
            return derivative(*vectors)

        return product


class Jacobians(Generic[H, Z]):
    """∂F/∂h and ∂F/∂z at one point, as operators.

    Parameters
    ----------
    problem
        With a VJP and a JVP.
    h, z
        The point.

    Attributes
    ----------
    samples
        The space of h, sample by sample: ∂F/∂h is block-diagonal. Cotangents are in its dual.
    whole
        The space of h with the batch as one vector: all samples share z.
    residual, finite
        ‖F(h) - h‖₂, (N, 1), and whether it is finite. Where it is not, nothing is known of the Jacobians.
    """

    # Decision 62.

    def __init__(self, problem: Problem[H, Z], h: H, z: Z) -> None:
        backend = self.backend = find_backend(h, "h")
        self.problem, self.h, self.z = problem, h, z
        self.samples = problem.space(h).every_leaf
        checks.samples("h", self.samples.batch_shape)
        if not self.samples.dimension:
            raise ValueError(f"h holds no numbers: shapes {self.samples.shapes}")
        self.whole = self.samples.as_one()
        self.at = problem.linearize(h, z).require("vjp_h", "jvp_h")
        if not all(map(backend.readable, backend.flatten((h, self.at.value))[0])):
            raise NotImplementedError(TRACED)
        refuse_coupling(self.samples, self.at, problem.f, "the conditions hold sample by sample")
        at, value = self.samples.pack(h), self.samples.pack(self.at.value)
        self.residual = length(self.samples, self.samples.sub(value, at))
        self.finite: Mask = backend.xp.isfinite(self.residual)

    @cached_property
    def parameters(self) -> Space:
        """The space of z, of the arrays that F has a derivative in, as one vector."""
        if not self._differentiable:
            raise ValueError(NO_PARAMETERS)
        leaves = self.backend.flatten(self.z, none_is_leaf=True)[0]
        return self.backend.space([leaves[i] for i in self._differentiable], 0, "z")

    @cached_property
    def _differentiable(self) -> list[int]:
        """The leaves of z that F has a derivative in."""
        backend = self.backend
        self.at.require("vjp_z", "jvp_z")
        leaves = backend.flatten(self.z, none_is_leaf=True)[0]
        floats = [backend.is_array(leaf) and backend.isdtype(leaf.dtype, "real floating") for leaf in leaves]
        cotangents = backend.flatten(self.at.vjp_z(zero_tangent(backend, self.h)), none_is_leaf=True)[0]
        return [i for i, v in enumerate(cotangents) if backend.is_array(v) and floats[i]]

    # Between pytrees shaped as z and states of ``parameters``.

    def cotangent(self, z_bar: Z) -> list[Array]:
        """The arrays in a cotangent shaped as z that F has a derivative in."""
        leaves = self.backend.flatten(z_bar, none_is_leaf=True)[0]
        return [leaves[i] for i in self._differentiable]

    def tangent(self, dz: list[Array]) -> Z:
        """A tangent shaped as z, zero elsewhere."""
        leaves, structure = self.backend.flatten(zero_tangent(self.backend, self.z), none_is_leaf=True)
        for i, leaf in zip(self._differentiable, dz, strict=True):
            leaves[i] = leaf
        tangent: Z = self.backend.unflatten(structure, leaves)
        return tangent

    def by_sample(self, x: State) -> State:
        """A state of ``whole`` as one of ``samples``."""
        return _reshaped(x, self.samples)

    def as_one(self, x: State) -> State:
        """A state of ``samples`` as one of ``whole``."""
        return _reshaped(x, self.whole)

    # Operators, in the paper's transposed convention: from cotangents of h.

    @cached_property
    def in_h(self) -> Pair:
        """∂F/∂h, sample by sample; NaN at a point that is not finite."""
        return self.in_h_of(self.samples)

    def in_h_of(self, space: Space) -> Pair:
        """The same in the units of another space of h, sample by sample."""
        known: Numbers = space.filled(space.full(1.0), ~self.finite, math.nan)
        pull, push = on_states(self.at.vjp_h, space.dual, space.dual), on_states(self.at.jvp_h, space, space)
        return Pair(lambda v: space.scale(known, pull(v)), lambda v: space.scale(known, push(v)))

    @cached_property
    def in_z(self) -> Pair:
        """∂F/∂z, from the whole batch's cotangents to cotangents of z."""
        return Pair(
            copied(lambda v: self.cotangent(self.at.vjp_z(v)), self.whole.dual, self.parameters),
            copied(lambda dz: self.at.jvp_z(self.tangent(dz)), self.parameters, self.whole),
        )

    def damped(self, lam: float) -> Pair:
        """B = λ ∂F/∂h + (1 - λ) I (Eq. 15), sample by sample."""
        space = self.samples

        def blend(product: Operator) -> Operator:
            return lambda v: space.axpy(lam, product(v), space.scale(1 - lam, v))

        return Pair(blend(self.in_h.product), blend(self.in_h.transposed))


@dataclass(frozen=True)
class Deviation:
    """How far an estimator's A is from the exact one, as in Theorem 1.

    Attributes
    ----------
    in_z
        A (I - ∂F/∂h) - ∂F/∂z, of condition (6), on the whole batch.
    in_h
        D (I - ∂F/∂h) - I, of condition (8), sample by sample; None unless A = (∂F/∂z) D.
    """

    in_z: Pair
    in_h: Pair | None


def deviation(j: Jacobians[H, Z], gradient: Estimator, start: H) -> Deviation:
    """The operators of conditions (6) and (8).

    Parameters
    ----------
    j
        The Jacobians at the estimator's value.
    gradient
        The estimator.
    start
        The point it starts from. For an estimator at the fixed point this is its value.
    """
    gradient = untested(gradient)
    if isinstance(gradient, AtFixedPoint):
        return _at_fixed_point(j, gradient)
    space, whole, in_h, in_z = j.samples, j.whole, j.in_h, j.in_z
    _, pullback = gradient.vjp(j.problem, start, j.z)
    estimate = copied(lambda v: j.cotangent(pullback(v)), whole.dual, j.parameters)
    pushed = copied(lambda dz: gradient.jvp(j.problem, start, j.z, j.tangent(dz))[1], j.parameters, space)

    def product(v: State) -> State:
        x = j.by_sample(v)
        return j.parameters.sub(estimate(j.as_one(space.sub(x, in_h.product(x)))), in_z.product(v))

    def transposed(dz: State) -> State:
        t = pushed(dz)
        return whole.sub(j.as_one(space.sub(t, in_h.transposed(t))), in_z.transposed(dz))

    return Deviation(Pair(product, transposed), None)


def _at_fixed_point(j: Jacobians[H, Z], gradient: AtFixedPoint) -> Deviation:
    """A = (∂F/∂z) D, so the operator of (6) is (∂F/∂z) (D (I - ∂F/∂h) - I)."""
    space, in_h, in_z = j.samples, j.in_h, j.in_z

    def product(v: State) -> State:
        return space.sub(gradient.apply(space, in_h.product, space.sub(v, in_h.product(v))), v)

    def transposed(v: State) -> State:
        w = gradient.apply(space, in_h.transposed, v)
        return space.sub(space.sub(w, in_h.transposed(w)), v)

    def on_whole(v: State) -> State:
        return in_z.product(j.as_one(product(j.by_sample(v))))

    def on_whole_transposed(dz: State) -> State:
        return j.as_one(transposed(j.by_sample(in_z.transposed(dz))))

    return Deviation(Pair(on_whole, on_whole_transposed), Pair(product, transposed))


def copied(function: Product, domain: Space, codomain: Space) -> Operator:
    """A function of pytrees as one of states. It may return the same arrays at every call: they are copied."""
    on_these = on_states(function, domain, codomain)
    return lambda x: codomain.copy(on_these(x))


def check(problem: Problem[H, Z], h: H) -> None:
    """Check the types of the arguments."""
    checks.instance("problem", problem, Problem, "Problem(f, vjp=..., jvp=...)")
    if isinstance(h, Solution):
        raise TypeError("h must be a point, got a Solution: pass solution.value")


def _reshaped(x: State, space: Space) -> State:
    xp = space.xp
    return State(tuple(xp.reshape(a, shape) for a, shape in zip(x, space.flat_shapes, strict=True)))

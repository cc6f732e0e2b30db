"""The matrices that the paper's conditions are about, as products on states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import checks
from ..backend import Array, PyTree
from ..estimators import Estimator
from ..estimators.base import AtFixedPoint
from ..problem import BoundLinearization, Problem
from ..registry import find_backend
from ..space import Operator, Space, State

TRACED = (
    "certify and suggest look at numbers to decide when to stop, and can't within jax.jit, jax.vmap or a captured "
    "graph: call them outside, on a Problem whose derivatives may be compiled"
)
NO_PARAMETERS = (
    "z holds no array that F has a derivative in: pass what is trained in z, not in what f closes over; for a "
    "torch module that is dict(module.named_parameters()), called by torch.func.functional_call"
)


class Pair:
    """An operator and its transpose, with the number of times each was applied."""

    def __init__(self, product: Operator, transposed: Operator) -> None:
        self.product, self.transposed = product, transposed


class Jacobians:
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
        The space of h, sample by sample: ∂F/∂h is block-diagonal.
    whole
        The space of h, the batch as one vector: all samples share what is in z.
    parameters
        The space of z, its floating arrays alone, as one vector.
    """

    def __init__(self, problem: Problem, h: PyTree, z: PyTree) -> None:
        backend = self.backend = find_backend(h, "h")
        self.problem, self.h, self.z = problem, h, z
        self.samples = Space(backend, h, problem.batch_ndim, "h")
        if not all(backend.readable(leaf) for leaf in backend.flatten(h)[0]):
            raise NotImplementedError(TRACED)
        self.whole = Space(backend, h, 0, "h")
        self.at: BoundLinearization = problem.linearize(h, z).require("vjp_h", "vjp_z", "jvp_h", "jvp_z")
        self._z_leaves, self._z_structure = backend.flatten_with_none(z)
        probe = backend.flatten_with_none(self.at.vjp_z(backend.map(backend.xp.zeros_like, h)))[0]
        self._moving = [i for i, leaf in enumerate(probe) if backend.is_array(leaf) and self._floats(i)]
        if not self._moving:
            raise ValueError(NO_PARAMETERS)
        self.parameters = Space(backend, [self._z_leaves[i] for i in self._moving], 0, "z")
        self.products_h = self.products_z = 0

    def _floats(self, i: int) -> bool:
        leaf = self._z_leaves[i]
        return self.backend.is_array(leaf) and self.backend.isdtype(leaf.dtype, "real floating")

    # Products with pytrees, counted.

    def vjp_h(self, v: PyTree) -> PyTree:
        """(∂F/∂h)ᵀ v."""
        self.products_h += 1
        return self.at.vjp_h(v)

    def jvp_h(self, dh: PyTree) -> PyTree:
        """(∂F/∂h) dh."""
        self.products_h += 1
        return self.at.jvp_h(dh)

    def vjp_z(self, v: PyTree) -> list[Array]:
        """(∂F/∂z)ᵀ v, the arrays that have a gradient."""
        self.products_z += 1
        return self.moving(self.at.vjp_z(v))

    def jvp_z(self, dz: list[Array]) -> PyTree:
        """(∂F/∂z) dz."""
        self.products_z += 1
        return self.at.jvp_z(self.tangent(dz))

    def moving(self, z_bar: PyTree) -> list[Array]:
        """Of a cotangent shaped as z, the arrays that have a gradient."""
        leaves = self.backend.flatten_with_none(z_bar)[0]
        return [leaves[i] for i in self._moving]

    def tangent(self, dz: list[Array]) -> PyTree:
        """A tangent shaped as z."""
        backend = self.backend
        leaves = [backend.xp.zeros_like(x) if backend.is_array(x) else x for x in self._z_leaves]
        for i, leaf in zip(self._moving, dz, strict=True):
            leaves[i] = leaf
        return backend.unflatten(self._z_structure, leaves)

    # Operators, in the paper's transposed convention: from cotangents of h.

    def in_h(self, space: Space) -> Pair:
        """∂F/∂h, on the states of a space of h."""
        return Pair(on(space, space, self.vjp_h), on(space, space, self.jvp_h))

    def in_z(self) -> Pair:
        """∂F/∂z, from the whole batch's cotangents to those of z."""
        return Pair(on(self.whole, self.parameters, self.vjp_z), on(self.parameters, self.whole, self.jvp_z))

    def damped(self, lam: float) -> Pair:
        """B = λ ∂F/∂h + (1 - λ) I (Eq. 15), sample by sample."""
        space, jacobian = self.samples, self.in_h(self.samples)

        def blend(product: Operator) -> Operator:
            return lambda v: space.axpy(lam, product(v), space.scale(1 - lam, v))

        return Pair(blend(jacobian.product), blend(jacobian.transposed))


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


def deviation(jacobians: Jacobians, gradient: Estimator, start: PyTree) -> Deviation:
    """The operators of conditions (6) and (8).

    Parameters
    ----------
    jacobians
        At the estimator's value.
    gradient
        The estimator.
    start
        The point it starts from: for those at the fixed point, their value.
    """
    if isinstance(gradient, AtFixedPoint):
        return _at_fixed_point(jacobians, gradient)
    j, problem = jacobians, jacobians.problem
    backend = j.backend
    _, pullback = gradient.vjp(problem, start, j.z)

    def forth(v: PyTree) -> list[Array]:
        image = j.moving(pullback(backend.map(lambda a, b: a - b, v, j.vjp_h(v))))
        return [a - b for a, b in zip(image, j.vjp_z(v), strict=True)]

    def back(dz: list[Array]) -> PyTree:
        _, t = gradient.jvp(problem, start, j.z, j.tangent(dz))
        return backend.map(lambda t, jt, g: t - jt - g, t, j.jvp_h(t), j.jvp_z(dz))

    return Deviation(Pair(on(j.whole, j.parameters, forth), on(j.parameters, j.whole, back)), None)


def _at_fixed_point(j: Jacobians, gradient: AtFixedPoint) -> Deviation:
    """A = (∂F/∂z) D, so that (6) is about (∂F/∂z) (D (I - ∂F/∂h) - I)."""
    backend, batch_ndim = j.backend, j.problem.batch_ndim

    def forth(v: PyTree) -> PyTree:
        w = gradient.inverse(j.vjp_h, backend.map(lambda a, b: a - b, v, j.vjp_h(v)), batch_ndim)
        return backend.map(lambda a, b: a - b, w, v)

    def back(t: PyTree) -> PyTree:
        s = gradient.inverse(j.jvp_h, t, batch_ndim)
        return backend.map(lambda s, js, t: s - js - t, s, j.jvp_h(s), t)

    return Deviation(
        Pair(
            on(j.whole, j.parameters, lambda v: j.vjp_z(forth(v))),
            on(j.parameters, j.whole, lambda dz: back(j.jvp_z(dz))),
        ),
        Pair(on(j.samples, j.samples, forth), on(j.samples, j.samples, back)),
    )


def on(domain: Space, codomain: Space, function: Callable[[Any], Any]) -> Operator:
    """A function of pytrees as one of states."""

    def on_states(x: State) -> State:
        return codomain.pack(function(domain.unpack(x)))

    return on_states


def check(problem: Problem, gradient: Any = None) -> None:
    """The arguments' kinds."""
    checks.instance("problem", problem, Problem, "Problem(f, vjp=..., jvp=...)")
    if gradient is not None:
        checks.instance("gradient", gradient, Estimator, "Neumann(k=5, lam=0.5)")

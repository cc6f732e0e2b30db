"""The matrices that the paper's conditions are about, as products on states."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .. import checks
from ..backend import Array, PyTree
from ..estimators import Estimator
from ..estimators.base import AtFixedPoint
from ..problem import BoundLinearization, Linearization, Problem
from ..registry import find_backend
from ..solution import Solution
from ..space import Operator, Space, State
from .krylov import dimension

TRACED = (
    "certify and suggest look at numbers to decide when to stop, and can't within jax.jit, jax.vmap or a captured "
    "graph: call them outside, on a Problem whose derivatives may be compiled"
)
NO_PARAMETERS = (
    "z holds no real floating array that F has a derivative in: pass what is trained in z, and not in what f closes "
    "over (for a torch module dict(module.named_parameters()), by torch.func.functional_call); cast integers to float"
)


class Pair(NamedTuple):
    """An operator and its transpose."""

    product: Operator
    transposed: Operator


class Counted(Problem):
    """A problem that counts what is asked of it.

    Attributes
    ----------
    evaluations, products_h, products_z
        Of F, and with ∂F/∂h and ∂F/∂z or their transposes.
    """

    def __init__(self, problem: Problem) -> None:
        self.evaluations = self.products_h = self.products_z = 0
        self._given = problem
        super().__init__(self._evaluate, linearize=self._linearized, batch_ndim=problem.batch_ndim)

    def _evaluate(self, h: PyTree, z: PyTree) -> PyTree:
        self.evaluations += 1
        return self._given.f(h, z)

    def _linearized(self, h: PyTree, z: PyTree) -> Linearization:
        self.evaluations += 1
        at = self._given.linearize(h, z)

        def counted(name: str, in_h: int, in_z: int) -> Any:
            joint = name.partition("_")[0]
            if getattr(at.raw, name) is None and getattr(at.raw, joint) is None:
                return None

            def product(*vectors: PyTree) -> PyTree:
                self.products_h += in_h
                self.products_z += in_z
                return getattr(at, name)(*vectors)

            return product

        return Linearization(
            at.value,
            vjp_h=counted("vjp_h", 1, 0),
            vjp_z=counted("vjp_z", 0, 1),
            jvp_h=counted("jvp_h", 1, 0),
            jvp_z=counted("jvp_z", 0, 1),
            vjp=counted("vjp", 1, 1),
            jvp=counted("jvp", 1, 1),
        )


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
    residual, finite
        ‖F(h) - h‖₂, and whether it is a number, (N, 1): nothing is known of a Jacobian at a point that is none.
    """

    def __init__(self, problem: Problem, h: PyTree, z: PyTree) -> None:
        backend = self.backend = find_backend(h, "h")
        self.problem, self.h, self.z = problem, h, z
        self.samples = Space(backend, h, problem.batch_ndim, "h")
        if not dimension(self.samples):
            raise ValueError(f"h holds no numbers: shapes {self.samples.shapes}")
        self.whole = Space(backend, h, 0, "h")
        self.at: BoundLinearization = problem.linearize(h, z).require("vjp_h", "jvp_h")
        if not all(map(backend.readable, backend.flatten((h, self.at.value))[0])):
            raise NotImplementedError(TRACED)
        self.residual = self.samples.norm(self.samples.sub(self.samples.pack(self.at.value), self.samples.pack(h)))
        self.finite = backend.xp.isfinite(self.residual)
        self._z_leaves, self._z_structure = backend.flatten_with_none(z)

    @cached_property
    def parameters(self) -> Space:
        """The space of z, its floating arrays alone, as one vector."""
        if not self._moving:
            raise ValueError(NO_PARAMETERS)
        return Space(self.backend, [self._z_leaves[i] for i in self._moving], 0, "z")

    @cached_property
    def _moving(self) -> list[int]:
        backend = self.backend
        self.at.require("vjp_z", "jvp_z")
        probe = backend.flatten_with_none(self.at.vjp_z(backend.map(backend.xp.zeros_like, self.h)))[0]
        return [i for i, leaf in enumerate(probe) if backend.is_array(leaf) and self._floats(i)]

    def _floats(self, i: int) -> bool:
        leaf = self._z_leaves[i]
        return self.backend.is_array(leaf) and self.backend.isdtype(leaf.dtype, "real floating")

    # Products with pytrees. A callback may return the same memory at each call: what it gave is copied.

    def vjp_h(self, v: PyTree) -> PyTree:
        """(∂F/∂h)ᵀ v."""
        return self.fresh(self.at.vjp_h(v))

    def jvp_h(self, dh: PyTree) -> PyTree:
        """(∂F/∂h) dh."""
        return self.fresh(self.at.jvp_h(dh))

    def vjp_z(self, v: PyTree) -> list[Array]:
        """(∂F/∂z)ᵀ v, the arrays that have a gradient."""
        return self.moving(self.at.vjp_z(v))

    def jvp_z(self, dz: list[Array]) -> PyTree:
        """(∂F/∂z) dz."""
        return self.fresh(self.at.jvp_z(self.tangent(dz)))

    def fresh(self, tree: PyTree) -> PyTree:
        """A pytree in memory of its own."""
        return self.backend.map(self.backend.fresh, tree)

    def moving(self, z_bar: PyTree) -> list[Array]:
        """Of a cotangent shaped as z, the arrays that have a gradient."""
        leaves = self.backend.flatten_with_none(z_bar)[0]
        return [self.backend.fresh(leaves[i]) for i in self._moving]

    def tangent(self, dz: list[Array]) -> PyTree:
        """A tangent shaped as z."""
        backend = self.backend
        leaves = [backend.xp.zeros_like(x) if backend.is_array(x) else x for x in self._z_leaves]
        for i, leaf in zip(self._moving, dz, strict=True):
            leaves[i] = leaf
        return backend.unflatten(self._z_structure, leaves)

    # Operators, in the paper's transposed convention: from cotangents of h.

    def in_h(self) -> Pair:
        """∂F/∂h, sample by sample; NaN at a point that is not finite."""
        space, xp = self.samples, self.backend.xp
        known = xp.where(self.finite, space.full(1.0), space.full(float("nan")))
        forth, back = on(space, space, self.vjp_h), on(space, space, self.jvp_h)
        return Pair(lambda v: space.scale(known, forth(v)), lambda v: space.scale(known, back(v)))

    def in_z(self) -> Pair:
        """∂F/∂z, from the whole batch's cotangents to those of z."""
        return Pair(on(self.whole, self.parameters, self.vjp_z), on(self.parameters, self.whole, self.jvp_z))

    def damped(self, lam: float) -> Pair:
        """B = λ ∂F/∂h + (1 - λ) I (Eq. 15), sample by sample."""
        space, jacobian = self.samples, self.in_h()

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


def check(problem: Problem, h: PyTree) -> None:
    """The arguments' kinds."""
    checks.instance("problem", problem, Problem, "Problem(f, vjp=..., jvp=...)")
    if isinstance(h, Solution):
        raise TypeError("h must be a point, got a Solution: pass solution.value")

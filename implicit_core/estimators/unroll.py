"""The unrolled phantom gradient (Eq. 17)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import checks, settings
from ..arrays import Array, Count, H, Real, State, Z
from ..problem import BoundLinearization, Problem
from ..records import is_array
from ..space import Space
from .base import Estimator, Factor, bind, geometric_bound
from .growth import GrowthTest, OnGrowth, Terms


@dataclass(frozen=True, repr=False)
class Unroll(Terms, Estimator):
    r"""The unrolling-based phantom gradient A^unr_{k,λ}, Eq. (17).

    .. math::
        A_{k,λ} = λ \sum_{t=0}^{k-1} \frac{∂F}{∂z}\Big|_{h_t} \prod_{s=t+1}^{k-1}
        \left(λ \frac{∂F}{∂h}\Big|_{h_s} + (1-λ) I\right)

    The derivative of k damped steps h_{t+1} = λ F(h_t, z) + (1 - λ) h_t (Eq. 13) from the solver's point h_0, which is
    a constant; the value is h_k. An inaccurate solve then behaves as backpropagation through time on k steps. A value
    costs k evaluations of F, a pullback k - 1 h-VJPs and k z-VJPs.

    Parameters
    ----------
    k
        Steps, at least 1: a number, or an array of integers that broadcasts to the batch, one for each sample. Samples
        with fewer steps keep their points, and their residual is the one at h_k.
    lam
        λ in (0, 1], likewise. The value, and the gradient, have a derivative in an array λ.
    most
        The largest k, where k is an array that a framework traces. Samples with a larger one, or with none, become NaN.
    recompute
        Keep the k states only, and linearize F again in the pullback: k more evaluations, one linearization at a time.
    on_growth
        What to do with samples whose cotangents grow from step to step, so that A is no estimate: ``"warn"`` with a
        :class:`GrowingGradientWarning`, make their part of the gradient ``"nan"``, or ``"ignore"`` it. The cotangent at
        h_1 is compared with the one at h_k. Code that a framework traces cannot warn: there ``"warn"`` does nothing.
        Nor does it behind a solver whose number of steps is forced, as in recursive models, where A is the derivative
        of the last k steps and estimates nothing else.
        Pushforwards and second derivatives are not tested.

    Raises
    ------
    TypeError, ValueError
        If k < 1, λ is not in (0, 1], or on_growth is none of the three.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 13, 14 and 17, Theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.Unroll(k=2, lam=1.0).vjp(problem, np.array([0.0]), np.array([1.0]))
    >>> value, pullback(np.array([1.0]))
    (array([1.5]), array([1.5]))
    """

    k: Count = 5
    lam: Real = 0.5
    recompute: bool = False
    most: int | None = field(default=None, kw_only=True, repr=False)
    on_growth: OnGrowth = field(default="warn", repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.instance("recompute", self.recompute, bool, "True")

    def value(self, problem: Problem[H, Z], h: H, z: Z) -> H:
        return self.steps(problem, h, z, 0, self.largest)

    def steps(self, problem: Problem[H, Z], h: H, z: Z, first: int, end: int) -> H:
        """The point h_end, from the point h_first; ``end`` is larger."""
        space = bind(problem, h)
        problem = problem.fixed_point_form(h, z)
        bound = settings.bound(self, space)
        backend = space.backend

        def step(problem: Problem[H, Z], h: H, t: Any) -> H:
            f = problem.f if backend.has_autodiff else backend.protected(problem.f)
            return _where_left(space, bound, t, _blend(space, bound.lam, f(h, z), h), h)

        # Whoever watches F sees the last step alone (Decision 72), and the first where asked for: a loop that is traced
        # lets nothing out.
        inner, t = problem.unwatched or problem, first
        with space.backend.on_device_of(h):
            h = _valid(space, bound, h)
            if problem.watches_first and t < end - 1:
                h, t = step(problem, h, t), t + 1
            h = _repeated(space, bound, lambda h, t: step(inner, h, t), h, t, end - 1)
            return _valid(space, bound, step(problem, h, end - 1))

    def vjp(self, problem: Problem[H, Z], h: H, z: Z) -> tuple[H, Callable[[H], Z]]:
        return self.vjp_with(self.growth, problem, h, z)

    def vjp_with(self, growth: GrowthTest, problem: Problem[H, Z], h: H, z: Z) -> tuple[H, Callable[[H], Z]]:
        """:meth:`vjp`, with a test in the name of another estimator."""
        space = bind(problem, h)
        problem = problem.fixed_point_form(h, z)
        bound = settings.bound(self, space)
        lam = bound.lam
        h_0, steps = h, list[tuple[H, BoundLinearization[H, Z] | None]]()
        with space.backend.on_device_of(h):
            h = _valid(space, bound, h)
            for t in range(self.largest):
                at = problem.linearize(h, z).require("vjp_h", "vjp_z")
                steps.append((h, None if self.recompute else at))
                h = _where_left(space, bound, t, _blend(space, lam, at.value, h), h)

        def linearization(t: int) -> BoundLinearization[H, Z]:
            h_t, at = steps[t]
            return problem.linearize(h_t, z) if at is None else at

        def pullback(h_bar: H) -> Z:
            """Eq. (17), the last step first. g is the cotangent of h_{t+1}, the point after step t."""
            h_bar = checks.like(space.backend, "h_bar", h_bar, h_0, "h")
            g, z_bar = _valid(space, bound, h_bar), None
            with space.backend.on_device_of(h_0):
                for t in reversed(range(1, self.largest)):
                    g_h, g_z = linearization(t).vjp(_where_left(space, bound, t, _scale(space, lam, g)))
                    z_bar = _add(space, z_bar, g_z)
                    g = _where_left(space, bound, t, _axpy(space, 1 - lam, g, g_h), g)
                g = _checked(space.dual, growth, h_bar, g)
                return _add(space, z_bar, linearization(0).vjp_z(_scale(space, lam, g)))

        return h, pullback

    def jvp(self, problem: Problem[H, Z], h: H, z: Z, dz: Z) -> tuple[H, H]:
        space = bind(problem, h)
        problem = problem.fixed_point_form(h, z)
        bound = settings.bound(self, space)
        lam = bound.lam
        checks.like_z(space.backend, "dz", dz, z)
        with space.backend.on_device_of(h):
            h = _valid(space, bound, h)
            at = problem.linearize(h, z).require("jvp_h", "jvp_z")
            tangent = _scale(space, lam, at.jvp_z(dz))
            h = _blend(space, lam, at.value, h)
            for t in range(1, self.largest):
                at = problem.linearize(h, z)
                moved = _blend(space, lam, at.jvp(tangent, dz), tangent)
                tangent = _where_left(space, bound, t, moved, tangent)
                h = _where_left(space, bound, t, _blend(space, lam, at.value, h), h)
        return h, _valid(space, bound, tangent)

    def error_bound(self, contraction: Factor) -> Factor:
        """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h), from a fixed point on (Theorem 2)."""
        return geometric_bound(self.k, self.lam, contraction)


def _checked(space: Space, growth: GrowthTest, first: H, last: H) -> H:
    """The cotangent ``last`` at h_1, compared with ``first`` at h_k."""
    if not growth.active:
        return last
    g = space.pack(last)
    checked: H = space.unpack(growth.checked(space, space.pack(first), g, g))
    return checked


# Arithmetic on the user's pytrees, leaf by leaf, so that the k steps are a plain graph in a framework with autodiff.


def _blend(space: Space, lam: Real, f: H, h: H) -> H:
    """λ f + (1 - λ) h (Eq. 13)."""
    if isinstance(f, float) and space.backend.has_autodiff:  # cut off from the graph (Decision 80)
        checks.like(space.backend, "the result of f", f, h, "h")
    return _copy(space, f) if settings.is_one(lam) else _axpy(space, lam, f, _scale(space, 1 - lam, h))


def _repeated(space: Space, bound: Unroll, step: Callable[[H, Any], H], h: H, first: int, end: int) -> H:
    """The steps ``first`` to ``end`` - 1 from h."""
    if isinstance(bound.k, int):
        return space.backend.repeat(lambda h: step(h, first), h, end - first)
    t = space.xp.asarray(first, dtype=space.xp.int32, device=space.device)
    return space.backend.repeat(lambda carry: (step(*carry), carry[1] + 1), (h, t), end - first)[0]


def _where_left(space: Space, bound: Unroll, t: Any, moved: H, h: H | None = None) -> H:
    """``moved`` in the samples that make the step t of their k; in the others h, or zero."""
    k = bound.k
    if isinstance(k, int) or (isinstance(t, int) and t == 0):
        return moved
    backend = space.backend
    leaves, structure = backend.flatten(moved)
    kept = [space.xp.zeros_like(a) for a in leaves] if h is None else backend.flatten(h)[0]
    masks = (settings.of_leaf(space, k > t, a) for a in leaves)
    chosen: H = backend.unflatten(structure, [space.xp.where(*x) for x in zip(masks, leaves, kept, strict=True)])
    return chosen


def _valid(space: Space, bound: Unroll, h: H) -> H:
    """``h``, NaN in samples whose k is out of range.

    Of the start, so that their status says it, and of the result, so that their gradient does.
    """
    valid = bound.valid(space)
    return _scale(space, valid, h) if is_array(valid) else h


def _axpy(space: Space, factor: Real, x: H, y: H) -> H:
    """``factor x + y``."""
    backend = space.backend
    leaves = [
        space.multiply_add(_of_leaf(space, factor, b), a, b)
        for a, b in zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
    ]
    total: H = backend.unflatten(space.structure, leaves)
    return total


def _scale(space: Space, factor: Real, x: H) -> H:
    """``factor x``."""
    backend = space.backend
    scaled: H = backend.map(lambda a: _of_leaf(space, factor, a) * a, x)
    return scaled


def _of_leaf(space: Space, factor: Real, leaf: Array) -> Any:
    return settings.like(space.backend, settings.of_leaf(space, factor, leaf), leaf)


def _copy(space: Space, x: H) -> H:
    """``x`` in its own memory, and in the space's structure."""
    leaves = [_copy_array(space, a) for a in space.backend.flatten(x)[0]]
    copied: H = space.backend.unflatten(space.structure, leaves)
    return copied


def _copy_array(space: Space, a: Array) -> Array:
    """``a`` in its own memory, since a callback may return the same array at every call.

    With autodiff it does not, and a copy would be part of the graph.
    """
    return a if space.backend.has_autodiff else space.copy(State((a,)))[0]


def _add(space: Space, total: Z | None, term: Z) -> Z:
    """The sum of two cotangents of z, in which None stands for no gradient."""
    backend = space.backend
    terms, structure = backend.flatten(term, none_is_leaf=True)
    if total is None:
        sums = [_copy_array(space, a) if backend.is_array(a) else a for a in terms]
    else:
        totals, _ = backend.flatten(total, none_is_leaf=True)
        sums = [a if b is None else b if a is None else a + b for a, b in zip(totals, terms, strict=True)]
    z_bar: Z = backend.unflatten(structure, sums)
    return z_bar

"""The root of g(x, z) = 0, and the map whose fixed point it is."""

import random
from collections.abc import Callable
from typing import Any

from . import checks
from .arrays import H, Numbers, PyTree, Z
from .problem import BoundLinearization, Linearization, Map, Names, Problem
from .registry import find_backend
from .space import Space, signs


class RootProblem(Problem[H, Z]):
    """The root of g(x, z) = 0, with whatever derivatives of g the user has.

    Solvers see -g(x) / ``g_scale`` as the residual, which is as accurate as g, whatever the size of x. A relative
    tolerance refers to its norm at the start. Estimators see the fixed point of F(x) = x - α g(x), which has the same
    derivatives for every α but zero.

    Parameters
    ----------
    f
        ``g(x, z)``; returns the structure, shapes and dtypes of ``x``.
    vjp, jvp, linearize, jacobian
        Derivatives of g, as for :class:`Problem`.
    batch_ndim, scale
        As for :class:`Problem`. ``scale`` holds the units of x.
    g_scale
        The units of g. Norms and tolerances of the residual refer to g / g_scale.
        None for 1 in the solve; then α is chosen by one product with ∂g/∂x, such that α ∂g/∂x is about as large as 1.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.RootProblem(
    ...     lambda x, z: x**2 - z, vjp=lambda x, z, v: (2 * x * v, -v), jvp=lambda x, z, dx, dz: 2 * x * dx - dz
    ... )
    >>> solution = ic.solve(problem, np.array([1.0]), np.array([2.0]), solver=ic.NewtonKrylov(rtol=1e-9))
    >>> solution.value.round(6)
    array([1.414214])
    >>> value, pullback = ic.Implicit().vjp(problem, solution.value, np.array([2.0]))
    >>> pullback(np.array([1.0])).round(6)  # 1 / (2 √2)
    array([0.353553])
    """

    names = Names("g", "x", "x0", "g", "root", "RootProblem")

    def __init__(
        self,
        f: Map[H, Z],
        *,
        vjp: Callable[[H, Z, H], tuple[H, Z]] | None = None,
        jvp: Callable[[H, Z, H, Z], H] | None = None,
        linearize: Callable[[H, Z], Linearization[H, Z]] | None = None,
        jacobian: Callable[[H, Z], Any] | None = None,
        batch_ndim: int = 0,
        scale: Any = None,
        g_scale: Any = None,
    ) -> None:
        super().__init__(
            f, vjp=vjp, jvp=jvp, linearize=linearize, jacobian=jacobian, batch_ndim=batch_ndim, scale=scale
        )
        checks.scale(scale, all_parts=True)  # an equation that is left out would not determine its unknown
        self.g_scale = checks.scale(g_scale, "g_scale", all_parts=True)
        self._base: Problem[H, Z] | None = None

    @classmethod
    def of(cls, g: Problem[H, Z], g_scale: PyTree = None) -> "RootProblem[H, Z]":
        """The root of the function that a :class:`Problem` is about."""
        root = cls(
            g.f,
            vjp=g._vjp,
            jvp=g._jvp,
            linearize=g._linearize,
            jacobian=g.jacobian,
            batch_ndim=g.batch_ndim,
            scale=g.scale,
            g_scale=g_scale,
        )
        root._base = g.base
        return root

    @property
    def base(self) -> Problem[H, Z]:
        """The problem of g."""
        return self if self._base is None else self._base

    def about(self, g: Problem[H, Z]) -> "RootProblem[H, Z]":
        """The root of another function, in the same units of g, and with the same names in errors."""
        root = RootProblem.of(g, self.g_scale)
        root.names = self.names
        return root

    def replace_f(self, f: Map[H, Z]) -> "RootProblem[H, Z]":
        """The same problem with another callable for g."""
        return self.about(super().replace_f(f))

    def with_function(
        self, f: Map[H, Z], linearize: Callable[[H, Z], Linearization[H, Z]] | None = None
    ) -> "RootProblem[H, Z]":
        """The same problem of another g with other derivatives, or none."""
        return self.about(super().with_function(f, linearize))

    def with_derivatives(self, arrays: PyTree) -> "RootProblem[H, Z]":
        """The problem, with derivatives of g by the arrays' framework if it has none."""
        made = super().with_derivatives(arrays)
        return self if made is self else self.about(made)

    def image(self, x: H, name: str = "x") -> Space:
        """The vector space of g(x), in units of ``g_scale``."""
        try:
            return find_backend(x, name).space(x, self.batch_ndim, name, self.g_scale)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("scale "):
                raise
            raise type(error)(f"g_{error}") from None

    def fixed_point_form(self, h: H, z: Z, *, relaxed: bool = True) -> Problem[H, Z]:
        """The problem of F(x) = x - α g(x), with derivatives if g has callbacks.

        Parameters
        ----------
        h, z
            Where α is chosen.
        relaxed
            Whether the size and the sign of α matter. They do not where a linear system is solved, if ``g_scale`` says
            how large g is.
        """
        return self.with_factors(self.factors(h, z, relaxed=relaxed))

    def factors(self, h: H, z: Z, *, relaxed: bool) -> H:
        """α in units of x over units of g, for every number of h. It is a constant."""
        space, image = self.space(h), self.image(h)
        backend = space.backend
        with backend.on_device_of(h), backend.solving():
            alpha = space.full(1.0)
            given = self.with_derivatives(h)
            # Where there are no derivatives, nothing depends on α.
            if (relaxed or self.g_scale is None) and given.has_derivatives:
                alpha = _relaxation(space, image, given.linearize(h, z), sign_alone=self.g_scale is not None)
            ones = image.pack(backend.map(backend.xp.ones_like, h))
            factors: H = backend.map(backend.stop_gradient, space.unpack(space.scale(alpha, ones)))
            return factors

    def with_factors(self, factors: H) -> Problem[H, Z]:
        """The problem of F(x) = x - ``factors`` g(x)."""
        backend = find_backend(factors, "x")

        def scaled(v: H) -> H:
            result: H = backend.map(lambda factor, v: -factor * v, factors, v)
            return result

        def plus(v: H, w: H) -> H:
            total: H = backend.map(lambda a, b: a + b, v, w)
            return total

        def f(x: H, z: Z) -> H:
            return plus(x, scaled(checks.structured(backend, self.f(x, z), x)))

        def linearize(x: H, z: Z) -> Linearization[H, Z]:
            at = self.linearize(x, z)
            pulls, pushes = (at.has(f"{name}_h") and at.has(f"{name}_z") for name in ("vjp", "jvp"))
            return Linearization(
                plus(x, scaled(at.value)),
                vjp_h=(lambda v: plus(v, at.vjp_h(scaled(v)))) if at.has("vjp_h") else None,
                vjp_z=(lambda v: at.vjp_z(scaled(v))) if at.has("vjp_z") else None,
                vjp=(lambda v: _first(lambda v_h: plus(v, v_h), at.vjp(scaled(v)))) if pulls else None,
                jvp_h=(lambda dx: plus(dx, scaled(at.jvp_h(dx)))) if at.has("jvp_h") else None,
                jvp_z=(lambda dz: scaled(at.jvp_z(dz))) if at.has("jvp_z") else None,
                jvp=(lambda dx, dz: plus(dx, scaled(at.jvp(dx, dz)))) if pushes else None,
            )

        given = linearize if self.has_derivatives else None
        form = Problem(f, linearize=given, batch_ndim=self.batch_ndim, scale=self.scale)
        space, image = self.space(factors), self.image(factors)
        ones = image.pack(backend.map(backend.xp.ones_like, factors))
        form.jacobian, form.row_factors = self.jacobian, factors
        form.names = self.names
        form.relaxation = space.xp.abs(space.pack(factors)[0] / ones[0])[:, :1]
        return form


def _first(function: Callable[[H], H], pair: tuple[H, Z]) -> tuple[H, Z]:
    return function(pair[0]), pair[1]


def _relaxation(space: Space, image: Space, at: BoundLinearization[Any, Any], *, sign_alone: bool) -> Numbers:
    """The α for which α ∂g/∂x leaves the length of a vector of random signs as it is, and turns it by less than 90°."""
    u = space.add(signs(space, random.Random(0)), space.zeros())  # the same signs in every sample
    if at.has("vjp_h"):
        product = space.dual.pack(at.vjp_h(image.dual.unpack(u)))
    else:
        product = image.pack(at.require("jvp_h").jvp_h(space.unpack(u)))
    one, largest = space.full(1.0), space.magnitude(product)  # squares may leave the range of numbers
    product = space.divide(product, largest)
    length = space.norm(product)
    sign = space.select(space.dot(u, product) < 0, -one, one)
    usable = (length > 0) & (length < float("inf"))
    alpha = sign if sign_alone else sign * space.norm(u) / space.select(usable, length, one) / largest
    return space.select(usable, alpha, one)

"""The equilibrium map F and its derivatives, as the user gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import checks
from .backend import Backend, PyTree
from .registry import find_backend

Map = Callable[[PyTree, PyTree], PyTree]
Linear = Callable[[PyTree], PyTree]


@dataclass(frozen=True)
class Linearization:
    """F and its derivatives at one point (h, z).

    Parameters
    ----------
    value
        F(h, z), shaped as h.
    vjp_h, vjp_z
        Pullbacks: a cotangent ``v`` shaped as h to (∂F/∂h)ᵀ v, shaped as h, and to (∂F/∂z)ᵀ v, shaped as z. ``None`` in
        place of a leaf of z says that it has no gradient.
    jvp_h, jvp_z
        Pushforwards: a tangent of h, or of z, to (∂F/∂h) dh, or (∂F/∂z) dz, shaped as h.
    vjp, jvp
        Both at once, where that is cheaper: ``vjp(v) -> (v_h, v_z)`` and ``jvp(dh, dz) -> dF``.

    Notes
    -----
    What is left out is simply not there: pullbacks need only the ``vjp`` side, pushforwards the ``jvp`` side.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> def linearize(h, z):
    ...     value = np.tanh(0.5 * h + z)
    ...     slope = 1 - value**2
    ...     return ic.Linearization(value, vjp_h=lambda v: 0.5 * slope * v, vjp_z=lambda v: slope * v)
    >>> problem = ic.Problem(lambda h, z: np.tanh(0.5 * h + z), linearize=linearize)
    >>> value, pullback = ic.Neumann(k=2, lam=1.0).vjp(problem, np.zeros(2), np.zeros(2))
    >>> pullback(np.ones(2))  # 1 + 1/2
    array([1.5, 1.5])
    """

    value: PyTree
    vjp_h: Linear | None = None
    vjp_z: Linear | None = None
    jvp_h: Linear | None = None
    jvp_z: Linear | None = None
    vjp: Callable[[PyTree], tuple[PyTree, PyTree]] | None = None
    jvp: Callable[[PyTree, PyTree], PyTree] | None = None


class BoundLinearization:
    """A :class:`Linearization` whose every result is checked against h and z; what the estimators work with."""

    def __init__(self, raw: Linearization, backend: Backend, h: PyTree, z: PyTree) -> None:
        self.raw, self.backend, self.h, self.z = raw, backend, h, z

    @property
    def value(self) -> PyTree:
        """F(h, z)."""
        return self.raw.value

    def vjp_h(self, v: PyTree) -> PyTree:
        """(∂F/∂h)ᵀ v."""
        if self.raw.vjp_h is None:
            return self.vjp(v)[0]
        return self._h("the h-cotangent from vjp", self.raw.vjp_h(v))

    def vjp_z(self, v: PyTree) -> PyTree:
        """(∂F/∂z)ᵀ v."""
        if self.raw.vjp_z is None:
            return self.vjp(v)[1]
        return self._z("the z-cotangent from vjp", self.raw.vjp_z(v))

    def vjp(self, v: PyTree) -> tuple[PyTree, PyTree]:
        """((∂F/∂h)ᵀ v, (∂F/∂z)ᵀ v)."""
        if self.raw.vjp is None:
            self.require("vjp_h", "vjp_z")
            return self.vjp_h(v), self.vjp_z(v)
        both: Any = self.raw.vjp(v)
        if not isinstance(both, tuple) or len(both) != 2:
            raise TypeError(f"vjp must return the pair (v_h, v_z), got {type(both).__name__}")
        return self._h("the h-cotangent from vjp", both[0]), self._z("the z-cotangent from vjp", both[1])

    def jvp_h(self, dh: PyTree) -> PyTree:
        """(∂F/∂h) dh."""
        if self.raw.jvp_h is None:
            return self.jvp(dh, self._zeros(self.z))
        return self._h("the tangent from jvp", self.raw.jvp_h(dh))

    def jvp_z(self, dz: PyTree) -> PyTree:
        """(∂F/∂z) dz."""
        if self.raw.jvp_z is None:
            return self.jvp(self._zeros(self.h), dz)
        return self._h("the tangent from jvp", self.raw.jvp_z(dz))

    def jvp(self, dh: PyTree, dz: PyTree) -> PyTree:
        """(∂F/∂h) dh + (∂F/∂z) dz."""
        if self.raw.jvp is None:
            self.require("jvp_h", "jvp_z")
            return self.backend.map(lambda a, b: a + b, self.jvp_h(dh), self.jvp_z(dz))
        return self._h("the tangent from jvp", self.raw.jvp(dh, dz))

    def require(self, *names: str) -> "BoundLinearization":
        """Raise NotImplementedError now, rather than in a pullback called later, if a derivative is missing."""
        for name in names:
            joint = name.split("_", maxsplit=1)[0]
            if getattr(self.raw, name) is None and getattr(self.raw, joint) is None:
                what = "a pullback" if joint == "vjp" else "a pushforward"
                raise NotImplementedError(
                    f"{what} needs the {joint.upper()} of F, which this problem doesn't have: "
                    f"pass {joint}= to Problem, or return {joint}_h and {joint}_z from its linearize"
                )
        return self

    def _h(self, name: str, got: PyTree) -> PyTree:
        checks.like(self.backend, name, got, self.h, "h")
        return got

    def _z(self, name: str, got: PyTree) -> PyTree:
        checks.like_z(self.backend, name, got, self.z)
        return got

    def _zeros(self, tree: PyTree) -> PyTree:
        backend = self.backend

        def zero(leaf: Any) -> Any:
            if backend.is_array(leaf):
                return backend.xp.zeros_like(leaf)
            return 0.0 if isinstance(leaf, (int, float)) else leaf

        return backend.map(zero, tree)


class Problem:
    """The fixed-point problem h = F(h, z) (Eq. 1), with whatever derivatives the user has.

    Parameters
    ----------
    f
        ``f(h, z)``, the equilibrium map F; returns the structure, shapes and dtypes of ``h``. Both may be pytrees; z
        holds inputs and parameters.
    vjp
        ``vjp(h, z, v) -> (v_h, v_z)``, the transposed Jacobians applied to a cotangent ``v`` shaped as h. Enough for
        every pullback.
    jvp
        ``jvp(h, z, dh, dz) -> dF``, shaped as h. Enough for every pushforward, and for :class:`NewtonKrylov`.
    linearize
        ``linearize(h, z) -> Linearization`` instead of both, where F and its derivatives share work, or where products
        with ∂F/∂h alone are cheaper: most of an estimator's are, and ``vjp`` computes the z-cotangent with each.
    batch_ndim
        How many first axes of every leaf of h index independent samples; 0 for one system.

    Notes
    -----
    F and the callbacks are functions: they leave their arguments as they are, and return new arrays. In the ``dz`` that
    reaches ``jvp``, what is not an array stays as it is in z.

    Raises
    ------
    TypeError
        If an argument isn't callable, or both ``linearize`` and ``vjp`` or ``jvp`` are given.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> solution = ic.solve(problem, np.zeros(2), np.ones(2), solver=ic.FixedPointIteration(rtol=1e-9))
    >>> solution.value.round(6)
    array([2., 2.])
    >>> value, pullback = ic.Neumann(k=60, lam=1.0).vjp(problem, solution.value, np.ones(2))
    >>> pullback(np.ones(2)).round(6)
    array([2., 2.])
    """

    def __init__(
        self,
        f: Map,
        *,
        vjp: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
        jvp: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree] | None = None,
        linearize: Callable[[PyTree, PyTree], Linearization] | None = None,
        batch_ndim: int = 0,
    ) -> None:
        checks.function("f", f)
        for name, callback in (("vjp", vjp), ("jvp", jvp), ("linearize", linearize)):
            if callback is not None:
                checks.function(name, callback)
        if linearize is not None and (vjp is not None or jvp is not None):
            raise TypeError("Problem takes linearize, or vjp and jvp, not both")
        self.f = f
        self.batch_ndim = checks.integer("batch_ndim", batch_ndim, 0)
        self._vjp, self._jvp, self._linearize = vjp, jvp, linearize

    def __repr__(self) -> str:
        name = getattr(self.f, "__qualname__", None) or repr(self.f)
        given = {"vjp": self._vjp, "jvp": self._jvp, "linearize": self._linearize}
        callbacks = [callback for callback, value in given.items() if value is not None]
        return f"Problem({', '.join([name, *callbacks, f'batch_ndim={self.batch_ndim}'])})"

    def __call__(self, h: PyTree, z: PyTree) -> PyTree:
        """F(h, z)."""
        return self.f(h, z)

    def replace_f(self, f: Map) -> "Problem":
        """The same problem with another callable for F, e.g. one that counts its calls."""
        return Problem(f, vjp=self._vjp, jvp=self._jvp, linearize=self._linearize, batch_ndim=self.batch_ndim)

    @property
    def has_jvp(self) -> bool:
        """Whether the JVP was given as a callback, and needs no linearization."""
        return self._jvp is not None

    def linearize(self, h: PyTree, z: PyTree) -> BoundLinearization:
        """F and its derivatives at (h, z), for one evaluation of F.

        Raises
        ------
        TypeError, ValueError
            If F or a callback returns another structure, shape, dtype or device than that of h or z.
        NotImplementedError
            On use of a derivative that the problem doesn't have.
        """
        backend = find_backend(h, "h")
        checks.state(backend, "h", h, self.batch_ndim)
        with backend.beside(h):
            raw = self._from_callbacks(h, z) if self._linearize is None else self._linearize(h, z)
        checks.instance("the result of linearize", raw, Linearization, "Linearization(value, vjp_h, vjp_z)")
        checks.like(backend, "the result of f", raw.value, h, "h")
        return BoundLinearization(raw, backend, h, z)

    def pushforward_h(self, h: PyTree, z: PyTree) -> tuple[Linear, int]:
        """``dh -> (∂F/∂h) dh`` at (h, z), and the evaluations of F spent on it: none if ``jvp`` was given."""
        jvp = self._jvp
        if jvp is None:
            return self.linearize(h, z).require("jvp_h").jvp_h, 1
        raw = Linearization(None, jvp=lambda dh, dz: jvp(h, z, dh, dz))
        return BoundLinearization(raw, find_backend(h, "h"), h, z).jvp_h, 0

    def _from_callbacks(self, h: PyTree, z: PyTree) -> Linearization:
        vjp, jvp = self._vjp, self._jvp
        return Linearization(
            self.f(h, z),
            vjp=None if vjp is None else lambda v: vjp(h, z, v),
            jvp=None if jvp is None else lambda dh, dz: jvp(h, z, dh, dz),
        )

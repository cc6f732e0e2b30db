"""The equilibrium map F and its derivatives, as the user gives them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from . import checks
from .arrays import H, Numbers, PyTree, Z
from .backend import Backend
from .registry import find_adapter, find_backend
from .space import Space

Map = Callable[[H, Z], H]
"""F: ``f(h, z)``."""
DERIVATIVES = ("vjp_h", "vjp_z", "jvp_h", "jvp_z", "vjp", "jvp")
VECTORS = {"jvp_h": ("dh",), "jvp_z": ("dz",), "jvp": ("dh", "dz")}
"""The arguments of a derivative, where they are not the cotangent v."""
Function = TypeVar("Function", bound=Callable[..., Any])


class Names(NamedTuple):
    """What errors call the parts of a problem."""

    function: str = "f"
    unknown: str = "h"
    start: str = "h0"
    symbol: str = "F"
    solution: str = "fixed point"
    kind: str = "Problem"


@dataclass(frozen=True)
class Linearization(Generic[H, Z]):
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
    matrix_h
        ``matrix_h() -> ∂F/∂h`` in the form of a Problem's ``jacobian``, where that is cheaper than n products, as in
        PyTorch; or None, for n products after all.

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

    value: H
    vjp_h: Callable[[H], H] | None = None
    vjp_z: Callable[[H], Z] | None = None
    jvp_h: Callable[[H], H] | None = None
    jvp_z: Callable[[Z], H] | None = None
    vjp: Callable[[H], tuple[H, Z]] | None = None
    jvp: Callable[[H, Z], H] | None = None
    matrix_h: Callable[[], Any] | None = None

    def wrap(self, outer: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> "Linearization[H, Z]":
        """The same, where ``outer(name, derivative)`` replaces each derivative that is given."""
        given = {name: getattr(self, name) for name in DERIVATIVES}
        return Linearization(self.value, **{name: f and outer(name, f) for name, f in given.items()})


class BoundLinearization(Generic[H, Z]):
    """A :class:`Linearization` at (h, z) for the estimators: every result is checked against h and z."""

    def __init__(self, raw: Linearization[H, Z], backend: Backend, h: H, z: Z, names: Names) -> None:
        self.raw, self.backend, self.h, self.z, self.names = raw, backend, h, z, names

    @property
    def value(self) -> H:
        """F(h, z)."""
        return self.raw.value

    def vjp_h(self, v: H) -> H:
        """(∂F/∂h)ᵀ v."""
        if self.raw.vjp_h is None:
            return self.vjp(v)[0]
        return self._h("the h-cotangent from vjp", self.raw.vjp_h(v))

    def vjp_z(self, v: H) -> Z:
        """(∂F/∂z)ᵀ v."""
        if self.raw.vjp_z is None:
            return self.vjp(v)[1]
        return self._z("the z-cotangent from vjp", self.raw.vjp_z(v))

    def vjp(self, v: H) -> tuple[H, Z]:
        """((∂F/∂h)ᵀ v, (∂F/∂z)ᵀ v)."""
        if self.raw.vjp is None:
            self.require("vjp_h", "vjp_z")
            return self.vjp_h(v), self.vjp_z(v)
        both: Any = self.raw.vjp(v)
        if not isinstance(both, tuple) or len(both) != 2:
            raise TypeError(f"vjp must return the pair (v_h, v_z), got {type(both).__name__}")
        return self._h("the h-cotangent from vjp", both[0]), self._z("the z-cotangent from vjp", both[1])

    def jvp_h(self, dh: H) -> H:
        """(∂F/∂h) dh."""
        if self.raw.jvp_h is None:
            return self.jvp(dh, zero_tangent(self.backend, self.z))
        return self._h("the tangent from jvp", self.raw.jvp_h(dh))

    def jvp_z(self, dz: Z) -> H:
        """(∂F/∂z) dz."""
        if self.raw.jvp_z is None:
            return self.jvp(zero_tangent(self.backend, self.h), dz)
        return self._h("the tangent from jvp", self.raw.jvp_z(dz))

    def jvp(self, dh: H, dz: Z) -> H:
        """(∂F/∂h) dh + (∂F/∂z) dz."""
        if self.raw.jvp is None:
            self.require("jvp_h", "jvp_z")
            total: H = self.backend.map(lambda a, b: a + b, self.jvp_h(dh), self.jvp_z(dz))
            return total
        return self._h("the tangent from jvp", self.raw.jvp(dh, dz))

    def matrix_h(self) -> Any:
        """∂F/∂h as a matrix; None if it takes n products."""
        return None if self.raw.matrix_h is None else self.raw.matrix_h()

    def has(self, name: str) -> bool:
        """Whether a derivative, such as ``"vjp_h"``, is given by itself or in a joint one."""
        return getattr(self.raw, name) is not None or getattr(self.raw, _joint(name)) is not None

    def require(self, *names: str) -> "BoundLinearization[H, Z]":
        """Raise NotImplementedError now, rather than in a pullback called later, if a derivative is missing."""
        function, _, _, symbol, _, kind = self.names
        for name in names:
            joint = _joint(name)
            if not self.has(name):
                what = "a pullback" if joint == "vjp" else "a pushforward"
                has_none = all(getattr(self.raw, each) is None for each in DERIVATIVES)
                by_autodiff = self.backend.has_autodiff and has_none
                raise NotImplementedError(
                    f"{what} needs the {joint.upper()} of {symbol}, which this problem doesn't have: "
                    + (f"take implicit_core.adapters.{self.backend.name}.problem({function}), " if by_autodiff else "")
                    + f"pass {joint}= to {kind}, or return {joint}_h and {joint}_z from its linearize"
                )
        return self

    def _h(self, name: str, got: H) -> H:
        got = checks.numbers_as_arrays(self.backend, got, self.h)
        result: H = checks.like(self.backend, name, got, self.h, self.names.unknown)
        return result

    def _z(self, name: str, got: Z) -> Z:
        checks.like_z(self.backend, name, got, self.z)
        return got


def _joint(name: str) -> str:
    return name.partition("_")[0]


def zero_tangent(backend: Backend, tree: Z) -> Z:
    """The zero tangent of a pytree. A leaf that is not an array of numbers, nor a number, stands for itself."""

    def zero(leaf: Any) -> Any:
        if backend.is_array(leaf):
            return backend.xp.zeros_like(leaf)
        return 0.0 if isinstance(leaf, (int, float)) else leaf

    zeros: Z = backend.map(zero, tree)
    return zeros


class Problem(Generic[H, Z]):
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
    jacobian
        ``jacobian(h, z)``, ∂F/∂h as a matrix: an array (batch..., n, n) for the n numbers of a sample in C order (of
        several leaves one after the other, or as a pytree of blocks as ``jax.jacobian`` returns), in every framework.
        With NumPy and ``batch_ndim=0`` also a sparse array of
        SciPy, which is never made dense. It is factorized once at a point: for a step of :class:`Newton`, and for the
        gradient of :class:`Implicit`. Where a callback or autodiff gives products with ∂F/∂h as well, the gradient is
        that of the products, and the factorization their preconditioner. Transforms of ``torch.func`` use products.
    batch_ndim
        How many first axes of every leaf of h index independent samples; 0 for one system.
    scale
        The units of the unknown, if its parts have different ones: a number, an array that broadcasts to h, or a pytree
        like h with a number or an array for each leaf. All positive, and known when a framework traces. ``math.inf``
        for a leaf leaves it out of residuals, as for a count of the steps. Norms, inner products, tolerances and
        certificates are then those of h / scale. ``magnitudes(f(h0, z))`` takes it from the first evaluation.

    Notes
    -----
    F and the callbacks do not change their arguments, which NumPy hands them as read-only views. Leaves of z that are
    not arrays have no derivative. Where ``jvp`` is called with dz = 0, Python numbers in z become 0.0, and all other
    leaves that are not arrays stay as they are.

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

    names: Names = Names()

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
    ) -> None:
        checks.function(self.names.function, f)
        for name, callback in (("vjp", vjp), ("jvp", jvp), ("linearize", linearize), ("jacobian", jacobian)):
            if callback is not None:
                checks.function(name, callback)
        if linearize is not None and (vjp is not None or jvp is not None):
            raise TypeError("Problem takes linearize, or vjp and jvp, not both")
        self.f = f
        self.batch_ndim = checks.integer("batch_ndim", batch_ndim, 0)
        self.scale = checks.scale(scale)
        self._vjp, self._jvp, self._linearize, self.jacobian = vjp, jvp, linearize, jacobian
        self.row_factors: Any = None
        """What makes an F of a root's g, if ``jacobian`` is that of g; see :meth:`RootProblem.factors`."""
        self.unwatched: Problem[H, Z] | None = None
        self.watches_first = False
        self.relaxation: Numbers | None = None
        """α, (N, 1), where F(x) = x - α g(x) stands for a root of g."""

    def __repr__(self) -> str:
        name = getattr(self.f, "__qualname__", None) or repr(self.f)
        given = {"vjp": self._vjp, "jvp": self._jvp, "linearize": self._linearize, "jacobian": self.jacobian}
        scale = [] if self.scale is None else [f"scale={self.scale!r}"]
        callbacks = [callback for callback, value in given.items() if value is not None]
        return f"Problem({', '.join([name, *callbacks, f'batch_ndim={self.batch_ndim}', *scale])})"

    def __call__(self, h: H, z: Z) -> H:
        """F(h, z)."""
        return self.f(h, z)

    @property
    def base(self) -> "Problem[H, Z]":
        """The problem whose class says where derivatives come from: of a root, the problem of g."""
        return self

    @property
    def has_derivatives(self) -> bool:
        """Whether a callback for derivatives was given, besides the Jacobian as a matrix."""
        return not (self._vjp is None and self._jvp is None and self._linearize is None)

    @property
    def has_jvp(self) -> bool:
        """Whether a callback was given that may push tangents forward."""
        return not (self._jvp is None and self._linearize is None and self.jacobian is None)

    def replace_f(self, f: Map[H, Z]) -> "Problem[H, Z]":
        """The same problem with another callable for F, e.g. one that counts its calls."""
        replaced = Problem(
            f,
            vjp=self._vjp,
            jvp=self._jvp,
            linearize=self._linearize,
            jacobian=self.jacobian,
            batch_ndim=self.batch_ndim,
            scale=self.scale,
        )
        replaced.relaxation, replaced.row_factors = self.relaxation, self.row_factors
        return replaced

    def with_derivatives(self, arrays: PyTree) -> "Problem[H, Z]":
        """The problem, with the derivatives of the arrays' framework if it has none and there is an adapter."""
        adapter = None if self.has_derivatives else find_adapter(arrays)
        if adapter is None:
            return self
        made: Problem[H, Z] = adapter.problem(self.f, batch_ndim=self.batch_ndim, scale=self.scale)
        made.jacobian = self.jacobian
        return made

    def space(self, h: H, name: str | None = None) -> Space:
        """The vector space of states shaped as h, which errors call ``name``."""
        name = self.names.unknown if name is None else name
        return find_backend(h, name).space(h, self.batch_ndim, name, self.scale)

    def with_function(
        self, f: Map[H, Z], linearize: Callable[[H, Z], Linearization[H, Z]] | None = None
    ) -> "Problem[H, Z]":
        """The same problem of another function with other derivatives, or none."""
        return Problem(f, linearize=linearize, batch_ndim=self.batch_ndim, scale=self.scale)

    def watched(self, note: Callable[[H, H], None], keep: Callable[[H], H] = lambda h: h) -> "Problem[H, Z]":
        """The same problem, which calls ``note(keep(h), F(h, z))`` after each evaluation of F, and ``keep`` before."""

        def f(h: H, z: Z) -> H:
            kept = keep(h)
            value = self.f(h, z)
            note(kept, value)
            return value

        watched = self.replace_f(f)
        watched.unwatched = self
        linearize = self._linearize
        if linearize is not None:

            def watched_linearize(h: H, z: Z) -> Linearization[H, Z]:
                at = linearize(h, z)
                if isinstance(at, Linearization):  # anything else is refused later
                    note(h, at.value)
                return at

            watched._linearize = watched_linearize
        return watched

    def fixed_point_form(self, h: H, z: Z, *, relaxed: bool = True) -> "Problem[H, Z]":
        """The fixed-point problem that estimators differentiate: this one; see :class:`RootProblem` for roots."""
        del h, z, relaxed
        return self

    def left_out(self, h: H, z: Z) -> tuple[str, ...]:
        """What F could be differentiated in besides h and z, in words. Of callbacks nothing is known.

        An adapter's ``problem(f)`` may know more: PyTorch's lists closed-over tensors that require a gradient, for one
        evaluation of F.
        """
        del h, z
        return ()

    def linearize(self, h: H, z: Z) -> BoundLinearization[H, Z]:
        """F and its derivatives at (h, z), for one evaluation of F.

        Raises
        ------
        TypeError, ValueError
            If the structure, shape, dtype or device of a result of F or of a callback differs from h or z.
        NotImplementedError
            On use of a derivative that the problem doesn't have.
        """
        function, unknown, *_ = self.names
        backend = find_backend(h, unknown)
        checks.state(backend, unknown, h, self.batch_ndim)
        checks.no_masks("z", z)
        with backend.on_device_of(h):
            if self._linearize is None:
                raw = self._from_callbacks(backend, h, z)
            else:
                linearize = self._linearize
                if not backend.has_autodiff:  # where it has, this is mostly its adapter's
                    linearize = backend.guarded(linearize, "linearize", "h")
                raw = linearize(h, z)
        checks.instance("the result of linearize", raw, Linearization, "Linearization(value, vjp_h, vjp_z)")
        if self._linearize is not None and not backend.has_autodiff:
            raw = raw.wrap(lambda name, product: backend.guarded(product, name, *VECTORS.get(name, ("v",))))
        value: Any = raw.value
        if not backend.has_autodiff:  # where it has, a Python float is cut off from the graph (Decision 80)
            value = checks.numbers_as_arrays(backend, value, h)
        value = checks.like(backend, f"the result of {function}", value, h, unknown)
        raw = raw if value is raw.value else replace(raw, value=value)
        if self.jacobian is not None and self.row_factors is None:
            raw = self._with_jacobian(raw, h, z)
        return BoundLinearization(raw, backend, h, z, self.names)

    def _with_jacobian(self, raw: Linearization[H, Z], h: H, z: Z) -> Linearization[H, Z]:
        """The linearization, with products with the Jacobian where there are no others."""
        from .solvers.jacobian import products  # which imports this module

        push, pull = products(self, h, z)
        if raw.vjp_h is None and raw.vjp is None:
            raw = replace(raw, vjp_h=pull)
        return raw if raw.jvp_h is not None or raw.jvp is not None else replace(raw, jvp_h=push)

    def _from_callbacks(self, backend: Backend, h: H, z: Z) -> Linearization[H, Z]:
        vjp, jvp = self._vjp, self._jvp
        value = backend.protected(self.f, *self.names[:2])(h, z)
        pull = push = None
        if vjp is not None:
            pull = backend.guarded(lambda h, v: vjp(h, z, v), "vjp", "h", "v")
        if jvp is not None:
            push = backend.guarded(lambda h, dh, dz: jvp(h, z, dh, dz), "jvp", "h", "dh", "dz")
        return Linearization(value, vjp=pull and partial(pull, h), jvp=push and partial(push, h))


def as_problem(f: Problem[H, Z] | Map[H, Z], batch_ndim: int | None, scale: Any = None) -> Problem[H, Z]:
    """A :class:`Problem` from F, its ``batch_ndim`` and its ``scale``; a problem as it is."""
    if not isinstance(f, Problem):
        return Problem(f, batch_ndim=0 if batch_ndim is None else batch_ndim, scale=scale)
    if scale is not None:
        raise TypeError("scale belongs to the problem: pass scale= where it is made")
    if batch_ndim is not None:
        raise TypeError(
            f"batch_ndim belongs to the problem, which has batch_ndim={f.batch_ndim}; "
            f"got batch_ndim={batch_ndim} as well"
        )
    return f

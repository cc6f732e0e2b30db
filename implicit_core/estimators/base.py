"""What a gradient estimator is: a frozen record that turns F's derivatives into an approximation of ∂h*/∂z."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Self, TypeVar

from array_api_compat import array_namespace

from .. import checks, settings
from ..arrays import Count, H, Operator, Real, State, Z
from ..problem import Problem
from ..records import Record, is_array
from ..space import Space

Factor = TypeVar("Factor")
"""A number, or an array of numbers."""


@dataclass(frozen=True, repr=False)
class Estimator(Record, ABC):
    """Base of the gradient estimators: A ≈ ∂h*/∂z, through its products.

    The paper writes Jacobians transposed (d_z × d_h), so its A v is ``pullback(v)`` here; ``jvp`` applies the transpose
    of the same A, so that ⟨u, jvp dz⟩ = ⟨pullback u, dz⟩: to rounding for a fixed number of terms or steps, and to its
    tolerance for an estimator that stops on a data-dependent test.

    Settings that are numbers, such as λ, may be arrays without axes, which JAX may trace or map; then the record is a
    pytree with these arrays as leaves, and has no hash. An array that is out of range and cannot be read becomes NaN,
    and so does the gradient.

    Examples
    --------
    >>> import implicit_core as ic
    >>> isinstance(ic.Neumann(k=5, lam=0.5), ic.Estimator)
    True
    """

    starts_from_h0: ClassVar[bool] = False
    """Whether the estimator replaces the solve instead of following it. Its value evaluates F at h0 first."""
    relaxes: ClassVar[bool] = True
    """Whether the gradient depends on the α of a root's F(x) = x - α g(x), as it does unless it is exact."""

    @abstractmethod
    def value(self, problem: Problem[H, Z], h: H, z: Z) -> H:
        """The layer's output, given the solver's point h."""

    @abstractmethod
    def vjp(self, problem: Problem[H, Z], h: H, z: Z) -> tuple[H, Callable[[H], Z]]:
        """The layer's output and its pullback, as ``jax.vjp``.

        Parameters
        ----------
        problem
            A problem with a VJP.
        h
            The solver's point, shaped as the state.
        z
            Inputs and parameters.

        Returns
        -------
        value
            Shaped as h.
        pullback
            A cotangent shaped as h to one shaped as z. May be called again.

        Raises
        ------
        NotImplementedError
            If the problem has no VJP.
        TypeError, ValueError
            If an argument or a callback's result has a wrong structure, shape, dtype or device.
        """

    @abstractmethod
    def jvp(self, problem: Problem[H, Z], h: H, z: Z, dz: Z) -> tuple[H, H]:
        """The layer's output and its tangent along ``dz``, as ``jax.jvp``.

        Parameters
        ----------
        problem
            A problem with a JVP.
        h
            The solver's point, shaped as the state.
        z, dz
            Inputs and parameters, and a tangent shaped as z.

        Returns
        -------
        value, tangent
            Both shaped as h.

        Raises
        ------
        NotImplementedError
            If the problem has no JVP.
        TypeError, ValueError
            If an argument or a callback's result has a wrong structure, shape, dtype or device.
        """

    def error_bound(self, contraction: Factor) -> Factor:
        """Theorem 2's bound of ‖A - ∂h*/∂z‖ / ‖∂F/∂z‖ at a fixed point, known before the gradient is computed.

        Parameters
        ----------
        contraction
            L_h < 1, a number or an array.

        Returns
        -------
        bound
            As ``contraction``; NaN if no bound is known for the estimator.
        """
        return unknown(contraction)

    def accumulated(self, contraction: float) -> float:
        """How many products' rounding errors add up in A v, at most, with L_h = ``contraction``, a number or infinity.

        With it, :func:`~implicit_core.theory.certify` makes its bounds hold in the precision of h (Decision 85). An
        estimator that does not say counts as one product.
        """
        return 1.0


class Derivative(Enum):
    """How w = D v is differentiated: for second derivatives, and in JAX to turn a pushforward into a pullback.

    See Decision 27.

    Examples
    --------
    >>> from implicit_core.estimators import Derivative, Implicit, Neumann
    >>> Neumann(k=5).derivative is Derivative.OF_OPERATIONS, Implicit().derivative is Derivative.OF_SOLUTION
    (True, True)
    """

    OF_OPERATIONS = auto()
    """Differentiate the operations of ``inverse``. Second derivatives of the layer are derivatives of the surrogate A.
    JAX transposes the operations, so their number must not depend on data."""

    OF_SOLUTION = auto()
    """``inverse`` solves (I - ∂F/∂h) w = v to a tolerance: differentiate w as the solution of this system. Second
    derivatives of the layer are exact to this tolerance. JAX transposes the system instead of the solver's operations,
    so the number of iterations may depend on data."""

    ONCE = auto()
    """The number of products depends on data, and w does not solve the system. JAX cannot transpose such a loop, so the
    layer has first derivatives alone there. PyTorch differentiates the operations."""


@dataclass(frozen=True, repr=False)
class AtFixedPoint(Estimator):
    """Estimators A = (∂F/∂z) D at the solver's point, where D approximates (I - ∂F/∂h)⁻¹ (Remark 1 of the paper).

    The value is the solver's point itself, where F is linearized once. A new estimator writes ``inverse`` alone.
    """

    derivative: ClassVar[Derivative] = Derivative.OF_OPERATIONS
    """How frameworks with autodiff differentiate ``inverse``."""

    @abstractmethod
    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """D v.

        Parameters
        ----------
        space
            The space of states, with their arithmetic. States are at least float32.
        jacobian
            Products with (∂F/∂h)ᵀ in a pullback, and with ∂F/∂h in a pushforward. A callback may return the same array
            at every call: copy a product, ``space.copy(jacobian(v))``, to use it in or after the next one.
        v
            A state.
        """
        # Decisions 25 and 32.

    def prepared(self, problem: Problem[H, Z], h: H, z: Z) -> Self:
        """The estimator, with what it computes once at the solver's point h: here nothing.

        ``problem`` is a fixed point's, see ``Problem.fixed_point_form``. Adapters may leave it out where h and z
        cannot be had, so it must not change the result beyond a tolerance.
        """
        return self

    def apply(self, space: Space, jacobian: Operator, v: State, *, transposed: bool = False) -> State:
        """D v by ``inverse`` of the estimator with settings to compute with, and whose result is checked.

        ``transposed`` says whether ``jacobian`` is (∂F/∂h)ᵀ.

        Raises
        ------
        TypeError
            If it is no state like v.
        """
        w = settings.bound(self, space).directed(space, jacobian, v, transposed=transposed)
        checks.state_like(f"{type(self).__name__}.inverse", w, v)
        return w

    def directed(self, space: Space, jacobian: Operator, v: State, *, transposed: bool) -> State:
        """D v by ``inverse``, for an estimator that need not know whether the Jacobian is transposed."""
        return self.inverse(space, jacobian, v)

    def inverse_error(self, contraction: float, eps: float = 0.0, rounding: float = 0.0) -> float:
        """A bound of ‖D (I - ∂F/∂h) - I‖ with L_h = ``contraction`` < 1, for an estimator that solves to a tolerance.

        Its D is not a fixed linear map (it stops on a data-dependent test), so its norm cannot be measured with
        matrix-vector products.

        Parameters
        ----------
        contraction
            An upper bound of L_h, below 1, in all samples.
        eps
            The machine precision of the coarsest leaf of h.
        rounding
            The rounding error of a product with the Jacobian, relative to the norms of the Jacobian and the vector.

        Returns
        -------
        bound
            NaN if none is known.
        """
        return math.nan

    def value(self, problem: Problem[H, Z], h: H, z: Z) -> H:
        """The solver's point, unchanged."""
        return h

    def _form(self, problem: Problem[H, Z], h: H, z: Z) -> Problem[H, Z]:
        """The problem that is differentiated, of a fixed point."""
        return problem.fixed_point_form(h, z, relaxed=self.relaxes)

    def vjp(self, problem: Problem[H, Z], h: H, z: Z) -> tuple[H, Callable[[H], Z]]:
        """See :meth:`Estimator.vjp`."""
        space = bind(problem, h).dual
        form = self._form(problem, h, z)
        at = form.linearize(h, z).require("vjp_h", "vjp_z")
        jacobian, prepared = on_states(at.vjp_h, space, space), self.prepared(form, h, z)

        def pullback(h_bar: H) -> Z:
            h_bar = checks.like(space.backend, "h_bar", h_bar, h, "h")
            with space.backend.on_device_of(h):
                w: H = space.unpack(prepared.apply(space, jacobian, space.pack(h_bar), transposed=True))
                return at.vjp_z(w)

        return h, pullback

    def jvp(self, problem: Problem[H, Z], h: H, z: Z, dz: Z) -> tuple[H, H]:
        """See :meth:`Estimator.jvp`."""
        space = bind(problem, h).every_leaf
        checks.like_z(space.backend, "dz", dz, z)
        form = self._form(problem, h, z)
        at = form.linearize(h, z).require("jvp_h", "jvp_z")
        jacobian, prepared = on_states(at.jvp_h, space, space), self.prepared(form, h, z)
        with space.backend.on_device_of(h):
            # Copied, since a callback may return the same array at every call.
            b = space.copy(space.pack(at.jvp_z(dz)))
            tangent: H = space.unpack(prepared.apply(space, jacobian, b))
            return h, tangent


def bind(problem: Problem[H, Z], h: H) -> Space:
    """The space of ``h``, after a check of both arguments."""
    checks.instance("problem", problem, Problem, "Problem(f, vjp=...)")
    return problem.space(h)


def on_states(function: Callable[[Any], Any], domain: Space, codomain: Space) -> Operator:
    """A function of the user's pytrees, as a function of states."""
    return lambda x: codomain.pack(function(domain.unpack(x)))


def geometric_bound(k: Count, lam: Real, contraction: Factor) -> Factor:
    """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h) (Theorem 2)."""
    number: Any = contraction
    if is_array(k):  # an exponent of the same dtype, as the array API requires
        xp: Any = array_namespace(k)
        like: Any = next((x for x in (lam, number) if is_array(x)), xp.asarray(0.0))
        k = xp.astype(k, like.dtype)
    bound: Factor = (1 - lam * (1 - number)) ** k / (1 - number)
    return bound


def geometric_count(k: int, lam: float, contraction: float) -> float:
    """At least Σ ‖B‖ᵗ over t < k, and at most k, for B = λ ∂F/∂h + (1 - λ) I with L_h < 1; otherwise k."""
    return min(k, 1 / (lam * (1 - contraction))) if contraction < 1 else k


def unknown(contraction: Factor) -> Factor:
    """NaN, shaped as ``contraction``."""
    number: Any = contraction
    nan: Factor = number * float("nan")
    return nan

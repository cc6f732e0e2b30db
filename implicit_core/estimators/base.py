"""What an estimator is: a frozen record that turns F's derivatives into an approximation of ∂h*/∂z."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import checks
from ..backend import Backend, PyTree
from ..problem import Problem
from ..registry import find_backend

Pullback = Callable[[PyTree], PyTree]


@dataclass(frozen=True)
class Estimator(ABC):
    """Base of the gradient estimators: A ≈ ∂h*/∂z, through its products.

    The paper writes Jacobians transposed (d_z × d_h), so its A v is ``pullback(v)`` here; ``jvp`` applies the transpose
    of the same A, so that ⟨u, jvp dz⟩ = ⟨pullback u, dz⟩ for every estimator.

    Examples
    --------
    >>> import implicit_core as ic
    >>> isinstance(ic.Neumann(k=5, lam=0.5), ic.Estimator)
    True
    """

    starts_from_h0: ClassVar[bool] = False
    """Whether the estimator replaces the solve instead of following it."""

    @abstractmethod
    def value(self, problem: Problem, h: PyTree, z: PyTree) -> PyTree:
        """The layer's output, given the solver's point h."""

    @abstractmethod
    def vjp(self, problem: Problem, h: PyTree, z: PyTree) -> tuple[PyTree, Pullback]:
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
    def jvp(self, problem: Problem, h: PyTree, z: PyTree, dz: PyTree) -> tuple[PyTree, PyTree]:
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

    def error_bound(self, contraction: Any) -> Any:
        """What Theorem 2 bounds ‖A - ∂h*/∂z‖ / ‖∂F/∂z‖ by at a fixed point, before anything is measured.

        Parameters
        ----------
        contraction
            L_h < 1, a number or an array.

        Returns
        -------
        bound
            As ``contraction``; NaN for an estimator of which nothing is known.
        """
        return contraction * float("nan")


@dataclass(frozen=True)
class AtFixedPoint(Estimator):
    """Estimators A = (∂F/∂z) D, with D in the place of (I - ∂F/∂h)⁻¹, at the solver's point (Remark 1 of the paper).

    The value is the solver's point itself, where F is linearized once. A new one writes ``inverse`` alone.
    """

    adaptive: ClassVar[bool] = False
    """Whether the number of products depends on data, so that a framework that transposes what it has traced can't
    transpose ``inverse``. Of no account for an exact one, which transposes itself."""

    @property
    def exact(self) -> bool:
        """Whether ``inverse`` solves (I - ∂F/∂h) w = v to a tolerance, by iterations that are not to be differentiated.

        Its derivatives are then those of the solution; otherwise they are those of the operations it consists of.
        """
        return False

    def inverse_error(self, contraction: Any) -> Any:
        """For an exact one, a bound of ‖D (I - ∂F/∂h) - I‖ with L_h = ``contraction`` < 1; NaN if none is known.

        Its D is no matrix, since it stops by what it finds, so that its norm can't be measured by products.
        """
        return contraction * float("nan")

    @abstractmethod
    def inverse(self, jacobian: Callable[[PyTree], PyTree], v: PyTree, batch_ndim: int) -> PyTree:
        """D v, given products with ∂F/∂h, or with its transpose for Dᵀ v; both shaped as h."""

    def value(self, problem: Problem, h: PyTree, z: PyTree) -> PyTree:
        """The solver's point, as it is."""
        return h

    def vjp(self, problem: Problem, h: PyTree, z: PyTree) -> tuple[PyTree, Pullback]:
        """See :meth:`Estimator.vjp`."""
        backend = bind(problem, h)
        at = problem.linearize(h, z).require("vjp_h", "vjp_z")

        def pullback(h_bar: PyTree) -> PyTree:
            check_cotangent(backend, h_bar, h)
            with backend.beside(h):
                return at.vjp_z(self.inverse(at.vjp_h, h_bar, problem.batch_ndim))

        return h, pullback

    def jvp(self, problem: Problem, h: PyTree, z: PyTree, dz: PyTree) -> tuple[PyTree, PyTree]:
        """See :meth:`Estimator.jvp`."""
        backend = bind(problem, h)
        check_tangent(backend, dz, z)
        at = problem.linearize(h, z).require("jvp_h", "jvp_z")
        with backend.beside(h):
            # A callback may return the same memory at each call.
            b = backend.map(backend.fresh, at.jvp_z(dz))
            return h, self.inverse(at.jvp_h, b, problem.batch_ndim)


def bind(problem: Problem, h: PyTree) -> Backend:
    """The backend of the arrays in ``h``, both arguments checked."""
    checks.instance("problem", problem, Problem, "Problem(f, vjp=...)")
    backend = find_backend(h, "h")
    checks.state(backend, "h", h, problem.batch_ndim)
    return backend


def check_cotangent(backend: Backend, h_bar: PyTree, h: PyTree) -> None:
    """``h_bar`` is shaped as h."""
    checks.like(backend, "h_bar", h_bar, h, "h")


def check_tangent(backend: Backend, dz: PyTree, z: PyTree) -> None:
    """``dz`` is shaped as z."""
    checks.like_z(backend, "dz", dz, z)


def geometric_bound(k: int, lam: float, contraction: Any) -> Any:
    """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h) (Theorem 2)."""
    return (1 - lam * (1 - contraction)) ** k / (1 - contraction)

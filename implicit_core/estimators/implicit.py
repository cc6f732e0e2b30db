"""The exact gradient by the implicit function theorem (Eq. 4)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import checks
from ..backend import PyTree
from ..linear_solvers import GMRES, LinearSolver
from ..registry import find_backend
from ..solution import Status
from ..space import Space
from .base import AtFixedPoint
from .inexact import report


@dataclass(frozen=True)
class Implicit(AtFixedPoint):
    r"""The exact gradient, Eq. (2) and (4): the adjoint system (I - ∂F/∂h)ᵀ w = v, solved per sample.

    .. math::
        \frac{∂h^*}{∂z} = \frac{∂F}{∂z} \left(I - \frac{∂F}{∂h}\right)^{-1}

    F is linearized once, at the solver's point. A pullback costs K h-VJPs, as many as the linear solver needs, and one
    z-VJP. A linear solve that does not converge is never passed over in silence.

    Parameters
    ----------
    linear_solver
        A :class:`LinearSolver`.
    on_failure
        What to do with samples whose linear solve did not converge: ``"raise"`` a :class:`SolveError`, ``"warn"`` and
        use what was reached, or make their part of the gradient ``"nan"``. A cotangent that is not finite is no such
        failure: it gives NaN. What JAX has traced can't raise: there ``"raise"`` is ``"nan"``.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong kind.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 2 and 4.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.Implicit().vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))
    array([2.])
    """

    linear_solver: LinearSolver = field(default=GMRES())
    on_failure: Literal["raise", "warn", "nan"] = "raise"

    def __post_init__(self) -> None:
        checks.instance("linear_solver", self.linear_solver, LinearSolver, "GMRES()")
        if self.on_failure not in ("raise", "warn", "nan"):
            raise ValueError(f"on_failure must be 'raise', 'warn' or 'nan', got {self.on_failure!r}")

    @property
    def exact(self) -> bool:
        """It is."""
        return True

    def inverse(self, jacobian: Callable[[PyTree], PyTree], v: PyTree, batch_ndim: int) -> PyTree:
        """The w with (I - J) w = v (Eq. 4)."""
        space = Space(find_backend(v, "v"), v, batch_ndim, "v")
        with space.backend.solving():
            result = self.linear_solver.run(
                space, lambda w: space.sub(w, space.pack(jacobian(space.unpack(w)))), space.pack(v)
            )
        # A vector that is not finite has no solution to miss. Its NaN goes on, as through other operations, to whoever
        # looks for it: a gradient scaler then skips the step.
        hopeless = result.status == Status.NONFINITE.value
        failed = (result.status != Status.CONVERGED.value) & ~hopeless
        readable = space.backend.readable(result.status)
        reported = self.on_failure == "warn" or (self.on_failure == "raise" and readable)
        x = space.where(hopeless if reported else hopeless | failed, space.scale(float("nan"), result.x), result.x)
        if reported:
            status = space.xp.where(hopeless, space.full(Status.CONVERGED, space.xp.int32), result.status)
            advice = (
                f"Raise max_steps or rtol of {self.linear_solver!r}, try another linear solver, or use Neumann or "
                "Unroll, which need none"
            )
            failed_solve = "the linear solve of Implicit did not converge"
            report(space, failed_solve, advice, status, result.residual, throw=self.on_failure == "raise")
        return space.unpack(x)

    def inverse_error(self, contraction: Any) -> Any:
        """A residual of at most rtol times that of zero, if a sample without it raises."""
        solver = self.linear_solver
        certain = self.on_failure == "raise" and solver.atol == 0.0
        return (solver.rtol if certain else float("nan")) * (1 + contraction) / (1 - contraction)

"""The exact gradient by the implicit function theorem (Eq. 4)."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from .. import checks
from ..arrays import H, Operator, State, Z
from ..jacobian import complement, factorized
from ..linear_solvers import GMRES, LinearSolver
from ..preconditioner import AtPoint, Preconditioner
from ..problem import Problem
from ..space import Space
from .base import AtFixedPoint, Derivative
from .inexact import OnFailure, check_on_failure, settled


@dataclass(frozen=True, repr=False)
class Implicit(AtFixedPoint):
    r"""The exact gradient, Eq. (2) and (4): the adjoint system (I - ∂F/∂h)ᵀ w = v, solved per sample.

    .. math::
        \frac{∂h^*}{∂z} = \frac{∂F}{∂z} \left(I - \frac{∂F}{∂h}\right)^{-1}

    F is linearized once, at the solver's point. A pullback costs K h-VJPs, as many as the linear solver needs, and one
    z-VJP. A linear solve that does not converge is never silent: see ``on_failure``.

    Of a :class:`Problem` with a ``jacobian`` the matrix is factorized once, and the linear solver only refines the
    solution: K is about 2.

    Parameters
    ----------
    linear_solver
        A :class:`LinearSolver`.
    on_failure
        What to do with samples whose linear solve did not converge: ``"raise"`` a :class:`SolveError`, ``"warn"`` and
        use the last iterate, make their part of the gradient ``"nan"``, or ``"ignore"`` it and use the last iterate. A
        cotangent that is not finite is not such a failure: it gives NaN. Code that JAX traces cannot raise: there
        ``"raise"`` is ``"nan"``. There ``"warn"`` is one call back to Python, which JAX's persistent compilation cache
        does not store, and ``"nan"`` in a program that ``jax.export`` exports; the others call nothing.

    preconditioner
        A :class:`Preconditioner`, an approximate inverse of I - ∂F/∂h, instead of the ``jacobian`` of the problem.
        Transforms of ``torch.func`` leave both out, and the gradient is the same.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range.

    Notes
    -----
    A pullback starts its linear solve from zero. To start from the adjoint of an earlier step, solve the system
    yourself, ``solve_linear(lambda w: w - vjp_h(w), h_bar, x0=...)``.

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
    on_failure: OnFailure = "raise"
    preconditioner: Preconditioner | AtPoint | None = field(default=None, repr=False)

    derivative: ClassVar[Derivative] = Derivative.OF_SOLUTION
    relaxes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.instance("linear_solver", self.linear_solver, LinearSolver, "GMRES()")
        check_on_failure(self.on_failure)
        if self.preconditioner is not None and not isinstance(self.preconditioner, AtPoint):
            checks.instance("preconditioner", self.preconditioner, Preconditioner, "Preconditioner(apply, transposed)")

    def prepared(self, problem: Problem[H, Z], h: H, z: Z) -> Self:
        """See :class:`AtFixedPoint`: the preconditioner, or the factorized Jacobian of the problem."""
        given = self.preconditioner
        if isinstance(given, AtPoint) or (given is None and problem.jacobian is None):
            return self
        space = problem.space(h)
        backend = space.backend
        h, z = (backend.map(lambda x: backend.stop_gradient(x) if backend.is_array(x) else x, tree) for tree in (h, z))
        at: AtPoint
        with backend.on_device_of(h), backend.solving():
            at = factorized(space, complement(problem, space, h, z)) if given is None else given.at(h, z)
        return replace(self, preconditioner=at)

    # Decision 24.
    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """The w with (I - J) w = v (Eq. 4)."""
        return self._solved(space, jacobian, v, None)

    def directed(self, space: Space, jacobian: Operator, v: State, *, transposed: bool) -> State:
        """See :class:`AtFixedPoint`: a preconditioner of the transposed system is transposed too."""
        at = self.preconditioner
        if not isinstance(at, AtPoint):  # none, or where it could not be prepared
            return self.inverse(space, jacobian, v)
        return self._solved(space, jacobian, v, lambda x: at.solve(space, x, transposed=transposed))

    def _solved(self, space: Space, jacobian: Operator, v: State, precondition: Operator | None) -> State:
        with space.backend.solving():
            result = self.linear_solver.run(space, lambda w: space.sub(w, jacobian(w)), v, precondition=precondition)
            # Decisions 24 and 53.
            return settled(
                space,
                result.x,
                result.status,
                result.residual,
                self.on_failure,
                "the linear solve of Implicit did not converge",
                f"Raise max_steps or rtol of {self.linear_solver!r}, try another linear solver, or use Neumann or "
                "Unroll, which need none",
            )

    def inverse_error(self, contraction: float, eps: float = 0.0, rounding: float = 0.0) -> float:
        """η (1 + L_h) / (1 - L_h), if a sample with a relative residual of its linear solve above η raises.

        η is what the solver accepts, and what rounding hides from it. NaN for another ``on_failure``.
        """
        # Decision 85. The error is A⁻¹ r, ‖b‖ ≤ (1 + L_h) ‖u‖, and the computed residual is wrong by rounding errors
        # of ‖A‖ ‖x‖ + ‖b‖, where ‖x‖ ≤ (1 + η condition) ‖u‖.
        condition = (1 + contraction) / (1 - contraction)
        accepted = self.linear_solver.accepted(contraction, eps)
        hidden = rounding * (2 + accepted * condition)
        return (accepted + hidden) * condition if self.on_failure == "raise" else math.nan

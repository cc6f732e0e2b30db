"""The exact gradient by the implicit function theorem (Eq. 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from .. import checks
from ..arrays import Array, Count, H, Operator, PyTree, State, Z
from ..backend import Backend
from ..linear_solvers import GMRES, LinearSolver
from ..linear_solvers.truncated import truncated
from ..preconditioner import AtPoint, Preconditioner
from ..problem import Problem
from ..records import Data, Record
from ..registry import find_backend
from ..solvers.jacobian import complement, factorized
from ..space import Space
from .base import AtFixedPoint, Derivative
from .inexact import OnFailure, check_on_failure, reported, settled

BUDGET = (
    "on_failure must be None with products, where no sample fails: its best iterate is used, and report tells the "
    "residual. Got on_failure={!r}"
)

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Start(Record):
    """Where the adjoint solves at a point start.

    Attributes
    ----------
    data
        A pytree like h.
    """

    data: Data

    def state(self, space: Space) -> State:
        """The start of a solve in ``space``, whose batch may have more axes, the first ones."""

        def repeated(x: Array, like: Array) -> Array:
            return x if x.shape == like.shape else space.xp.broadcast_to(x, like.shape)

        return space.pack(space.backend.map(repeated, self.data.tree, space.like))


@dataclass(frozen=True, repr=False)
class Implicit(AtFixedPoint):
    r"""The exact gradient, Eq. (2) and (4): the adjoint system (I - ∂F/∂h)ᵀ w = v, solved per sample.

    .. math::
        \frac{∂h^*}{∂z} = \frac{∂F}{∂z} \left(I - \frac{∂F}{∂h}\right)^{-1}

    F is linearized once, at the solver's point. A pullback costs K h-VJPs, as many as the linear solver needs, and one
    z-VJP. A linear solve that does not converge is never silent: see ``on_failure``. With ``products`` the solve is
    truncated on purpose.

    Of a :class:`Problem` with a ``jacobian`` the matrix is factorized once, and the linear solver only refines the
    solution: K is about 2.

    Parameters
    ----------
    linear_solver
        A :class:`LinearSolver`.
    on_failure
        What to do with samples whose linear solve did not converge: ``"raise"`` a :class:`SolveError`, which is the
        default, ``"warn"`` and use the last iterate, make their part of the gradient ``"nan"``, or ``"ignore"`` it and
        use the last iterate. A cotangent that is not finite is not such a failure: it gives NaN. Code that JAX traces
        cannot raise: there ``"raise"`` is ``"nan"``. There ``"warn"`` is one call back to Python, which JAX's
        persistent compilation cache does not store, and ``"nan"`` in a program that ``jax.export`` exports; the others
        call nothing. Not with ``products``.

    preconditioner
        A :class:`Preconditioner`, an approximate inverse of I - ∂F/∂h, instead of the ``jacobian`` of the problem.
        Transforms of ``torch.func`` leave both out, and the gradient is the same, unless ``products`` truncate it.
    x0
        Where the solve of a pullback starts, shaped as h: a guess of w, such as that of the training step before. It is
        a constant, saves products if it is close, and changes no gradient beyond the tolerance of the linear solver,
        unless ``products`` truncate it. Samples in which its residual is not below ‖v‖ start from zero. It costs one
        product more.

        w is the gradient with respect to a term b = 0 that is added to F, h = F(h, z) + b; of a root, to g. A
        pushforward solves another system, and starts from zero. So do the pullbacks of ``torch.func``.
    products
        The most h-VJPs of a pullback, or h-JVPs of a pushforward, for a cell whose linear system is too hard to solve.
        Each sample uses its iterate with the least residual, however large that is: nothing raises or warns. A sample
        ends sooner where the tolerance of the linear solver is reached, whose ``max_steps`` is not used. Close to a
        singular system w would grow without limit. So rounding errors of the products count as a part of the residual:
        ‖A‖ ‖w‖ times half of ``rtol`` / 8, or of ε if that is larger, with A = I - ∂F/∂h.

        All products count. One of them measures the residual of what is used, since recurrences lose it in half
        precision: ``products=20`` is 19 steps of GMRES, which holds up to ``products`` states, unless its ``restart``
        is given; if ``products`` is traced, it restarts after 20 steps. ``x0`` costs one of the products, and is not
        used if there is no other. Whether F couples samples is not examined.

        With ``products=1``, and where GMRES finds no iterate with a residual below ‖v‖, w is v, as for
        :class:`OneStep`; with a preconditioner it is M⁻ᵀ v. A GMRES that restarts, and other solvers, go on from there.
        The iterates of Richardson are the sums of its series, the first of them ω v. w is NaN where v, a product or w
        itself is not finite. CG and MINRES on a system that is not symmetric may return a w with a larger residual,
        which ``report`` tells.

        A truncated w is not linear in v. So pullbacks and pushforwards are adjoint to each other only as far as the
        residual is small. So are second derivatives right: they are those of the solution, by truncated solves.
    report
        Called after each linear solve with ‖v - (I - ∂F/∂h)ᵀ w‖ / ‖v‖ of each sample, an array of the batch's shape:
        once for a pullback or a pushforward, more often for a second derivative. It is zero where v is zero, and NaN
        where it is not finite. A report changes no gradient, and costs no product.

        Transforms such as ``vmap`` add first axes. In code that JAX traces it is a call back to Python, as for
        ``"warn"``: ``jax.effects_barrier()`` waits for it, and a program that ``jax.export`` exports calls nothing.
        JAX compiles a program for each function, so pass the same one at each step.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range, if ``on_failure`` and ``products`` are both given, or if
        ``x0`` is not shaped as h.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 2 and 4.
    S. Bai, V. Koltun and J. Z. Kolter, Multiscale deep equilibrium models, NeurIPS 2020: backward solves of a fixed
    number of steps.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.Implicit().vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))
    array([2.])

    The adjoint of one step as the start of the next, with a term b in z that is added to F:

    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z[0] + z[1], vjp=lambda h, z, v: (0.5 * v, (v, v)))
    >>> h, z = np.array([2.0]), (np.array([1.0]), np.zeros(1))
    >>> z_bar, w = ic.Implicit().vjp(problem, h, z)[1](np.array([1.0]))
    >>> z_bar, w = ic.Implicit(x0=w).vjp(problem, h, z)[1](np.array([1.1]))
    >>> w
    array([2.2])

    A map that does not contract, and a system in four unknowns that three products do not solve:

    >>> slopes = np.array([-8.0, -2.0, 0.5, 3.0])
    >>> problem = ic.Problem(lambda h, z: slopes * h + z, vjp=lambda h, z, v: (slopes * v, v))
    >>> residuals = []
    >>> for products in (3, 5):
    ...     gradient = ic.Implicit(products=products, report=residuals.append)
    ...     w = gradient.vjp(problem, np.zeros(4), np.zeros(4))[1](np.ones(4))
    >>> [float(residual.round(3)) for residual in residuals]
    [0.816, 0.0]
    >>> w.round(3)  # 1 / (1 - slopes)
    array([ 0.111,  0.333,  2.   , -0.5  ])
    """

    linear_solver: LinearSolver = field(default=GMRES())
    on_failure: OnFailure | None = field(default=None, repr=False)
    preconditioner: Preconditioner | AtPoint | None = field(default=None, repr=False)
    x0: PyTree | Data | Start | None = field(default=None, repr=False)
    products: Count | None = field(default=None, repr=False)
    report: Callable[[Any], None] | None = field(default=None, repr=False)

    derivative: ClassVar[Derivative] = Derivative.OF_SOLUTION
    relaxes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.instance("linear_solver", self.linear_solver, LinearSolver, "GMRES()")
        if self.on_failure is not None:
            check_on_failure(self.on_failure)
        if self.products is not None:
            object.__setattr__(self, "products", checks.count("products", self.products, 1))
            if self.on_failure is not None:
                raise ValueError(BUDGET.format(self.on_failure))
        if self.report is not None:
            checks.function("report", self.report)
        if self.preconditioner is not None and not isinstance(self.preconditioner, AtPoint):
            checks.instance("preconditioner", self.preconditioner, Preconditioner, "Preconditioner(apply, transposed)")
        if self.x0 is not None and not isinstance(self.x0, (Data, Start)):
            object.__setattr__(self, "x0", Data(_constants(find_backend(self.x0, "x0"), self.x0)))

    def prepared(self, problem: Problem[H, Z], h: H, z: Z) -> Self:
        """See :class:`AtFixedPoint`: the preconditioner, or the factorized Jacobian of the problem, and the start."""
        preconditioner, x0 = self._preconditioner_at(problem, h, z), self._start_at(problem, h)
        if preconditioner is self.preconditioner and x0 is self.x0:
            return self
        return replace(self, preconditioner=preconditioner, x0=x0)

    def _preconditioner_at(self, problem: Problem[H, Z], h: H, z: Z) -> Preconditioner | AtPoint | None:
        given = self.preconditioner
        if isinstance(given, AtPoint) or (given is None and problem.jacobian is None):
            return given
        space = problem.space(h)
        backend = space.backend
        h, z = _constants(backend, h), _constants(backend, z)
        with backend.on_device_of(h), backend.solving():
            return factorized(space, complement(problem, space, h, z)) if given is None else given.at(h, z)

    def _start_at(self, problem: Problem[H, Z], h: H) -> Start | None:
        given = self.x0
        if not isinstance(given, Data):
            return given
        backend = find_backend(h)
        w = checks.like(backend, "x0 of Implicit", checks.numbers_as_arrays(backend, given.tree, h), h, "h")
        if problem.row_factors is not None:  # b is added to g, and F is x - factors g
            w = backend.map(lambda x, factor: -x / factor, w, problem.row_factors)
        return Start(Data(w))

    # Decision 24.
    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """The w with (I - J) w = v (Eq. 4)."""
        return self._solved(space, jacobian, v, None, None)

    def directed(self, space: Space, jacobian: Operator, v: State, *, transposed: bool) -> State:
        """See :class:`AtFixedPoint`: a preconditioner of the transposed system is transposed too."""
        at, start = self.preconditioner, self.x0
        precondition = x0 = None  # also where they could not be prepared
        if isinstance(at, AtPoint):
            precondition = partial(at.solve, space, transposed=transposed)
        if isinstance(start, Start) and transposed:
            x0 = start.state(space)
        if precondition is None and x0 is None:
            return self.inverse(space, jacobian, v)
        return self._solved(space, jacobian, v, precondition, x0)

    def _solved(
        self, space: Space, jacobian: Operator, v: State, precondition: Operator | None, x0: State | None
    ) -> State:
        def operator(w: State) -> State:
            return space.sub(w, jacobian(w))

        with space.backend.solving():
            if self.products is not None:
                best = truncated(self._within_products(), space, operator, v, x0=x0, precondition=precondition)
                return reported(space, best.x, best.relative, self.report)
            result = self.linear_solver.run(space, operator, v, x0=x0, precondition=precondition)
            # Decisions 24 and 53.
            return settled(
                space,
                reported(space, result.x, result.relative, self.report),
                result.status,
                result.residual,
                self.on_failure or "raise",
                "the linear solve of Implicit did not converge",
                f"Raise max_steps or rtol of {self.linear_solver!r}, try another linear solver, or use Neumann or "
                "Unroll, which need none",
            )

    def _within_products(self) -> LinearSolver:
        """The linear solver, whose ``max_steps`` are the products."""
        solver, products = self.linear_solver, self.products
        if isinstance(products, int) and isinstance(solver, GMRES) and solver.restart is None:
            solver = replace(solver, restart=max(products - 1, 1))
        return replace(solver, max_steps=products)

    def inverse_error(self, contraction: float, eps: float = 0.0, rounding: float = 0.0) -> float:
        """η (1 + L_h) / (1 - L_h), if a sample with a relative residual of its linear solve above η raises.

        η is what the solver accepts, and what rounding hides from it. NaN for another ``on_failure``, and with
        ``products``.
        """
        if self.products is not None or self.on_failure not in (None, "raise"):
            return math.nan
        # Decision 85. The error is A⁻¹ r, ‖b‖ ≤ (1 + L_h) ‖u‖, and the computed residual is wrong by rounding errors
        # of ‖A‖ ‖x‖ + ‖b‖, where ‖x‖ ≤ (1 + η condition) ‖u‖.
        condition = (1 + contraction) / (1 - contraction)
        accepted = self.linear_solver.accepted(contraction, eps)
        hidden = rounding * (2 + accepted * condition)
        return (accepted + hidden) * condition


def _constants(backend: Backend, tree: T) -> T:
    """A pytree, its arrays without derivatives."""
    constants: T = backend.map(lambda x: backend.stop_gradient(x) if backend.is_array(x) else x, tree)
    return constants

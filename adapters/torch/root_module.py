"""The root of a module as a layer."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from implicit_core import checks
from implicit_core.arrays import PyTree
from implicit_core.estimators import Estimator
from implicit_core.problem import Names, Problem
from implicit_core.root import EXACT_GRADIENT
from implicit_core.root_problem import RootProblem
from implicit_core.solvers import FixedPointSolver, Polyalgorithm

from .compilation import never_compiled
from .module import H, ImplicitLayer, X

NAMES = Names("the cell", "h", "h0", "the cell", "root", "RootProblem")


@never_compiled
class RootLayer(ImplicitLayer[X, H]):
    """A layer whose output h is a root of its cell: ``cell(h, x) = 0``, as by :func:`implicit_core.root`.

    All else is as for :class:`ImplicitLayer`: what gradients reach, modes, statuses and counts, the state dict.

    Parameters
    ----------
    cell
        ``cell(h, x)``, a module or a function. Its result has the structure, shapes and dtypes of h.
    solver, gradient, eval_solver
        As for :func:`implicit_core.root` and :class:`ImplicitLayer`.
    h0
        As for :class:`ImplicitLayer`. A sample has converged where ‖cell(h, x)‖ ≤ atol + rtol ‖cell(h0, x)‖.
    batch_ndim
        How many first axes of every leaf of h index independent samples. With ``Brent`` and ``Bisection``, all.
    scale, g_scale
        The units of h and of the cell's result, see :class:`~implicit_core.RootProblem`.
    throw, check
        As for :class:`ImplicitLayer`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for :class:`ImplicitLayer`.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> class Cubic(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stiffness = torch.nn.Parameter(torch.tensor(1.0))
    ...
    ...     def forward(self, h, x):
    ...         return h + self.stiffness * h**3 - x
    >>> layer = ict.RootLayer(Cubic())
    >>> h = layer(torch.tensor([[2.0], [10.0]]))
    >>> h.sum().backward()
    >>> h.detach().flatten().round(decimals=3), layer.cell.stiffness.grad  # - Σ h³ / (1 + 3 h²)
    (tensor([1., 2.]), tensor(-0.8654))
    """

    _default_gradient: ClassVar[Estimator] = EXACT_GRADIENT

    def __init__(
        self,
        cell: Callable[[H, X], H],
        *,
        solver: FixedPointSolver | Callable[[Problem[H, X], H, X], H] = Polyalgorithm(),
        gradient: Estimator | None = None,
        eval_solver: FixedPointSolver | Callable[[Problem[H, X], H, X], H] | None = None,
        h0: Callable[[X], H] | Sequence[int] | None = None,
        batch_ndim: int = 1,
        scale: PyTree = None,
        g_scale: PyTree = None,
        throw: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__(
            cell,
            solver=solver,
            gradient=gradient,
            eval_solver=eval_solver,
            h0=h0,
            batch_ndim=batch_ndim,
            scale=scale,
            throw=throw,
            check=check,
        )
        self.g_scale = checks.scale(g_scale, "g_scale", all_parts=True)

    def _stated(self, problem: Problem[H, Any]) -> Problem[H, Any]:
        root = RootProblem.of(problem, self.g_scale)
        root.names = NAMES
        return root

"""The implicit layer as a module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from implicit_core import checks
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import Estimator, Unroll
from implicit_core.solution import Stats
from implicit_core.solve import solve
from implicit_core.solvers import Anderson
from implicit_core.theory import Certificate, certify

from .constant import constant_within_solve
from .function import transforming
from .layer import fixed_point
from .precision import state_dtype
from .problem import problem

PyTree = Any


class ImplicitLayer(nn.Module):
    """A layer whose output h is the fixed point of its cell, ``h = cell(h, x)`` (Eq. 1 of the paper).

    Gradients reach x, the cell's parameters and whatever else the cell uses; in train mode and in eval mode alike, as
    autograd's own state says. Normalized weights and the masks of :class:`VariationalDropout` stay the same through a
    call and its backward. The layer adds nothing to the state dict: its entries are the cell's, under ``cell.``.

    Parameters
    ----------
    cell
        ``cell(h, x)``, a module or a function; returns the structure, shapes and dtypes of h.
    solver
        A solver, or any callable ``(problem, h0, z) -> h``.
    gradient
        An estimator.
    eval_solver
        The solver in eval mode; ``solver`` if None.
    h0
        ``h0(x)``, where a solve starts unless the call says so; zeros shaped as x if None, of its dtype, or of float32
        where x is half precision under autocast.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    throw
        Raise :class:`~implicit_core.SolveError` where a sample did not converge.

    Attributes
    ----------
    status, stats
        Those of the last call (see :class:`~implicit_core.Solution`); they hold no graph. None before the first, and
        after one within ``torch.func``.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong kind; at the call, if what the cell returns is not shaped as h.
    RuntimeError
        At the call, if the cell, instead of the layer, was handed to ``fully_shard`` or ``DistributedDataParallel``.

    Examples
    --------
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import torch as ict
    >>> class Cell(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = torch.nn.Linear(8, 8)
    ...
    ...     def forward(self, h, x):
    ...         return torch.tanh(0.5 * self.inner(h) + x)
    >>> layer = ict.ImplicitLayer(Cell(), gradient=ic.Neumann(k=5, lam=0.5))
    >>> x = torch.randn(4, 8)
    >>> h = layer(x)
    >>> h.square().mean().backward()
    >>> layer.status == ic.CONVERGED
    tensor([True, True, True, True])
    >>> h = layer(x + 0.01, h0=h.detach())  # a warm start is the caller's to keep
    """

    status: Tensor | None
    stats: Stats | None

    def __init__(
        self,
        cell: Callable[[PyTree, PyTree], PyTree],
        *,
        solver: Any = Anderson(),
        gradient: Estimator = Unroll(k=5, lam=0.5),
        eval_solver: Any = None,
        h0: Callable[[PyTree], PyTree] | None = None,
        batch_ndim: int = 1,
        throw: bool = False,
    ) -> None:
        super().__init__()
        checks.function("cell", cell)
        checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
        if h0 is not None:
            checks.function("h0", h0)
        self.cell = cell
        self.solver, self.eval_solver, self.gradient = solver, eval_solver, gradient
        self.h0 = h0
        self.batch_ndim = checks.integer("batch_ndim", batch_ndim, 0)
        self.throw = throw
        self.status = self.stats = None

    def forward(self, x: PyTree, h0: PyTree | None = None) -> PyTree:
        """The fixed point h, shaped as h0.

        Parameters
        ----------
        x
            Inputs, a tensor or a pytree.
        h0
            Where to start; the layer's own start if None.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _check_not_sharded(self.cell)
        solution = fixed_point(
            constant_within_solve(self.cell),
            self._start(x) if h0 is None else h0,
            x,
            solver=self.solver if self.training or self.eval_solver is None else self.eval_solver,
            gradient=self.gradient,
            batch_ndim=self.batch_ndim,
            throw=self.throw,
        )
        # Within torch.func they are tensors that no one can look at afterwards.
        self.status, self.stats = (None, None) if transforming() else (solution.status, solution.stats)
        return solution.value

    def certify(self, x: PyTree, h0: PyTree | None = None, **options: Any) -> Certificate:
        """The paper's conditions on this layer's gradient, with respect to the cell's parameters.

        :func:`implicit_core.theory.certify` at the layer's fixed point for ``x``. The cell is in eval mode meanwhile:
        F is then one function. A few samples are enough, and ``layer.certify(x[:4], steps=10)`` takes as long as ten
        to 35 steps of training.

        Parameters
        ----------
        x, h0
            As for a call.
        options
            ``cotangent``, ``steps``, ``confidence``, ``seed`` and ``linear_solver``, as there.

        Raises
        ------
        TypeError
            If the cell is not a module with parameters to train.

        Examples
        --------
        >>> import torch
        >>> import implicit_core as ic
        >>> from implicit_core.adapters import torch as ict
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = torch.nn.Linear(4, 4)
        ...         torch.nn.init.orthogonal_(self.inner.weight, gain=0.5)
        ...
        ...     def forward(self, h, x):
        ...         return torch.tanh(self.inner(h) + x)
        >>> layer = ict.ImplicitLayer(Cell(), gradient=ic.Neumann(k=20, lam=0.9))
        >>> layer.certify(torch.eye(2, 4)).descent
        True
        """
        cell, parameters = self.cell, _trained(self.cell)
        if not isinstance(cell, nn.Module) or not parameters:
            raise TypeError(
                "the conditions are about what is trained, and the cell is no module with parameters that require a "
                "gradient: put them in z, and call implicit_core.theory.certify"
            )
        x = BACKEND.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)
        with _in_eval_mode(cell), torch.no_grad():
            given = problem(lambda h, p: functional_call(cell, p, (h, x)), batch_ndim=self.batch_ndim)
            h = self._start(x) if h0 is None else h0
            if not self.gradient.starts_from_h0:
                h = solve(given, h, parameters, solver=self.eval_solver or self.solver).value
            return certify(given, h, parameters, self.gradient, **options)

    def _start(self, x: PyTree) -> PyTree:
        if self.h0 is not None:
            return self.h0(x)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x is of type {type(x).__name__}, which does not tell the shape of h: "
                "give ImplicitLayer an h0, a function of x that returns the start, or pass h0 to the call"
            )
        return torch.zeros_like(x, dtype=state_dtype(x))

    def extra_repr(self) -> str:
        """Settings, as they were given."""
        settings = [f"solver={self.solver!r}", f"gradient={self.gradient!r}"]
        if self.eval_solver is not None:
            settings.append(f"eval_solver={self.eval_solver!r}")
        return ",\n".join([*settings, f"batch_ndim={self.batch_ndim}"])


def _trained(cell: Any) -> dict[str, Tensor]:
    """The values of a cell's parameters that require a gradient."""
    named = cell.named_parameters() if isinstance(cell, nn.Module) else ()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Within it a module is in eval mode; afterwards each of its parts is in its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _check_not_sharded(cell: Any) -> None:
    from torch.distributed.fsdp import FSDPModule  # takes long, and is needed in a group of processes alone

    if isinstance(cell, nn.Module) and any(
        isinstance(m, (FSDPModule, DistributedDataParallel)) for m in cell.modules()
    ):
        raise RuntimeError(
            "the cell is distributed over processes, and would communicate at every evaluation, but each process stops "
            "after its own number of steps: wrap the ImplicitLayer, or the model, in fully_shard or "
            "DistributedDataParallel, not the cell or a part of it"
        )

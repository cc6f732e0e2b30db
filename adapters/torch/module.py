"""The implicit layer as a module."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import TypeVar

from implicit_core import checks
from implicit_core.arrays import PyTree
from implicit_core.backends.torch import BACKEND
from implicit_core.coupling import differences, refuse_coupling, testable, unchecked
from implicit_core.estimators import AtFixedPoint, Estimator
from implicit_core.fixed_point import DEFAULT_GRADIENT
from implicit_core.forced import has_no_tolerance, is_forced
from implicit_core.layer import LayerOptions, check_has_default, gradient_or_default
from implicit_core.problem import Problem, as_problem
from implicit_core.registry import not_compiled
from implicit_core.solution import CoupledSamplesError, Solution, SolveError, Stats
from implicit_core.solve import as_solver, solve
from implicit_core.solvers import Anderson, FixedPointSolver
from implicit_core.solvers.compacting import without_compacting
from implicit_core.theory import Certificate, certify

from .autograd import in_dual_level, transforming
from .cells import check_not_sharded, in_eval_mode, notice_changes, refuse_collectives, refuse_outside, trained
from .compilation import never_compiled
from .exported import warn_of_constant
from .layer import layer
from .precision import full_precision, state_dtype
from .problem import closed_over, problem
from .random_state import RandomState
from .tensors import has_storage, tensors
from .training.constant import constant_within_solve
from .undisturbed import undisturbed

NO_TENSOR = "{} computes with tensors, but neither h0 nor x holds one: pass torch.as_tensor(x)"
NOT_OF_SHAPES = NotImplementedError, SolveError, CoupledSamplesError, torch.OutOfMemoryError
X = TypeVar("X", default=Tensor)
"""The inputs: a tensor or a pytree."""
H = TypeVar("H", default=Tensor)
"""The state: a tensor or a pytree of tensors."""

SHAPE_OF_X = (
    "No h0 was given, so the shape of h, {}, was taken from x. If the state of the cell has another shape, give "
    "{} an h0, the shape of one sample's state or a function of x, or pass h0 to the call."
)

SCRIPTED = (
    "an implicit layer solves in Python, which torch.jit.script cannot compile: use torch.export, or torch.jit.trace "
    "within torch.no_grad(); the cell can be scripted"
)


@never_compiled
class ImplicitLayer(nn.Module, Generic[X, H]):
    """A layer whose output h is the fixed point of its cell, ``h = cell(h, x)`` (Eq. 1 of the paper).

    Gradients reach x, the cell's parameters and all other tensors that the cell uses, in train mode and in eval mode,
    unless autograd is disabled. Normalized weights and the masks of :class:`VariationalDropout` stay the same through a
    call and its backward. The layer adds nothing to the state dict: its entries are the cell's, under ``cell.``.

    Parameters
    ----------
    cell
        ``cell(h, x)``, a module or a function. Its result has the structure, shapes and dtypes of h.
    solver
        A solver, or any callable ``(problem, h0, z) -> h``.
    gradient
        An estimator; ``Unroll(k=5, lam=0.5)`` if None. There is no default behind a forced number of plain steps, as of
        :func:`~implicit_core.steps`.
    eval_solver
        The solver in eval mode; ``solver`` if None. The steps of the estimator come after it in both modes.
    h0
        The start of a solve, unless the call gives one: the shape of one sample's state, as ``(64,)``, for zeros, or a
        function of x that returns the start. If None, the start is zero, with the shape and dtype of x, or with float32
        where x is half precision under autocast.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    scale
        The units of h, if its parts have different ones, see :class:`~implicit_core.Problem`.
    throw
        Raise :class:`~implicit_core.SolveError` where a sample did not converge; after a forced number of steps, as of
        :func:`~implicit_core.steps`, where one is not finite.
    check
        Find out whether the cell couples samples, which makes per-sample gradients wrong. It takes two evaluations
        without a graph, once for each shape of h and x and each mode of the cell, and each time within a
        ``TorchDispatchMode``, such as a selective activation checkpoint. It is skipped where no gradient is computed,
        within ``torch.func``, and while a program is recorded.

    Attributes
    ----------
    status, stats
        The status and statistics of the last call, see :class:`~implicit_core.Solution`. They hold no graph. None
        before the first call, and after a call within ``torch.func`` or one that raised a
        :class:`~implicit_core.SolveError`. To record a program leaves them as they were.
    samples, unconverged
        How many samples were solved since :meth:`reset_counts`, and how many of them did not converge: two integers
        for a logger. To read ``unconverged`` waits for the device. Calls whose solver makes a fixed number of steps
        (both tolerances zero, and no ``stop``) count no sample, nor do calls for which ``status`` is None.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong kind; at the call, if the cell's result is not shaped as h, or if the cell couples
        samples, as batch norm in train mode does: pass ``batch_ndim=0``.
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
    _default_gradient: ClassVar[Estimator] = DEFAULT_GRADIENT
    # Of the class, for layers that were pickled before there were counts.
    samples: int = 0
    _unconverged: Tensor | int = 0

    def __init__(
        self,
        cell: Callable[[H, X], H],
        *,
        solver: FixedPointSolver | Callable[[Problem[H, X], H, X], H] = Anderson(),
        gradient: Estimator | None = None,
        eval_solver: FixedPointSolver | Callable[[Problem[H, X], H, X], H] | None = None,
        h0: Callable[[X], H] | Sequence[int] | None = None,
        batch_ndim: int = 1,
        scale: PyTree = None,
        throw: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        checks.function("cell", cell)
        gradient = gradient_or_default(gradient, self._default_gradient, solver)
        checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
        checks.instance("throw", throw, bool, "True")
        checks.instance("check", check, bool, "False")
        as_solver(solver)
        if eval_solver is not None:
            as_solver(eval_solver, "eval_solver")
            if gradient is self._default_gradient:
                check_has_default(eval_solver)
        if h0 is not None and not callable(h0):
            h0 = _as_shape(h0)
        self.cell = cell
        self.solver, self.eval_solver, self.gradient = solver, eval_solver, gradient
        self.h0 = h0
        self.batch_ndim = checks.integer("batch_ndim", batch_ndim, 0)
        self.scale = checks.scale(scale)
        self.throw = throw
        self.check = check
        self._checked: set[Hashable] = set()  # shapes whose samples were found to be independent
        self.status = self.stats = None
        self.reset_counts()

    if TYPE_CHECKING:

        def __call__(
            self,
            x: X,
            h0: H | None = None,
            *,
            solver: FixedPointSolver | Callable[[Problem[H, X], H, X], H] | None = None,
            gradient: Estimator | None = None,
        ) -> H:
            """See :meth:`forward`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cell":
            self._checked = set()  # of another cell nothing is known
        super().__setattr__(name, value)

    @not_compiled
    def forward(
        self,
        x: X,
        h0: H | None = None,
        *,
        solver: FixedPointSolver | Callable[[Problem[H, X], H, X], H] | None = None,
        gradient: Estimator | None = None,
    ) -> H:
        """The fixed point h, shaped as h0.

        Parameters
        ----------
        x
            Inputs, a tensor or a pytree.
        h0
            Where to start, a constant that gets no gradient; the layer's own start if None.
        solver, gradient
            For this call, in both modes; the layer's own if None.
        """
        cell = constant_within_solve(self.cell)
        inferred = h0 is None and self.h0 is None
        start = self._start(x) if h0 is None else h0
        gradient = self.gradient if gradient is None else gradient
        checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
        chosen = self._solver() if solver is None else solver
        if gradient is self._default_gradient:  # which the layer has for its own solver
            check_has_default(chosen)
        if self.training:
            # The steps of a recurrent model may each draw anew.
            notice_changes(self.cell, draws=isinstance(gradient, AtFixedPoint) or not has_no_tolerance(chosen))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            check_not_sharded(self.cell)
            self._refuse_collectives(cell, start, x)
        if not (tensors(start) or tensors(x)):
            raise TypeError(NO_TENSOR.format(type(self).__name__))
        checks.supported("h0", start)
        options = LayerOptions(
            as_solver(chosen if self.check else unchecked(chosen)),
            gradient if self.check else unchecked(gradient),
            self.throw,
            examine=partial(self._refuse_coupling, x, gradient.starts_from_h0) if self.check else None,
        )
        try:
            solution = layer(self._stated(as_problem(cell, self.batch_ndim, self.scale)), start, x, options)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, SolveError):
                self.status = self.stats = None
            # An error whose kind has nothing to do with a shape is left as it is.
            if inferred and not isinstance(error, NOT_OF_SHAPES):
                error.add_note(SHAPE_OF_X.format(tuple(tensors(start)[0].shape), type(self).__name__))
            raise
        if transforming():  # tensors of a transform cannot be read after it
            self.status = self.stats = None
        elif BACKEND.recording():  # a program that is recorded must not change the module
            if self.training:
                warn_of_constant(gradient)
        else:
            self.status, self.stats = solution.status, solution.stats
            if not is_forced(chosen):
                self._count(solution)
        return solution.value

    @property
    def unconverged(self) -> int:
        """How many of the ``samples`` did not converge."""
        return int(self._unconverged)

    def reset_counts(self) -> None:
        """Count ``samples`` and ``unconverged`` from zero."""
        self.samples = self._unconverged = 0

    def _count(self, solution: Solution[H]) -> None:
        if BACKEND.capturing(solution.status) or solution.status.is_meta:
            return
        failed = ~solution.converged
        self.samples += failed.numel()
        if failed.is_cpu:
            self._unconverged += sum(BACKEND.count([failed]))
        else:  # the number stays on its device, which is not waited for
            before = self._unconverged
            before = before.to(failed.device) if isinstance(before, Tensor) else before
            self._unconverged = failed.sum() + before

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by ``torch.jit.script``, which would name an attribute instead of the reason."""
        raise NotImplementedError(SCRIPTED)

    def certify(self, x: X, h0: H | None = None, **options: Any) -> Certificate:
        """The paper's conditions on this layer's gradient, with respect to the cell's parameters.

        Calls :func:`implicit_core.theory.certify` at the layer's fixed point for ``x``, with the cell in eval mode, so
        that F is one function. A few samples are enough. ``layer.certify(x[:4], steps=10)`` takes as long as ten to 35
        steps of training.

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
        ValueError
            If the cell uses tensors that require a gradient and are not its parameters, such as a weight computed
            outside of ``forward``: the layer differentiates them, but the conditions would leave them out.

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
        cell, parameters = self.cell, trained(self.cell)
        if not isinstance(cell, nn.Module) or not parameters:
            raise TypeError(
                "the conditions are about trained parameters, but the cell is not a module with parameters that "
                "require a gradient: put them in z, and call implicit_core.theory.certify"
            )
        x = BACKEND.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)
        with in_eval_mode(cell), torch.no_grad():
            given: Problem[H, dict[str, Tensor]] = problem(
                lambda h, p: functional_call(cell, p, (h, x)), batch_ndim=self.batch_ndim, scale=self.scale
            )
            given = self._stated(given)
            h = self._start(x) if h0 is None else h0
            if not self.gradient.starts_from_h0:
                solver: Any = without_compacting(self.eval_solver or self.solver)  # z holds the parameters here
                h = solve(given, h, parameters, solver=solver).value
            refuse_outside(cell, closed_over(given.f, h, parameters))
            return certify(given, h, parameters, self.gradient, **options)

    def _stated(self, problem: Problem[H, Any]) -> Problem[H, Any]:
        """The equation that the layer solves, given the problem of its cell."""
        return problem

    def _solver(self) -> FixedPointSolver | Callable[[Problem[H, X], H, X], H]:
        """The solver of this mode."""
        return self.solver if self.training or self.eval_solver is None else self.eval_solver

    def _refuse_collectives(self, f: Callable[[H, X], H], h: H, x: X) -> None:
        """Raise if the cell communicates with other processes; once for each mode."""
        case = "collectives", self._modes()
        if torch.distributed.get_world_size() > 1 and self._is_due(case) and not transforming():
            with undisturbed(self.cell, h), BACKEND.solving():
                refuse_collectives(self.cell, lambda: f(BACKEND.map(torch.clone, h), x))
            self._checked.add(case)

    def _is_due(self, case: Hashable) -> bool:
        """Whether a check of the cell is made: once, or each time within a dispatch mode (Decision 98)."""
        return case not in self._checked or is_in_torch_dispatch_mode()

    def _modes(self) -> tuple[bool, ...]:
        return tuple(part.training for part in self.cell.modules()) if isinstance(self.cell, nn.Module) else ()

    def _refuse_coupling(self, x: X, is_start: bool, f: Callable[[H, X], H], h: H) -> None:
        """Raise if the cell couples samples; once for each shape and mode (Decision 83).

        If h ``is_start``, where a coupling may be zero, F(h) is looked at.
        """
        if not self.batch_ndim:
            return
        leaves = [leaf for leaf in BACKEND.flatten((h, x))[0] if isinstance(leaf, Tensor)]
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled() or BACKEND.recording():
            return
        if transforming() or in_dual_level():
            return
        case = (self.batch_ndim, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves), self._modes())
        if not self._is_due(case):
            return
        if not all(has_storage(leaf) and BACKEND.readable(leaf) and not leaf.is_meta for leaf in leaves):
            return
        space = BACKEND.space(h, self.batch_ndim, "h")
        if testable(space):
            # With the same random numbers each time: dropout draws masks, and couples nothing.
            replayed = RandomState(tensors(h), f, x).replay(BACKEND.protected(f))
            given = differences(replayed, self.batch_ndim)
            with undisturbed(self.cell, h), full_precision(h), BACKEND.solving():
                h = replayed(h, x) if is_start else h
                refuse_coupling(space, given.linearize(h, x), given.f, type(self).__name__)
        self._checked.add(case)

    def _start(self, x: X) -> H:
        if callable(self.h0):
            return self.h0(x)
        if self.h0 is not None:
            return self._zeros(x, self.h0)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"the shape of h cannot be inferred from an x of type {type(x).__name__}: give {type(self).__name__} "
                "an h0, the shape of one sample's state or a function of x, or pass h0 to the call"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"the state cannot start from an x of dtype {x.dtype}: give {type(self).__name__} an h0, a function of "
                "x that returns the start, or the shape of one sample's state, as h0=(64,)"
            )
        start: Any = torch.zeros_like(x, dtype=state_dtype(x))
        return start  # type: ignore[no-any-return]  # a tensor, as x is

    def _zeros(self, x: X, shape: tuple[int, ...]) -> H:
        """Zeros of this shape for each sample in x."""
        given = tensors(x)
        if not given or given[0].ndim < self.batch_ndim:
            raise ValueError(f"h0={shape} needs an x with a tensor of batch_ndim={self.batch_ndim} axes or more")
        like = given[0]
        dtype = state_dtype(like) if like.is_floating_point() else torch.get_default_dtype()
        start: Any = torch.zeros(*like.shape[: self.batch_ndim], *shape, dtype=dtype, device=like.device)
        return start  # type: ignore[no-any-return]  # a tensor

    def extra_repr(self) -> str:
        """Settings, as they were given."""
        settings = [f"solver={self.solver!r}", f"gradient={self.gradient!r}"]
        if self.eval_solver is not None:
            settings.append(f"eval_solver={self.eval_solver!r}")
        return ",\n".join([*settings, f"batch_ndim={self.batch_ndim}"])


def _as_shape(h0: object) -> tuple[int, ...]:
    if not isinstance(h0, Sequence) or isinstance(h0, str):
        raise TypeError(f"h0 must be the shape of one sample's state, as (64,), or a function of x; got {h0!r}")
    return tuple(checks.integer("each axis of h0", n, 0) for n in h0)

"""Normalized weights and dropout masks that stay constant within one solve."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from threading import Lock
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from implicit_core import checks
from implicit_core.arrays import H, Z
from implicit_core.problem import Map

Weights = Mapping[ParametrizationList, Tensor]
Masks = dict[tuple["VariationalDropout", tuple[int, ...]], Tensor]

MAX_AXES = 64
"""The most axes a tensor can have in PyTorch."""

_masks: ContextVar[Masks | None] = ContextVar("masks", default=None)
_trial: ContextVar[Masks | None] = ContextVar("trial", default=None)
_weights: ContextVar[Weights] = ContextVar("weights", default=MappingProxyType({}))

_lock = Lock()
_users: dict[ParametrizationList, int] = {}
"""In how many evaluations that are running, in all threads, a parametrization returns a held weight."""


def constant_within_solve(cell: Map[H, Z], *modules: nn.Module) -> Map[H, Z]:
    """``cell`` as one function, whose parametrized tensors and dropout masks are the same in every evaluation.

    A parametrized weight (``weight_norm``, ``spectral_norm``, ``orthogonal`` and others of
    :mod:`torch.nn.utils.parametrize`) is computed here, once. Every evaluation of the result uses it: in the solve, in
    the gradient estimator, and in a backward pass that recomputes. The weight carries its graph, so gradients reach the
    parameters it was computed from, and ``spectral_norm`` makes one power iteration however often F is evaluated. The
    masks of :class:`VariationalDropout` are drawn at the first evaluation and kept in the same way. Call this function
    again for each solve, as :class:`ImplicitLayer` does.

    Parameters
    ----------
    cell
        ``cell(h, z)``, a module or a function.
    modules
        The modules that ``cell`` uses, other than itself and its submodules. A parametrized weight of a module that is
        not given here is computed at every evaluation.

    Returns
    -------
    Callable
        ``f(h, z)``; ``cell`` itself if it is a module without parametrized weights and without such dropout.

    Raises
    ------
    TypeError
        If ``cell`` is not callable, or one of ``modules`` is not a module.

    Notes
    -----
    A cell may itself hold an implicit layer. The inner layer then uses the masks of the outer one: otherwise the outer
    F would differ from evaluation to evaluation. Weights normalized by the older ``torch.nn.utils.weight_norm`` and
    ``torch.nn.utils.spectral_norm`` are recomputed by hooks at every evaluation.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.utils.parametrizations import spectral_norm
    >>> from implicit_core.adapters import torch as ict
    >>> inner = spectral_norm(torch.nn.Linear(3, 3))
    >>> dropout = ict.VariationalDropout(0.2)
    >>> f = ict.constant_within_solve(lambda h, x: 0.9 * torch.tanh(dropout(inner(h)) + x), inner, dropout)
    >>> h, x = torch.zeros(4, 3), torch.ones(4, 3)
    >>> torch.equal(f(h, x), f(h, x))
    True
    >>> ict.fixed_point(f, h, x, batch_ndim=1).value.sum().backward()
    >>> inner.parametrizations.weight.original.grad.shape
    torch.Size([3, 3])
    """
    checks.function("cell", cell)
    for module in modules:
        checks.instance("each of modules", module, nn.Module, "torch.nn.Linear(3, 3)")
    roots = (cell, *modules) if isinstance(cell, nn.Module) else modules
    parts = list(dict.fromkeys(part for root in roots for part in root.modules()))
    # Not parametrize.cached(): its scope has ended when a backward pass evaluates F again. And of a module that is not
    # given here, it would keep the weight that the solve computes, which has no graph.
    held = dict(_parametrized(parts))
    if isinstance(cell, nn.Module) and not held and not any(isinstance(part, VariationalDropout) for part in parts):
        return cell
    outer = _masks.get()
    masks: Masks = {} if outer is None else outer

    def constant(h: H, z: Z) -> H:
        trial = _trial.get()
        with _Held(masks if trial is None else trial, {**_weights.get(), **held}):
            return cell(h, z)

    return constant


class _Held:
    """Evaluations with these masks and weights; may be entered again."""

    def __init__(self, masks: Masks | None, weights: Weights) -> None:
        self.masks, self.weights = masks, weights
        self._before: list[tuple[Token[Masks | None], Token[Weights]]] = []

    def __enter__(self) -> None:
        self._before.append((_masks.set(self.masks), _weights.set(self.weights)))
        _return_held(self.weights)

    def __exit__(self, *_: object) -> None:
        _compute_again(self.weights)
        masks, weights = self._before.pop()
        _masks.reset(masks)
        _weights.reset(weights)


def constant_in_checkpoint() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of a :func:`torch.utils.checkpoint.checkpoint` inside a cell.

    A checkpoint evaluates its function again in the backward pass, when the solve is over. With this it has the weights
    and the masks of the solve there. Without it PyTorch raises a ``CheckpointError`` where a parametrized weight, or a
    :class:`VariationalDropout` whose input requires a gradient, is inside of it. ``use_reentrant=True``, which has no
    ``context_fn``, would draw another mask, and nothing would tell: do not use it.

    Returns
    -------
    tuple
        Two context managers, as PyTorch asks for: for the first evaluation and for the other ones.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.checkpoint import checkpoint
    >>> from implicit_core.adapters import torch as ict
    >>> inner = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
    >>> again = {"use_reentrant": False, "context_fn": ict.constant_in_checkpoint}
    >>> cell = lambda h, x: 0.5 * torch.tanh(checkpoint(inner, h, **again) + x)
    >>> f = ict.constant_within_solve(cell, inner)
    >>> ict.fixed_point(f, torch.zeros(4, 3), torch.ones(4, 3), batch_ndim=1).value.sum().backward()
    >>> inner.parametrizations.weight.original1.grad.shape
    torch.Size([3, 3])
    """
    return nullcontext(), _Held(_masks.get(), _weights.get())


@contextmanager
def masks_of_a_trial() -> Iterator[None]:
    """Evaluations whose masks are forgotten at the end: a solve that follows draws its own (Decision 140)."""
    token = _trial.set({})
    try:
        yield
    finally:
        _trial.reset(token)


class VariationalDropout(nn.Module):
    """Dropout whose mask is the same in every evaluation of F within one solve, and another one in the next solve.

    With :class:`torch.nn.Dropout` in a cell F differs from evaluation to evaluation, so there is no fixed point and no
    solver converges. Inside :func:`constant_within_solve`, which :class:`ImplicitLayer` uses, this module keeps one
    mask for each shape of its input. Elsewhere it draws a mask at every call. In eval mode it is the identity.

    Parameters
    ----------
    p
        Probability in [0, 1] that a number is set to zero; the others are multiplied by 1 / (1 - p).
    dims
        Axes along which the mask is the same, as ``dims=(-2, -1)`` for whole feature maps.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong kind; at the call, if the input has no such axis.

    References
    ----------
    Y. Gal and Z. Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, NIPS 2016;
    in equilibrium models: S. Bai, J. Z. Kolter and V. Koltun, Deep equilibrium models, NeurIPS 2019.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> dropout = ict.VariationalDropout(0.5, dims=(1,))
    >>> sorted(set(dropout(torch.ones(64, 3)).sum(1).tolist()))
    [0.0, 6.0]
    >>> dropout.eval()(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, p: float = 0.5, dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.p = checks.real("p", p, 0.0, 1.0)
        if not isinstance(dims, Sequence):
            raise TypeError(f"dims must be a sequence of axes, such as (-2, -1), got {dims!r}")
        self.dims = tuple(checks.integer("each of dims", dim, -MAX_AXES) for dim in dims)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times the mask, of the shape of ``x``."""
        masks = _masks.get()
        # Without masks there is no key to make: sizes of a program that is exported have no hash.
        if not masks and (not self.training or self.p == 0.0):
            return x
        if masks is None:
            # The mask has one axis more than within a solve. By that a checkpoint sees that it evaluates a cell again
            # without the masks of the solve, and raises an error, see constant_in_checkpoint.
            product: Tensor = (x * self._draw(x)[None])[0]
            return product
        key = self, tuple(x.shape)
        if key not in masks:
            if not self.training or self.p == 0.0:
                return x
            masks[key] = self._draw(x)
        # In eval mode too: a backward pass evaluates the F that was solved, whose mode may have changed since.
        return x * masks[key].to(dtype=x.dtype, device=x.device)

    def _draw(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        for dim in self.dims:
            if not -x.ndim <= dim < x.ndim:
                raise ValueError(f"dims={self.dims} needs an axis {dim}, which an input of shape {(*x.shape,)} lacks")
            shape[dim] = 1
        keep = 1.0 - self.p
        with torch.inference_mode(False):  # a solver may compute a pullback, for which the mask is saved
            mask = torch.bernoulli(torch.full(shape, keep, dtype=x.dtype, device=x.device))
            return mask / keep if keep else mask

    def extra_repr(self) -> str:
        """The settings."""
        return f"p={self.p}, dims={self.dims}" if self.dims else f"p={self.p}"


MASKED_AXES = {nn.Dropout: (), nn.Dropout1d: (-1,), nn.Dropout2d: (-2, -1), nn.Dropout3d: (-3, -2, -1)}


def replace_dropout(module: nn.Module) -> nn.Module:
    """Replace the dropout modules within a module by :class:`VariationalDropout`.

    For cells of a library, or cells that a library has put dropout into, as PEFT does with ``lora_dropout``.

    Parameters
    ----------
    module
        Changed in place: each :class:`torch.nn.Dropout`, ``Dropout1d``, ``Dropout2d`` and ``Dropout3d`` in it is
        replaced, with its probability and mode. Other kinds stay, and so does dropout that a ``forward`` computes with
        functions.

    Returns
    -------
    Module
        The module itself, or its replacement if it is a dropout module.

    Raises
    ------
    TypeError
        If it is not a module.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> cell = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.1))
    >>> ict.replace_dropout(cell)
    Sequential(
      (0): Linear(in_features=3, out_features=3, bias=True)
      (1): VariationalDropout(p=0.1)
    )
    """
    checks.instance("module", module, nn.Module, "torch.nn.Sequential(...)")
    made: dict[nn.Module, VariationalDropout] = {}  # a module may have several names
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if type(part) in MASKED_AXES:
            if part not in made:
                made[part] = VariationalDropout(part.p, MASKED_AXES[type(part)])
                made[part].train(part.training)
            if not path:
                return made[part]
            module.set_submodule(path, made[part])
    return module


def _parametrized(parts: Sequence[nn.Module]) -> list[tuple[ParametrizationList, Tensor]]:
    """The parametrized tensors of modules, and the modules that compute them, in the caller's grad mode."""
    if not any(isinstance(part, ParametrizationList) for part in parts):
        return []
    grad = torch.is_grad_enabled()
    found = []
    # A solver may compute a pullback, for which a tensor of inference mode could not be saved.
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        for owner in parts:
            lists = getattr(owner, "parametrizations", None)
            if isinstance(lists, nn.ModuleDict):
                found += [(x, getattr(owner, name)) for name, x in lists.items() if isinstance(x, ParametrizationList)]
    return found


def _return_held(held: Weights) -> None:
    """Make parametrizations return the held tensors, in every thread and context that holds some."""
    with _lock:
        for part in held:
            _users[part] = _users.get(part, 0) + 1
            vars(part)["forward"] = functools.partial(_weight, part)


def _compute_again(held: Weights) -> None:
    """Undo :func:`_return_held`; parametrizations compute again when no evaluation needs a held tensor."""
    with _lock:
        for part in held:
            _users[part] -= 1
            if not _users[part]:
                del _users[part]
                del vars(part)["forward"]


def _weight(part: ParametrizationList) -> Tensor:
    held = _weights.get().get(part)
    weight: Tensor = type(part).forward(part) if held is None else held
    return weight

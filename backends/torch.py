"""PyTorch tensors: native spellings, since the portable ones cost several dispatches each."""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, Generic

import array_api_compat.torch as xp
import numpy as np
import optree
import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__
from torch.utils import _pytree as torch_pytree

from implicit_core.arrays import H, History, Matrices, Numbers, PyTree, Row, State, Z
from implicit_core.backend import Backend, Function, IsLeaf, Loop, Stream, WrittenArgumentError
from implicit_core.space import Space, total

DEFAULT_STREAM = (0, 1)
PER_THREAD_STREAM = 2
"""CUDA's names for its default streams, which stand where an address would."""

LARGE = 1 << 18
"""Numbers of a history from which on a product with it costs more than the launch of some operations."""

WRITES_LATER = (
    "f wrote to its argument h, which it did not in its first evaluation, or it returns memory that it reuses: let it "
    "always return a new tensor, `torch.relu(h)` instead of `torch.relu_(h)`, or always work on a copy, `h = h.clone()`"
)

TRACED = (
    "a solve stops on a test of its numbers, which make_fx cannot trace, nor torch.func.linearize, which uses it: take "
    "torch.func.jvp or torch.func.vjp, and torch.export for a program"
)
WITHOUT_NUMBERS = (
    "tensors of the meta device have shapes and no numbers, by which a solve stops: use fixed_point or ImplicitLayer, "
    "which evaluate f once there, for the shapes of values and gradients"
)
IN_PLACE = "leaf Variable that requires grad"
NO_GRAPH = "does not require grad and does not have a grad_fn"
DERIVATIVE_IN_F = (
    "a solve evaluates f without a graph. For a derivative within f, as in a step down an energy, use torch.func.grad: "
    "h - 0.5 * torch.func.grad(energy)(h, x)"
)

CASTS_HAVE_GRAPHS = torch.__version__ >= (2, 11)  # type: ignore[operator]  # a TorchVersion, which compares so
"""Whether autocast casts a weight with a graph even where autograd is disabled, before it keeps the cast in its cache.

Otherwise a weight gets no gradient, silently, if F was evaluated without a graph before.
"""

NODES = "implicit_core.torch"
"""The namespace of optree that holds the classes that are registered with PyTorch's own pytrees."""
LEAVES = frozenset((Tensor, torch.nn.Parameter, int, float, complex, bool, str, type(None)))
"""Classes that are no nodes, for all that is common in a pytree."""
A_LEAF: Any = torch.empty(0)
ONE_LEAF = [optree.tree_flatten(A_LEAF, none_is_leaf=none, namespace=NODES)[1] for none in (False, True)]
"""The structure of one tensor, the most common pytree."""

_LOOP: ContextVar[Loop | None] = ContextVar("records a loop instead of carrying it out", default=None)
_RECORDED: ContextVar[bool] = ContextVar("operations become a program that is exported", default=False)


@contextmanager
def recording_loops(loop: Loop) -> Iterator[None]:
    """Operations are being recorded within this context, and ``loop`` replaces :meth:`Backend.while_loop`.

    The counter that a loop's body gets may then be a tensor without axes.
    """
    token = _LOOP.set(loop)
    try:
        yield
    finally:
        _LOOP.reset(token)


@contextmanager
def recorded() -> Iterator[None]:
    """Within this context operations become a program of ``torch.export`` or ``torch.jit.trace``."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)


class Rows:
    """The rows of a tensor, to be read at a number, or at an index that is on the device."""

    def __init__(self, rows: Tensor) -> None:
        self._rows, self._views = rows, tuple(rows)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        return self._rows.index_select(0, index)[0] if isinstance(index, Tensor) else self._views[index]


class TorchSpace(Space):
    """One dispatch for each operation."""

    def copy(self, x: State) -> State:
        return State(tuple([a.clone(memory_format=torch.contiguous_format) for a in x]))

    def multiply_add(self, factor: Any, x: Any, y: Any) -> Any:
        return torch.addcmul(y, factor, x) if isinstance(factor, Tensor) else torch.add(y, x, alpha=factor)

    def where(self, mask: Any, x: State, y: State) -> State:
        if isinstance(mask, bool):
            return x if mask else y
        return State(tuple(torch.where(mask, a, b) for a, b in zip(x, y, strict=True)))

    def select(self, mask: Any, x: Any, y: Any) -> Any:
        # On another device a number would be copied to it, which waits for it and can't be captured.
        if isinstance(mask, bool) or (isinstance(x, int) and not y.is_cpu):
            return super().select(mask, x, y)
        return torch.where(mask, x, y)

    def plus_one(self, counts: Any, mask: Any) -> Any:
        return counts + mask

    def norm(self, x: State) -> Numbers:
        first, *rest = self.measured(x)
        norm: Any = torch.linalg.vector_norm(first, dim=-1, keepdim=True)
        for a in rest:
            norm = torch.hypot(norm, torch.linalg.vector_norm(a, dim=-1, keepdim=True))
        return self.noticing(norm, x)

    def largest_of(self, a: Any) -> Any:
        return a.abs().amax(dim=-1, keepdim=True)  # a norm of order infinity takes twenty times as long on a CPU

    def is_in_range(self, norm: Any) -> bool:
        backend = self.backend
        try:
            if not norm.is_cpu or not norm.numel() or backend.is_wrapped(norm) or not backend.readable(norm):
                return False
        except NotImplementedError:  # a program is traced, to which nothing may be added
            return False
        least, largest = torch.aminmax(norm)
        return self.smallest < float(least) and float(largest) < self.highest  # never true of NaN

    def same(self, x: State, y: State) -> Any:
        # On a device, reading one number waits for it.
        if all(a.is_cpu and torch.equal(a, b) for a, b in zip(x, y, strict=True)):
            return True
        return super().same(x, y)

    def set_matrix_row(self, matrix: Tensor, index: int | Tensor, row: Tensor) -> Tensor:
        # In place: a history belongs to one solve, which runs without a graph.
        if isinstance(index, Tensor):
            return matrix.index_copy_(1, index, row[:, None] if row.ndim == 2 else row)
        (matrix.select(1, index) if row.ndim == 2 else matrix.narrow(1, index, 1)).copy_(row)
        return matrix

    def rows_in_use(self, history: History, index: int | Tensor) -> History:
        n = history[0].shape[1]
        if isinstance(index, Tensor) or index >= n or not any(map(_is_large, history)):
            return history
        return History(tuple(a.narrow(1, 0, index) for a in history))

    def products(self, rows: Row, history: History) -> Matrices:
        pairs = zip(self.measured(rows), self.measured(history), strict=True)
        products: Matrices = total(torch.bmm(a, b.mT) for a, b in pairs)
        return products

    def gram(self, gram: Any, history: History, index: int | Tensor) -> Any:
        return tuple(_gram(a, b, index) for a, b in zip(gram, self.measured(history), strict=True))

    def combine(self, weights: Any, history: History, onto: Row | None = None) -> Row:
        if onto is None:
            return Row(tuple(torch.bmm(weights, a) for a in history))
        return Row(tuple(torch.baddbmm(b, weights, a) for a, b in zip(history, onto, strict=True)))

    def matmul(self, a: Any, b: Any) -> Any:
        return torch.bmm(a, b)

    def solve_rows(self, matrix: Any, row: Any) -> Any:
        if self.backend.capturing(matrix):
            return _eliminated(matrix, row)
        # solve_ex: `solve` reads its error code back from the device at every call.
        return torch.linalg.solve_ex(matrix, row, left=False).result

    def take(self, x: Tensor, index: int | Tensor, axis: int) -> Tensor:
        return x.index_select(axis, index) if isinstance(index, Tensor) else x.narrow(axis, index, 1)

    def eye(self, m: int) -> Tensor:
        # Not torch.eye, which ONNX has no translation of within a solve.
        return torch.diag_embed(torch.ones(m, dtype=self.dtype, device=self.device))

    def table(self, rows: Tensor) -> Rows:
        return Rows(rows)


class CUDAStreams:
    """See :class:`implicit_core.backend.Streams`."""

    def current(self, tree: PyTree) -> Stream | None:
        device = next(x.device for x in BACKEND.flatten(tree)[0] if isinstance(x, Tensor))
        if device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(device)
        return Stream(stream.device_index, stream.cuda_stream)

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        # Memory that a framework frees belongs to its stream: on another stream it might still be read.
        if stream.address == PER_THREAD_STREAM:
            raise NotImplementedError(
                "PyTorch cannot work on the per-thread default stream. Make another stream the current one, as with "
                "cupy.cuda.Stream(non_blocking=True), or unset CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"
            )
        if stream.address in DEFAULT_STREAM:
            return torch.cuda.stream(torch.cuda.default_stream(stream.device))
        return torch.cuda.stream(torch.cuda.ExternalStream(stream.address, stream.device))


class Unread:
    """Numbers on their way from a device, whose readers are called once they have arrived.

    To wait for them would stop the host from queueing more work (Decision 77).
    """

    MOST = 8
    """While so many are on their way, the next are not looked at."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[Any], None], Tensor, Callable[[], bool]]] = deque()
        self._lock = threading.Lock()

    def add(self, function: Callable[[Any], None], numbers: Tensor) -> None:
        """Send ``numbers`` to the host, and call the readers of all earlier ones that have arrived."""
        if len(self._waiting) < self.MOST:
            self._waiting.append((function, *self.send(numbers)))
        while (found := self._arrived()) is not None:
            reader, arrived = found
            reader(arrived.numpy())

    def _arrived(self) -> tuple[Callable[[Any], None], Tensor] | None:
        """The reader of the first numbers and these, if they have arrived."""
        with self._lock:  # a thread may take the first between the question of another and its answer
            if not (self._waiting and self._waiting[0][2]()):
                return None
            return self._waiting.popleft()[:2]

    def send(self, numbers: Tensor) -> tuple[Tensor, Callable[[], bool]]:
        """A copy on the host that is being filled, and whether it has been."""
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(numbers.device))
        return host, event.query


UNREAD = Unread()


class Protected(Generic[H, Z]):
    """F, which is handed copies if it writes to its argument, as ``torch.nn.ReLU(inplace=True)`` does (Decision 91).

    Tensors count the writes to them. The first evaluation has a copy, and shows whether F writes.
    """

    def __init__(self, f: Callable[[H, Z], H]) -> None:
        self._f = f
        self._writes: bool | None = None

    def __repr__(self) -> str:
        return getattr(self._f, "__qualname__", None) or repr(self._f)

    def __call__(self, h: H, z: Z) -> H:
        try:
            return self._call(h, z)
        except RuntimeError as error:
            if NO_GRAPH in str(error) and not torch.is_grad_enabled():
                raise RuntimeError(f"{DERIVATIVE_IN_F}. PyTorch says: {error}") from error
            if IN_PLACE in str(error):
                error.add_note(WRITES_LATER)
            raise

    def _call(self, h: H, z: Z) -> H:
        if self._writes is False and (before := writes(h)) is not None:
            value = self._f(h, z)
            if writes(h) != before:
                raise ValueError(WRITES_LATER)
            return value
        own: H = BACKEND.map(torch.clone, h)
        before = writes(own)
        value = self._f(own, z)
        if before is not None:
            self._writes = bool(self._writes) or writes(own) != before
        return value


def unprotected(f: Callable[[H, Z], H]) -> Callable[[H, Z], H]:
    """F, which is looked at anew: between two solves a module may be put into a mode in which it writes."""
    return f._f if isinstance(f, Protected) else f


def writes(h: PyTree) -> list[int] | None:
    """How often each tensor of a pytree was written to; None if a tensor does not count.

    Tensors of inference mode have no counter. Within ``vmap`` tensors have no storage, and their counter stays at 0.
    """
    leaves = (h,) if isinstance(h, Tensor) else BACKEND.flatten(h)[0]
    try:
        return [x._version for x in leaves if x.untyped_storage() is not None]  # which raises if there is none
    except (NotImplementedError, RuntimeError):
        return None


class Node:
    """A node of PyTorch's pytrees, without its children."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and bool(self.spec == other.spec)

    def __hash__(self) -> int:
        return hash(self.spec.type)  # what else a node holds may have no hash

    def __repr__(self) -> str:
        return ""


def children(node: Any) -> tuple[list[Any], Any]:
    """The children of a node of PyTorch's pytrees, and the rest of it; a leaf is its own child.

    Of a dataclass PyTorch drops the fields that are None, which cotangents of integers are: here they are children.
    """
    # Private, but the only registry with all nodes. Those of `torch.export.register_dataclass` do not reach optree's
    # namespace "torch", which is public. Decision 95.
    found, spec = torch_pytree.tree_flatten(node, is_leaf=lambda x: x is not node)
    if dataclasses.is_dataclass(node):
        fields = {field.name: getattr(node, field.name, None) for field in dataclasses.fields(node) if field.init}
        present = [x for x in fields.values() if x is not None]
        if len(found) == len(present) and all(a is b for a, b in zip(found, present, strict=True)):
            return list(fields.values()), tuple(fields)
    return found, Node(spec)


def is_node(leaf: Any) -> bool:
    """Whether a leaf is a node of PyTorch's pytrees, and from now on one of this backend's."""
    kind = type(leaf)
    found, _ = torch_pytree.tree_flatten(leaf, is_leaf=lambda x: x is not leaf)
    if len(found) == 1 and found[0] is leaf:
        return False

    def unflatten(rest: Any, parts: Any) -> Any:
        if isinstance(rest, Node):
            return torch_pytree.tree_unflatten(list(parts), rest.spec)
        return kind(**dict(zip(rest, parts, strict=True)))

    with suppress(ValueError):  # another thread was faster
        optree.register_pytree_node(kind, children, unflatten, namespace=NODES)
    return True


class TorchBackend(Backend):
    """PyTorch tensors on any device."""

    has_autodiff = True
    sees_writes = True
    streams = CUDAStreams()

    def device(self, x: Tensor) -> torch.device:
        return x.device

    def devices(self) -> list[str]:
        found = ["cpu"]
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
        return found + ["mps"] * torch.backends.mps.is_available()

    def complex(self, real: Tensor, imag: Tensor) -> Tensor:
        return torch.complex(real, imag)

    def axis_order(self, x: Tensor, batch_ndim: int) -> tuple[int, ...] | None:
        """``channels_last`` and ``channels_last_3d``: the axis of channels has the least stride (Decision 94)."""
        channels = max(batch_ndim, 1)
        if x.ndim - channels not in (3, 4) or x.is_contiguous():
            return None
        order = (*range(channels), *range(channels + 1, x.ndim), channels)
        # `is_contiguous(memory_format=...)` cannot be asked within vmap, and a batch may have several axes.
        return order if x.permute(order).is_contiguous() else None

    def in_axis_order(self, x: Tensor, order: tuple[int, ...] | None, batch_ndim: int) -> Tensor:
        if self.axis_order(x, batch_ndim) == order:
            return x
        if order is None:
            return x.contiguous()
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])

    def rows(self, x: Tensor, indices: Tensor) -> Tensor:
        return x[indices]  # index_select, which is xp.take, returns C order

    def finfo(self, dtype: torch.dtype) -> torch.finfo:
        return torch.finfo(dtype)

    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()

    def guarded(self, function: Function, name: str, *arguments: str) -> Function:
        n = len(arguments)

        def counted(*args: Any) -> Any:
            tensors = [x for x in self.flatten(args[:n])[0] if isinstance(x, Tensor)]
            before = writes(tensors)
            result = function(*args)
            if writes(tensors) != before:
                raise WrittenArgumentError(name, *arguments)
            return result

        guarded: Any = counted
        return guarded  # type: ignore[no-any-return]  # it is called as the function is

    def protected(self, f: Callable[[H, Z], H], name: str = "f", argument: str = "h") -> Callable[[H, Z], H]:
        return f if isinstance(f, Protected) else Protected(f)

    # Pytrees are optree's, with the classes that are registered with PyTorch's own, whenever they were.

    def flatten(
        self, tree: PyTree, *, none_is_leaf: bool = False, is_leaf: IsLeaf | None = None
    ) -> tuple[list[Any], Hashable]:
        if isinstance(tree, Tensor):
            return [tree], ONE_LEAF[none_is_leaf]
        leaves, structure = optree.tree_flatten(tree, is_leaf, none_is_leaf=none_is_leaf, namespace=NODES)
        unknown = [x for x in leaves if type(x) not in LEAVES and not isinstance(x, Tensor)]
        if is_leaf is not None:
            unknown = [x for x in unknown if not is_leaf(x)]
        if any(map(is_node, unknown)):
            return self.flatten(tree, none_is_leaf=none_is_leaf, is_leaf=is_leaf)
        return leaves, structure

    def map(self, fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        if isinstance(tree, Tensor) and not rest:
            return fn(tree)
        leaves, structure = self.flatten(tree)
        parts: Any = structure
        return self.unflatten(structure, list(map(fn, leaves, *(parts.flatten_up_to(other) for other in rest))))

    def unsupported(self, x: Tensor, name: str) -> str | None:
        if x.layout is torch.strided:
            return None
        return f"a tensor of the layout {x.layout}, which a solve cannot compute with: write {name}.to_dense()"

    def recording(self) -> bool:
        return is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())

    def solving(self) -> AbstractContextManager[Any]:
        """No graph: gradients come from an estimator, not from the solver's steps."""
        if _RECORDED.get():  # in an exported program such a context would be a part of the program
            return nullcontext()
        return torch.no_grad() if CASTS_HAVE_GRAPHS else _without_graph()

    def capturing(self, x: Tensor) -> bool:
        if _RECORDED.get():
            return True
        return _LOOP.get() is not None or (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def readable(self, x: Tensor) -> bool:
        if x.is_meta or self.capturing(x):
            return False
        # Numbers of samples are read without PyTorch's dispatcher, from which a tracer would learn of it.
        if x.is_cpu and x.shape[-1:] == (1,):
            try:
                torch.equal(x, x)
            except RuntimeError as error:
                if "tracing tensor" in str(error):
                    raise NotImplementedError(TRACED) from error
        return True

    def is_wrapped(self, x: Tensor) -> bool:
        try:
            x.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return True
        return False

    @property
    def recorder(self) -> Loop | None:  # type: ignore[override]  # it depends on the context
        return _LOOP.get()

    def tell(self, function: Callable[..., None], *numbers: Any) -> None:
        if self.capturing(numbers[0]):
            return
        if numbers[0].is_cuda:
            UNREAD.add(lambda found: function(*found), torch.stack(numbers))
            return
        try:
            found = [x.detach().cpu().numpy() for x in numbers]
        except (RuntimeError, TypeError):  # without storage, as torch.func wraps them
            return
        function(*found)

    def count(self, masks: Sequence[Any]) -> list[int]:
        if masks[0].is_cpu:  # where a reduction takes longer to begin with than to carry out
            try:
                return [int(np.count_nonzero(mask.numpy())) for mask in masks]
            except (RuntimeError, TypeError):  # without storage, as torch.func wraps them
                return [int(mask.sum()) for mask in masks]
        if masks[0].is_meta:
            raise NotImplementedError(WITHOUT_NUMBERS)
        counts: list[int] = torch.cat(tuple(masks), dim=1).sum(dim=0).tolist()
        return counts


def _is_large(history: Tensor) -> bool:
    numbers: Any = history.numel()
    return isinstance(numbers, int) and numbers >= LARGE  # in an exported program a size may be a symbol


def drop_casts_without_graph() -> None:
    """Empty autocast's cache if an evaluation with a graph may follow one without (Decision 97)."""
    if not CASTS_HAVE_GRAPHS and torch.is_grad_enabled() and torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


@contextmanager
def _without_graph() -> Iterator[None]:
    try:
        with torch.no_grad():
            yield
    finally:
        drop_casts_without_graph()


def _gram(gram: Tensor, history: Tensor, index: int | Tensor) -> Tensor:
    if isinstance(index, Tensor) or not _is_large(history):  # Decision 18.
        return torch.bmm(history, history.mT)  # recomputed: one product, while the update of a row takes six operations
    products = torch.bmm(history.narrow(1, index, 1), history.mT)
    gram.narrow(1, index, 1).copy_(products)
    gram.narrow(2, index, 1).copy_(products.mT)
    return gram


def _eliminated(matrix: Tensor, row: Tensor) -> Tensor:
    """Gauss-Jordan elimination by columns: some of the batched factorizations can't be captured in a CUDA graph."""
    table = torch.cat([matrix, row], dim=1)
    for j in range(matrix.shape[-1]):
        pivot = table.narrow(2, j, 1) / table[:, j : j + 1, j : j + 1]
        # Not a product of matrices, which may round to TF32.
        table = torch.addcmul(table, pivot, table.narrow(1, j, 1), value=-1)
        table.narrow(2, j, 1).copy_(pivot)
    return table.narrow(1, matrix.shape[-1], row.shape[1])


BACKEND = TorchBackend("torch", xp, (Tensor,), space=TorchSpace)

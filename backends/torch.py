"""PyTorch tensors: native spellings, since the portable ones cost several dispatches each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from implicit_core.backend import Backend, Stream

SPECIAL_STREAMS = (1, 2)
"""Numbers in the place of addresses: CUDA's names for its legacy and its per-thread default stream."""

LARGE = 1 << 18
"""Numbers of a history from which on a product with it costs more than the launch of some operations."""

Loop = Callable[[Callable[[Any], Tensor], Callable[[Any], Any], Any, int, int], Any]

_LOOP: ContextVar[Loop | None] = ContextVar("what records a loop, in the place of carrying it out", default=None)


@contextmanager
def looping(loop: Loop) -> Iterator[None]:
    """Within it operations are being recorded, and ``loop`` stands for :meth:`Backend.while_loop`.

    The counter that a loop's body gets may then be a tensor without axes.
    """
    token = _LOOP.set(loop)
    try:
        yield
    finally:
        _LOOP.reset(token)


class Rows:
    """The rows of a tensor, to be read at a number, or at one that is on the device."""

    def __init__(self, rows: Tensor) -> None:
        self._rows, self._views = rows, tuple(rows)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        return self._rows.index_select(0, index)[0] if isinstance(index, Tensor) else self._views[index]


class TorchBackend(Backend):
    """PyTorch tensors on any device."""

    def device(self, x: Tensor) -> torch.device:
        return x.device

    def on_stream(self, stream: Stream | None) -> AbstractContextManager[Any]:
        # Memory that a framework gives back is its stream's: on another stream it might still be read.
        if stream is None or stream.address in SPECIAL_STREAMS:
            return nullcontext()  # DLPack orders the two by events
        if stream.address == 0:
            return torch.cuda.stream(torch.cuda.default_stream(stream.device))
        return torch.cuda.stream(torch.cuda.ExternalStream(stream.address, stream.device))

    def devices(self) -> list[str]:
        found = ["cpu"]
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
        return found + ["mps"] * torch.backends.mps.is_available()

    def finfo(self, dtype: torch.dtype) -> torch.finfo:
        return torch.finfo(dtype)

    def recorded(self, x: Tensor) -> bool:
        return _LOOP.get() is not None or (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def check_later(self, ok: Tensor, message: str, **numbers: Tensor) -> None:
        raise NotImplementedError(
            "throw=True can't look at statuses while a CUDA graph is captured: look at solution.status after a replay"
        )

    def recorder(self) -> Loop | None:
        return _LOOP.get()

    def count(self, masks: Sequence[Tensor]) -> list[int]:
        if masks[0].is_cpu:  # where a reduction takes longer to begin with than to carry out
            try:
                return [int(np.count_nonzero(mask.numpy())) for mask in masks]
            except (RuntimeError, TypeError):  # without storage, as torch.func wraps them
                return [int(mask.sum()) for mask in masks]
        counts: list[int] = torch.cat(tuple(masks), dim=1).sum(dim=0).tolist()
        return counts

    def address(self, x: Tensor) -> int | None:
        try:
            return x.data_ptr()
        except RuntimeError:  # without storage, as torch.func wraps them
            return None

    def copy(self, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def has_graph(self, x: Tensor) -> bool:
        return x.requires_grad

    def where(self, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(mask, x, y)

    def where_number(self, mask: Tensor, number: int, x: Tensor) -> Tensor:
        # Elsewhere a number would be copied to the device, which waits for it, and can't be captured.
        return torch.where(mask, number, x) if x.is_cpu else super().where_number(mask, number, x)

    def unchanged(self, x: Tensor, before: Tensor) -> Any:
        # On a device one look, which waits for it, is too many.
        return (x.is_cpu and torch.equal(x, before)) or super().unchanged(x, before)

    def rows_in_use(self, history: Tensor, index: int | Tensor) -> int:
        all_rows = history.shape[1]
        return all_rows if isinstance(index, Tensor) or history.numel() < LARGE else min(index, all_rows)

    def head(self, array: Tensor, axis: int, n: int) -> Tensor:
        return array if array.shape[axis] == n else array.narrow(axis, 0, n)

    def minimum(self, index: int | Tensor, limit: int) -> int | Tensor:
        return torch.clamp(index, max=limit) if isinstance(index, Tensor) else min(index, limit)

    def table(self, rows: Tensor) -> Rows:
        return Rows(rows)

    def solving(self) -> AbstractContextManager[Any]:
        """No graph: gradients come from an estimator, not from the solver's steps."""
        return torch.no_grad()

    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()

    def fresh(self, x: Tensor) -> Tensor:
        return x  # functions of tensors return new ones, and a copy would be part of the graph

    def tally(self, counts: Tensor, mask: Tensor) -> Tensor:
        return counts + mask

    def norm(self, x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm

    def axpy(self, a: Tensor | float, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(y, a, x) if isinstance(a, Tensor) else torch.add(y, x, alpha=a)

    def gram(self, gram: Tensor, history: Tensor, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor) or history.numel() < LARGE:
            return torch.bmm(history, history.mT)  # anew: one product, where the update of a row takes six operations
        products = torch.bmm(history.narrow(1, index, 1), history.mT)
        gram.narrow(1, index, 1).copy_(products)
        gram.narrow(2, index, 1).copy_(products.mT)
        return gram

    def products(self, row: Tensor, history: Tensor) -> Tensor:
        return torch.bmm(row, history.mT)

    def products_of_two(self, x: Tensor, y: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.bmm(torch.cat((x, y), dim=1), history.mT)
        return both.narrow(1, 0, 1), both.narrow(1, 1, 1)

    def combine(self, weights: Tensor, history: Tensor) -> Tensor:
        return torch.bmm(weights, history)

    def combine_onto(self, row: Tensor, weights: Tensor, history: Tensor) -> Tensor:
        return torch.baddbmm(row, weights, history)

    def solve_rows(self, matrix: Tensor, row: Tensor) -> Tensor:
        if self.recorded(matrix):
            return _eliminated(matrix, row)
        # solve_ex: `solve` reads its error code back from the device at every call.
        solution: Tensor = torch.linalg.solve_ex(matrix, row, left=False).result
        return solution

    def entry(self, row: Tensor, index: int | Tensor) -> Tensor:
        return row.index_select(2, index) if isinstance(index, Tensor) else row.narrow(2, index, 1)

    def set_row(self, history: Tensor, index: int | Tensor, row: Tensor) -> Tensor:
        # In place: a history belongs to one solve, which runs without a graph.
        if isinstance(index, Tensor):
            return history.index_copy_(1, index, row[:, None] if row.ndim == 2 else row)
        (history.select(1, index) if row.ndim == 2 else history.narrow(1, index, 1)).copy_(row)
        return history


def _eliminated(matrix: Tensor, row: Tensor) -> Tensor:
    """Gauss-Jordan elimination by columns: some of the batched factorizations can't be captured in a CUDA graph."""
    table = torch.cat([matrix, row], dim=1)
    for j in range(matrix.shape[-1]):
        pivot = table.narrow(2, j, 1) / table[:, j : j + 1, j : j + 1]
        table = torch.baddbmm(table, pivot, table.narrow(1, j, 1), alpha=-1)
        table.narrow(2, j, 1).copy_(pivot)
    return table.narrow(1, matrix.shape[-1], 1)


BACKEND = TorchBackend("torch", xp, (Tensor,))

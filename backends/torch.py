"""PyTorch tensors: native spellings, since the portable ones cost several dispatches each."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from implicit_core.backend import Backend, Stream

SPECIAL_STREAMS = (1, 2)
"""Numbers in the place of addresses: CUDA's names for its legacy and its per-thread default stream."""


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

    def gram(self, gram: Tensor, history: Tensor, index: int) -> Tensor:
        # Anew: one product where the update of a row takes seven operations.
        return torch.bmm(history, history.mT)

    def products(self, row: Tensor, history: Tensor) -> Tensor:
        return torch.bmm(row, history.mT)

    def combine(self, weights: Tensor, history: Tensor) -> Tensor:
        return torch.bmm(weights, history)

    def combine_onto(self, row: Tensor, weights: Tensor, history: Tensor) -> Tensor:
        return torch.baddbmm(row, weights, history)

    def solve_rows(self, matrix: Tensor, row: Tensor) -> Tensor:
        # solve_ex: `solve` reads its error code back from the device at every call.
        solution: Tensor = torch.linalg.solve_ex(matrix, row, left=False).result
        return solution

    def entry(self, row: Tensor, index: int) -> Tensor:
        return row.narrow(2, index, 1)

    def set_row(self, history: Tensor, index: int, row: Tensor) -> Tensor:
        # In place: a history belongs to one solve, which runs without a graph.
        (history.select(1, index) if row.ndim == 2 else history.narrow(1, index, 1)).copy_(row)
        return history


BACKEND = TorchBackend("torch", xp, (Tensor,))

"""The recording of operations as CUDA graphs, section by section."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records operations section by section. All sections share one memory, and are replayed in order."""

    def warming_up(self) -> AbstractContextManager[object]:
        """Operations are executed as they will be recorded, so that kernels are loaded and workspaces allocated."""

    def begin(self) -> None:
        """Begin a section."""

    def end(self) -> Replay:
        """End the section, and return the function that replays it."""

    def abandon(self) -> None:
        """End the section after an error."""

    def in_order(self) -> AbstractContextManager[object]:
        """Replays wait for all earlier ones, on whatever stream those ran."""


class CUDAGraphRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._current, self._current_device = torch.cuda.current_stream(device), torch.cuda.current_device()
        self._done = torch.cuda.Event()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture: torch.cuda.graph | None = None

    def warming_up(self) -> AbstractContextManager[object]:
        """Work goes to the stream that will be recorded."""
        stack = ExitStack()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        stack.callback(current.wait_stream, self._stream)
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def begin(self) -> None:
        """Begin a graph."""
        self._current, self._current_device = torch.cuda.current_stream(self._device), torch.cuda.current_device()
        self._graph = torch.cuda.CUDAGraph()
        self._capture = torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        self._capture.__enter__()

    def end(self) -> Replay:
        """End the graph."""
        graph, capture, self._capture = self._graph, self._capture, None
        if graph is None or capture is None:
            raise AssertionError("no section has begun")
        capture.__exit__(None, None, None)
        replay: Replay = graph.replay
        return replay

    def abandon(self) -> None:
        """End the graph after an error."""
        capture, self._capture = self._capture, None
        if capture is not None:
            try:
                capture.__exit__(None, None, None)
            except RuntimeError:  # a failed capture leaves its stream the current one
                torch.cuda.set_stream(self._current)
                torch.cuda.set_device(self._current_device)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Replays wait for each other."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)  # an event that was never recorded is not waited for
        try:
            yield
        finally:
            self._done.record(stream)

"""The recording of operations as CUDA graphs, section by section."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor

Replay = Callable[[], None]


class Sections(Protocol):
    """Takes operations section by section."""

    def begin(self) -> None:
        """Begin a section."""

    def end(self) -> Replay:
        """End the section, and return the function that replays it."""


class Recorder(Sections, Protocol):
    """Records operations section by section. All sections share one memory, and are replayed in order."""

    def warming_up(self) -> AbstractContextManager[object]:
        """Operations are executed as they will be recorded, so that kernels are loaded and workspaces allocated."""

    def abandon(self) -> None:
        """End the section after an error."""

    def in_order(self, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        """Replays wait for all earlier ones, on whatever stream those ran.

        ``inputs`` are the tensors that replays read and that were allocated outside of the sections.
        """


class Rehearsal:
    """Records nothing: the operations of all sections are executed."""

    def begin(self) -> None:
        """Begin a section."""

    def end(self) -> Replay:
        """End the section."""
        return lambda: None


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
        self._replayed_on: set[torch.cuda.Stream] = set()

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
        if self._graph is None or self._capture is None:
            raise AssertionError("no section has begun")
        self._capture.__exit__(None, None, None)
        self._capture = None  # not before: a capture may fail at its end, and is abandoned then
        replay: Replay = self._graph.replay
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
                self._release_generator()

    def _release_generator(self) -> None:
        """End the capture of the device's generator, which would refuse to draw numbers outside of captures.

        Some versions of PyTorch end it only with a capture that succeeds.
        """
        number = torch.zeros((), device=self._device)
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError), torch.cuda.stream(torch.cuda.Stream(self._device)):
            # Not torch.cuda.graph, which begins with torch.cuda.empty_cache: that fails after a failed capture.
            graph.capture_begin(capture_error_mode="thread_local")
            number.zero_()
            graph.capture_end()

    @contextmanager
    def in_order(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Replays wait for each other."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)  # an event that was never recorded is not waited for
        if stream not in self._replayed_on:
            self._replayed_on.add(stream)
            for x in inputs:  # once a recording is dropped, their memory is reused in the order of another stream
                x.record_stream(stream)
        try:
            yield
        finally:
            self._done.record(stream)

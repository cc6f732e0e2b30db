"""The state of PyTorch's random number generators, so that F evaluated again draws the same numbers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .referenced_modules import generators_of

P = ParamSpec("P")
R = TypeVar("R")


class RandomState:
    """The generators that F may draw from, as they are now (Decision 81).

    These are the ones of the CPU and of the CUDA devices of some tensors, and those that F itself refers to.

    Parameters
    ----------
    tensors
        Tensors on the devices on which F computes.
    f, z
        F, and its inputs and parameters, among whose variables other generators are looked for.
    """

    def __init__(self, tensors: Sequence[Tensor], f: Callable[..., object], z: object = None) -> None:
        self._devices = sorted({x.device.index for x in tensors if x.is_cuda})
        # The state cannot be read while a CUDA graph is captured, whose replays draw numbers of their own.
        self._known = not (self._devices and torch.cuda.is_current_stream_capturing())
        if self._known:
            self._cpu = torch.get_rng_state()
            self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
            self._own = [(generator, generator.get_state()) for generator in generators_of(f, z)]

    def replay(self, function: Callable[P, R]) -> Callable[P, R]:
        """``function``, which draws from this state at every call, and leaves the generators as they were."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._restored():
                return function(*args, **kwargs)

        return call if self._known else function

    @contextmanager
    def _restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._devices), replayed(self._own):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def replayed(states: Sequence[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    """Generators in these states, and at the end as they were."""
    present = [(generator, generator.get_state()) for generator, _ in states]
    try:
        for generator, state in states:
            generator.set_state(state)
        yield
    finally:
        for generator, state in present:
            generator.set_state(state)

"""A solve taken down in three sections, start, step and end, and carried out again from these."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_core.backends.torch import BACKEND, looping
from implicit_core.problem import Problem
from implicit_core.solution import Solution
from implicit_core.solve import solve
from implicit_core.solvers import Solver

from .closure import pure
from .trace import Trace

PyTree = Any

LOOKS = 1
"""Evaluations of F that tell, before a replay, whether it is still the F that was recorded."""


class UnfitError(Exception):
    """Why a solve can't be recorded."""


class Recorder(Protocol):
    """What records operations, section by section; all sections share one memory, and are replayed in order."""

    def warming_up(self) -> AbstractContextManager[Any]:
        """Within it operations are carried out as they will be recorded: kernels are loaded, workspaces made."""

    def begin(self) -> None:
        """Start a section."""

    def end(self) -> Callable[[], None]:
        """End it; returns what replays it."""

    def abandon(self) -> None:
        """End it after an error."""

    def in_order(self) -> AbstractContextManager[Any]:
        """Within it a replay follows those before it, on whatever stream these were."""


class Recording:
    """A solve that was recorded: the tensors it reads, its sections, and the tensors it leaves its results in."""

    def __init__(
        self, recorder: Recorder, start: Sequence[Tensor], inputs: Sequence[Tensor], in_place: Sequence[bool]
    ) -> None:
        self.recorder, self.start, self.inputs, self._in_place = recorder, start, inputs, in_place
        self._places = [(x.data_ptr(), x.stride()) for x in inputs]  # now: a storage may be given other memory
        self.state: PyTree = None
        self.start_section: Callable[[], None] = _nothing
        self.end_section: Callable[[], None] = _nothing
        self.loop: _Loop | None = None
        self.solution: Solution | None = None

    def fits(self, externals: Sequence[Tensor]) -> bool:
        """Whether the tensors that are read where they are are still there."""
        return all(
            not in_place or (new.data_ptr(), new.stride()) == place
            for in_place, place, new in zip(self._in_place, self._places, externals, strict=True)
        )

    def replay(self, h0: Sequence[Tensor], externals: Sequence[Tensor]) -> Solution:
        """The solution for this start and these tensors, in memory of its own."""
        loop, solution = self.loop, self.solution
        if loop is None or solution is None:
            raise AssertionError("a recording is replayed when it is complete")
        stats = solution.stats._replace(evaluations=0)
        with self.recorder.in_order():
            for to, x in zip(self.start, h0, strict=True):
                to.copy_(x)
            for in_place, to, x in zip(self._in_place, self.inputs, externals, strict=True):
                if not in_place:
                    to.copy_(x)
            steps = self._carry_out(loop)
            result: Solution = BACKEND.map(
                lambda x: x.clone() if isinstance(x, Tensor) else x, solution._replace(stats=stats)
            )
        return result._replace(stats=result.stats._replace(evaluations=LOOKS + 1 + steps))

    def _carry_out(self, loop: "_Loop") -> int:
        self.start_section()
        made = 0
        while made < loop.max_steps and bool(loop.flag):
            chunk = min(loop.check_every, loop.max_steps - made)
            whole = chunk if chunk in loop.steps else 1
            for _ in range(chunk // whole):
                loop.steps[whole]()
            made += chunk
        self.end_section()
        return made


def _nothing() -> None:
    """What is not recorded yet."""


class _Loop(NamedTuple):
    flag: Tensor
    max_steps: int
    check_every: int
    steps: dict[int, Callable[[], None]]


def record(
    problem: Problem, solver: Solver, h0: PyTree, z: PyTree, seen: Trace, recorder: Recorder, traced: bool
) -> Recording:
    """Record a solve, of which nothing is carried out."""
    h_leaves, structure = BACKEND.flatten(h0)
    start = [x.clone() for x in h_leaves]
    # Parameters are read where they are now. All else is another tensor in the next call.
    inputs = [x.detach() if isinstance(x, nn.Parameter) else x.clone() for x in seen.externals]
    recording = Recording(recorder, start, inputs, [isinstance(x, nn.Parameter) for x in seen.externals])
    on_leaves = pure(problem.f, structure, z, seen.externals, seen.externals)

    def f(h: PyTree, z: PyTree) -> PyTree:
        return BACKEND.unflatten(structure, list(on_leaves(BACKEND.flatten(h)[0], inputs)))

    steady = Problem(f, batch_ndim=problem.batch_ndim)
    begin = BACKEND.unflatten(structure, start)

    def loop(cond: Any, body: Any, carry: Any, max_steps: int, check_every: int) -> Any:
        if recording.state is not None:
            raise UnfitError(f"a step of {type(solver).__name__} has a loop of its own")
        if max_steps == 0:
            raise UnfitError("a solve of one evaluation has no steps to replay")
        state = recording.state = _state(carry)
        flag = cond(state).clone()
        recording.start_section = recorder.end()
        steps = {}
        # As many steps as are made without a look, and one, for what is left of them at the end.
        for chunk in {min(check_every, max_steps), 1}:
            recorder.begin()
            new = BACKEND.repeat(body, state, chunk)
            flag.copy_(cond(new))
            _overwrite(state, new)
            steps[chunk] = recorder.end()
        recording.loop = _Loop(flag, max_steps, check_every, steps)
        recorder.begin()
        return state

    autocast_cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a weight that was cast would be read where it was
    try:
        with recorder.warming_up():
            solve(steady, begin, None, solver=solver, trace=traced)
        recorder.begin()
        with looping(loop):
            recording.solution = solve(steady, begin, None, solver=solver, trace=traced)
        recording.end_section = recorder.end()
    except RuntimeError as error:
        recorder.abandon()
        raise UnfitError(f"F can't be captured: {(str(error) or repr(error)).splitlines()[0]}") from error
    except BaseException:
        recorder.abandon()
        raise
    finally:
        torch.set_autocast_cache_enabled(autocast_cache)
    return recording


def _state(carry: PyTree) -> PyTree:
    """A loop's carry in memory that is its own, its counter a tensor."""
    leaves, structure = BACKEND.flatten(carry)
    device = next(x.device for x in leaves if isinstance(x, Tensor))
    taken: set[int] = set()

    def own(x: Any) -> Any:
        if isinstance(x, int):
            return torch.full((), x, dtype=torch.int64, device=device)
        if not isinstance(x, Tensor):
            return x
        if _memory(x) in taken or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(_memory(x))
        return x

    return BACKEND.unflatten(structure, [own(x) for x in leaves])


def _overwrite(state: PyTree, new: PyTree) -> None:
    """``state`` becomes what ``new`` is, in place."""
    for to, x in zip(BACKEND.flatten(state)[0], BACKEND.flatten(new)[0], strict=True):
        if not isinstance(to, Tensor) and to is not x and to != x:
            raise UnfitError(f"the solver remembers a {type(to).__name__} that changes, which is no tensor")
    pairs = [
        (to, x)
        for to, x in zip(BACKEND.flatten(state)[0], BACKEND.flatten(new)[0], strict=True)
        if isinstance(to, Tensor) and to is not x
    ]
    # What is moved within the state would be overwritten before it is read.
    held = {_memory(x) for x in BACKEND.flatten(state)[0] if isinstance(x, Tensor)}
    moved = [x.clone() if _memory(x) in held else x for _, x in pairs]
    for (to, _), x in zip(pairs, moved, strict=True):
        to.copy_(x)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class OnDevice:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._current, self._current_device = torch.cuda.current_stream(device), torch.cuda.current_device()
        self._done = torch.cuda.Event()
        self._open: Any = None
        self._graph: Any = None

    def warming_up(self) -> AbstractContextManager[Any]:
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
        self._open = torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        self._open.__enter__()

    def end(self) -> Callable[[], None]:
        """End it."""
        graph, section, self._open = self._graph, self._open, None
        section.__exit__(None, None, None)
        replay: Callable[[], None] = graph.replay
        return replay

    def abandon(self) -> None:
        """End it, whatever it is worth."""
        section, self._open = self._open, None
        if section is not None:
            try:
                section.__exit__(None, None, None)
            except RuntimeError:  # of a capture that failed, whose stream is still the current one
                torch.cuda.set_stream(self._current)
                torch.cuda.set_device(self._current_device)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Replays wait for each other."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)  # nothing before it was recorded
        try:
            yield
        finally:
            self._done.record(stream)

"""A solve recorded in three sections (start, step and end), and its replay."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.torch import BACKEND, recording_loops
from implicit_core.problem import Problem
from implicit_core.solution import Solution
from implicit_core.solvers import Solver

from ..closure import with_explicit_inputs
from ..tensors import Tensors
from .call_log import CallLog
from .capturable import only_capturable
from .errors import NotRecordableError
from .recorder import Recorder, Rehearsal, Replay, Sections

Carry = TypeVar("Carry")

LOGGED = 1
"""Evaluations of F before a replay, which check that F is still the function that was recorded."""


class Loop(NamedTuple):
    """The recorded loop of a solve.

    Attributes
    ----------
    active
        Whether a sample is still active: a boolean tensor without axes, written by each step.
    max_steps, check_every
        The most steps, and how many are made between two reads of ``active``.
    steps
        For a number of steps, the function that replays them.
    """

    active: Tensor
    max_steps: int
    check_every: int
    steps: dict[int, Replay]


class Inputs:
    """The tensors that a recorded solve reads: its start, and the externals of F.

    Parameters of modules are read where they are. All other externals are copied before a replay, because another call
    has them elsewhere.
    """

    def __init__(self, h0: Sequence[Tensor], externals: Sequence[Tensor]) -> None:
        self.h0 = [x.clone() for x in h0]
        self.externals = [x.detach() if isinstance(x, nn.Parameter) else x.clone() for x in externals]
        self._in_place = [isinstance(x, nn.Parameter) for x in externals]
        # As they are when recorded: a parameter's storage may be given other memory.
        self._addresses = [(x.data_ptr(), x.stride()) for x in self.externals]

    def fit(self, externals: Sequence[Tensor]) -> bool:
        """Whether the parameters are where they were recorded."""
        return all(
            not in_place or (new.data_ptr(), new.stride()) == address
            for in_place, address, new in zip(self._in_place, self._addresses, externals, strict=True)
        )

    def copy_from(self, h0: Sequence[Tensor], externals: Sequence[Tensor]) -> None:
        """Take the numbers of another start, and of other externals."""
        for to, x in zip(self.h0, h0, strict=True):
            to.copy_(x)
        for in_place, to, x in zip(self._in_place, self.externals, externals, strict=True):
            if not in_place:
                to.copy_(x)


class Recording(NamedTuple, Generic[H]):
    """A recorded solve.

    Attributes
    ----------
    recorder
        The recorder of its sections.
    inputs
        The tensors that it reads.
    start, loop, end
        Its sections.
    solution
        The tensors that it writes its results to.
    carry
        The tensors that the loop carries from step to step, kept for as long as the recording.
    """

    recorder: Recorder
    inputs: Inputs
    start: Replay
    loop: Loop
    end: Replay
    solution: Solution[H]
    carry: PyTree

    def replay(self, h0: Sequence[Tensor], externals: Sequence[Tensor]) -> Solution[H]:
        """The solution from this start with these externals, copied."""
        stats = self.solution.stats
        with self.recorder.in_order((*self.inputs.h0, *self.inputs.externals)):
            self.inputs.copy_from(h0, externals)
            self.start()
            steps = self._run_loop()
            self.end()
            solution = self.solution._replace(stats=stats._replace(evaluations=LOGGED + 1 + steps))
            result: Solution[H] = BACKEND.map(lambda x: x.clone() if isinstance(x, Tensor) else x, solution)
        return result

    def _run_loop(self) -> int:
        loop, made = self.loop, 0
        while made < loop.max_steps and bool(loop.active):
            chunk = min(loop.check_every, loop.max_steps - made)
            recorded = chunk if chunk in loop.steps else 1
            for _ in range(chunk // recorded):
                loop.steps[recorded]()
            made += chunk
        return made


class _LoopRecorder:
    """Replaces the backend's ``while_loop`` while a solve is recorded (Decision 58).

    It ends the section of the start, records the loop's body as the next section, and begins the section of the end.
    """

    def __init__(self, recorder: Sections, solver: Solver) -> None:
        self._recorder, self._solver = recorder, solver
        self.start: Replay | None = None
        self.loop: Loop | None = None
        self.carry: PyTree = None

    def __call__(
        self,
        cond: Callable[[Carry], Tensor],
        body: Callable[[Carry], Carry],
        carry: Carry,
        max_steps: int,
        check_every: int,
    ) -> Carry:
        if self.start is not None:  # the loop of a step, while the body is recorded
            raise NotRecordableError(f"a step of {type(self._solver).__name__} has a loop of its own")
        if max_steps == 0:
            raise NotRecordableError("a solve of one evaluation has no steps to replay")
        carry = self.carry = _in_own_memory(carry)
        active = cond(carry).clone()
        self.start = self._recorder.end()
        steps = {}
        # As many steps as are made between two reads, and a single one, for the remainder at the end.
        for chunk in dict.fromkeys((min(check_every, max_steps), 1)):
            self._recorder.begin()
            new = BACKEND.repeat(body, carry, chunk)
            active.copy_(cond(new))
            _overwrite(carry, new)
            steps[chunk] = self._recorder.end()
        self.loop = Loop(active, max_steps, check_every, steps)
        self._recorder.begin()
        return carry


def record(
    problem: Problem[H, Z], solver: Solver, h0: H, z: Z, log: CallLog, recorder: Recorder, *, trace: bool
) -> Recording[H]:
    """Record a solve. A recording with CUDA graphs executes nothing."""
    h_leaves, structure = BACKEND.flatten(h0)
    inputs = Inputs(h_leaves, log.externals)
    on_leaves = with_explicit_inputs(problem.f, structure, z, log.externals, log.externals)

    def f(h: H, _: None) -> H:
        value: H = BACKEND.unflatten(structure, list(on_leaves(BACKEND.flatten(h)[0], inputs.externals)))
        return value

    recorded = Problem(f, batch_ndim=problem.batch_ndim, scale=problem.scale)
    start: H = BACKEND.unflatten(structure, inputs.h0)
    loop = _LoopRecorder(recorder, solver)
    autocast_cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a replay would read a cached weight of the recording
    try:
        # Decision 96: what cannot be captured is found here, and kernels are loaded.
        rehearsed = recording_loops(_LoopRecorder(Rehearsal(), solver))
        with recorder.warming_up(), only_capturable(h_leaves[0].device), rehearsed:
            solver.solve(recorded, start, None, trace=trace)
        recorder.begin()
        with recording_loops(loop):
            solution = solver.solve(recorded, start, None, trace=trace)
        end = recorder.end()
    except torch.OutOfMemoryError as error:  # the solve itself may fit: a recording has memory of its own
        recorder.abandon()
        raise NotRecordableError("the memory of the device does not suffice for a recording") from error
    except RuntimeError as error:
        recorder.abandon()
        raise NotRecordableError(f"F can't be captured: {(str(error) or repr(error)).splitlines()[0]}") from error
    except BaseException:
        recorder.abandon()
        raise
    finally:
        torch.set_autocast_cache_enabled(autocast_cache)
    if loop.start is None or loop.loop is None:
        raise NotRecordableError(f"{type(solver).__name__} made no loop")
    return Recording(recorder, inputs, loop.start, loop.loop, end, solution, loop.carry)


def _in_own_memory(carry: Carry) -> Carry:
    """A loop's carry, each tensor in memory that no other shares, its counter a tensor."""
    leaves, structure = BACKEND.flatten(carry)
    device = next(x.device for x in leaves if isinstance(x, Tensor))
    taken: set[int] = set()

    def own(x: object) -> object:
        if isinstance(x, int):
            return torch.full((), x, dtype=torch.int64, device=device)
        if not isinstance(x, Tensor):
            return x
        if _address(x) in taken or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(_address(x))
        return x

    owned: Carry = BACKEND.unflatten(structure, [own(x) for x in leaves])
    return owned


def _overwrite(carry: Carry, new: Carry) -> None:
    """Copy ``new`` into the tensors of ``carry``."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for to, x in zip(BACKEND.flatten(carry)[0], BACKEND.flatten(new)[0], strict=True):
        if isinstance(to, Tensor) and to is not x:
            pairs.append((to, x))
        elif to is not x and to != x:
            raise NotRecordableError(f"the solver remembers a {type(to).__name__} that changes, which is not a tensor")
    # A tensor that moves within the carry would be overwritten before it is read.
    held = {_address(x) for x in BACKEND.flatten(carry)[0] if isinstance(x, Tensor)}
    sources: Tensors = tuple(x.clone() if _address(x) in held else x for _, x in pairs)
    for (to, _), x in zip(pairs, sources, strict=True):
        to.copy_(x)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()

"""A solver whose steps are recorded once, as CUDA graphs, and replayed: a launch for each step instead of dozens."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from implicit_core import checks
from implicit_core.backends.torch import BACKEND, looping
from implicit_core.problem import Problem
from implicit_core.solution import Solution
from implicit_core.solve import solve
from implicit_core.solvers import Anderson, DrivenSolver, Solver

from .closure import has_storage, pure, tensors
from .function import transforming
from .trace import Trace, trace

PyTree = Any

LOOKS = 1
"""Evaluations of F that tell, before a replay, whether it is still the F that was recorded."""
MOST = 8
"""Recordings that are kept; and those made for arguments of one kind, before F counts as another one in every call."""


class GraphFallbackWarning(RuntimeWarning):
    """A solve could not be replayed from CUDA graphs, and was carried out as usual."""


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


class CUDAGraphs(DrivenSolver):
    """A solver that replays the steps of another from CUDA graphs.

    On small problems the launch of a kernel takes longer than the kernel. A solve is recorded at its first call for
    each kind of arguments (shapes, dtypes, and what F computes) in three graphs: up to the first evaluation, a step,
    and what follows the last. Afterwards a step is one launch; the flag that stops the loop is still read from the
    device, once in ``check_every`` steps. Values and statuses are those of the solver itself.

    What F computes is looked at again in every call, by one evaluation without graphs: the functions it calls, their
    numbers, and the tensors it closes over. If it is not what was recorded, it is recorded anew. So parameters may be
    updated, modules switch their mode, and settings change.

    Where a solve can't be recorded it is carried out as usual, with a :class:`GraphFallbackWarning` that says why, once
    for each reason: tensors that are not on one CUDA device, a solver that solves linear systems on the way, an F that
    looks at numbers, uses tensors of the CPU, holds compiled or scripted code, or writes to a buffer.

    Parameters
    ----------
    solver
        A :class:`~implicit_core.Solver`, as :class:`~implicit_core.Anderson`.

    Attributes
    ----------
    reason
        Why the last solve was not replayed; None if it was.

    Raises
    ------
    TypeError
        If ``solver`` is no :class:`~implicit_core.Solver`; a callable owns its loop.

    Notes
    -----
    Recordings belong to this object: give each layer its own. Each holds the memory of one solve. They are not part of
    a copy or a pickle. ``stats.evaluations`` counts the evaluation that looks. The gradient is not recorded; a training
    step of a fixed number of steps can be captured as a whole with PyTorch's own tools, see the guide.

    Examples
    --------
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import torch as ict
    >>> layer = ict.ImplicitLayer(
    ...     torch.nn.RNNCell(4, 4), solver=ict.CUDAGraphs(ic.FixedPointIteration(check_every=4))
    ... )
    >>> layer.solver
    CUDAGraphs(FixedPointIteration(rtol=1e-05, atol=None, max_steps=100, check_every=4, damping=1.0))
    """

    def __init__(self, solver: Solver = Anderson()) -> None:
        checks.instance("solver", solver, Solver, "Anderson()")
        self.solver = solver
        self.reason: str | None = None
        self._recordings: dict[Hashable, _Recording] = {}
        self._unfit: dict[Hashable, str] = {}
        self._made: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"CUDAGraphs({self.solver!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.solver,)

    def solve(self, problem: Problem, h0: PyTree, z: PyTree, *, trace: bool = False) -> Solution:
        """See :func:`implicit_core.solve`."""
        checks.state(BACKEND, "h0", h0, problem.batch_ndim)
        if BACKEND.recorded(tensors(h0)[0]):  # by the user: the steps are part of that recording
            return solve(problem, h0, z, solver=self.solver, trace=trace)
        with self._lock:
            try:
                solution = self._replayed(problem, h0, z, trace)
                self.reason = None
                return solution
            except UnfitError as unfit:
                self._tell(str(unfit))
        return solve(problem, h0, z, solver=self.solver, trace=trace)

    def _tell(self, reason: str) -> None:
        if reason != self.reason:
            warnings.warn(f"no CUDA graphs: {reason}", GraphFallbackWarning, stacklevel=5)
        self.reason = reason

    def _recorder(self, device: torch.device) -> Callable[[], Recorder]:
        if device.type != "cuda":
            raise UnfitError(f"the tensors are on {device}, not on a CUDA device")
        return lambda: _OnDevice(device)

    def _replayed(self, problem: Problem, h0: PyTree, z: PyTree, traced: bool) -> Solution:
        device = tensors(h0)[0].device
        if self.solver.uses_jacobian:
            raise UnfitError(f"{type(self.solver).__name__} solves linear systems, whose loops stop by what they find")
        recorder = self._recorder(device)  # made only to record
        if transforming():
            raise UnfitError("a transform of torch.func is at work")
        kind = _kind(h0, z), problem.batch_ndim, traced, device, torch.is_autocast_enabled(device.type)
        if kind in self._unfit:
            raise UnfitError(self._unfit[kind])
        try:
            with torch.inference_mode(False), torch.no_grad():
                recording, seen = self._find(problem, h0, z, kind, recorder, traced)
                return recording.replay(BACKEND.flatten(h0)[0], seen.externals)
        except UnfitError as unfit:
            self._unfit[kind] = str(unfit)
            raise

    def _find(
        self, problem: Problem, h0: PyTree, z: PyTree, kind: Hashable, recorder: Callable[[], Recorder], traced: bool
    ) -> tuple["_Recording", Trace]:
        """The recording for this F, and what F was seen to be."""
        seen: Trace
        for _ in range(2):  # twice: what f makes once and keeps, as a dropout mask, is an external by then
            seen = trace(problem.f, BACKEND.map(torch.clone, h0), z)
            found = self._recordings.get((kind, seen.calls))
            if found is not None and found.fits(seen.externals):
                return found, seen
        if self._made[kind] == MOST:
            raise UnfitError(f"F was another one in each of {MOST} calls")
        self._made[kind] += 1
        _check(problem, h0, z, seen)
        self._recordings.pop((kind, seen.calls), None)
        while len(self._recordings) >= MOST:
            del self._recordings[next(iter(self._recordings))]
        recording = _record(problem, self.solver, h0, z, seen, recorder(), traced)
        self._recordings[kind, seen.calls] = recording
        return recording, seen


class _Recording:
    """A solve that was recorded: the tensors it reads, its sections, and the tensors it leaves its results in."""

    def __init__(
        self, recorder: Recorder, start: Sequence[Tensor], seen: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> None:
        self.recorder, self.start, self.inputs = recorder, start, inputs
        self._in_place = [x is to for x, to in zip(seen, inputs, strict=True)]
        self.state: PyTree = None
        self.sections: list[Callable[[], None]] = []
        self.loop: _Loop | None = None
        self.solution: Solution | None = None

    def fits(self, externals: Sequence[Tensor]) -> bool:
        """Whether the tensors that are read where they are are still there."""
        return all(
            not in_place or new.data_ptr() == old.data_ptr()
            for in_place, old, new in zip(self._in_place, self.inputs, externals, strict=True)
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
        first, step, last = self.sections
        first()
        steps = 0
        while steps < loop.max_steps and bool(loop.flag):
            chunk = min(loop.check_every, loop.max_steps - steps)
            for _ in range(chunk):
                step()
            steps += chunk
        last()
        return steps


class _Loop(NamedTuple):
    flag: Tensor
    max_steps: int
    check_every: int


def _record(
    problem: Problem, solver: Solver, h0: PyTree, z: PyTree, seen: Trace, recorder: Recorder, traced: bool
) -> _Recording:
    """Record a solve, of which nothing is carried out."""
    h_leaves, structure = BACKEND.flatten(h0)
    start = [x.clone() for x in h_leaves]
    # Parameters stay where they are, and are read there. All else is another tensor in the next call.
    inputs = [x if isinstance(x, nn.Parameter) else x.clone() for x in seen.externals]
    recording = _Recording(recorder, start, seen.externals, inputs)
    on_leaves = pure(problem.f, structure, z, seen.externals, seen.externals)

    def f(h: PyTree, z: PyTree) -> PyTree:
        return BACKEND.unflatten(structure, list(on_leaves(BACKEND.flatten(h)[0], inputs)))

    steady = Problem(f, batch_ndim=problem.batch_ndim)
    begin = BACKEND.unflatten(structure, start)

    def loop(cond: Any, body: Any, carry: Any, max_steps: int, check_every: int) -> Any:
        if recording.loop is not None:
            raise UnfitError(f"a step of {type(solver).__name__} has a loop of its own")
        if max_steps == 0:
            raise UnfitError("a solve of one evaluation has no steps to replay")
        state = recording.state = _state(carry)
        flag = cond(state).clone()
        recording.loop = _Loop(flag, max_steps, check_every)
        recording.sections.append(recorder.end())
        recorder.begin()
        _overwrite(state, body(state))
        flag.copy_(cond(state))
        recording.sections.append(recorder.end())
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
        recording.sections.append(recorder.end())
    except RuntimeError as error:
        recorder.abandon()
        raise UnfitError(f"F can't be captured: {str(error).splitlines()[0]}") from error
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


def _kind(h0: PyTree, z: PyTree) -> Hashable:
    """What arguments look like."""
    h, structure = BACKEND.flatten(h0)
    return structure, tuple((tuple(x.shape), x.dtype, x.device) for x in (*h, *tensors(z)))


def _check(problem: Problem, h0: PyTree, z: PyTree, seen: Trace) -> None:
    """Raise :class:`UnfitError` where F does what a recording could not do in its place."""
    device = tensors(h0)[0].device
    for x in seen.externals:
        if not has_storage(x):
            raise UnfitError("F uses tensors of a transform of torch.func, or sparse ones")
        if type(x) not in (Tensor, nn.Parameter):
            raise UnfitError(f"F uses a tensor of type {type(x).__name__}, which a graph can't read where it is")
        if x.device != device:
            raise UnfitError(f"F uses a tensor on {x.device}, whose numbers would be read once and kept")
    before = [None if isinstance(x, nn.Parameter) else x.clone() for x in seen.externals]
    again = trace(problem.f, BACKEND.map(torch.clone, h0), z)
    if again.calls != seen.calls:
        raise UnfitError("F calls other functions, or with other numbers, when it is evaluated again")
    if any(a is not b for a, b in zip(again.externals, seen.externals, strict=True)):
        raise UnfitError("F makes tensors in code that can't be looked into, compiled or scripted, or not of PyTorch's")
    for x, old in zip(seen.externals, before, strict=True):
        if old is not None and not torch.all((x == old) | (x != x)):
            raise UnfitError("F writes to a tensor that it closes over, as batch normalization does in training mode")


class _OnDevice:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._current = torch.cuda.current_stream(device)
        self._done = torch.cuda.Event()
        self._open: Any = None
        self._graph: Any = None

    def warming_up(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        stack.callback(current.wait_stream, self._stream)
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def begin(self) -> None:
        self._current = torch.cuda.current_stream(self._device)
        self._graph = torch.cuda.CUDAGraph()
        self._open = torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        self._open.__enter__()

    def end(self) -> Callable[[], None]:
        graph, section, self._open = self._graph, self._open, None
        section.__exit__(None, None, None)
        replay: Callable[[], None] = graph.replay
        return replay

    def abandon(self) -> None:
        section, self._open = self._open, None
        if section is not None:
            try:
                section.__exit__(None, None, None)
            except RuntimeError:  # of a capture that failed, whose stream is still the current one
                torch.cuda.set_stream(self._current)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)  # nothing before it was recorded
        yield
        self._done.record(stream)

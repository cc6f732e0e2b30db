"""A solver whose steps are recorded once as CUDA graphs and replayed: one launch for each step instead of dozens."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_core import checks
from implicit_core.arrays import H, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Problem
from implicit_core.root_problem import RootProblem
from implicit_core.settings import arrays_in
from implicit_core.solution import Solution
from implicit_core.solvers import Anderson, Solver
from implicit_core.warnings_ import warn

from ..autograd import transforming
from ..tensors import has_storage, tensors
from .call_log import CallLog, log_calls
from .errors import NotRecordableError
from .recorder import CUDAGraphRecorder, Recorder
from .recording import Recording, record
from .settings import numerical_settings

MOST = 8
"""How many recordings are kept, those that were used last.

After as many in a row without a replay, arguments of a kind are no longer recorded.
"""


class GraphFallbackWarning(RuntimeWarning):
    """A solve could not be replayed from CUDA graphs, and was executed as usual."""


class CUDAGraphs:
    """A solver that replays the steps of another solver from CUDA graphs.

    On small problems the launch of a kernel takes longer than the kernel. The first solve for each kind of arguments
    (shapes, dtypes, and the operations of F) is recorded in three graphs: up to the first evaluation, a step, and the
    end. Afterwards a step is one launch. The flag that stops the loop is still read from the device, once in
    ``check_every`` steps. Values and statuses are the same as without graphs.

    Every call first evaluates F once without graphs, and compares its operations with the recorded ones: the functions
    it calls, their numerical arguments, and the tensors it closes over. If they differ, the solve is recorded again. So
    parameters may be updated, modules may change their mode, and settings may change.

    A solve that cannot be recorded is executed as usual, with a :class:`GraphFallbackWarning` that gives the reason. So
    are all later solves with arguments of the same kind, until :meth:`reset`. Reasons are: tensors that are not on one
    CUDA device, a solver that solves linear systems, an F that reads numbers, copies from or to the CPU, holds compiled
    or scripted code, or writes to a buffer, and too little memory.

    Settings of PyTorch that choose kernels or precisions, such as ``torch.set_float32_matmul_precision``, belong to the
    kind of the arguments. Eight recordings are kept, those that were used last.

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
        If ``solver`` is not a :class:`~implicit_core.Solver`. The loop of a callable cannot be recorded.

    Notes
    -----
    Recordings belong to this object: give each layer its own. Each recording holds the memory of one solve. A copy or a
    pickle has no recordings. ``stats.evaluations`` includes the evaluation without graphs, but not the few of a
    recording. The gradient is not recorded. A training step with a fixed number of solver steps can be captured as a
    whole with PyTorch's own tools, see the guide.

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
        self._recordings: dict[Hashable, Recording[Any]] = {}
        self._refused: dict[Hashable, str] = {}
        self._unused: Counter[Hashable] = Counter()
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __repr__(self) -> str:
        return f"CUDAGraphs({self.solver!r})"

    def __reduce__(self) -> tuple[type["CUDAGraphs"], tuple[Solver]]:
        return type(self), (self.solver,)

    def solve(self, problem: Problem[H, Z], h0: H, z: Z, *, trace: bool = False) -> Solution[H]:
        """See :func:`implicit_core.solve`."""
        checks.state(BACKEND, problem.names.start, h0, problem.batch_ndim)
        # If the user captures a graph, the steps become part of it (Decision 60).
        capturing = BACKEND.capturing(tensors(h0)[0])
        nested = self._owner == threading.get_ident()  # a layer within F has the same solver
        if capturing or nested:
            return self.solver.solve(problem, h0, z, trace=trace)
        with self._lock:
            self._owner = threading.get_ident()
            try:
                solution = self._replayed(problem, h0, z, trace)
                self.reason = None
                return solution
            except NotRecordableError as error:
                self._warn(str(error))
            finally:
                self._owner = None
        return self.solver.solve(problem, h0, z, trace=trace)

    def reset(self) -> None:
        """Delete all recordings, which frees their memory, and try again to record where that was impossible."""
        with self._lock:
            self._recordings.clear()
            self._refused.clear()
            self._unused.clear()
            self.reason = None

    def _warn(self, reason: str) -> None:
        if reason != self.reason:
            warn(f"no CUDA graphs: {reason}", GraphFallbackWarning)
        self.reason = reason

    def _recorder(self, device: torch.device) -> Callable[[], Recorder]:
        if device.type != "cuda":
            raise NotRecordableError(f"the tensors are on {device}, not on a CUDA device")
        return lambda: CUDAGraphRecorder(device)

    def _replayed(self, problem: Problem[H, Z], h0: H, z: Z, trace: bool) -> Solution[H]:
        device = tensors(h0)[0].device
        if isinstance(problem, RootProblem):
            raise NotRecordableError("a root is sought, and only solves of fixed points are recorded")
        if self.solver.uses_jacobian:
            raise NotRecordableError(
                f"{type(self.solver).__name__} solves linear systems, which stop on a data-dependent test"
            )
        if name := next((name for name, _ in arrays_in(self.solver)), None):
            raise NotRecordableError(f"{name} of its solver is a tensor, whose number a graph would read only once")
        make_recorder = self._recorder(device)
        if transforming():
            raise NotRecordableError("a transform of torch.func is active")
        layout = _layout(h0, z, problem.batch_ndim)
        kind = layout, problem.batch_ndim, trace, device, self.solver, numerical_settings(device.type)
        if kind in self._refused:
            raise NotRecordableError(self._refused[kind])
        try:
            with torch.inference_mode(False), torch.no_grad():
                recording, log = self._find(problem, h0, z, kind, make_recorder, trace)
                return recording.replay(BACKEND.flatten(h0)[0], log.externals)
        except NotRecordableError as error:
            self._refused[kind] = str(error)
            raise

    def _find(
        self,
        problem: Problem[H, Z],
        h0: H,
        z: Z,
        kind: Hashable,
        make_recorder: Callable[[], Recorder],
        trace: bool,
    ) -> tuple[Recording[H], CallLog]:
        """The recording of this F, made if necessary, and the log of an evaluation (Decision 59)."""
        log: CallLog
        # Twice: a tensor that f makes at its first call and keeps, as a dropout mask, is closed over at the second.
        for _ in range(2):
            log = log_calls(problem.f, BACKEND.map(torch.clone, h0), z)
            found = self._recordings.get((kind, log.calls))
            if found is not None and found.inputs.fit(log.externals):
                self._unused[kind] = 0
                self._recordings[kind, log.calls] = self._recordings.pop((kind, log.calls))  # the last to be dropped
                return found, log
        if self._unused[kind] == MOST:
            raise NotRecordableError(
                f"F was another function in each of {MOST} calls, or more than {MOST} kinds of arguments took turns"
            )
        self._unused[kind] += 1
        _check_externals(tensors(h0)[0].device, log.externals)
        _check_repeatable(problem, h0, z, log)
        self._recordings.pop((kind, log.calls), None)
        while len(self._recordings) >= MOST:
            del self._recordings[next(iter(self._recordings))]
        recording = record(problem, self.solver, h0, z, log, make_recorder(), trace=trace)
        self._recordings[kind, log.calls] = recording
        return recording, log


def _layout(h0: object, z: object, batch_ndim: int) -> Hashable:
    """Structure, shapes, dtypes and devices of the arguments of a solve, and the memory formats of its states."""
    h, structure = BACKEND.flatten(h0)
    formats = tuple(BACKEND.axis_order(x, batch_ndim) for x in h)
    return structure, formats, tuple((tuple(x.shape), x.dtype, x.device) for x in (*h, *tensors(z)))


def _check_externals(device: torch.device, externals: Sequence[Tensor]) -> None:
    """Raise :class:`NotRecordableError` if a graph cannot read these tensors."""
    for x in externals:
        if not has_storage(x):
            raise NotRecordableError("F uses tensors of a transform of torch.func, or sparse tensors")
        if type(x) not in (Tensor, nn.Parameter):
            raise NotRecordableError(f"F uses a tensor of type {type(x).__name__}, which a graph cannot read in place")
        if x.device != device:
            raise NotRecordableError(f"F uses a tensor on {x.device}, whose numbers a graph would read only once")


def _check_repeatable(problem: Problem[H, Z], h0: H, z: Z, log: CallLog) -> None:
    """Raise :class:`NotRecordableError` if a second evaluation of F does something else, or writes to a tensor."""
    before = [None if isinstance(x, nn.Parameter) else x.clone() for x in log.externals]
    versions = [None if x.is_inference() else x._version for x in log.externals]
    again = log_calls(problem.f, BACKEND.map(torch.clone, h0), z)
    if again.calls != log.calls:
        raise NotRecordableError("F calls other functions, or with other numbers, when it is evaluated again")
    if any(a is not b for a, b in zip(again.externals, log.externals, strict=True)):
        raise NotRecordableError(
            "F makes tensors in code that cannot be observed: compiled or scripted code, or another library"
        )
    for x, old, version in zip(log.externals, before, versions, strict=True):
        # The version shows a write of the same numbers too.
        written = version is not None and x._version != version
        if written or (old is not None and not torch.all((x == old) | (x != x))):
            raise NotRecordableError(
                "F writes to a tensor that it closes over, as batch normalization does in training mode"
            )

"""A solver whose steps are recorded once, as CUDA graphs, and replayed: a launch for each step instead of dozens."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from implicit_core import checks
from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Problem
from implicit_core.solution import Solution
from implicit_core.solve import solve
from implicit_core.solvers import Anderson, DrivenSolver, Solver

from .closure import has_storage, tensors
from .function import transforming
from .recording import OnDevice, Recorder, Recording, UnfitError, record
from .trace import Trace, trace

PyTree = Any

MOST = 8
"""Recordings that are kept; and those made one after the other, before F counts as another one in every call."""


class GraphFallbackWarning(RuntimeWarning):
    """A solve could not be replayed from CUDA graphs, and was carried out as usual."""


class CUDAGraphs(DrivenSolver):
    """A solver that replays the steps of another from CUDA graphs.

    On small problems the launch of a kernel takes longer than the kernel. A solve is recorded at its first call for
    each kind of arguments (shapes, dtypes, and what F computes) in three graphs: up to the first evaluation, a step,
    and what follows the last. Afterwards a step is one launch; the flag that stops the loop is still read from the
    device, once in ``check_every`` steps. Values and statuses are those of the solver itself.

    What F computes is looked at again in every call, by one evaluation without graphs: the functions it calls, their
    numbers, and the tensors it closes over. If it is not what was recorded, it is recorded anew. So parameters may be
    updated, modules switch their mode, and settings change.

    Where a solve can't be recorded it is carried out as usual, with a :class:`GraphFallbackWarning` that says why, and
    so are those with arguments of the same kind from then on, until :meth:`reset`. Reasons are: tensors that are not on
    one CUDA device, a solver that solves linear systems on the way, an F that looks at numbers, uses tensors of the
    CPU, holds compiled or scripted code, or writes to a buffer.

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
    a copy or a pickle. ``stats.evaluations`` counts the evaluation that looks, not the few of a recording. The gradient
    is not recorded; a training step of a fixed number of steps can be captured as a whole with PyTorch's own tools, see
    the guide.

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
        self._recordings: dict[Hashable, Recording] = {}
        self._unfit: dict[Hashable, str] = {}
        self._made: Counter[Hashable] = Counter()
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __repr__(self) -> str:
        return f"CUDAGraphs({self.solver!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.solver,)

    def solve(self, problem: Problem, h0: PyTree, z: PyTree, *, trace: bool = False) -> Solution:
        """See :func:`implicit_core.solve`."""
        checks.state(BACKEND, "h0", h0, problem.batch_ndim)
        if BACKEND.recorded(tensors(h0)[0]):  # by the user: the steps are part of that recording
            return solve(problem, h0, z, solver=self.solver, trace=trace)
        if self._owner == threading.get_ident():  # a layer within F, with the same solver
            return solve(problem, h0, z, solver=self.solver, trace=trace)
        with self._lock:
            self._owner = threading.get_ident()
            try:
                solution = self._replayed(problem, h0, z, trace)
                self.reason = None
                return solution
            except UnfitError as unfit:
                self._tell(str(unfit))
            finally:
                self._owner = None
        return solve(problem, h0, z, solver=self.solver, trace=trace)

    def reset(self) -> None:
        """Forget the recordings, and give back their memory; and what could not be recorded, which may be by now."""
        with self._lock:
            self._recordings.clear()
            self._unfit.clear()
            self._made.clear()
            self.reason = None

    def _tell(self, reason: str) -> None:
        if reason != self.reason:
            warnings.warn(f"no CUDA graphs: {reason}", GraphFallbackWarning, stacklevel=5)
        self.reason = reason

    def _recorder(self, device: torch.device) -> Callable[[], Recorder]:
        if device.type != "cuda":
            raise UnfitError(f"the tensors are on {device}, not on a CUDA device")
        return lambda: OnDevice(device)

    def _replayed(self, problem: Problem, h0: PyTree, z: PyTree, traced: bool) -> Solution:
        device = tensors(h0)[0].device
        if self.solver.uses_jacobian:
            raise UnfitError(f"{type(self.solver).__name__} solves linear systems, whose loops stop by what they find")
        recorder = self._recorder(device)  # made only to record
        if transforming():
            raise UnfitError("a transform of torch.func is at work")
        settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        kind = _kind(h0, z), problem.batch_ndim, traced, device, self.solver, settings, autocast
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
    ) -> tuple[Recording, Trace]:
        """The recording for this F, and what F was seen to be."""
        seen: Trace
        for _ in range(2):  # twice: what f makes once and keeps, as a dropout mask, is an external by then
            seen = trace(problem.f, BACKEND.map(torch.clone, h0), z)
            found = self._recordings.get((kind, seen.calls))
            if found is not None and found.fits(seen.externals):
                self._made[kind] = 0
                return found, seen
        if self._made[kind] == MOST:
            raise UnfitError(f"F was another one in each of {MOST} calls")
        self._made[kind] += 1
        _check(problem, h0, z, seen)
        self._recordings.pop((kind, seen.calls), None)
        while len(self._recordings) >= MOST:
            del self._recordings[next(iter(self._recordings))]
        recording = record(problem, self.solver, h0, z, seen, recorder(), traced)
        self._recordings[kind, seen.calls] = recording
        return recording, seen


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
    versions = [None if x.is_inference() else x._version for x in seen.externals]
    again = trace(problem.f, BACKEND.map(torch.clone, h0), z)
    if again.calls != seen.calls:
        raise UnfitError("F calls other functions, or with other numbers, when it is evaluated again")
    if any(a is not b for a, b in zip(again.externals, seen.externals, strict=True)):
        raise UnfitError("F makes tensors in code that can't be looked into, compiled or scripted, or not of PyTorch's")
    for x, old, version in zip(seen.externals, before, versions, strict=True):
        written = version is not None and x._version != version  # with what was there already, for one
        if written or (old is not None and not torch.all((x == old) | (x != x))):
            raise UnfitError("F writes to a tensor that it closes over, as batch normalization does in training mode")

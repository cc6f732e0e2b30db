"""Recorded solves: on the CPU with a tape that obeys the rules of CUDA graphs, on a GPU with CUDA graphs."""

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import CELLS, Cell
from gpus import TORCH as ON_GPU
from gpus import on_gpu_with_torch
from libraries import TORCH
from problems import CASES, Case
from tape import Tape
from test_adapters_torch import Reads
from torch import Tensor, nn

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.backends.torch import BACKEND

ROOT = Path(__file__).parents[1]
CUDA = pytest.param("cuda", marks=ON_GPU)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


@dataclass(frozen=True, kw_only=True)
class TwoBack(ic.Solver):
    """A solver whose memory is the start itself at first, and which shifts states within its memory."""

    def init(self, system: Any, x: Any) -> Any:
        return x, x

    def step(self, system: Any, memory: Any, point: Any) -> Any:
        before, long_before = memory
        drift = system.space.sub(before, long_before)
        return system.space.axpy(0.1, drift, point.f), (point.x, before)


SOLVERS = [
    TwoBack(),
    ic.FixedPointIteration(),
    ic.FixedPointIteration(damping=0.7, check_every=3),
    ic.Anderson(),
    ic.Anderson(memory=3, damping=0.8, check_every=4),
    ic.Broyden(memory=4),
    ic.Broyden(),
    ic.Anderson(max_steps=4, rtol=0.0),
]


class Recorded(ict.CUDAGraphs):
    """CUDAGraphs that records with a tape instead of CUDA graphs if there is no GPU."""

    def _recorder(self, device: torch.device) -> Any:
        return super()._recorder(device) if device.type == "cuda" else Tape


def both(f: Any, h0: Any, z: Any, solver: Any, graphs: ict.CUDAGraphs, **options: Any) -> ic.Solution:
    """The solution from the recording, after a check that it equals the solver's own."""
    plain = ic.solve(f, h0, z, solver=solver, **options)
    replayed = ic.solve(f, h0, z, solver=graphs, **options)
    assert graphs.reason is None
    # Anderson's small system is solved by another algorithm, which amplifies rounding errors.
    torch.testing.assert_close(replayed.value, plain.value, rtol=1e-6, atol=1e-8)
    assert torch.equal(replayed.status, plain.status)
    assert torch.equal(replayed.stats.steps, plain.stats.steps)
    torch.testing.assert_close(replayed.stats.residual, plain.stats.residual, rtol=1e-2, atol=1e-8, equal_nan=True)
    assert replayed.stats.evaluations == plain.stats.evaluations + 1, "and one that records F"
    return replayed


@DEVICES
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_problem_is_solved_as_without(case: Case, solver: ic.Solver, device: str) -> None:
    graphs = Recorded(solver)
    h0, z = (torch.utils._pytree.tree_map(lambda x: x.to(device), TORCH.array(a)) for a in (case.h0, case.z))
    f = case.problem(TORCH).f
    for _ in range(2):
        both(f, h0, z, solver, graphs, batch_ndim=case.batch_ndim)


@DEVICES
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_one_recording_serves_all_starts_inputs_and_parameters(cell: Cell, solver: ic.Solver, device: str) -> None:
    module, h0, x = cell.build()
    module, graphs = module.to(device), Recorded(solver)
    for seed in range(4):
        torch.manual_seed(seed)
        start, inputs = torch.randn_like(h0).to(device), torch.randn_like(x).to(device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.95)
        both(module, start, inputs, solver, graphs, batch_ndim=1)
    assert len(graphs._recordings) == 1


@DEVICES
def test_a_solution_is_not_changed_by_the_next(device: str) -> None:
    graphs = Recorded(ic.Anderson(rtol=1e-8))
    h0 = torch.zeros(3, device=device)
    solutions = [ic.solve(lambda h, z: torch.cos(h) + z, h0, z * torch.ones_like(h0), solver=graphs) for z in (0, 1.5)]
    kept = solutions[0].value.clone()
    ic.solve(lambda h, z: torch.cos(h) + z, h0 + 1, h0 + 0.5, solver=graphs)
    assert torch.equal(solutions[0].value, kept)
    torch.testing.assert_close(kept, torch.full_like(kept, 0.739085), rtol=1e-5, atol=0)


@DEVICES
def test_a_trace_of_residuals(device: str) -> None:
    solver = ic.Anderson(rtol=1e-8, max_steps=30)
    h0 = torch.zeros(4, 3, dtype=torch.float64, device=device)
    z = torch.linspace(0, 1, 12, dtype=h0.dtype, device=device).reshape(4, 3)
    graphs = Recorded(solver)
    for _ in range(2):
        replayed = both(lambda h, z: torch.cos(h) + z, h0, z, solver, graphs, batch_ndim=1, trace=True)
        plain = ic.solve(lambda h, z: torch.cos(h) + z, h0, z, solver=solver, batch_ndim=1, trace=True)
        torch.testing.assert_close(replayed.stats.trace, plain.stats.trace, equal_nan=True, rtol=1e-3, atol=1e-7)


@DEVICES
def test_samples_that_are_not_finite_are_reported_as_without(device: str) -> None:
    solver = ic.Anderson(max_steps=30)
    z = torch.tensor([[0.5], [float("nan")], [3.0]], dtype=torch.float64, device=device)
    graphs = Recorded(solver)
    plain, replayed = (
        ic.solve(lambda h, z: z * h + 1.0, torch.zeros_like(z), z, solver=s, batch_ndim=1) for s in (solver, graphs)
    )
    assert graphs.reason is None
    assert torch.equal(replayed.status, plain.status)
    assert int(replayed.status[1]) == ic.NONFINITE
    with pytest.raises(ic.SolveError):
        ic.solve(lambda h, z: z * h + 1.0, torch.zeros_like(z), z, solver=graphs, batch_ndim=1, throw=True)


@DEVICES
@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Neumann(3, 0.5), ic.OneStep(), ic.Implicit()], ids=repr)
def test_the_gradients_of_a_layer(gradient: ic.Estimator, device: str) -> None:
    cell, _, x = CELLS[0].build()
    cell.to(device)
    x = x.detach().to(device)
    solver = ic.Anderson(rtol=1e-9)
    layers = [ict.ImplicitLayer(cell, solver=s, gradient=gradient) for s in (solver, Recorded(solver))]
    for step in range(3):
        gradients = []
        for layer in layers:
            inputs = (x + step).requires_grad_()
            layer(inputs).square().sum().backward()
            gradients.append([inputs.grad, *(p.grad for p in cell.parameters())])
            cell.zero_grad()
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            cell.hidden.weight.mul_(0.9)
    assert layers[1].solver.reason is None


@DEVICES
def test_mixed_precision(device: str) -> None:
    """Autocast's copy of a parameter is not kept: the next call makes another one."""
    torch.manual_seed(0)
    cell, x = nn.Linear(6, 6).to(device), torch.linspace(-1, 1, 24, device=device).reshape(4, 6)
    nn.init.orthogonal_(cell.weight, gain=0.5)
    solver = ic.FixedPointIteration(max_steps=12, rtol=0.0)
    layers = [
        ict.ImplicitLayer(lambda h, x: torch.tanh(cell(h) + x), solver=s, gradient=ic.Unroll())
        for s in (solver, Recorded(solver))
    ]
    for _ in range(3):
        with torch.autocast(device, dtype=torch.bfloat16):
            plain, replayed = (layer(x) for layer in layers)
        assert layers[1].solver.reason is None
        torch.testing.assert_close(replayed, plain, rtol=0, atol=1e-6)
        with torch.no_grad():
            cell.weight.mul_(-0.5)


class Parametrized(nn.Module):
    """A weight that is computed in each call, and a mask that is drawn in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.dropout = ict.VariationalDropout(0.3)
        self.scale = 0.9

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.dropout(self.inner(h)) + x)


@DEVICES
def test_weights_and_masks_of_one_call_are_not_used_in_the_next(device: str) -> None:
    cell, x = Parametrized().double().to(device), torch.ones(4, 6, dtype=torch.float64, device=device)
    solver = ic.Anderson(rtol=1e-9)
    layers = [ict.ImplicitLayer(cell, solver=s) for s in (solver, Recorded(solver))]
    values = []
    for seed in range(4):
        found = []
        for layer in layers:
            torch.manual_seed(seed)
            found.append(layer(x))
            cell.inner.parametrizations.weight[0].eval()  # one power iteration less to differ by
        assert layers[1].solver.reason is None
        torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)
        values.append(found[1])
        with torch.no_grad():
            cell.inner.parametrizations.weight.original.mul_(1.0 + seed)
    assert all(not torch.allclose(values[0], value) for value in values[1:]), "another mask in each call"


@DEVICES
def test_settings_and_modes_that_change_are_followed(device: str) -> None:
    cell, x = Parametrized().double().to(device), torch.ones(4, 6, dtype=torch.float64, device=device)
    solver = ic.Anderson(rtol=1e-9)
    graphs = Recorded(solver)
    cell.eval()
    both(cell, torch.zeros_like(x), x, solver, graphs, batch_ndim=1)
    cell.scale = 0.2
    both(cell, torch.zeros_like(x), x, solver, graphs, batch_ndim=1)
    both(lambda h, z: torch.sin(cell(h, z)), torch.zeros_like(x), x, solver, graphs, batch_ndim=1)
    assert len(graphs._recordings) == 3
    both(cell, torch.zeros_like(x), x, solver, graphs, batch_ndim=1)
    assert len(graphs._recordings) == 3


@DEVICES
def test_numbers_of_numpy_are_numbers(device: str) -> None:
    """A new one may get the address of one that is gone."""
    solver = ic.Anderson(rtol=1e-9)
    graphs, z = Recorded(solver), torch.linspace(0, 1, 3, dtype=torch.float64, device=device)
    for scale in (0.9, 0.5, 0.1, 0.9):
        both(lambda h, z, scale=scale: torch.tanh(np.float32(scale) * h + z), torch.zeros_like(z), z, solver, graphs)
    assert len(graphs._recordings) == 3


@DEVICES
def test_parameters_that_move_are_found_again(device: str) -> None:
    module, h0, x = CELLS[0].build()
    module, h0, x = module.to(device), h0.to(device), x.detach().to(device)
    solver = ic.Anderson(rtol=1e-9)
    graphs = Recorded(solver)
    both(module, h0, x, solver, graphs, batch_ndim=1)
    for parameter in module.parameters():
        parameter.data = 0.5 * parameter.data
    both(module, h0, x, solver, graphs, batch_ndim=1)
    module.hidden.weight.data = module.hidden.weight.data.T
    both(module, h0, x, solver, graphs, batch_ndim=1)
    state = {name: 0.3 * value.detach() for name, value in module.named_parameters()}
    both(lambda h, z: torch.func.functional_call(module, state, (h, z)), h0, x, solver, graphs, batch_ndim=1)
    both(module, h0, x, solver, graphs, batch_ndim=1)


@DEVICES
def test_shapes_each_have_a_recording(device: str) -> None:
    module, _, x = CELLS[0].build()
    module, x = module.to(device), x.detach().to(device)
    solver = ic.Anderson(rtol=1e-9)
    graphs = Recorded(solver)
    for n in (1, 2, 3, 2, 1):
        both(module, torch.zeros_like(x[:n]), x[:n], solver, graphs, batch_ndim=1)
    assert len(graphs._recordings) == 3
    wide = torch.randn(20, 5, dtype=x.dtype, device=device)
    for n in range(1, 21):
        both(module, torch.zeros_like(wide[:n]), wide[:n], solver, graphs, batch_ndim=1)
    assert len(graphs._recordings) <= 8, "the memory of each is held"


def solved(f: Any, graphs: ict.CUDAGraphs, n: int, device: str = "cpu") -> Tensor:
    """The fixed points of n samples."""
    z = torch.linspace(0.1, 0.9, n, device=device)[:, None].repeat(1, 3)
    solution = ic.solve(f, torch.zeros_like(z), z, solver=graphs, batch_ndim=1)
    torch.testing.assert_close(f(solution.value, z), solution.value, rtol=1e-3, atol=1e-3)
    return solution.value


class Tapes(Recorded):
    """Counts the recorders that it makes."""

    made = 0

    def _recorder(self, device: torch.device) -> Any:
        make = super()._recorder(device)

        def counted() -> Any:
            self.made += 1
            return make()

        return counted


def cosine(h: Tensor, z: Tensor) -> Tensor:
    return 0.5 * torch.cos(h) + z


@DEVICES
def test_the_recording_that_was_used_last_is_dropped_last(device: str) -> None:
    graphs = Tapes(ic.Anderson())
    for n in range(2, 14):
        solved(cosine, graphs, 1, device)  # in turn with twelve others
        solved(cosine, graphs, n, device)
    assert graphs.made == 13, "one for each shape: the first was never dropped"
    assert len(graphs._recordings) == 8


@DEVICES
def test_one_kind_more_than_are_kept_leaves_the_others_their_recordings(device: str) -> None:
    """Nine shapes in turn, of which each would be dropped before it returns: one of them is given up."""
    graphs = Tapes(ic.FixedPointIteration())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in 12 * [*range(1, 10)]:
            solved(cosine, graphs, n, device)
    assert ["more than 8 kinds of arguments took turns" in str(w.message) for w in caught] == [True] * len(caught)
    assert caught
    assert len(graphs._refused) == 1
    made = graphs.made
    for n in range(2, 10):
        solved(cosine, graphs, n, device)
        assert graphs.reason is None
    assert graphs.made == made


SETTINGS = {
    "cuda.matmul.allow_tf32": True,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": False,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": False,
    "cuda.matmul.allow_fp16_accumulation": True,
    "cuda.matmul.fp32_precision": "tf32",
    "cudnn.allow_tf32": False,
    "cudnn.conv.fp32_precision": "ieee",
    "cudnn.rnn.fp32_precision": "ieee",
    "cudnn.benchmark": True,
    "cudnn.deterministic": True,
    "cudnn.enabled": False,
}
CHANGES = """
import os, sys
from operator import attrgetter

import torch
from implicit_core.adapters.torch.graphs.settings import numerical_settings

before = numerical_settings("cuda")
assert hash(before) == hash(numerical_settings("cuda"))
for name, value in eval(sys.argv[1]).items():
    *path, last = name.split(".")
    try:
        owner = attrgetter(".".join(path))(torch.backends)
        getattr(owner, last)
    except AttributeError:  # an older version
        continue
    if os.fork() == 0:  # PyTorch does not let a precision go back to the older of its names
        setattr(owner, last, value)
        print("" if numerical_settings("cuda") != before else name, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_settings_that_choose_kernels_are_told_apart() -> None:
    done = subprocess.run([sys.executable, "-c", CHANGES, repr(SETTINGS)], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.stdout.split() == []
    assert len(done.stdout.splitlines()) > 5


@DEVICES
def test_a_recording_is_for_the_settings_it_was_made_with(device: str) -> None:
    graphs = Tapes(ic.Anderson())
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    try:
        for expected, names in enumerate((("highest", False), ("high", False), ("high", True), ("highest", False)), 1):
            torch.set_float32_matmul_precision(names[0])
            torch.use_deterministic_algorithms(names[1], warn_only=True)
            solved(cosine, graphs, 2, device)
            assert graphs.made == min(expected, 3), "the last is as the first"
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


class Exhausted(Tape):
    """There is too little memory for a recording."""

    def begin(self) -> None:
        super().begin()
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_recording_that_does_not_fit_into_memory_leaves_the_solve() -> None:
    graphs, f = Recorded(ic.Anderson()), cosine
    graphs._recorder = lambda device: Exhausted  # type: ignore[method-assign]
    with pytest.warns(ict.GraphFallbackWarning, match="memory of the device does not suffice for a recording"):
        value = solved(f, graphs, 3)
    torch.testing.assert_close(value, solved(f, Recorded(ic.Anderson()), 3))
    assert not graphs._recordings


@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=repr)
def test_a_start_that_is_the_solution_warms_up_all_kernels(solver: ic.Solver) -> None:
    """The tape refuses a function that was not called before it was recorded."""
    graphs, z = Recorded(solver), torch.zeros(4, 3, dtype=torch.float64)
    both(lambda h, z: 0.5 * h + z, z, z, solver, graphs, batch_ndim=1)
    both(lambda h, z: 0.5 * h + z, z, z + 1, solver, graphs, batch_ndim=1)


class FakeCUDA:
    """What the recorder calls of ``torch.cuda``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.device, self.captures, self.ended = "the caller's", 1, 0, 0
        for name in ("current_stream", "current_device", "set_stream", "set_device", "stream"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", lambda device: "of the recorder")
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch.setattr(torch.cuda, "Event", lambda: None)
        patch.setattr(torch, "zeros", lambda shape, device: torch.ones(shape))

    def current_stream(self, device: Any) -> str:
        return self.current

    def current_device(self) -> int:
        return self.device

    def set_stream(self, stream: str) -> None:
        self.current, self.device = stream, 0

    def set_device(self, device: int) -> None:
        self.device = device

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def replay(self) -> None: ...

    def capture_begin(self, capture_error_mode: str) -> None:
        assert self.current == "of the recorder"
        self.captures += 1

    def capture_end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("fails", ["at its beginning", "at its end", None])
def test_the_callers_stream_is_current_again_after_a_capture(fails: str | None, monkeypatch: Any) -> None:
    from implicit_core.adapters.torch.graphs.recorder import CUDAGraphRecorder

    cuda = FakeCUDA(monkeypatch)

    class Graph:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> None:
            if fails == "at its beginning":
                raise RuntimeError("not now")
            cuda.current, cuda.device = "of the recorder", 0

        def __exit__(self, *_: Any) -> None:
            if fails is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            cuda.current, cuda.device = "the caller's", 1

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    recorder = CUDAGraphRecorder(torch.device("cuda", 0))
    with pytest.raises(RuntimeError) if fails == "at its beginning" else nullcontext():
        recorder.begin()
    if fails != "at its beginning":
        with pytest.raises(RuntimeError) if fails else nullcontext():
            recorder.end()
    recorder.abandon()
    assert (cuda.current, cuda.device) == ("the caller's", 1)
    expected = 0 if fails is None else 1
    assert cuda.captures == cuda.ended == expected, "the generator's capture is ended by one that succeeds"


def test_what_is_copied_between_devices_is_refused_before_a_capture() -> None:
    from implicit_core.adapters.torch.graphs.capturable import only_capturable
    from implicit_core.adapters.torch.graphs.errors import NotRecordableError

    there, vector, number = torch.ones(3, device="meta"), torch.ones(3), torch.ones(())
    with only_capturable(there.device):
        assert (number * there).shape == (3,), "a number that becomes part of the graph"
        assert torch.equal(2 * vector, vector + 1), "nothing of the device"
        for copy_it in (
            lambda: vector.to("meta"),
            lambda: number.to("meta"),
            lambda: there.copy_(vector),
            lambda: torch.tensor([1.0, 2.0], device="meta"),
            lambda: torch.as_tensor(np.ones(2), device="meta"),
        ):
            with pytest.raises(NotRecordableError, match=r"copies (a tensor to or from another|numbers to the) device"):
                copy_it()
        with pytest.raises(NotRecordableError, match="reads numbers"):
            there.repeat_interleave(torch.ones(3, dtype=torch.int64, device="meta"))
        repeats = torch.ones(3, dtype=torch.int64, device="meta")
        assert there.repeat_interleave(repeats, output_size=3).shape == (3,)


def test_tensors_of_one_solve_do_not_outlive_the_call() -> None:
    import gc
    import weakref

    graphs = Recorded(ic.Anderson())
    x = torch.ones(3)
    seen = weakref.ref(x)
    ic.solve(lambda h, z: torch.cos(h) + z, torch.zeros(3), x, solver=graphs)
    del x
    gc.collect()
    assert seen() is None


# A problem that cannot be recorded is solved as usual, with a warning.


def reads_a_number(h: Tensor, z: Tensor) -> Tensor:
    return torch.cos(h) + z * float(z.sum())


def asks(h: Tensor, z: Tensor) -> Tensor:
    return torch.cos(h) + (z if torch.equal(h, h) else h)


def masked(h: Tensor, z: Tensor) -> Tensor:
    return torch.cos(h) + z * (0 * h[h >= 0]).sum()


def written_through_a_mask(h: Tensor, z: Tensor) -> Tensor:
    y = torch.cos(h)
    y[y > 2] += 1.0
    return y + z


def solves(h: Tensor, z: Tensor) -> Tensor:
    return torch.cos(h) + torch.linalg.solve(torch.eye(4), z)


def of_the_cpu(h: Tensor, z: Tensor) -> Tensor:
    return torch.cos(h) + z * torch.from_numpy(torch.ones(()).numpy()).to(h.device)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        return 0.3 * self.norm(h) + z


class Changing:
    """A different function at each evaluation."""

    calls = 0

    def __call__(self, h: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return torch.cos(h) + z + 1e-12 * self.calls


def scripted() -> Callable[..., Tensor]:
    def f(h: Tensor, z: Tensor) -> Tensor:
        return torch.cos(h) + z

    return torch.jit.trace(f, (torch.zeros(4, 3), torch.zeros(4, 3)))


UNFIT = {
    "reads a number": (lambda: reads_a_number, "reads numbers of a tensor"),
    "asks whether tensors are equal": (lambda: asks, "reads numbers of a tensor"),
    "indexes with a mask": (lambda: masked, "reads numbers of a tensor"),
    "writes through a mask": (lambda: written_through_a_mask, "reads numbers of a tensor"),
    "checks for errors": (lambda: solves, "reads numbers of a tensor"),
    "of the cpu": (lambda: of_the_cpu, "another library"),
    "batch norm": (Counting, "writes to a tensor"),
    "changing": (Changing, "with other numbers"),
    "scripted": (scripted, "compiled or scripted code"),
}


# PyTorch 2.14 has another category.
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.trace. is deprecated:DeprecationWarning", "ignore:.torch.jit.trace. is deprecated:FutureWarning"
)
@pytest.mark.parametrize("name", UNFIT)
def test_the_reason_why_not(name: str) -> None:
    make, reason = UNFIT[name]
    f, z = make(), torch.full((4, 3), 0.1)
    graphs = Recorded(ic.Anderson())
    with pytest.warns(ict.GraphFallbackWarning, match=reason):
        solution = ic.solve(f, torch.zeros_like(z), z, solver=graphs, batch_ndim=1)
    assert reason in str(graphs.reason)
    assert bool(solution.converged.all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ic.solve(f, torch.zeros_like(z), z, solver=graphs, batch_ndim=1)  # warned once


def test_a_failed_recording_is_tried_again_after_a_reset() -> None:
    cell, z = Counting().double(), torch.full((4, 3), 0.1, dtype=torch.float64)
    graphs = Recorded(ic.Anderson())
    with pytest.warns(ict.GraphFallbackWarning, match="writes to a tensor"):
        ic.solve(cell, torch.zeros_like(z), z, solver=graphs, batch_ndim=1)
    cell.eval()
    ic.solve(cell, torch.zeros_like(z), z, solver=graphs, batch_ndim=1)
    assert graphs.reason is not None
    graphs.reset()
    both(cell, torch.zeros_like(z), z, ic.Anderson(), graphs, batch_ndim=1)
    graphs.reset()
    assert not graphs._recordings


def test_recordings_are_given_up_for_an_f_that_changes_not_for_one_that_changes_now_and_then() -> None:
    graphs, z = Recorded(ic.Anderson()), torch.full((3,), 0.1)
    for i in range(20):
        for _ in range(2):
            ic.solve(lambda h, z, i=i: torch.cos(h) + i * 0.01 * z, torch.zeros(3), z, solver=graphs)
            assert graphs.reason is None
    assert len(graphs._recordings) == 8


class Fading(ic.Solver):
    """A solver whose memory is a number."""

    def init(self, system: Any, x: Any) -> float:
        return 1.0

    def step(self, system: Any, memory: float, point: Any) -> Any:
        return system.space.axpy(memory, point.residual, point.x), 0.7 * memory


class Keeping(nn.Module):
    """Writes to a buffer; a second evaluation at the same point writes the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3))

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        self.last.copy_(h)
        return torch.cos(h) + z


class Inner(ic.Solver):
    """A solver with a loop in its step."""

    def init(self, system: Any, x: Any) -> None:
        return None

    def step(self, system: Any, memory: None, point: Any) -> Any:
        return BACKEND.while_loop(lambda x: (point.active,), lambda x, masks: x, point.f, 1), None


def test_a_step_with_a_loop() -> None:
    graphs = Recorded(Inner())
    with pytest.warns(ict.GraphFallbackWarning, match="a step of Inner has a loop of its own"):
        assert ic.solve(lambda h, z: 0.5 * h + 1, torch.zeros(3), None, solver=graphs).converged


def test_a_memory_that_is_not_a_tensor() -> None:
    graphs = Recorded(Fading())
    with pytest.warns(ict.GraphFallbackWarning, match="remembers a float that changes"):
        ic.solve(lambda h, z: 0.5 * h + 1, torch.zeros(3), None, solver=graphs)


def test_a_buffer_that_is_written_to() -> None:
    cell, graphs = Keeping(), Recorded(ic.Anderson())
    with pytest.warns(ict.GraphFallbackWarning, match="writes to a tensor"):
        value = ic.solve(cell, torch.zeros(3), torch.zeros(3), solver=graphs).value
    torch.testing.assert_close(cell.last, value, rtol=1e-2, atol=1e-2)


def test_signs_of_zero_strides_settings_and_solvers_are_distinguished() -> None:
    graphs, z = Recorded(ic.Anderson(rtol=1e-9)), torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4) / 20
    h0 = torch.zeros(12, dtype=torch.float64)
    for zero in (0.0, -0.0):
        both(lambda h, z, v=zero: torch.cos(h) + z.copysign(v).reshape(12), h0, z, graphs.solver, graphs)
    for given in (z, z.T.contiguous().T):
        both(lambda h, z: torch.cos(h) + torch.as_strided(z, (12,), (1,)), h0, given, graphs.solver, graphs)
    scale = np.array(0.5)
    for number in (0.5, 0.1):
        scale[...] = number
        both(lambda h, z: torch.tensor(scale) * torch.cos(h) + z.reshape(12), h0, z, graphs.solver, graphs)
    graphs.solver = ic.FixedPointIteration(rtol=1e-3)
    both(lambda h, z: torch.cos(h) + z.reshape(12), h0, z, graphs.solver, graphs)
    graphs.solver = ic.FixedPointIteration(rtol=1e-9)
    both(lambda h, z: torch.cos(h) + z.reshape(12), h0, z, graphs.solver, graphs)


def test_a_layer_within_f_may_have_the_same_solver() -> None:
    graphs = Recorded(ic.Anderson())

    def f(h: Tensor, z: Tensor) -> Tensor:
        return torch.cos(h) + 0.1 * ic.solve(lambda a, b: 0.5 * a + b, torch.zeros_like(z), z, solver=graphs).value

    with pytest.warns(ict.GraphFallbackWarning):
        assert ic.solve(f, torch.zeros(3), torch.ones(3), solver=graphs).converged


def test_on_the_processor_there_are_no_graphs() -> None:
    graphs = ict.CUDAGraphs()
    with pytest.warns(ict.GraphFallbackWarning, match="on cpu, not on a CUDA device"):
        ic.solve(lambda h, z: torch.cos(h), torch.zeros(3), None, solver=graphs)


def test_newtons_method_solves_linear_systems() -> None:
    graphs = Recorded(ic.NewtonKrylov())
    with pytest.warns(ict.GraphFallbackWarning, match="NewtonKrylov solves linear systems"):
        ic.fixed_point(lambda h, z: torch.cos(h), torch.zeros(3), None, solver=graphs)


def layer_at(z: Tensor, solver: Any) -> Tensor:
    h0 = torch.zeros((), dtype=z.dtype, device=z.device)
    return ic.fixed_point(
        lambda h, z: torch.tanh(0.5 * h + z), h0, z, solver=solver, gradient=ic.Implicit(ic.GMRES(rtol=1e-10))
    ).value


@DEVICES
def test_within_torch_func(device: str) -> None:
    """A layer solves on plain values, so it is recorded; tensors of vmap are solved without a recording."""
    solver = ic.Anderson(rtol=1e-10)
    graphs, zs = Recorded(solver), torch.linspace(-1, 1, 5, dtype=torch.float64, device=device)
    expected = torch.stack([torch.func.grad(lambda z: layer_at(z, solver))(z) for z in zs])
    torch.testing.assert_close(torch.func.grad(lambda z: layer_at(z, graphs))(zs[1]), expected[1], rtol=1e-7, atol=0)
    assert graphs.reason is None
    with pytest.warns(ict.GraphFallbackWarning, match=r"torch\.func"):
        got = torch.func.vmap(torch.func.grad(lambda z: layer_at(z, graphs)))(zs)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)


def test_an_f_that_is_another_in_every_call_is_given_up() -> None:
    graphs, z = Recorded(ic.Anderson()), torch.full((3,), 0.1)
    for i in range(8):
        ic.solve(lambda h, z, i=i: torch.cos(h) + i * 0.01 * z, torch.zeros(3), z, solver=graphs)
        assert graphs.reason is None
    with pytest.warns(ict.GraphFallbackWarning, match="another function in each of 8 calls"):
        ic.solve(lambda h, z: torch.cos(h) + 0.5 * z, torch.zeros(3), z, solver=graphs)


@pytest.mark.parametrize(
    "solver", [lambda problem, h0, z: h0, "anderson", ic.Anderson], ids=["callable", "str", "class"]
)
def test_it_takes_a_solver(solver: Any) -> None:
    with pytest.raises(TypeError, match="solver must be a Solver"):
        ict.CUDAGraphs(solver)


def test_a_root_is_solved_without_a_recording() -> None:
    graphs = Recorded(ic.Anderson(rtol=1e-6))
    with pytest.warns(ict.GraphFallbackWarning, match="a root is sought"):
        solution = ic.root(lambda x, z: x**3 + x - z, torch.ones(2), torch.tensor([2.0, 10.0]), solver=graphs)
    torch.testing.assert_close(solution.value, torch.tensor([1.0, 2.0]))
    assert not graphs._recordings


def test_copies_and_pickles_begin_without_recordings() -> None:
    graphs = Recorded(ic.Broyden(memory=3))
    ic.solve(lambda h, z: torch.cos(h), torch.zeros(3), None, solver=graphs)
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert other.solver == graphs.solver
        assert graphs._recordings
        assert not other._recordings
    assert repr(graphs).startswith("CUDAGraphs(Broyden(")


def test_in_inference_mode_and_out_of_it() -> None:
    graphs, solver, z = Recorded(ic.Anderson()), ic.Anderson(), torch.full((3,), 0.1, dtype=torch.float64)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            both(lambda h, z: torch.cos(h) + z, torch.zeros_like(z), z + 0, solver, graphs)
    assert len(graphs._recordings) == 1


# A capture by the user.


class Capturing:
    """A context that records operations."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(BACKEND, "capturing", lambda x: True)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()], ids=repr)
@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Neumann(3, 0.5), ic.OneStep()], ids=repr)
def test_a_training_step_within_a_capture_reads_no_number(solver: ic.Solver, gradient: ic.Estimator) -> None:
    cell, h0, x = CELLS[0].build()
    expected = ic.fixed_point(cell, h0, x, solver=solver, gradient=gradient, batch_ndim=1)
    expected.value.square().sum().backward()
    gradients = [p.grad for p in cell.parameters()]
    cell.zero_grad()
    with Capturing(), Reads() as reads:
        solution = ic.fixed_point(cell, h0, x, solver=solver, gradient=gradient, batch_ndim=1)
        solution.value.square().sum().backward()
    assert reads.count == 0
    assert solution.stats.evaluations == solver.max_steps
    assert torch.equal(solution.status, expected.status)
    torch.testing.assert_close(solution.value, expected.value)
    torch.testing.assert_close([p.grad for p in cell.parameters()], gradients)


def test_methods_that_must_read_numbers_are_refused_within_a_capture() -> None:
    z = torch.ones(3, requires_grad=True)
    with Capturing():
        value = ic.fixed_point(lambda h, z: torch.cos(h) + z, torch.zeros(3), z, gradient=ic.Implicit()).value.sum()
        with pytest.raises(NotImplementedError, match="Use Neumann, Unroll"):
            value.backward()
        with pytest.raises(NotImplementedError, match=r"solution\.status after a replay"):
            ic.solve(lambda h, z: torch.cos(h), torch.zeros(3), None, throw=True)


@on_gpu_with_torch
@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Neumann(3, 0.5), ic.OneStep()], ids=repr)
def test_a_whole_training_step_is_captured_with_pytorchs_own_tools(gradient: ic.Estimator) -> None:
    cell, h0, x = CELLS[0].build()
    cell, h0, x = cell.cuda(), h0.cuda(), x.detach().cuda()
    solver = ic.Anderson(max_steps=20)

    def step() -> Tensor:
        loss = ic.fixed_point(cell, h0, x, solver=solver, gradient=gradient, batch_ndim=1).value.square().sum()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            cell.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    cell.zero_grad()
    with torch.cuda.graph(graph):
        loss = step()
    replayed = [loss, *(p.grad for p in cell.parameters())]
    for shift in (0.0, 0.3):
        x.add_(shift)
        graph.replay()
        cell.zero_grad()
        expected = [step().detach(), *(p.grad for p in cell.parameters())]
        torch.testing.assert_close([a.detach() for a in replayed], expected, rtol=1e-9, atol=1e-9)

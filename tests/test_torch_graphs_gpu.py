"""What only a GPU can tell of recorded solves: failed captures, first loads of kernels, memory, precisions, streams."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import gpus
import pytest
import torch
from torch import Tensor

import implicit_core as ic
from implicit_core.adapters import torch as ict

pytestmark = gpus.TORCH
ROOT = Path(__file__).parents[1]
HEAD = """
import warnings

import torch

import implicit_core as ic
from implicit_core.adapters import torch as ict

z = torch.linspace(0.1, 0.9, 12, device="cuda").reshape(4, 3)

def cosine(h, z):
    return 0.5 * torch.cos(h) + z

def solved(f, solver):
    return ic.solve(f, torch.zeros_like(z), z, solver=solver, batch_ndim=1).value

def fallback(f, graphs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = solved(f, graphs)
    assert any(w.category is ict.GraphFallbackWarning for w in caught), caught
    return value

warnings.simplefilter("error", ict.GraphFallbackWarning)
expected = solved(cosine, ic.Anderson())
"""


def alone(code: str) -> None:
    """Run code in a process of its own: a failed capture may spoil all later ones of its process."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("solver", ["Anderson()", "Broyden()", "FixedPointIteration()", "Anderson(check_every=4)"])
def test_kernels_that_a_process_has_not_used_are_loaded_before_the_capture(solver: str) -> None:
    """The start is the solution, so a plain solve makes no step: the products of Anderson's method, too, are new."""
    alone(f"""
        graphs = ict.CUDAGraphs(ic.{solver})
        zero = torch.zeros(4, 3, device="cuda")
        value = ic.solve(lambda h, z: 0.5 * torch.sin(h) * z, zero, zero + 1, solver=graphs, batch_ndim=1).value
        assert graphs.reason is None
        assert not value.any()
        torch.testing.assert_close(solved(cosine, graphs), expected, rtol=1e-4, atol=1e-4)
        """)


def test_after_a_failed_capture_numbers_are_drawn_and_solves_are_right() -> None:
    alone("""
        def waits(h, z):
            torch.cuda.synchronize()  # permitted outside of captures only
            return cosine(h, z)

        graphs = ict.CUDAGraphs(ic.Anderson())
        torch.cuda.manual_seed(5)
        first = torch.rand(5, device="cuda"), torch.randn(5, device="cuda")
        torch.cuda.manual_seed(5)
        drawn = torch.rand(5, device="cuda")
        stream = torch.cuda.current_stream()
        value = fallback(waits, graphs)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.equal(drawn, first[0])
        assert torch.equal(torch.randn(5, device="cuda"), first[1])
        torch.cuda.manual_seed(5)
        assert torch.equal(torch.rand(5, device="cuda"), first[0])
        graphs.reset()
        with warnings.catch_warnings():  # PyTorch before 2.12 cannot capture again
            warnings.simplefilter("ignore", ict.GraphFallbackWarning)
            torch.testing.assert_close(solved(cosine, graphs), expected, rtol=1e-4, atol=1e-4)
        """)


def test_a_read_is_found_before_the_capture_which_leaves_the_process_as_it_was() -> None:
    alone("""
        graphs = ict.CUDAGraphs(ic.Anderson())
        for f, word in (
            (lambda h, z: cosine(h, z) + 0 * float(z.sum()), "reads numbers"),
            (lambda h, z: cosine(h, z) + 0 * h[h >= 0].sum(), "reads numbers"),
            (lambda h, z: cosine(h, z) + 0 * h.cpu().to(h.device), "copies"),
            (lambda h, z: cosine(h, z) + torch.tensor([0.0, 0.0, 0.0], device=h.device), "copies"),
        ):
            graphs.reset()
            torch.testing.assert_close(fallback(f, graphs), expected, rtol=1e-4, atol=1e-4)
            assert word in graphs.reason, graphs.reason
        graphs.reset()
        torch.testing.assert_close(solved(cosine, graphs), expected, rtol=1e-4, atol=1e-4)
        assert graphs.reason is None
        torch.cuda.empty_cache()
        """)


def test_memory_that_runs_out_in_a_capture_is_freed_and_the_stream_is_usable() -> None:
    alone("""
        import gc

        def large(h, z):
            if torch.cuda.is_current_stream_capturing():
                kept = [torch.empty(1 << 20, device=h.device) for _ in range(8)]
                torch.empty(1 << 50, device=h.device)
            return cosine(h, z)

        graphs = ict.CUDAGraphs(ic.Anderson())
        gc.collect()
        torch.cuda.empty_cache()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        value = fallback(large, graphs)
        assert "memory" in graphs.reason
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        del value
        gc.collect()
        torch.cuda.empty_cache()
        workspaces = 64 << 20  # of cuBLAS, for the stream of the recorder
        assert torch.cuda.memory_allocated() - allocated <= workspaces
        assert torch.cuda.memory_reserved() - reserved <= workspaces
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.rand(3, device="cuda")
        graphs.reset()
        torch.testing.assert_close(solved(cosine, graphs), expected, rtol=1e-4, atol=1e-4)
        assert graphs.reason is None
        """)


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(max_steps=6), ic.Anderson(max_steps=40)], ids=repr)
def test_a_replay_has_the_precision_that_is_set_now(solver: ic.Solver) -> None:
    """Products round to TF32 with "high", which moves the solution by far more than float32 does."""
    torch.manual_seed(0)
    w = torch.nn.init.orthogonal_(torch.empty(256, 256)).mul_(0.7).cuda()
    z = torch.randn(64, 256, device="cuda")
    graphs, found = ict.CUDAGraphs(solver), {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest", "high"):
            torch.set_float32_matmul_precision(precision)
            values = [
                ic.solve(lambda h, z: torch.tanh(h @ w.T) + z, torch.zeros_like(z), z, solver=s, batch_ndim=1).value
                for s in (solver, graphs)
            ]
            assert graphs.reason is None
            tolerance = 1e-4 if precision == "highest" else 1e-2
            torch.testing.assert_close(values[1], values[0], rtol=tolerance, atol=tolerance)
            again = found.setdefault(precision, values[1])
            assert torch.equal(again, values[1]), "the same recording, with the same numbers"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(graphs._recordings) == 2
    if torch.cuda.get_device_capability() >= (8, 0):
        assert (found["high"] - found["highest"]).abs().max() > 1e-5


def coupled(w: Tensor) -> Any:
    return lambda h, z: torch.tanh(h @ w.T) + z


def test_replays_on_two_streams_in_turn_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    w = torch.nn.init.orthogonal_(torch.empty(512, 512)).mul_(0.8).cuda()
    zs = torch.randn(12, 512, 512, device="cuda")
    solver = ic.Anderson(check_every=10)
    graphs, streams = ict.CUDAGraphs(solver), [torch.cuda.Stream() for _ in range(2)]
    start = torch.zeros_like(zs[0])
    ic.solve(coupled(w), start, zs[0], solver=graphs, batch_ndim=1)  # recorded on the default stream
    torch.cuda.synchronize()
    found = []
    for i, z in enumerate(zs):
        with torch.cuda.stream(streams[i % 2]):
            found.append(ic.solve(coupled(w), start, z, solver=graphs, batch_ndim=1).value)
    assert graphs.reason is None
    torch.cuda.synchronize()
    for z, value in zip(zs, found, strict=True):
        expected = ic.solve(coupled(w), start, z, solver=solver, batch_ndim=1).value
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


def test_a_recording_dropped_while_it_is_replayed_elsewhere_keeps_its_memory_until_then() -> None:
    """Its inputs were allocated on the default stream, which may not reuse them before the replay has read them."""
    torch.manual_seed(0)
    w = torch.nn.init.orthogonal_(torch.empty(1024, 1024)).mul_(0.8).cuda()
    z = torch.randn(2048, 1024, device="cuda")
    solver = ic.FixedPointIteration(max_steps=20, check_every=20, rtol=0.0, atol=0.0)
    graphs, side = ict.CUDAGraphs(solver), torch.cuda.Stream()
    start = torch.zeros_like(z)
    expected = ic.solve(coupled(w), start, z, solver=solver, batch_ndim=1).value
    ic.solve(coupled(w), start, z, solver=graphs, batch_ndim=1)
    busy = torch.eye(4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(100):  # work that the replay waits for
            busy = busy @ busy
        (recording,) = graphs._recordings.values()
        with recording.recorder.in_order((*recording.inputs.h0, *recording.inputs.externals)):
            recording.inputs.copy_from([start], [z, w])
            recording.start()  # without the loop, which would wait
            recording.loop.steps[max(recording.loop.steps)]()
            recording.end()
            value = recording.solution.value.clone()
    graphs.reset()
    del recording
    for _ in range(8):
        torch.full_like(z, float("nan"))
    torch.cuda.synchronize()
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


def test_a_training_step_on_a_side_stream() -> None:
    """The backward pass follows on the stream of the forward pass."""
    torch.manual_seed(0)
    cell = torch.nn.Linear(64, 64).cuda()
    torch.nn.init.orthogonal_(cell.weight, gain=0.8)
    x, side = torch.randn(32, 64, device="cuda"), torch.cuda.Stream()
    gradients = []
    for solver in (ic.Anderson(rtol=1e-6), ict.CUDAGraphs(ic.Anderson(rtol=1e-6))):
        layer = ict.ImplicitLayer(lambda h, x: torch.tanh(cell(h) + x), solver=solver, gradient=ic.Neumann(5, 0.5))
        for _ in range(3):
            cell.zero_grad()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), warnings.catch_warnings():
                warnings.simplefilter("error", ict.GraphFallbackWarning)
                layer(x).square().sum().backward()
            torch.cuda.current_stream().wait_stream(side)
        gradients.append(cell.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)

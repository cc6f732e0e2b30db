"""F and solvers may reuse memory: no result of a solve changes when they write to it again."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from libraries import Library

import implicit_core as ic
from implicit_core.adapters import torch as ict

Z = np.asarray([1.0, 2.0])


@dataclass(frozen=True, kw_only=True)
class Blocks(ic.Solver):
    """A leaf of the step is the result of F itself, not a copy."""

    def init(self, system: Any, x: Any) -> None:
        return None

    def step(self, system: Any, memory: None, point: Any) -> Any:
        return (point.f[0], point.x[1] + 0.5 * point.residual[1]), None


@dataclass(frozen=True, kw_only=True)
class Rewrapped(Blocks):
    """The result of F, not copied, in a new tuple."""

    def step(self, system: Any, memory: None, point: Any) -> Any:
        return tuple(a for a in point.f), None


class Scratch(Blocks):
    """A solver that writes every step to the same array."""

    def init(self, system: Any, x: Any) -> Any:
        return [np.empty_like(a) for a in x]

    def step(self, system: Any, memory: Any, point: Any) -> Any:
        for own, f in zip(memory, point.f, strict=True):
            own[...] = f if point.index < 2 else -3 * f  # then it moves away from the root
        return tuple(memory), memory


def test_a_users_solver_may_return_a_part_of_fs_result() -> None:
    buffer = np.zeros(2)

    def f(h: Any, z: Any) -> Any:
        np.multiply(h[0], 0.9, out=buffer)
        np.add(buffer, z, out=buffer)
        return buffer, 0.1 * h[1]

    solution = ic.solve(f, (np.zeros(2), np.ones(2)), np.ones(2), solver=Blocks(max_steps=500))
    assert solution.status == ic.CONVERGED
    np.testing.assert_allclose(solution.value[0], 10.0, rtol=1e-3)


def test_a_users_solver_may_rewrap_fs_result() -> None:
    buffer = np.zeros(2)
    solution = ic.solve(
        lambda h, z: np.add(0.9 * h, z, out=buffer), np.zeros(2), np.ones(2), solver=Rewrapped(max_steps=500)
    )
    np.testing.assert_allclose(solution.value, 10.0, rtol=1e-3)


class Averaged(Blocks):
    """The mean of the last two results of F, of which the memory holds one as it is."""

    def init(self, system: Any, x: Any) -> Any:
        return x

    def step(self, system: Any, memory: Any, point: Any) -> Any:
        space = system.space
        return space.scale(0.5, space.add(point.f, memory)), point.f


def test_a_users_solver_may_remember_fs_result() -> None:
    buffer, settings = np.zeros(2), {"solver": Averaged(max_steps=500), "trace": True}
    reused = ic.solve(lambda h, z: np.add(-0.8 * h, z, out=buffer), np.zeros(2), np.ones(2), **settings)
    new = ic.solve(lambda h, z: -0.8 * h + z, np.zeros(2), np.ones(2), **settings)
    np.testing.assert_array_equal(reused.stats.trace, new.stats.trace)


def test_a_users_solver_may_reuse_its_own_array() -> None:
    def f(h: Any, z: Any) -> Any:
        return np.cos(h) + z

    solution = ic.solve(f, np.zeros(2), Z, solver=Scratch(max_steps=6))
    residual = np.linalg.norm(f(solution.value, Z) - solution.value)
    assert solution.stats.residual == pytest.approx(residual)


def test_leaves_of_a_state_may_trade_places_and_buffers() -> None:
    """A delay: one leaf is the previous value of the other, and F writes to two buffers alternately."""
    start, z = (torch.zeros(3), torch.zeros(3)), torch.tensor([1.0, 2.0, -1.0])
    buffers, calls = [torch.zeros(3), torch.zeros(3)], [0]

    def reusing(h: Any, z: Any) -> Any:
        out = buffers[calls[0] % 2]
        calls[0] += 1
        out.copy_(0.9 * h[0] + z)
        return h[1], out

    def allocating(h: Any, z: Any) -> Any:
        return h[1], 0.9 * h[0] + z

    solver = ic.FixedPointIteration(max_steps=60)
    ours, theirs = (ic.solve(f, start, z, solver=solver) for f in (reusing, allocating))
    assert ours.status == theirs.status == ic.MAX_STEPS
    for a, b in zip(ours.value, theirs.value, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.stats.residual, theirs.stats.residual)


@pytest.mark.parametrize(
    "solver",
    [ic.FixedPointIteration(rtol=1e-6), ic.FixedPointIteration(damping=0.9, rtol=1e-6), ic.Anderson(), ic.Broyden()],
    ids=repr,
)
def test_samples_are_independent_in_another_memory_order(library: Library, solver: ic.Solver) -> None:
    """F returns a transpose. A sample is bit-identical whether another one is finished, active or not finite."""
    rng = np.random.default_rng(0)
    n, d = 16, 67
    w = rng.standard_normal((d, d)).astype(np.float32)
    w = library.array(w * np.float32(0.9) / np.linalg.norm(w, 2))
    xp = library.xp

    def f(h: Any, z: Any) -> Any:
        size = (1 + xp.sum(h * h, axis=-1)) ** 0.5
        return xp.tanh(w @ (h / size[:, None]).T + z.T).T

    b = rng.standard_normal((n, d)).astype(np.float32)
    spoiled, early = b.copy(), b.copy()
    spoiled[1], early[2] = np.nan, 0.0
    values = [
        library.numpy(
            ic.solve(
                f, library.array(np.zeros((n, d), np.float32)), library.array(z), solver=solver, batch_ndim=1
            ).value
        )[0]
        for z in (b, spoiled, early)
    ]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])


def nodes(x: torch.Tensor) -> int:
    """Number of nodes in the graph of a tensor."""
    seen, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_a_map_that_records_within_leaves_no_growing_graph() -> None:
    w, z, behind = torch.nn.Parameter(0.3 * torch.eye(3)), torch.ones(3), []

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        behind.append(nodes(h))
        with torch.enable_grad():
            return torch.tanh(h @ w) + z

    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=20)
    solution = ic.solve(f, torch.zeros(1, 3), z, solver=solver, batch_ndim=1)
    assert max(behind) == 0
    assert not solution.value.requires_grad


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()], ids=repr)
def test_a_solve_within_torch_func(solver: ic.Solver) -> None:
    z = torch.ones(2, 3)

    def total(z: torch.Tensor) -> torch.Tensor:
        found = ic.solve(lambda h, z: 0.5 * torch.tanh(h) + z, torch.zeros(2, 3), z, solver=solver, batch_ndim=1)
        return (found.value * z).sum()

    value = ic.solve(lambda h, z: 0.5 * torch.tanh(h) + z, torch.zeros(2, 3), z, solver=solver, batch_ndim=1).value
    torch.testing.assert_close(torch.func.grad(total)(z), value)
    torch.testing.assert_close(torch.func.jvp(total, (z,), (z,))[1], value.sum())
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(total)(torch.ones(4, 2, 3))


def test_a_start_in_the_memory_that_f_writes_to() -> None:
    """The start shares memory with the buffer of f, but f does not write to its argument."""
    buffer, calls = np.zeros(2), [0]

    def f(h: Any, z: Any) -> Any:
        calls[0] += 1
        return np.add(0.5 * h, z, out=buffer)

    solution = ic.solve(f, f(np.zeros(2), Z), Z)
    np.testing.assert_allclose(solution.value, 2 * Z, rtol=1e-4)
    assert solution.status == ic.CONVERGED
    assert solution.stats.evaluations == calls[0] - 1
    solution = ic.solve(f, np.zeros(2), Z, solver=lambda p, h, z: p(p(h, z), z))
    np.testing.assert_allclose(solution.value, 1.5 * Z)
    assert solution.stats.residual == pytest.approx(np.linalg.norm(0.25 * Z))
    with pytest.raises(ValueError, match="f wrote to its argument h"):
        ic.solve(lambda h, z: np.multiply(h, 0.5, out=h), np.ones(2), Z)


def test_states_along_the_way_are_kept_in_memory_of_their_own() -> None:
    z, buffers, calls = torch.ones(3), [torch.zeros(3), torch.zeros(3)], [0]

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            calls[0] += 1
            return buffers[calls[0] % 2].copy_(0.5 * h + z)

    solver = ic.FixedPointIteration(rtol=1e-6)
    ours = ict.fixed_point_correction(f, torch.zeros(3), z, at=(2, 4), solver=solver, gradient=ic.OneStep())
    theirs = ict.fixed_point_correction(
        lambda h, z: 0.5 * h + z, torch.zeros(3), z, at=(2, 4), solver=solver, gradient=ic.OneStep()
    )
    for step in (2, 4):
        torch.testing.assert_close(ours.states[step], theirs.states[step])

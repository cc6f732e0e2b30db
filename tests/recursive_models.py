"""The loops of recursive models, written with the library: n steps without a graph, then k with one.

A cell is ``cell(h, x)``, a function or a module. All of these run in PyTorch and in JAX. ``recursive_loops.py`` has the
same loops by hand.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import implicit_core as ic

Cell = Callable[[Any, Any], Any]


def recur(cell: Cell, h: Any, x: Any, n: Any, k: int = 1) -> Any:
    """n steps of ``h = cell(h, x)`` without a graph, then k with one: Huginn and FPDM, where both are random."""
    return ic.fixed_point(cell, h, x, solver=ic.steps(n), gradient=ic.Unroll(k, 1.0), batch_ndim=1).value


def parcae(cell: Cell, h: Any, x: Any, n: Any, k: Any, most: int | None = None) -> Any:
    """An n and a k for each sequence, arrays of integers; ``most`` is the largest k within ``jax.jit``: Parcae."""
    gradient = ic.Unroll(k, 1.0, most=most)
    return ic.fixed_point(cell, h, x, solver=ic.steps(n), gradient=gradient, batch_ndim=1).value


def free(cell: Cell, h: Any, x: Any, n: int) -> Any:
    """n steps without a graph."""
    return ic.solve(cell, h, x, solver=ic.steps(n), batch_ndim=1).value


def hrm(low: Cell, high: Cell, state: Any, x: Any, cycles: int = 2, steps: int = 3) -> Any:
    """Two time scales, of which the last step of each has a graph: HRM (G. Wang et al., 2025)."""

    def cycle(state: Any, x: Any) -> Any:
        z_high, z_low = state
        z_low = recur(low, z_low, z_high + x, steps - 1)
        return high(z_high, z_low), z_low

    return recur(cycle, state, x, cycles - 1)


def recursion(net: Cell, steps: int = 3) -> Cell:
    """One recursion of TRM: the latent z is refined, then the answer y."""

    def refined(state: Any, x: Any) -> Any:
        y, z = state
        for _ in range(steps):
            z = net(z, x + y)
        return net(y, z), z

    return refined


def trm(net: Cell, state: Any, x: Any, cycles: int = 3) -> Any:
    """All recursions but the last without a graph: TRM (A. Jolicoeur-Martineau, 2025)."""
    return recur(recursion(net), state, x, cycles - 1)


def noisy(net: Cell, noise: Callable[[Any], Any]) -> Cell:
    """A net each of whose applications is damped and disturbed, as in EqR."""
    return lambda h, x: 0.95 * net(h, x) + 0.05 * h + 0.01 * noise(h)


def eqr_restarts(net: Cell, starts: Any, x: Any, cycles: int = 4) -> Any:
    """EqR at evaluation: of R starts for each sample, (R, B, ...), the one whose last step is the shortest."""
    return ic.solve(recursion(net), starts, x, solver=ic.steps(cycles), batch_ndim=2).best().value


def hrm_text(low: Cell, high: Cell, x: Any, z_low: Any, graded: int, cycles: int = 2, steps: int = 3) -> Any:
    """The last ``graded`` steps have a graph, as many of the high level as there are, but for one: HRM-Text."""
    z_high, of_high = x, min(cycles, graded - 1)
    for left in reversed(range(cycles)):
        k = min(max(graded - of_high - left * steps, 0), steps)
        if k < steps:
            z_low = free(low, z_low, z_high, steps - k)
        for _ in range(k):
            z_low = low(z_low, z_high)
        z_high = high(z_high, z_low) if left < of_high else free(high, z_high, z_low, 1)
    return z_high


def fp_rnn(mixer: Cell, h: Any, x: Any, rtol: float = 0.01, most: int = 30) -> Any:
    """The hidden states of a whole sequence as a fixed point, and one step with a graph: FP-RNN."""
    solver = ic.FixedPointIteration(rtol=rtol, max_steps=most)
    return ic.fixed_point(mixer, h, x, solver=solver, gradient=ic.Unroll(1, 1.0), batch_ndim=1).value


def fp_rnn_step_by_step(cell: Cell, h: Any, xs: Sequence[Any]) -> list[Any]:
    """One fixed point after the other. Each starts at the one before, which reaches the gradient through x."""
    states = [h]
    for x in xs:
        states.append(fp_rnn(cell, states[-1], (states[-1], x)))
    return states[1:]


def implicit_language_model(layers: Cell, h: Any, x: Any, trained: bool) -> Any:
    """A few steps at first, later a tolerance for each sequence, and a phantom gradient (M. Schöne et al., 2025)."""
    solver = ic.FixedPointIteration(rtol=0.05, max_steps=32) if trained else ic.steps(4)
    return ic.fixed_point(layers, h, x, solver=solver, gradient=ic.Unroll(4 if trained else 1, 0.8), batch_ndim=1).value


def by_depth(cell: Cell, h: Any, x: Any, most: int) -> Iterator[tuple[Any, Any]]:
    """The state after 0, 1, ... steps, and its residual, from one solve: how accuracy grows with depth."""
    stepper = ic.Stepper(cell, solver=ic.steps(most), batch_ndim=1)
    state = stepper.init(h, x)
    yield state.value, state.residual
    for _ in range(most):
        state = stepper.step(state, x)
        yield state.value, state.residual


def until_halted(cell: Cell, h: Any, x: Any, halts: Callable[[Any], Any], most: int) -> ic.Solution[Any]:
    """Each sample recurs until ``halts(h)`` says so, and then leaves the batch; x has a row for each sample."""
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=most, stop=lambda h, _: halts(h))
    return ic.solve(cell, h, x, solver=ic.Compacting(solver), batch_ndim=1)

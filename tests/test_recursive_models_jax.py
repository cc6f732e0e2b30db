"""Recursive models in JAX: the library's training steps, compiled, lead to the parameters of the loops by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import libraries  # noqa: F401  # configures JAX
import numpy as np
import pytest
import recursive_loops as by_hand
import recursive_models as library
from jax import lax

import implicit_core as ic

BATCH, WIDTH, TOKENS, STEPS = 4, 8, 5, 20
constant = lax.stop_gradient
Parameters = Any
Cell = library.Cell


def dense(p: Parameters, h: Any) -> Any:
    return h @ p["w"] + jnp.broadcast_to(p["b"], (*h.shape[:-1], p["b"].shape[0]))


def net(p: Parameters) -> Cell:
    """A layer with one hidden layer, a residual connection and a normalization; what is injected is added."""

    def apply(h: Any, injected: Any) -> Any:
        u = h + injected
        u = u + dense(p["second"], jax.nn.silu(dense(p["first"], u)))
        return u * lax.rsqrt(jnp.mean(u * u, -1, keepdims=True) + 1e-6)

    return apply


def mixer(p: Parameters) -> Cell:
    """Channels are mixed, and then time, by a linear recurrence; h is (batch, time, width)."""

    def apply(h: Any, x: Any) -> Any:
        u, gate = jnp.tanh(dense(p["first"], h)[..., :WIDTH] + x), jax.nn.sigmoid(dense(p["first"], x)[..., WIDTH:])

        def through_time(before: Any, now: Any) -> Any:
            u, gate = now
            after = gate * before + (1 - gate) * u
            return after, after

        mixed = lax.scan(through_time, jnp.zeros_like(u[:, 0]), (u.swapaxes(0, 1), gate.swapaxes(0, 1)))[1]
        return mixed.swapaxes(0, 1)

    return apply


def recurrent(p: Parameters) -> Cell:
    """A cell that sees its previous state and an input; h is (batch, width)."""

    def apply(h: Any, inputs: Any) -> Any:
        before, x = inputs
        return jnp.tanh(dense(p["first"], h)[:, :WIDTH] + dense(p["first"], before)[:, WIDTH:] + x)

    return apply


def attention(p: Parameters) -> Cell:
    """One head over h + x, scaled and added to x; h is (batch, tokens, width)."""

    def apply(h: Any, x: Any) -> Any:
        q, k = jnp.split(dense(p["first"], h + x), 2, axis=-1)
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / WIDTH**0.5)
        return x + 2.0 * jnp.tanh(weights @ (h + x) @ p["first"]["w"][:, :WIDTH])

    return apply


def parameters(key: Any, cells: int) -> Parameters:
    keys = iter(jax.random.split(key, 2 + 2 * cells))

    def layer(n: int, m: int) -> Parameters:
        return {"w": jax.random.normal(next(keys), (n, m)) / (2 * n**0.5), "b": jnp.zeros(m)}

    made = [{"first": layer(WIDTH, 2 * WIDTH), "second": layer(2 * WIDTH, WIDTH)} for _ in range(cells)]
    return {"embed": layer(3, WIDTH), "head": layer(WIDTH, 2), "cells": made}


def counted(cell: Cell, key: Any, steps: int = 3) -> Cell:
    """A recursion of EqR, each application of whose net draws noise by a key of its own. A count in the state gives it.

    Keys are no numbers that a solve can carry, and F is not told how often it was evaluated.
    """

    def apply(state: Any, x: Any) -> Any:
        state, count = state
        keys = iter(jax.random.split(jax.random.fold_in(key, count.ravel()[0].astype(jnp.int32)), steps + 1))
        noisy = library.noisy(cell, lambda h: jax.random.normal(next(keys), h.shape))
        return library.recursion(noisy, steps)(state, x), count + 1

    return apply


def eqr(cell: Cell, state: Any, x: Any, key: Any, cycles: int = 3) -> Any:
    return library.recur(counted(cell, key), (state, jnp.zeros(x.shape[0])), x, cycles - 1)[0]


def eqr_restarts(cell: Cell, starts: Any, x: Any, key: Any, cycles: int = 4) -> Any:
    """The restart whose last step is the shortest.

    In large units the count is no part of this length, and it stays exact if they are a power of 2.
    """
    h0, scale = (starts, jnp.zeros(starts[0].shape[:2])), ((1.0, 1.0), 2.0**100)
    solution = ic.solve(counted(cell, key), h0, x, solver=ic.steps(cycles), batch_ndim=2, scale=scale)
    return solution.best().value[0]


def eqr_by_hand(cell: Cell, state: Any, x: Any, key: Any, cycles: int = 3) -> tuple[Any, Any]:
    """The last state, and the one before it."""
    keys = iter([each for i in range(cycles) for each in jax.random.split(jax.random.fold_in(key, i), 4)])
    noisy = lambda h, x: 0.95 * cell(h, x) + 0.05 * h + 0.01 * jax.random.normal(next(keys), h.shape)  # noqa: E731
    before = by_hand.trm(constant, noisy, state, x, cycles - 1)
    return by_hand.trm(constant, noisy, before, x, 1), before


def recur(cell: Cell, h: Any, x: Any, n: Any, k: int) -> Any:
    """By hand, with an n that is an argument of the program."""
    h = constant(lax.fori_loop(0, n, lambda _, h: constant(cell(h, x)), h))
    return by_hand.recur(constant, cell, h, x, 0, k)


def depths_of_parcae(key: Any) -> tuple[Any, Any]:
    """Of each sequence."""
    key_n, key_k = jax.random.split(key)
    return jax.random.randint(key_n, (BATCH,), 0, 4), jax.random.randint(key_k, (BATCH,), 1, 4)


def parcae(cell: Cell, h: Any, x: Any, n: Any, k: Any) -> Any:
    return by_hand.parcae(constant, jnp.where, cell, h, x, n[:, None], k[:, None], (3, 3))


def until_converged(cell: Cell, h: Any, x: Any, rtol: float, most: int) -> Any:
    """Plain iteration until each sample has converged; such a sample keeps its point."""
    norm = lambda a: jnp.linalg.norm(a.reshape(a.shape[0], -1), axis=1)  # noqa: E731

    def evaluated(h: Any, cap: Any) -> Any:
        f = constant(cell(h, x))
        residual, tolerance = norm(f - h), rtol * norm(f) + 1e-3 * rtol
        if cap is None:  # the residual also has to fall
            cap = jnp.maximum(min(max(10 * rtol, 0.1), 0.5) * residual, 2 * tolerance)
        return h, f, residual > jnp.minimum(tolerance, cap), cap

    def step(carry: Any) -> Any:
        i, h, f, active, cap = carry
        h = jnp.where(active.reshape(-1, *[1] * (h.ndim - 1)), f, h)
        return i + 1, *evaluated(h, cap)

    return lax.while_loop(lambda carry: carry[3].any() & (carry[0] < most), step, (1, *evaluated(h, None)))[1]


def damped(cell: Cell, h: Any, x: Any, k: int, lam: float) -> Any:
    h = constant(h)
    for _ in range(k):
        h = lam * cell(h, x) + (1 - lam) * h
    return h


def fp_rnn(cell: Cell, h: Any, x: Any) -> Any:
    return cell(constant(until_converged(cell, constant(h), constant(x), 0.01, 30)), x)


def implicit_language_model(cell: Cell, x: Any, trained: bool) -> Any:
    h = jnp.zeros_like(x)
    if trained:
        return damped(cell, until_converged(cell, h, constant(x), 0.05, 32), x, 4, 0.8)
    return damped(cell, by_hand.recur(constant, cell, h, x, 4, 0), x, 1, 0.8)


@dataclass(frozen=True)
class Draws:
    """What a training step draws: an n that may be traced, a key, and what a program is specific to."""

    n: Any
    key: Any
    static: Any


Advance = Callable[[list[Cell], Any, Any, Draws], Any]


@dataclass(frozen=True)
class Loop:
    name: str
    cells: list[Callable[[Parameters], Cell]]
    library: Advance
    by_hand: Advance
    static: Callable[[int], Any] = lambda step: None
    pair: bool = False
    sequence: bool = False


LOOPS = [
    Loop(
        "HRM",
        [net, net],
        lambda cells, state, x, draws: library.hrm(*cells, state, x),
        lambda cells, state, x, draws: by_hand.hrm(constant, *cells, state, x),
        pair=True,
    ),
    Loop(
        "TRM",
        [net],
        lambda cells, state, x, draws: library.trm(*cells, state, x),
        lambda cells, state, x, draws: by_hand.trm(constant, *cells, state, x),
        pair=True,
    ),
    Loop(
        "EqR",
        [net],
        lambda cells, state, x, draws: eqr(*cells, state, x, draws.key),
        lambda cells, state, x, draws: eqr_by_hand(*cells, state, x, draws.key)[0],
        pair=True,
    ),
    Loop(
        "Huginn",
        [net],
        lambda cells, state, x, draws: library.recur(
            *cells, jax.random.normal(draws.key, x.shape), x, draws.n, draws.static
        ),
        lambda cells, state, x, draws: recur(*cells, jax.random.normal(draws.key, x.shape), x, draws.n, draws.static),
        lambda step: 1 + step % 2,
    ),
    Loop(
        "Parcae",
        [net],
        lambda cells, state, x, draws: library.parcae(*cells, state, x, *depths_of_parcae(draws.key), 3),
        lambda cells, state, x, draws: parcae(*cells, state, x, *depths_of_parcae(draws.key)),
    ),
    Loop(
        "HRM-Text",
        [net, net],
        lambda cells, state, x, draws: library.hrm_text(*cells, x, jnp.ones_like(x), draws.static),
        lambda cells, state, x, draws: by_hand.hrm_text(constant, *cells, x, jnp.ones_like(x), draws.static),
        lambda step: 2 + 3 * (step >= 10),
    ),
    Loop(
        "FPDM",
        [net],
        lambda cells, state, x, draws: library.recur(*cells, state, x, draws.n, draws.static),
        lambda cells, state, x, draws: recur(*cells, state, x, draws.n, draws.static),
        lambda step: 1 + step % 2,
    ),
    Loop(
        "FP-RNN",
        [mixer],
        lambda cells, state, x, draws: library.fp_rnn(*cells, jnp.zeros_like(x), x),
        lambda cells, state, x, draws: fp_rnn(*cells, jnp.zeros_like(x), x),
        sequence=True,
    ),
    Loop(
        "FP-RNN, step by step",
        [recurrent],
        lambda cells, state, x, draws: jnp.stack(
            library.fp_rnn_step_by_step(*cells, jnp.zeros_like(x[:, 0]), list(x.swapaxes(0, 1))), 1
        ),
        lambda cells, state, x, draws: jnp.stack(
            by_hand.step_by_step(fp_rnn, *cells, jnp.zeros_like(x[:, 0]), list(x.swapaxes(0, 1))), 1
        ),
        sequence=True,
    ),
    Loop(
        "implicit language model",
        [attention],
        lambda cells, state, x, draws: library.implicit_language_model(*cells, jnp.zeros_like(x), x, draws.static),
        lambda cells, state, x, draws: implicit_language_model(*cells, x, draws.static),
        lambda step: step >= 10,
        sequence=True,
    ),
]


def batch(sequence: bool) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    shape = (BATCH, TOKENS) if sequence else (BATCH,)
    x, target = (jnp.asarray(generator.standard_normal((*shape, n))) for n in (3, 2))
    return x, target


def start(loop: Loop) -> tuple[Parameters, Any]:
    shape = (BATCH, TOKENS, WIDTH) if loop.sequence else (BATCH, WIDTH)
    state = jnp.zeros(shape)
    return parameters(jax.random.key(0), len(loop.cells)), (state, state) if loop.pair else state


def training_step(loop: Loop, advance: Advance) -> Callable[..., tuple[Parameters, Any]]:
    """(parameters, state), after a step of gradient descent."""
    x, target = batch(loop.sequence)

    def step(p: Parameters, state: Any, n: Any, key: Any, static: Any) -> tuple[Parameters, Any]:
        def loss(p: Parameters) -> Any:
            cells = [make(q) for make, q in zip(loop.cells, p["cells"], strict=True)]
            new = advance(cells, state, dense(p["embed"], x), Draws(n, key, static))
            return jnp.mean((dense(p["head"], new[0] if loop.pair else new) - target) ** 2), new

        gradient, new = jax.grad(loss, has_aux=True)(p)
        return jax.tree.map(lambda p, g: p - 0.2 * g, p, gradient), constant(new)

    return step


def train(loop: Loop, advance: Advance) -> Parameters:
    step = jax.jit(training_step(loop, advance), static_argnums=4)
    p, state = start(loop)
    depths = np.random.default_rng(1).poisson(1.5, STEPS)
    assert depths.min() == 0
    for i in range(STEPS):
        p, state = step(p, state, jnp.asarray(depths[i]), jax.random.key(i), loop.static(i))
    return p


def assert_equal(ours: Parameters, theirs: Parameters) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_a_loop_trains_as_the_loop_by_hand_does(loop: Loop) -> None:
    ours = train(loop, loop.library)
    assert_equal(ours, train(loop, loop.by_hand))
    moved = jnp.concatenate(
        [jnp.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (ours, start(loop)[0])), strict=True)]
    )
    assert jnp.linalg.norm(moved) > 0.1


@pytest.mark.parametrize("loop", LOOPS[:2], ids=lambda loop: loop.name)
def test_training_steps_are_scanned(loop: Loop) -> None:
    step = training_step(loop, loop.library)

    def scanned(carry: Any, _: None) -> Any:
        return step(*carry, None, None, None), None

    p, _ = jax.jit(partial(lax.scan, scanned, length=STEPS))(start(loop))[0]
    assert_equal(p, train(loop, loop.by_hand))


def test_eqr_chooses_among_restarts_by_the_last_step() -> None:
    cell = net(parameters(jax.random.key(0), 1)["cells"][0])
    generator = np.random.default_rng(0)
    x = jnp.broadcast_to(jnp.asarray(generator.standard_normal((BATCH, WIDTH))), (6, BATCH, WIDTH))
    starts = tuple(jnp.asarray(generator.standard_normal((2, 6, BATCH, WIDTH))))
    key = jax.random.key(1)
    last, before = eqr_by_hand(cell, starts, x, key, 4)
    length = jnp.linalg.norm(jnp.concatenate(last, -1) - jnp.concatenate(before, -1), axis=-1)
    best = length.argmin(0)
    assert len(set(best.tolist())) > 1
    for a, b in zip(jax.jit(partial(eqr_restarts, cell))(starts, x, key), last, strict=True):
        np.testing.assert_allclose(a, b[best, jnp.arange(BATCH)], rtol=1e-12, atol=1e-12)

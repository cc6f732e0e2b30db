"""What a trained model does to puzzles, recursion by recursion; in every framework."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import implicit_core as ic

from .sudoku import Array, Puzzles

BELIEF = 0.9
"""Probability at which the model is taken to believe its answer. At 0.5 one answer in five was wrong."""


class Functions(NamedTuple):
    """The functions of a model, see :class:`.model.RecursiveModel`; without derivatives, or compiled."""

    start: Callable[..., Any]
    embed: Callable[..., Any]
    recursion: Callable[..., Any]
    read: Callable[..., Any]


class Answers(NamedTuple):
    """What a model says of n puzzles after a recursion.

    Attributes
    ----------
    digits
        1 to 6: integers (n, 36).
    confidence
        Their probabilities: (n, 36).
    belief
        The probability that all of them are right: (n,).
    residual
        Relative: (n,).
    """

    digits: Array
    confidence: Array
    belief: Array
    residual: Array


class Halted(NamedTuple):
    """Recursions until the model believes its answer.

    Attributes
    ----------
    halted
        Whether it did: booleans (n,).
    recursions
        Behind each answer: integers (n,).
    evaluated
        Recursions that were computed for each puzzle, one more where it halted, which the solver needs to look.
    right
        Whether each answer is right: booleans (n,).
    """

    halted: Array
    recursions: Array
    evaluated: Array
    right: Array


def by_depth(model: Functions, clues: Array, most: int) -> Iterator[Answers]:
    """The answers of a model to clues (n, 36) after 1, 2, ..., ``most`` recursions, from one solve."""
    h, x = model.start(clues), model.embed(clues)
    stepper = ic.Stepper(model.recursion, solver=ic.steps(most), batch_ndim=1)
    state = stepper.init(h, x)
    for _ in range(most):
        state = stepper.step(state, x)
        logits, solved = (np.asarray(a) for a in model.read(state.value[0]))
        size = np.sqrt(sum(np.square(np.asarray(part)).sum(axis=(1, 2)) for part in state.value))
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        yield Answers(
            logits.argmax(axis=-1) + 1,
            (odds / odds.sum(axis=-1, keepdims=True)).max(axis=-1),
            1 / (1 + np.exp(-solved)),
            np.asarray(state.residual) / size,
        )


def shares(answers: Answers, puzzles: Puzzles) -> dict[str, float]:
    """The shares of right cells and of solved puzzles, and the median relative residual."""
    right = answers.digits == puzzles.solutions
    return {
        "cells": float(right.mean()),
        "exact": float(right.all(axis=1).mean()),
        "residual": float(np.median(answers.residual)),
    }


def until_halted(model: Functions, puzzles: Puzzles, most: int, belief: float = BELIEF) -> Halted:
    """Each puzzle recurs until the model believes its answer, at most ``most`` times. Then it leaves the batch."""
    limit = math.log(belief / (1 - belief))
    x = model.embed(puzzles.clues)
    # The belief at the start has seen no puzzle.
    h = ic.solve(model.recursion, model.start(puzzles.clues), x, solver=ic.steps(1), batch_ndim=1).value
    solver = ic.FixedPointIteration(
        rtol=0.0, atol=0.0, max_steps=most - 1, stop=lambda h, _: model.read(h[0])[1] > limit
    )
    solution = ic.solve(model.recursion, h, x, solver=ic.Compacting(solver), batch_ndim=1)
    digits = np.asarray(model.read(solution.value[0])[0]).argmax(axis=-1) + 1
    halted, steps = np.asarray(solution.converged), np.asarray(solution.stats.steps)
    return Halted(
        halted,
        np.where(halted, steps, most),
        np.where(halted, steps + 1, most),
        (digits == puzzles.solutions).all(axis=1),
    )

"""Sudoku puzzles of 6 x 6 cells in boxes of 2 x 3, each with one solution.

Many puzzles are searched at once: ``candidates[c, i, d]`` says whether cell c of puzzle i may hold the digit d + 1.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

DIGITS = 6
CELLS = DIGITS**2
CHUNK = 2000
"""Puzzles that are searched together: few enough for the caches of a processor."""


def _units() -> Array:
    """Which cells lie in which row, column and box: booleans (18, 36)."""
    row, column = np.divmod(np.arange(CELLS), DIGITS)
    box = row // 2 * 2 + column // 3
    return np.concatenate([np.arange(DIGITS)[:, None] == kind for kind in (row, column, box)])


UNITS = _units().astype(np.float32)  # float32, for products of matrices
PEERS = ((UNITS.T @ UNITS > 0) & ~np.eye(CELLS, dtype=bool)).astype(np.float32)
"""Which cells must differ: (36, 36)."""


class Puzzles(NamedTuple):
    """Puzzles and their solutions.

    Attributes
    ----------
    clues
        The given digits, 0 where a cell is empty: integers (n, 36), row by row.
    solutions
        The digits 1 to 6 of all cells: integers (n, 36).
    """

    clues: Array
    solutions: Array


def train_and_test(seed: int, train: int, test: int, clues: int) -> tuple[Puzzles, Puzzles]:
    """Two sets of puzzles that have no solution in common; ``clues`` as in :func:`puzzles`.

    Examples
    --------
    >>> from implicit_core.examples.recursive.sudoku import train_and_test
    >>> train, test = train_and_test(seed=0, train=4, test=2, clues=12)
    >>> train.clues.shape, test.solutions.shape
    ((4, 36), (2, 36))
    """
    rng = np.random.default_rng(seed)
    solutions = distinct_grids(rng, train + test)
    given = np.concatenate(
        [puzzles(rng, part, clues) for part in np.split(solutions, range(CHUNK, len(solutions), CHUNK))]
    )
    return Puzzles(given[:train], solutions[:train]), Puzzles(given[train:], solutions[train:])


def distinct_grids(rng: np.random.Generator, count: int) -> Array:
    """Completed grids, no two of them equal: integers (count, 36), in random order."""
    grids = np.zeros((0, CELLS), dtype=np.int64)
    while len(grids) < count:
        grids = np.unique(np.concatenate([grids, random_grids(rng, CHUNK)]), axis=0)
    return rng.permutation(grids)[:count]


def random_grids(rng: np.random.Generator, tries: int) -> Array:
    """Completed grids, at most ``tries``: random digits in random cells, until one contradicts another or all fit."""
    candidates = np.ones((CELLS, tries, DIGITS), dtype=bool)
    while (open_cells := candidates.sum(axis=2) > 1).any():
        cell = np.where(open_cells, rng.random(open_cells.shape), -1.0).argmax(axis=0)
        every = np.arange(len(cell))
        digit = (candidates[cell, every] * rng.random((len(cell), DIGITS))).argmax(axis=1)
        candidates = propagate(_with_digit(candidates, cell, every, digit))
        candidates = candidates[:, possible(candidates)]
    grids: Array = candidates.argmax(axis=2).T + 1
    return grids


def puzzles(rng: np.random.Generator, solutions: Array, clues: int) -> Array:
    """Clues (n, 36) for solutions (n, 36): digits are taken away in random order, as long as one solution is left.

    A puzzle keeps at least ``clues`` digits, and more where none can be spared.
    """
    given = solutions.copy()
    every = np.arange(len(given))
    for cell in rng.permuted(np.tile(np.arange(CELLS), (len(given), 1)), axis=1).T:
        # Another solution has another digit in this cell: a search without the right digit finds it.
        trial = given.copy()
        trial[every, cell] = 0
        candidates = candidates_of(trial)
        candidates[cell, every, solutions[every, cell] - 1] = False
        spare = (given > 0).sum(axis=1) > clues
        spare[spare] = ~solvable(candidates[:, spare])
        given[spare, cell[spare]] = 0
    return given


def candidates_of(clues: Array) -> Array:
    """The candidates of clues (n, 36): every digit in an empty cell."""
    given = clues.T[:, :, None]
    candidates: Array = (given == 0) | (given == np.arange(1, DIGITS + 1))
    return candidates


def solvable(candidates: Array) -> Array:
    """Whether there is a solution: booleans (n,). Where deductions end, each candidate of one cell is tried."""
    found = np.zeros(candidates.shape[1], dtype=bool)
    puzzle = np.arange(len(found))
    while len(puzzle):
        candidates = propagate(candidates)
        alive = possible(candidates)
        count = candidates.sum(axis=2)
        found[puzzle[alive & (count == 1).all(axis=0)]] = True
        left = alive & ~found[puzzle]
        candidates, puzzle, count = candidates[:, left], puzzle[left], count[:, left]
        cell = np.where(count > 1, count, DIGITS + 1).argmin(axis=0)
        parent, digit = np.nonzero(candidates[cell, np.arange(len(puzzle))])
        candidates, puzzle = _with_digit(candidates, cell[parent], parent, digit), puzzle[parent]
    return found


def propagate(candidates: Array) -> Array:
    """The candidates that are left when no digit follows any more, from its cell or from a row, column or box.

    A cell with one candidate takes it from its peers, and a digit with one place in a unit is put there.
    """
    while True:
        left: Array
        single = candidates & (candidates.sum(axis=2, keepdims=True) == 1)
        left = candidates & (_product(PEERS, single) == 0)
        only_place = left & (_product(UNITS.T, _product(UNITS, left) == 1) > 0)
        left = only_place | (left & ~only_place.any(axis=2, keepdims=True))
        if np.array_equal(left, candidates):
            return left
        candidates = left


def possible(candidates: Array) -> Array:
    """Whether every cell has a candidate and every digit a place in each unit: booleans (n,)."""
    places = _product(UNITS, candidates)
    fits: Array = np.logical_and(candidates.any(axis=2).all(axis=0), (places > 0).all(axis=(0, 2)))
    return fits


def _product(matrix: Array, candidates: Array) -> Array:
    """A matrix times candidates, over cells or units."""
    product: Array = matrix @ candidates.reshape(len(candidates), -1).astype(np.float32)
    return product.reshape(len(matrix), *candidates.shape[1:])


def _with_digit(candidates: Array, cell: Array, parent: Array, digit: Array) -> Array:
    """Copies of the puzzles ``parent``, each with one digit put into one cell."""
    copies = candidates[:, parent]
    copies[cell, np.arange(len(parent))] = np.arange(DIGITS) == digit[:, None]
    return copies

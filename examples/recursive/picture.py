"""A picture of a puzzle that is solved, recursion by recursion."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .evaluation import Answers, Functions, by_depth
from .sudoku import DIGITS, Array, Puzzles

# Colours of Okabe and Ito, distinct with any colour vision.
GIVEN, RIGHT, WRONG, LINE = "#000000", "#0072B2", "#D55E00", "#009E73"
BOARDS = 5


def draw(path: Path, model: Functions, puzzles: Puzzles, most: int) -> Figure:
    """Draw how a model solves the puzzle that takes it longest, and save the picture.

    Parameters
    ----------
    path
        The file; its folder is made.
    model
        The functions of a trained model.
    puzzles
        Of which one is drawn.
    most
        Recursions in which it is solved. Twice as many are drawn.
    """
    answers = list(by_depth(model, puzzles.clues, 2 * most))
    right = np.stack([(a.digits == puzzles.solutions).all(axis=1) for a in answers[:most]])
    # The first recursion from which on the answer is right; 0 if it is wrong in the end.
    solved = np.where(right[-1], most - np.logical_and.accumulate(right[::-1]).sum(axis=0) + 1, 0)
    chosen = int(solved.argmax())
    figure = picture(
        puzzles.clues[chosen],
        puzzles.solutions[chosen],
        [Answers(*(part[chosen] for part in a)) for a in answers],
        int(solved[chosen]) or most,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


def picture(clues: Array, solution: Array, answers: list[Answers], last: int) -> Figure:
    """The boards of one puzzle up to the recursion ``last``; and residual, wrong cells and belief of all recursions."""
    shown = sorted({round(depth) for depth in np.geomspace(1, last, BOARDS)})
    while len(shown) < min(BOARDS, last):
        shown = sorted({*shown, next(i for i in range(1, last + 1) if i not in shown)})
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    figure.suptitle(
        "black: given, blue: right, orange: wrong; the surer the model is, the darker is the cell", fontsize=9
    )
    grid = figure.add_gridspec(2, len(shown) + 1)
    board(figure.add_subplot(grid[0, 0]), clues, solution, None, "the puzzle")
    for column, depth in enumerate(shown, 1):
        title = f"after {depth} recursion{'s' * (depth > 1)}"
        board(figure.add_subplot(grid[0, column]), clues, solution, answers[depth - 1], title)
    curves(figure.add_subplot(grid[1, :]), solution, answers, shown)
    return figure


def board(axes: Axes, clues: Array, solution: Array, answers: Answers | None, title: str) -> None:
    """A board: given digits black, others by right and wrong; the surer the model is, the darker is the cell."""
    cells = np.ones((DIGITS, DIGITS, 3))
    for cell, (given, true) in enumerate(zip(clues, solution, strict=True)):
        row, column = divmod(cell, DIGITS)
        digit, colour, weight = int(given), GIVEN, "bold"
        if not given and answers is not None:
            digit, sure = int(answers.digits[cell]), float(answers.confidence[cell])
            colour, weight = (RIGHT if digit == true else WRONG), "normal"
            # From a guess, 1 / 6, to certainty.
            shade = 0.45 * max(0.0, (sure - 1 / DIGITS) / (1 - 1 / DIGITS))
            cells[row, column] = 1 - shade * (1 - np.array(to_rgb(colour)))
        elif given:
            cells[row, column] = 0.9
        if digit:
            axes.text(column, row, str(digit), color=colour, weight=weight, ha="center", va="center", fontsize=11)
    axes.imshow(cells)
    for i in range(DIGITS + 1):
        axes.axhline(i - 0.5, color="black", linewidth=1.4 if i % 2 == 0 else 0.3)
        axes.axvline(i - 0.5, color="black", linewidth=1.4 if i % 3 == 0 else 0.3)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def curves(axes: Axes, solution: Array, answers: list[Answers], shown: list[int]) -> None:
    """The relative residual, and beside it wrong cells and the belief."""
    depth = np.arange(1, len(answers) + 1)
    for i in shown:
        axes.axvline(i, color="#cccccc", linewidth=0.8, zorder=0)
    axes.semilogy(depth, [float(a.residual) for a in answers], "o-", color=LINE, markersize=4)
    axes.set_xlim(0, len(answers) + 1)
    axes.set_xlabel("recursion")
    axes.set_ylabel("relative residual", color=LINE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    other = axes.twinx()
    wrong = [int((a.digits != solution).sum()) for a in answers]
    other.step(depth, wrong, where="mid", color=WRONG)
    other.set_ylabel("wrong cells", color=WRONG)
    other.set_ylim(bottom=-0.3)
    other.yaxis.set_major_locator(MaxNLocator(integer=True))

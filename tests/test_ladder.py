"""The gradient ladder: its puzzles, its gradients beside loops written by hand, and its runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.ladder import command, measures, runs, words
from benchmarks.ladder.rungs import Rung, rungs
from benchmarks.ladder.tasks import SUDOKU, WORDS, Examples
from benchmarks.ladder.training import Training
from implicit_core.examples.recursive import sudoku
from implicit_core.examples.recursive.model import Prediction
from implicit_core.examples.recursive.training import loss_of

pytestmark = pytest.mark.slow

SETTINGS = SUDOKU.quick
T, STEPS = SETTINGS.recursions, SETTINGS.latent


@pytest.fixture(scope="module")
def data() -> Any:
    return SUDOKU.data(SETTINGS)


def fits(grid: list[int], cell: int, digit: int) -> bool:
    row, column = divmod(cell, 6)
    for other, value in enumerate(grid):
        r, c = divmod(other, 6)
        same_box = (r // 2, c // 3) == (row // 2, column // 3)
        if value == digit and other != cell and (r == row or c == column or same_box):
            return False
    return True


def solutions(grid: list[int]) -> list[list[int]]:
    """All solutions of a puzzle, by trying every digit in the first empty cell."""
    if 0 not in grid:
        return [grid]
    cell = grid.index(0)
    tried = [[*grid[:cell], digit, *grid[cell + 1 :]] for digit in range(1, 7) if fits(grid, cell, digit)]
    return [found for following in tried for found in solutions(following)]


def test_each_puzzle_has_one_solution_and_the_sets_have_none_in_common() -> None:
    train, test = sudoku.train_and_test(seed=3, train=30, test=10, clues=13)
    clues, solved = np.vstack([train.clues, test.clues]), np.vstack([train.solutions, test.solutions])
    for puzzle, solution in zip(clues.tolist(), solved.tolist(), strict=True):
        assert solutions(puzzle) == [solution]
    assert set((clues > 0).sum(axis=1)) == {13}
    assert len(np.unique(solved, axis=0)) == 40
    again = sudoku.train_and_test(seed=3, train=30, test=10, clues=13)
    assert np.array_equal(train.clues, again[0].clues)
    assert np.array_equal(test.clues, again[1].clues)


def test_a_puzzle_of_several_solutions_is_found_out() -> None:
    """Without the two digits of a rectangle in two boxes, both may be exchanged."""
    grid = [1, 2, 3, 4, 5, 6, 4, 5, 6, 1, 2, 3, 2, 3, 1, 5, 6, 4, 5, 6, 4, 2, 3, 1, 3, 1, 2, 6, 4, 5, 6, 4, 5, 3, 1, 2]
    open_cells = [cell for cell in range(36) if cell // 6 in (0, 1) and grid[cell] in (1, 4)]
    puzzle = [0 if cell in open_cells else digit for cell, digit in enumerate(grid)]
    count = len(solutions(puzzle))
    candidates = sudoku.candidates_of(np.array([puzzle]))
    candidates[open_cells[0], 0, grid[open_cells[0]] - 1] = False
    assert bool(sudoku.solvable(candidates)[0]) == (count > 1) == True  # noqa: E712


HANDWRITTEN: dict[str, Callable[[int, int], bool]] = {
    "full": lambda i, j: True,
    "trm": lambda i, j: i == T - 1,
    "unroll-2-1": lambda i, j: i >= T - 2,
    "hrm": lambda i, j: i == T - 1 and j >= STEPS - 1,
}
"""Whether evaluation j of recursion i keeps its graph: the last one of a recursion is that of the answer."""


def by_hand(model: Any, examples: Examples, state: Any, kept: Callable[[int, int], bool]) -> torch.Tensor:
    """The gradient, with a plain loop."""
    model.zero_grad()
    x = model.digits(examples.inputs) + model.positions.weight
    net, (y, z) = model.layer.cell.net, state
    for i in range(T):
        for j in range(STEPS + 1):
            with torch.set_grad_enabled(kept(i, j)):
                y, z = (net(y + z), z) if j == STEPS else (y, net(x + y + z))
    logits, solved = model.head(y), model.halt(y.mean(dim=1)).squeeze(1)
    loss_of(Prediction(logits, solved, state), examples.targets).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([x.flatten() for x in gradients])


def training(name: str, data: Any, dtype: torch.dtype = torch.float64) -> Training:
    made = Training(SUDOKU, SETTINGS, rungs(T)[name], 1, data.train)
    made.model.to(dtype)
    return made


def started(data: Any) -> tuple[Examples, Any]:
    generator = torch.Generator().manual_seed(0)
    probe = Examples(*(x[: SETTINGS.batch] for x in data.train))
    shape = (*probe.inputs.shape, SETTINGS.width)
    return probe, tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_a_gradient_is_that_of_a_loop_written_by_hand(name: str, data: Any) -> None:
    made, (probe, state) = training(name, data), started(data)
    found = measures.gradient_of(SUDOKU, SETTINGS, made.rung, made, probe, state)
    expected = by_hand(made.model, probe, state, HANDWRITTEN[name])
    torch.testing.assert_close(found.vector, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


SERIES = {"one-step": (1, 1.0), "neumann-3-1": (3, 1.0), "neumann-5-0.5": (5, 0.5)}


@pytest.mark.parametrize("name", SERIES)
def test_a_neumann_series_is_that_of_a_loop_written_by_hand(name: str, data: Any) -> None:
    """Of the recursion at the state after T recursions."""
    made, (probe, state) = training(name, data), started(data)
    found = measures.gradient_of(SUDOKU, SETTINGS, made.rung, made, probe, state)
    model: Any = made.model
    model.zero_grad()
    x = model.digits(probe.inputs) + model.positions.weight
    with torch.no_grad():
        for _ in range(T):
            state = model.layer.cell(state, x)
    h = tuple(part.requires_grad_() for part in state)
    f = model.layer.cell(h, x)
    y = h[0].detach().requires_grad_()
    logits, solved = model.head(y), model.halt(y.mean(dim=1)).squeeze(1)
    loss_of(Prediction(logits, solved, h), probe.targets).backward()
    v = y.grad, torch.zeros_like(y)
    k, lam = SERIES[name]
    term, total = v, v
    for _ in range(k - 1):
        product = torch.autograd.grad(f, h, term, retain_graph=True)
        term = tuple(lam * a + (1 - lam) * b for a, b in zip(product, term, strict=True))
        total = tuple(a + b for a, b in zip(total, term, strict=True))
    torch.autograd.backward(f, tuple(lam * part for part in total))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(found.vector, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


FREE = {"neumann-3-1": 3, "neumann-5-0.5": 5, "one-step": 1}


def test_costs_are_counted(data: Any) -> None:
    """In evaluations of the network, of which a recursion makes one for each update of z, and one for y."""
    one = STEPS + 1
    expected = {
        "hrm": (T * one, 2),
        "trm": (T * one, one),
        "unroll-2-1": (T * one, 2 * one),
        "full": (T * one, T * one),
        "switching": (T * one, 2 * one),
        "unroll-5-0.5": ((T + 3) * one, 5 * one),
        **{name: ((T + 1) * one, k * one) for name, k in FREE.items()},
    }
    probe, state = started(data)
    found = {
        name: measures.gradient_of(SUDOKU, SETTINGS, made.rung, made, probe, state)
        for name in expected
        for made in [training(name, data)]
    }
    assert {name: (f.evaluations, f.vjps) for name, f in found.items()} == expected
    saved = {name: f.saved for name, f in found.items()}
    assert saved["hrm"] < saved["trm"] < saved["unroll-2-1"] < saved["full"]
    assert saved["one-step"] == saved["neumann-3-1"] == saved["neumann-5-0.5"]


def test_all_rungs_but_the_damped_one_have_the_same_value(data: Any) -> None:
    made, (probe, state) = training("full", data), started(data)
    losses = {
        name: measures.gradient_of(SUDOKU, SETTINGS, rung, made, probe, state).loss
        for name, rung in rungs(T).items()
        if name != "unroll-5-0.5"
    }
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["full"], rel=1e-12), name


def test_the_products_of_words_are_those_of_even_permutations() -> None:
    even = [p for p in permutations(range(5)) if sum(a > b for a, b in combinations(p, 2)) % 2 == 0]
    elements, products = words.words(np.random.default_rng(0), 20, 6)
    for xs, found in zip(elements.tolist(), products.tolist(), strict=True):
        total = tuple(range(5))
        for x, product in zip(xs, found, strict=True):
            total = tuple(even[x][i] for i in total)
            assert even[product] == total
    assert np.array_equal(words.group()[0], np.arange(60))


def test_words_are_read_as_a_recurrent_network_reads_them() -> None:
    """T recursions in words of T elements: the exact gradient and the full one are backpropagation through time."""
    settings = WORDS.quick
    train = WORDS.data(settings).train
    made = Training(WORDS, settings, rungs(settings.recursions)["full"], 0, train)
    model: Any = made.model.double()
    state = model.start(train.inputs)
    h, x = model.layer.cell.first.expand(len(train.inputs), -1), model.elements(train.inputs)
    steps = [h := model.layer.cell.net(h, x[:, t]) for t in range(x.shape[1])]
    h = torch.stack(steps, dim=1)
    prediction = Prediction(model.head(h), model.right(h.mean(dim=1)).squeeze(1), state)
    loss_of(prediction, train.targets).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    full, exact = (
        measures.gradient_of(WORDS, settings, rungs(settings.recursions)[name], made, train, state)
        for name in ("full", "exact")
    )
    torch.testing.assert_close(full.vector, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    assert float(torch.linalg.vector_norm(exact.vector - expected) / torch.linalg.vector_norm(expected)) < 0.02
    # The last recursion moves the last of 32 positions alone, each of which has the norm √width.
    assert exact.relative == pytest.approx(32**-0.5)
    assert full.relative == pytest.approx(32**-0.5)


def test_switching_follows_the_residual_of_the_step_before() -> None:
    table = rungs(T)
    rung: Rung = table["switching"]
    assert rung.options(0.5)["gradient"] == table["unroll-2-1"].gradient
    assert rung.options(float("nan"))["gradient"] == table["unroll-2-1"].gradient
    assert rung.options(0.01)["gradient"] == table["neumann-3-1"].gradient


def without_times(file: Path) -> Any:
    record = json.loads(file.read_text())
    for found in record["checkpoints"]:
        found.pop("seconds")
        found.pop("processor_seconds")
    return record


def test_a_run_that_was_stopped_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "implicit_core.examples.recursive.loops.THRESHOLD", 0.2
    )  # the first step is above it, later ones below
    run = runs.Run("sudoku", "switching", 0, True, tmp_path / "whole", tmp_path)
    runs.execute(run, print)
    parts = replace(run, results=tmp_path / "parts")
    runs.execute(parts, print, until=SETTINGS.marks()[0])
    assert parts.unfinished.exists()
    assert not parts.finished()
    runs.execute(parts, print)
    assert parts.finished()
    assert not parts.unfinished.exists()
    assert without_times(run.result) == without_times(parts.result)


def test_a_run_that_diverges_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(self: Training) -> None:
        self.done, self.diverged = 5, True

    monkeypatch.setattr(Training, "step", diverges)
    run = runs.Run("sudoku", "trm", 0, True, tmp_path, tmp_path)
    runs.execute(run, print)
    record = json.loads(run.result.read_text())
    assert record["diverged"] == 5
    assert record["checkpoints"] == []


def test_a_result_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sudoku-trm-0.json").write_text(json.dumps({"settings": {"steps": 1}}))
    arguments = ["ladder", "--quick", "--estimators", "trm", "--results", str(tmp_path), "--scratch", str(tmp_path)]
    assert benchmarks.main(arguments) == 2
    assert "other settings" in " ".join(capsys.readouterr().out.split())


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = ["--quick", "--scratch", str(tmp_path)]
    assert command.main([*scratch, "--estimators", "trm", "full", "--seeds", "2"]) == 0
    capsys.readouterr()
    (tmp_path / "quick" / "sudoku-hrm-0.json").write_text(diverged(tmp_path / "quick" / "sudoku-trm-0.json"))
    assert command.main([*scratch, "--report"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "1(1)" in printed
    record = json.loads((tmp_path / "quick" / "sudoku.json").read_text())
    assert record["rungs"]["full"]["runs"] == record["rungs"]["trm"]["runs"] == 2
    assert record["rungs"]["full"]["gradient"]["cosine"][0][0] == pytest.approx(1.0)
    assert record["rungs"]["trm"]["gradient"]["cosine"][0][0] < 1.0
    assert set(record["along_full"]) == {*SUDOKU.main, *SUDOKU.rest}
    assert (tmp_path / "quick" / "sudoku.png").read_bytes().startswith(b"\x89PNG")


def diverged(file: Path) -> str:
    record = json.loads(file.read_text())
    return json.dumps(record | {"rung": "hrm", "diverged": 3, "checkpoints": []})

"""The recursive example: both frameworks agree, an interruption changes nothing, and halting saves recursions."""

import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import libraries  # noqa: F401  # configures JAX
import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator
from threadpoolctl import threadpool_limits

from implicit_core.examples import program, recursive
from implicit_core.examples.recursive import (
    evaluation,
    model,
    model_jax,
    picture,
    run,
    sudoku,
    training,
    training_jax,
)
from implicit_core.examples.recursive.__main__ import PROGRAM, main
from implicit_core.examples.recursive.batches import Places
from implicit_core.examples.recursive.settings import Settings
from implicit_core.examples.recursive.sudoku import Puzzles

pytestmark = [pytest.mark.slow, pytest.mark.promotes("optax")]

SMALL = {"steps": 20, "batch": 16, "width": 8, "supervisions": 4, "latent_steps": 2, "recursions": 2}
FLAGS = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
FRAMEWORKS = {"torch": training.Training, "jax": training_jax.Training}


@pytest.fixture(scope="module", autouse=True)
def puzzles() -> Iterator[tuple[Puzzles, Puzzles]]:
    """Few puzzles, which the program uses instead of all."""
    few = sudoku.train_and_test(seed=0, train=40, test=20, clues=20)
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(sudoku, "train_and_test", lambda *_: few)
        yield few


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Press Ctrl-C within the step with the given number, counted from 1."""

    def interrupt(framework: str, number: int) -> None:
        kind = FRAMEWORKS[framework]
        original, calls = kind.step, 0

        def interrupted(self: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGINT)
            original(self)

        monkeypatch.setattr(kind, "step", interrupted)

    return interrupt


def in_float64(settings: Settings, train: Puzzles) -> training.Training:
    """A training in PyTorch in float64."""
    made = training.Training.of_puzzles(settings, train)
    made.model.double()
    made.average.double()
    made.state = tuple(part.double() for part in made.state)
    return made


def path_of(name: str) -> Callable[[Any], Any]:
    """Where the model in JAX has a parameter that the one in PyTorch calls ``name``."""
    parts = name.replace("layer.cell", "recursion").split(".")

    def where(tree: Any) -> Any:
        for part in parts:
            tree = tree[int(part)] if part.isdigit() else getattr(tree, part)
        return tree

    return where


def translated(theirs: model.RecursiveModel, ours: model_jax.RecursiveModel) -> model_jax.RecursiveModel:
    """The model in JAX, with the parameters of the one in PyTorch."""
    names, values = zip(*theirs.named_parameters(), strict=True)
    assert len(names) == len(jax.tree.leaves(eqx.filter(ours, eqx.is_inexact_array)))
    paths = [path_of(name) for name in names]
    return eqx.tree_at(
        lambda tree: [path(tree) for path in paths], ours, [jnp.asarray(value.detach().numpy()) for value in values]
    )


@pytest.mark.parametrize("gradient", ["trm", "hrm", "neumann"])
def test_both_frameworks_compute_the_same_values_and_gradients(gradient: str, puzzles: tuple[Puzzles, Puzzles]) -> None:
    settings = Settings(gradient=gradient, **SMALL)
    theirs = in_float64(settings, puzzles[0])
    ours = training_jax.Training(settings, puzzles[0])
    rng = np.random.default_rng(0)
    state = [rng.normal(size=(40, 36, settings.width)) for _ in range(2)]
    options = settings.loop().options(0.0)

    prediction = theirs.model(theirs.train.inputs, tuple(map(torch.as_tensor, state)), **options)
    loss = training.loss_of(prediction, theirs.train.targets)
    loss.backward()

    begun = translated(theirs.model, ours.carry.model)
    both = eqx.filter_jit(eqx.filter_value_and_grad(training_jax.loss_and_prediction, has_aux=True))
    given = jnp.asarray(ours.clues), jnp.asarray(ours.targets), tuple(map(jnp.asarray, state))
    (value, predicted), gradients = both(begun, *given, options)

    close = partial(np.testing.assert_allclose, rtol=1e-10)
    close(value, loss.detach().numpy())
    close(predicted.logits, prediction.logits.detach().numpy(), atol=1e-10)
    close(predicted.solved, prediction.solved.detach().numpy(), atol=1e-10)
    for a, b in zip(predicted.state, prediction.state, strict=True):
        close(a, b.numpy(), atol=1e-10)
    for name, parameter in theirs.model.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(expected).max() > 0, name
        close(path_of(name)(gradients), expected, atol=1e-10 * np.abs(expected).max(), err_msg=name)


def test_both_frameworks_make_the_same_training_steps(puzzles: tuple[Puzzles, Puzzles]) -> None:
    """AdamW, its learning rate, the averaged weights, the order of the places and the states in them."""
    settings = Settings(**SMALL)
    theirs, ours = in_float64(settings, puzzles[0]), training_jax.Training(settings, puzzles[0])
    begun = translated(theirs.model, ours.carry.model)
    ours.carry = ours.carry._replace(model=begun, average=begun)
    ours.places.order = theirs.places.order.copy()
    for _ in range(6):
        theirs.step()
        ours.step()
        assert ours.totals.means() == pytest.approx(theirs.totals.means(), rel=0.2)  # medians of an even number
        assert ours.totals.loss == pytest.approx(theirs.totals.loss, rel=1e-6)
    # PyTorch's learning rate is a cosine in float32.
    for mine, their in ((ours.carry.model, theirs.model), (ours.carry.average, theirs.average.module)):
        for name, parameter in their.named_parameters():
            np.testing.assert_allclose(path_of(name)(mine), parameter.detach().numpy(), rtol=1e-5, atol=1e-7)
    moved = [(a - b).abs().max() for a, b in zip(theirs.model.parameters(), theirs.average.parameters(), strict=True)]
    assert min(moved) > 1e-5


def test_places_are_filled_in_turn() -> None:
    settings = Settings(batch=4, supervisions=2)
    orders = iter([np.array([7, 3, 5, 1, 0, 2, 6, 4]), np.array([4, 0, 1, 2, 3, 5, 6, 7])])
    places = Places(settings, 8, lambda _: next(orders))
    filled = [places.fill(done).tolist() + places.rows.tolist() for done in range(4)]
    assert filled == [
        [True, True, True, True, 7, 3, 5, 1],
        [False, True, False, True, 7, 0, 5, 2],
        [True, False, True, False, 6, 0, 4, 2],
        [False, True, False, True, 6, 4, 4, 0],
    ]


def test_a_new_puzzle_starts_anew_and_an_old_one_goes_on(
    puzzles: tuple[Puzzles, Puzzles], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = training.Training.of_puzzles(Settings(**SMALL), puzzles[0])
    original, seen = model.RecursiveModel.forward, []

    def forward(self: Any, clues: Any, state: Any, **options: Any) -> Any:
        prediction = original(self, clues, state, **options)
        seen.append((state, prediction.state))
        return prediction

    monkeypatch.setattr(model.RecursiveModel, "forward", forward)
    for _ in range(5):
        made.step()
    for done in range(1, 5):
        fresh = (np.arange(16) + done) % 4 == 0
        for start, before in zip(seen[done][0], seen[done - 1][1], strict=True):
            assert torch.equal(start[fresh], torch.zeros_like(start[fresh]))
            assert torch.equal(start[~fresh], before[~fresh])


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("gradient", ["trm", "neumann", "one-step", "implicit"])
def test_a_training_whose_parameters_are_nan_has_diverged(
    gradient: str, framework: str, puzzles: tuple[Puzzles, Puzzles]
) -> None:
    made = run.begin(Settings(framework=framework, gradient=gradient, **SMALL), puzzles[0])
    made.step()
    assert not made.diverged
    if isinstance(made, training.Training):
        made.model.digits.weight.data.fill_(float("nan"))
    else:
        model = eqx.tree_at(path_of("digits.weight"), made.carry.model, replace_fn=lambda x: x * float("nan"))
        made.carry = made.carry._replace(model=model)
    made.step()
    assert made.diverged


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_puzzle_halts_at_the_first_recursion_whose_answer_the_model_believes(
    framework: str, puzzles: tuple[Puzzles, Puzzles]
) -> None:
    test, most = puzzles[1], 8
    made = run.begin(Settings(framework=framework, **SMALL), puzzles[0])
    plain = made.averaged()
    beliefs = np.stack([answers.belief for answers in evaluation.by_depth(plain, test.clues, most)])
    # Between two of them, so that some puzzles halt at once, some later, and some not at all.
    belief = float(np.sort(beliefs.max(axis=0))[5:7].mean())
    believed = beliefs > belief
    expected = np.where(believed[:-1].any(axis=0), believed.argmax(axis=0) + 1, most)
    assert {1, most} < set(expected)
    digits = np.stack([answers.digits for answers in evaluation.by_depth(plain, test.clues, most + 1)])
    assert (digits[most] != digits[most - 1]).any(axis=1)[expected == most].any()
    answered = Puzzles(test.clues, digits[expected - 1, np.arange(20)])
    halted = evaluation.until_halted(plain, answered, most, belief)
    assert np.array_equal(halted.halted, believed[:-1].any(axis=0))
    assert np.array_equal(halted.recursions, expected)
    assert np.array_equal(halted.evaluated, np.where(halted.halted, expected + 1, most))
    assert halted.right.all()


def content(path: Path) -> Any:
    """A checkpoint without its times."""
    line, _, rest = path.read_bytes().partition(b"\n")
    settings = json.loads(line)
    if settings["framework"] == "torch":
        state = torch.load(io.BytesIO(rest), weights_only=True)
        state.pop("wall"), state.pop("processor")
        return settings, jax.tree.map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, state)
    made = training_jax.Training(Settings(**settings), sudoku.train_and_test()[0])
    made.load(io.BytesIO(rest))
    made.wall = 0.0
    return settings, jax.tree.map(np.asarray, eqx.filter(made.state(), lambda x: not callable(x)))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    framework: str, interrupt: Callable[[str, int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts, log, drawn = (tmp_path / name for name in ("whole.pt", "new/parts.pt", "runs", "new/solved.png"))
    flags = [*FLAGS, "--framework", framework]
    before = signal.getsignal(signal.SIGINT)
    assert main([*flags, "--checkpoint", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for row in ("8 \\(trained\\) +[0-9.]+%", "16 +[0-9.]+%", "puzzles that halted +[0-9]+ of 20", "saved +[0-9.]+%"):
        assert re.search(row, shown), row

    interrupt(framework, 12)  # between the second and the third pass over the puzzles
    arguments = ["--checkpoint", str(parts), "--tensorboard", str(log), "--picture", str(drawn)]
    assert main([*flags, *arguments]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert not drawn.exists()
    *_, command = capsys.readouterr().err.splitlines()
    assert main(shlex.split(command.strip().removeprefix(PROGRAM))) == 0
    (settings, expected), (again, found) = content(whole), content(parts)
    assert settings == again
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in parts.parent.iterdir()) == ["parts.pt", "solved.png"]

    events = event_accumulator.EventAccumulator(str(log)).Reload()
    names = {f"{name}/train" for name in ("loss", "cells", "exact", "residual")}
    assert set(events.Tags()["scalars"]) == names | {f"{name}/test" for name in ("cells", "exact", "residual")}
    assert [e.step for e in events.Scalars("loss/train")] == list(range(2, 21, 2))


def test_the_picture_tells_right_from_wrong() -> None:
    solution = np.tile(np.arange(1, 7), 6)
    clues = np.where(np.arange(36) < 6, solution, 0)
    digits = np.where(np.arange(36) == 35, 1, solution)
    answers = evaluation.Answers(digits, np.full(36, 0.9), np.array(0.5), np.array(0.1))
    figure = picture.picture(clues, solution, [answers, answers._replace(digits=solution)], last=2)
    puzzle, first, second, curves, _ = figure.axes
    assert len(puzzle.texts) == 6
    colours = [text.get_color() for text in first.texts]
    assert colours == [picture.GIVEN] * 6 + [picture.RIGHT] * 29 + [picture.WRONG]
    assert [text.get_color() for text in second.texts] == [picture.GIVEN] * 6 + [picture.RIGHT] * 30
    assert curves.lines


@pytest.mark.parametrize("module", ["equinox", "matplotlib"])
def test_a_missing_package_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model_jax", "training_jax", "picture"):
        import_module(f"{recursive.__name__}.{name}")
        monkeypatch.delitem(sys.modules, f"{recursive.__name__}.{name}")
        monkeypatch.delattr(recursive, name)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*FLAGS, "--framework", "jax", "--picture", str(tmp_path / "x.png")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"The example needs {module}, which is not installed; ")
    assert 'pip install -e ".[examples,jax-examples]"' in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--framework numpy", "invalid choice: 'numpy'"),
        ("--gradient exact", "invalid choice: 'exact'"),
        ("--k 2", "--k and --lam belong to --gradient unroll and neumann, not to trm"),
        ("--gradient neumann --k 0", "k must be at least 1, got 0"),
        ("--gradient unroll --lam 1.5", r"lam must lie in \(0, 1\], got 1.5"),
        ("--gradient unroll --k 4", r"recursions must be at least k \* lam, 4, for this gradient, got 3"),
        ("--gradient switching --recursions 1", r"recursions must be at least k \* lam, 2"),
        ("--latent-steps 0", "latent_steps must be at least 1, got 0"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--rate nan", "rate must lie in"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--resume", "--resume needs --checkpoint FILE"),
        ("--picture solved.txt", r"--picture needs a file ending in one of \.pdf, \.png, \.svg, got 'solved\.txt'"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 50", r"A batch of 50 is more than the 40 examples to train on\."),
        ("--rate 1e38", r"The loss or the residual is not finite in step \d+; try a smaller --rate\."),
        ("--checkpoint run.pt", r"run\.pt exists: add --resume to go on from it, or name another file\."),
        ("--checkpoint absent.pt --resume", r"absent\.pt can't be read: No such file or directory\."),
        ("--checkpoint text.pt --resume", r"text\.pt is not a checkpoint of this program, or is damaged\."),
        ("--checkpoint half.pt --resume", r"half\.pt is not a checkpoint of this program, or is damaged\."),
        ("--checkpoint text.pt/run.pt", r"text\.pt/run\.pt can't be written: (Not a directory|File exists)\."),
        ("--checkpoint run.pt --resume --seed 1", r"run\.pt was made with --seed 0: resume with the same settings\."),
        ("--checkpoint run.pt --resume --gradient unroll", r"was made with --gradient trm: resume"),
    ],
)
def test_errors_are_printed_as_one_sentence(
    arguments: str,
    message: str,
    puzzles: tuple[Puzzles, Puzzles],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(**SMALL)
    program.save(settings, run.begin(settings, puzzles[0]), Path("run.pt"))
    before = Path("run.pt").read_bytes()
    Path("text.pt").write_text("not a checkpoint")
    Path("half.pt").write_bytes(before[: len(before) // 2])
    assert main([*FLAGS, *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("The training stopped: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert Path("run.pt").read_bytes() == before


def test_it_learns(puzzles: tuple[Puzzles, Puzzles]) -> None:
    """Without a gradient through the recursion the loss stays at log 6, 1.79."""
    settings = Settings(batch=40, width=24, supervisions=4, latent_steps=2, recursions=2, steps=80, rate=1e-2)
    result = run.run(settings, console=Console(file=io.StringIO(), width=80))
    made = result.training
    made.totals = type(made.totals)()
    made.step()
    assert made.totals.means()["loss"] < 0.9
    assert result.by_depth[8]["cells"] > 0.5


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    for name in ("framework", "gradient", "k", "lam", "recursions", "latent-steps", "width", "batch", "steps", "seed"):
        assert re.search(rf"--{name} .*?\(default:\s[^)]+\)", shown, re.DOTALL)
    for name in ("checkpoint FILE", "resume", "tensorboard DIR", "picture FILE"):
        assert f"--{name}" in shown
    assert "examples:" in shown

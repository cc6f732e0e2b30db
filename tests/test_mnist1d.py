"""The MNIST-1D example: it learns, and an interruption changes nothing."""

import io
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator
from threadpoolctl import threadpool_limits
from torch.nn.functional import cross_entropy

import implicit_core as ic
from implicit_core.examples import torch_mnist1d
from implicit_core.examples.program import DivergedError, TrainingError
from implicit_core.examples.torch_mnist1d import checkpoint, data, model, run
from implicit_core.examples.torch_mnist1d.__main__ import PROGRAM, main
from implicit_core.examples.torch_mnist1d.data import Data, Samples
from implicit_core.examples.torch_mnist1d.settings import GRADIENTS, Settings
from implicit_core.examples.torch_mnist1d.training import Training, evaluate

pytestmark = pytest.mark.slow

SMALL = Settings(epochs=2, batch_size=40, channels=8)
FLAGS = ["--epochs", "2", "--batch-size", "40", "--channels", "8"]
STEPS = 9  # an epoch: 360 of 400 samples, the others are held out


def first(samples: Samples, n: int) -> Samples:
    return Samples(*(x[:n] for x in samples))


@pytest.fixture(scope="module")
def whole() -> Data:
    return data.load()


@pytest.fixture(scope="module", autouse=True)
def few(whole: Data) -> Iterator[Data]:
    """Few samples, which the program uses instead of all."""
    samples = Data(first(whole.train, 400), first(whole.test, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda: samples)
        yield samples


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Press Ctrl-C within the steps or measurements with the given numbers, counted from 1."""

    def interrupt(name: str, *numbers: int) -> None:
        original, calls = getattr(Training, name), 0

        def interrupted(training: Training) -> None:
            nonlocal calls
            calls += 1
            if calls in numbers:
                os.kill(os.getpid(), signal.SIGINT)
            original(training)

        monkeypatch.setattr(Training, name, interrupted)

    return interrupt


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    epochs = [(train, validation) for train, validation, _ in state["epochs"]]
    return {**state, "epochs": epochs, "seconds": 0.0}


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, and of the same types."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("mnist1d") / "run.pt"
    assert main([*FLAGS, "--checkpoint", str(path)]) == 0
    return without_times(read(path))


@pytest.mark.parametrize(
    ("where", "numbers", "position", "epochs"),
    [
        pytest.param("step", (1,), 1, 0, id="first step"),
        pytest.param("step", (4, 9), 4, 0, id="twice in an epoch"),
        pytest.param("step", (STEPS,), STEPS, 0, id="last step of an epoch"),
        pytest.param("step", (STEPS + 5,), 5, 1, id="second epoch"),
        pytest.param("end_epoch", (1,), 0, 1, id="while an epoch is measured"),
        pytest.param("end_epoch", (2,), 0, 2, id="at the very end"),
    ],
)
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    where: str,
    numbers: tuple[int, ...],
    position: int,
    epochs: int,
    interrupt: Callable[..., None],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "new folder" / "run.pt"
    before = signal.getsignal(signal.SIGINT)
    interrupt(where, *numbers)
    code = main([*FLAGS, "--checkpoint", str(path)])
    assert code == 130
    state = read(path)
    assert (state["position"], len(state["epochs"])) == (position, epochs)
    assert signal.getsignal(signal.SIGINT) is before
    *_, command = capsys.readouterr().err.splitlines()
    assert command.strip().startswith(PROGRAM)
    resume = shlex.split(command.strip().removeprefix(PROGRAM))
    for more in numbers[1:]:
        assert main(resume) == 130, f"step {more}"
    torch.rand(3)  # nothing depends on torch's global generator
    assert main(resume) == 0
    assert_same(without_times(read(path)), uninterrupted)
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def test_a_second_interruption_is_obeyed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def impatient(training: Training) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(Training, "step", impatient)
    assert main([*FLAGS, "--checkpoint", str(tmp_path / "run.pt")]) == 130
    assert read(tmp_path / "run.pt")["position"] == 0
    assert "--resume" in capsys.readouterr().err


def test_an_interruption_without_a_checkpoint_says_so(
    interrupt: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt("step", 2)
    assert main(FLAGS) == 130
    assert "Nothing is kept; --checkpoint FILE would have" in capsys.readouterr().err


def test_a_checkpoint_is_replaced_whole_or_not_at_all(
    few: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    training = Training(SMALL, few.train)
    checkpoint.save(training, path)
    before = path.read_bytes()
    training.step()

    def full(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"run\.pt can't be written: No space left on device"):
        checkpoint.save(training, path)
    assert path.read_bytes() == before


# Whether a step's map contracts everywhere depends on how a processor rounds. The layer warns where it does not.
@pytest.mark.filterwarnings("ignore::implicit_core.GrowingGradientWarning", "ignore::implicit_core.ConvergenceWarning")
def test_it_learns(whole: Data) -> None:
    """Without gradients for the encoder the accuracy is at most 37 %; guessing gives 10 %."""
    training = Training(Settings(epochs=4, batch_size=20, channels=16, lr=1e-2), first(whole.train, 1000))
    with threadpool_limits(1):
        for _ in range(4):
            for _ in range(training.steps):
                training.step()
            training.end_epoch()
        tested = evaluate(training.best_model(), first(whole.test, 500)).means()
    assert tested["accuracy"] > 0.75
    assert tested["converged"] > 0.95
    losses = [epoch.train.means()["loss"] for epoch in training.epochs]
    assert losses[-1] < 0.4 * losses[0]


def gradient(few: Data, settings: Settings) -> dict[str, torch.Tensor]:
    """Gradients of all parameters of the initial model, with solves to ten digits."""
    model = Training(settings, few.train).model.double()
    model.layer.solver = ic.Anderson(rtol=1e-10, max_steps=200)
    if settings.gradient == "implicit":
        model.layer.gradient = ic.Implicit(ic.GMRES(rtol=1e-10))
    signals, labels = first(few.train, 32)
    names, parameters = zip(*model.named_parameters(), strict=True)
    with threadpool_limits(1):
        loss = cross_entropy(model(signals.double()), labels)
        gradients = torch.autograd.grad(loss, parameters)
    assert bool((model.layer.status == ic.CONVERGED).all())
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (Settings(gradient="unroll", k=60), 0.0, 1e-5),
        (Settings(gradient="neumann", k=60), 0.0, 1e-5),
        (Settings(gradient="unroll"), 0.1, 0.25),
        (Settings(gradient="neumann"), 0.1, 0.25),
        (Settings(gradient="one-step"), 0.4, 0.8),
    ],
    ids=str,
)
def test_every_parameter_gets_the_estimators_gradient(few: Data, settings: Settings, low: float, high: float) -> None:
    """The largest relative error of a parameter's gradient is the error of the estimator."""
    exact = gradient(few, replace(settings, gradient="implicit"))
    estimated = gradient(few, settings)
    errors = [float((estimated[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert len(errors) == 20
    assert low < max(errors) < high


def test_the_name_chooses_the_estimator() -> None:
    estimators = {name: Settings(gradient=name, k=3, lam=0.8).estimator() for name in GRADIENTS}
    assert estimators == {
        "unroll": ic.Unroll(3, 0.8),
        "neumann": ic.Neumann(3, 0.8),
        "one-step": ic.OneStep(),
        "implicit": ic.Implicit(ic.GMRES(rtol=1e-3)),
    }


def test_training_counts_solver_steps_and_solves_that_fail(few: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(SMALL, few.train)
    training.model.layer.solver = ic.FixedPointIteration(rtol=1e-6, max_steps=2)
    training.step()
    assert training.totals.means() == pytest.approx(
        {"loss": math.log(10), "accuracy": 0.1, "solver_steps": 2.0, "converged": 0.0}, abs=0.5
    )
    monkeypatch.setattr(model, "SOLVER", training.model.layer.solver)
    console = Console(file=io.StringIO(), width=80)
    run.run(SMALL, console=console)
    text = console.file.getvalue()
    assert "In training, 720 of 720 solves did not converge (100.00%)." in text
    assert "In the test, 100 of 100 solves did not converge (100.00%)." in text


@pytest.mark.parametrize("gradient", ["neumann", "one-step"])
def test_a_training_whose_parameters_are_nan_has_diverged(gradient: str, few: Data) -> None:
    """The solver then returns its start, and the loss is finite."""
    training = Training(replace(SMALL, gradient=gradient), few.train)
    training.step()
    next(training.model.layer.parameters()).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite in epoch 1"):
        training.step()


def test_the_best_epoch_on_the_samples_held_out_is_tested(few: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Training.end_epoch

    def spoil_afterwards(training: Training) -> None:
        original(training)
        if len(training.epochs) == 3:
            torch.nn.init.zeros_(training.model.output.weight)

    monkeypatch.setattr(Training, "end_epoch", spoil_afterwards)
    console = Console(file=io.StringIO(), width=80)
    training, tested = run.run(replace(SMALL, epochs=3), console=console)
    correct = [epoch.validation.correct for epoch in training.epochs]
    assert training.best["correct"] == max(correct)
    assert training.best["epoch"] == max(number for number, c in enumerate(correct, 1) if c == max(correct))
    assert len(training.samples.labels) == 360
    assert len(training.validation.labels) == 40
    together = torch.cat([training.samples.signals, training.validation.signals])
    assert len(together.unique(dim=0)) == len(few.train.labels)
    with threadpool_limits(1):
        assert evaluate(training.best_model(), few.test) == tested
        assert evaluate(training.model, few.test).correct != tested.correct
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for row in (f"test accuracy +│ +{tested.correct}.0%", "parameters +│ +946", "best epoch.*│ +. of 3"):
        assert re.search(row, text)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_the_log(
    interrupt: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*FLAGS, "--checkpoint", str(tmp_path / "run.pt"), "--tensorboard", str(tmp_path / "runs")]
    interrupt("step", STEPS + 3)
    assert main(arguments) == 130
    *_, command = capsys.readouterr().err.splitlines()
    assert main(shlex.split(command.strip().removeprefix(PROGRAM))) == 0
    logged, epochs = events(tmp_path / "runs"), read(tmp_path / "run.pt")["epochs"]
    assert len(logged) == 8
    for part, index in (("train", 0), ("validation", 1)):
        for name, value in (("loss", "loss"), ("accuracy", "correct"), ("solver_steps", "steps"), ("converged",) * 2):
            expected = [epoch[index][value] / epoch[index]["samples"] for epoch in epochs]
            assert [step for step, _ in logged[f"{name}/{part}"]] == [1, 2]
            assert [x for _, x in logged[f"{name}/{part}"]] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("module", ["tensorboard", "mnist1d"])
def test_a_missing_package_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith((module, "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("run", "report", "data"):
        monkeypatch.delitem(sys.modules, f"{torch_mnist1d.__name__}.{name}")
        monkeypatch.delattr(torch_mnist1d, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*FLAGS, "--tensorboard", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"The example needs {module}, which is not installed; ")
    assert 'in a checkout: pip install -e ".[examples]"' in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gradient exact", "invalid choice: 'exact'"),
        ("--k 0", "k must be at least 1, got 0"),
        ("--k two", "argument --k: invalid int value: 'two'"),
        ("--lam 1.5", r"lam must lie in \(0, 1\], got 1.5"),
        ("--gradient one-step --k 3", "--k and --lam belong to --gradient unroll and neumann, not to one-step"),
        ("--gradient implicit --lam 0.5", "not to implicit"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--lr 0", r"lr must lie in \(0, inf\), got 0.0"),
        ("--lr nan", "lr must lie in"),
        ("--channels 12", "channels must be a multiple of 8, got 12"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--seed 9999999999999999999", r"seed must be below 2\*\*63"),
        ("--resume", "--resume needs --checkpoint FILE"),
        ("--threads 2", "unrecognized arguments: --threads 2"),
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
        ("--batch-size 500", r"A batch of 500 is more than the 360 samples to train on\."),
        ("--lr 1e38 --epochs 1", r"The loss or a residual is not finite in epoch 1; try a smaller --lr\."),
        ("--checkpoint run.pt", r"run\.pt exists: add --resume to go on from it, or name another file\."),
        ("--checkpoint absent.pt --resume", r"absent\.pt can't be read: No such file or directory\."),
        ("--checkpoint text.pt --resume", r"text\.pt is not a checkpoint of this program, or is damaged\."),
        ("--checkpoint half.pt --resume", r"half\.pt is not a checkpoint of this program, or is damaged\."),
        ("--checkpoint weights.pt --resume", r"weights\.pt is not a checkpoint of this program, or is damaged\."),
        ("--checkpoint text.pt/run.pt", r"text\.pt/run\.pt can't be written: (Not a directory|File exists)\."),
        ("--checkpoint run.pt --resume --seed 1", r"run\.pt was made with --seed 0: resume with the same settings\."),
        (
            "--checkpoint run.pt --resume --gradient neumann --epochs 3",
            r"run\.pt was made with --gradient unroll --epochs 2: resume",
        ),
        ("--checkpoint run.pt --resume --gradient one-step", r"made with --gradient unroll --k 5 --lam 0\.5: resume"),
    ],
)
def test_errors_are_printed_as_one_sentence(
    arguments: str,
    message: str,
    few: Data,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(Training(SMALL, few.train), Path("run.pt"))
    before = Path("run.pt").read_bytes()
    Path("text.pt").write_text("not a checkpoint")
    Path("half.pt").write_bytes(before[: len(before) // 2])
    torch.save({"weight": torch.ones(2)}, "weights.pt")
    assert main([*FLAGS, *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("The training stopped: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert Path("run.pt").read_bytes() == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    for name in ("gradient", "k", "lam", "epochs", "batch-size", "lr", "channels", "seed"):
        assert re.search(rf"--{name} .*?\(default:\s[^)]+\)", shown, re.DOTALL)
    for name in ("checkpoint FILE", "resume", "tensorboard DIR"):
        assert f"--{name}" in shown
    assert "examples:" in shown

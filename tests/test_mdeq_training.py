"""The MDEQ example: its settings, its program and its trainings, alone and in two processes."""

import copy
import io
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpus
import mdeq_worker
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import implicit_core as ic
from implicit_core.examples import program
from implicit_core.examples.mdeq import run, source
from implicit_core.examples.mdeq.__main__ import PROGRAM, main
from implicit_core.examples.mdeq.data import Images, fashion_mnist
from implicit_core.examples.mdeq.data.imagenet import central_view
from implicit_core.examples.mdeq.settings import GRADIENTS, PRESETS, Settings, WholeBatch
from implicit_core.examples.mdeq.source import Source
from implicit_core.examples.mdeq.training import LEAST_RATE, Training
from implicit_core.examples.program import TrainingError

pytestmark = pytest.mark.slow

FEW = Settings(train=48, test=20, epochs=2, solver_steps=4, k=2, products=3)
"""Three steps an epoch, on few digits."""


def words_of(settings: Settings) -> list[str]:
    """The command line of a run."""
    return [word for pair in settings.flags().items() for word in pair]


# Settings and the command line.


@pytest.mark.parametrize("scale", [0.999, 1.001])
def test_a_solve_ends_by_the_norm_of_the_whole_batch(scale: float) -> None:
    rng = np.random.default_rng(0)
    h, f = ([rng.normal(size=shape) for shape in ((3, 4, 8, 8), (3, 6, 4, 4))] for _ in range(2))
    numbers = np.concatenate([(b - a).ravel() for a, b in zip(h, f, strict=True)])
    stop = WholeBatch(scale * float(np.linalg.norm(numbers)) / math.sqrt(3 * (4 * 64 + 6 * 16)))
    made = stop(tuple(map(torch.from_numpy, h)), tuple(map(torch.from_numpy, f)))
    assert made.shape == ()
    assert bool(made) == (scale > 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "model must be one of small, small-4, tiny, large, imagenet, got 'huge'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, got 'float16'"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"lam": 0.0}, "lam must lie in"),
        ({"gradient": "implicit", "products": 0}, "products must be at least 1, got 0"),
        ({"pixels": -1}, "pixels must be at least 0, got -1"),
        ({"pretraining": 1.5}, "pretraining must lie in"),
        ({"dropout": -0.1}, "dropout must lie in"),
        ({"rate": 0.0}, "rate must lie in"),
        ({"decay": -1.0}, "decay must lie in"),
        ({"augment": 2}, "augment must be 0 or 1, got 2"),
        ({"seed": 2**32}, "seed must be below"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data mnist", "invalid choice: 'mnist'"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--gradient implicit --k 2", "--k and --lam belong to --gradient unroll and neumann, not to implicit"),
        ("--products 3", "--products belongs to --gradient implicit, not to unroll"),
        ("--resume", "--resume needs --checkpoint FILE"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(len(line) < 80 for line in shown.splitlines())
    for name in Settings().flags() | {"--products": "", "--checkpoint": "", "--data-dir": ""}:
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), name


def test_flags_are_read_as_the_settings_they_were_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Settings] = []
    monkeypatch.setattr(run, "run", lambda settings, **_: found.append(settings))
    many = [replace(preset, gradient=gradient) for preset in PRESETS.values() for gradient in ("unroll", "implicit")]
    many += [Settings(gradient="neumann", k=3, lam=0.25), Settings(gradient="implicit", products=7)]
    other = {"pixels": 8, "train": 9, "test": 7, "pretraining": 0.1, "dropout": 0.2, "solver_steps": 3, "epochs": 4}
    other |= {"batch": 2, "optimizer": "nesterov", "rate": 0.125, "decay": 0.5, "augment": 1, "precision": "bfloat16"}
    many += [Settings(model="tiny", data="cifar10", gradient=name, seed=6, **other) for name in GRADIENTS]
    many += [replace(PRESETS["imagenet"], seed=3, optimizer="adam")]
    for settings in many:
        assert main(words_of(settings)) == 0
    assert found == many
    assert main(["--model", "large", "--batch", "32"]) == 0
    assert found[-1] == replace(PRESETS["large"], batch=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data cifar10", r"CIFAR-10 needs --data-dir, the folder that has cifar-10-batches-py; "),
        (
            "--data cifar10 --data-dir .",
            r"CIFAR-10 is missing: there is no data_batch_1 in cifar-10-batches-py or ",
        ),
        ("--data-dir .", r"The digits come with scikit-learn: --data-dir belongs to other --data\."),
        ("--data fashion-mnist", r"there is no train-images-idx3-ubyte or .*Debian's package dataset-fashion-mnist"),
        ("--data imagenet --pixels 0 --train 0 --test 0", r"ImageNet needs --data-dir: "),
        ("--model imagenet", r"The imagenet model needs sides .* of 32, and images of digits have sides of 8 pixels\."),
        ("--device abacus", r"There is no device 'abacus' for PyTorch here: "),
        ("--device meta", r"There is no device 'meta' for PyTorch here: "),
        ("--batch 100", r"A batch of 100 is more than the 48 images to train on\."),
        ("--pixels 5", r"The images of digits can have the size 8, not 5\."),
        ("--checkpoint text.pt", r"text\.pt exists: add --resume to go on from it, or name another file\."),
        ("--checkpoint text.pt --resume", r"text\.pt is not a checkpoint of this program, or is damaged\."),
        ("--checkpoint run.pt --resume --seed 1", r"run\.pt was made with --seed 0: resume with the same settings\."),
        ("--rate 1e30", r"The loss is \S+ at step \d+; try a smaller --rate\."),
    ],
)
def test_errors_are_printed_as_one_sentence(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "fashion-mnist")
    Path("text.pt").write_text("not a checkpoint")
    if "run.pt" in arguments:
        program.save(FEW, Training(FEW, Source.of(FEW, None)), Path("run.pt"))
    assert main([*words_of(FEW), *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("The training stopped: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


# Training.


def content(path: Path) -> tuple[Any, Any]:
    """The settings and the state in a checkpoint, without times."""
    line, _, rest = path.read_bytes().partition(b"\n")
    state = torch.load(io.BytesIO(rest), weights_only=True)
    for name in ("wall", "processor"):
        state.pop(name)
        for epoch in state["epochs"]:
            epoch.pop({"wall": "seconds", "processor": "processor_seconds"}[name])
    return json.loads(line), state


@pytest.mark.parametrize(
    "settings",
    [
        replace(FEW, gradient="implicit", optimizer="adam", rate=1e-3),
        replace(FEW, dropout=0.25, augment=1, pretraining=0.34, optimizer="nesterov"),
    ],
    ids=["", "dropout, augmentation and pretraining"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    settings: Settings, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole.pt", tmp_path / "new" / "parts.pt"
    flags = words_of(settings)
    before = signal.getsignal(number)
    assert main([*flags, "--checkpoint", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert re.findall(r"^epoch +(\d) ", shown, re.MULTILINE) == ["1", "2"]
    assert re.search(r"last +2 +[0-9.]+%", shown)

    original, calls = Training.step, 0

    def interrupted(self: Training) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        original(self)

    monkeypatch.setattr(Training, "step", interrupted)
    assert main([*flags, "--checkpoint", str(parts)]) == 130
    assert signal.getsignal(number) is before
    assert calls == 2
    *_, command = capsys.readouterr().err.splitlines()
    torch.manual_seed(7)  # which has no influence
    assert main(shlex.split(command.strip().removeprefix(PROGRAM))) == 0
    assert calls == 6
    (expected_settings, expected), (found_settings, found) = content(whole), content(parts)
    assert found_settings == expected_settings
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert sorted(file.name for file in parts.parent.iterdir()) == ["parts.pt"]


@pytest.fixture(scope="module")
def digits() -> Source:
    return Source.of(FEW, None)


def evaluations_of(training: Training) -> int:
    """Evaluations of the cell in a step."""
    count = 0

    def notice(*_: Any) -> None:
        nonlocal count
        count += 1

    with training.model.layer.cell.register_forward_pre_hook(notice):
        training.step()
    return count


def test_steps_of_pretraining_apply_the_cell_ten_times_without_a_solve(digits: Source) -> None:
    training = Training(replace(FEW, pretraining=0.5), digits)
    training.model.layer.check = False
    assert (training.all_steps, training.pretraining_steps) == (6, 3)
    counts = []
    for _ in range(training.all_steps):
        counts.append(evaluations_of(training))
        if training.at_end_of_epoch:
            training.end_epoch()
    assert counts == [10, 10, 10] + [FEW.solver_steps + FEW.k] * 3


def test_images_are_normalized_in_training_and_in_tests(digits: Source) -> None:
    training, seen = Training(FEW, digits), []
    training.model.register_forward_pre_hook(lambda _module, given: seen.extend(given[0]))
    training.step()
    known = digits.normalized(digits.train.pixels)
    assert len(seen) == FEW.batch
    assert all((known == image).all(dim=(1, 2, 3)).any() for image in seen)
    seen.clear()
    training.test()
    assert torch.equal(torch.stack(seen), digits.normalized(digits.test.pixels))


def test_images_are_augmented_before_they_are_normalized(digits: Source) -> None:
    """The border is black: pixels stay multiples of 1/16."""
    training, seen = Training(replace(FEW, augment=1), digits), []
    training.model.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    training.step()
    levels = 16 * (seen[0] * digits.std + digits.mean)
    assert float((levels - levels.round()).abs().max()) < 1e-4


@pytest.mark.parametrize("gradient", ["implicit", "neumann", "unroll", "one-step"])
def test_bfloat16_is_the_precision_of_the_layers_alone(gradient: str, digits: Source) -> None:
    # Without weight decay, which would move a parameter that has no gradient.
    training = Training(replace(FEW, gradient=gradient, precision="bfloat16", decay=0.0), digits)
    cell, dtypes = training.model.layer.cell, set()
    cell.register_forward_pre_hook(lambda _module, given: dtypes.update(leaf.dtype for leaf in given[0]))
    made = set()
    cell.blocks[0].widen.register_forward_hook(lambda _module, _given, value: made.add(value.dtype))
    before = copy.deepcopy(training.model.state_dict())
    training.step()
    assert dtypes == {torch.float32}
    assert made == {torch.bfloat16}
    for name, value in training.model.named_parameters():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name
    assert np.isfinite(training.totals.loss)
    exact = Training(replace(FEW, gradient=gradient), digits)
    exact.step()
    assert training.totals.loss == pytest.approx(exact.totals.loss, rel=0.02)


def test_it_learns(digits: Source) -> None:
    """Without learning the loss stays at log 10, 2.3."""
    settings = replace(FEW, epochs=12, solver_steps=6, gradient="neumann", k=5)
    training = run.run(settings, console=Console(file=io.StringIO(), width=80))
    assert training.epochs[-1]["train/loss"] < 1.0
    assert training.epochs[-1]["test/accuracy"] >= 0.5


def torchrun(*arguments: str) -> tuple[int, str]:
    """The exit code and the output of two processes, which import the same package as this one."""
    package = Path(ic.__file__).parents[1]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(package)}
    running = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        shown, _ = running.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)  # also the processes that it started
        raise
    return running.returncode, shown


def test_two_processes_train_together(tmp_path: Path, digits: Source) -> None:
    """Both end with the same numbers, those of SGD by hand with the mean of the gradients of the halves of batches.

    So they do if a signal to one of them stops both on the way.
    """
    settings = mdeq_worker.SETTINGS
    code, shown = torchrun(mdeq_worker.__file__, str(tmp_path))
    assert code == 0, shown
    assert re.findall(r"^epoch +(\d) ", shown, re.MULTILINE) == ["1", "1"]  # only one process prints
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    # Stopped by a signal to the second, and resumed: the sums over the epoch are those of both.
    for rank in range(2):
        resumed = torch.load(tmp_path / f"resumed-{rank}.pt", weights_only=True)
        torch.testing.assert_close(resumed, first, rtol=0, atol=0)

    halves = [Training(settings, Source.of(settings, None)) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.rank, half.processes = rank, 2
        half.batches = half._batches()
        half.optimizer = torch.optim.SGD(half.model.parameters(), 0.0)  # which leaves them as they are
        half.scheduler = SimpleNamespace(step=lambda: None)
    assert halves[0].all_steps == 3
    velocity = [torch.zeros_like(p) for p in halves[0].model.parameters()]
    for t in range(3):
        rate = LEAST_RATE + (settings.rate - LEAST_RATE) * (1 + math.cos(math.pi * t / 3)) / 2
        for half in halves:
            half.step()
        with torch.no_grad():
            for v, *both in zip(velocity, *(half.model.parameters() for half in halves), strict=True):
                v.copy_(0.9 * v + sum(p.grad for p in both) / 2 + settings.decay * both[0])
                for p in both:
                    p -= rate * v
    begin = Training(settings, digits).model.state_dict()
    for name, value in halves[0].model.state_dict().items():
        if "running" in name or "tracked" in name:  # which each half has its own of
            continue
        # Sums in another order: where a ReLU is at zero, they decide.
        assert float((first["model"][name] - value).norm()) < 0.02 * float((value - begin[name]).norm()), name
    # Both tested with the running means of the first.
    halves[0].model.load_state_dict(first["model"])
    halves[0].rank, halves[0].processes = 0, 1
    assert first["epochs"][-1]["test/accuracy"] == halves[0].test().means()["accuracy"]


def test_a_process_may_have_no_image_to_test_on(digits: Source) -> None:
    training = Training(FEW, replace(digits, test=Images(*(part[:1] for part in digits.test))))
    training.rank, training.processes = 1, 2
    training.test().require_finite(0)


@gpus.on_gpu_with_torch
def test_a_gpu_trains_as_the_cpu_does(digits: Source) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        training = Training(FEW, digits, device)
        while not training.at_end_of_epoch:
            training.step()
        losses.append(training.totals.means()["loss"])
        training.end_epoch()
        assert next(training.model.parameters()).device.type == device
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_checkpoint_of_two_processes_is_not_gone_on_from_by_one(tmp_path: Path, digits: Source) -> None:
    training = Training(FEW, digits)
    with pytest.raises(TrainingError, match="is one of 2 processes, and 1 would go on"):
        training.restore(training.state() | {"processes": 2})


@pytest.mark.parametrize("batch", [15, 2])
def test_processes_that_cannot_share_a_batch_are_told(
    batch: int, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(TrainingError, match=f"2 processes can't share a batch of {batch}: each needs as many"):
        Training(replace(FEW, batch=batch), digits)


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_old_one_stays(tmp_path: Path, digits: Source) -> None:
    training, path = Training(FEW, digits), tmp_path / "run.pt"
    path.write_text("the old one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # as a full disk does, it ends a file
    try:
        with pytest.raises(TrainingError, match=r"run\.pt can't be written: File too large\.$"):
            program.save(FEW, training, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the old one"]


def test_a_checkpoint_with_something_else_in_it_is_told(
    tmp_path: Path, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(FEW, digits)
    state = training.state()
    state["optimizer"] = 3  # which PyTorch meets with an AttributeError
    monkeypatch.setattr(training, "state", lambda: state)
    program.save(FEW, training, tmp_path / "run.pt")
    with pytest.raises(TrainingError, match=r"run\.pt is not a checkpoint of this program, or is damaged\.$"):
        program.restore(FEW, training, tmp_path / "run.pt")


def write_images(folder: Path) -> None:
    """Six images to train on, and two to test on, of two classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_random_views_are_those_of_a_seed_an_epoch_and_an_image(tmp_path: Path) -> None:
    write_images(tmp_path)
    source = Source.of(PRESETS["imagenet"], tmp_path)
    rows = torch.tensor([[4, 1], [0, 3]])
    torch.manual_seed(1)
    found = torch.cat([images for images, _ in source.batches(source.train, rows, lambda place: 10 + place)])
    torch.manual_seed(2)  # what was drawn before does not matter, nor which images come before
    later = [images for images, _ in source.batches(source.train, rows[1:], lambda place: 10 + place)]
    assert torch.equal(found[2:], later[0])
    others = torch.cat([images for images, _ in source.batches(source.train, rows, lambda place: 20 + place)])
    assert not torch.equal(found, others)
    labels = torch.cat([labels for _, labels in source.batches(source.train, rows)])
    assert labels.tolist() == [1, 0, 0, 1]
    tested = [[images for images, _ in source.batches(source.test, [torch.arange(2)])] for _ in range(2)]
    assert torch.equal(tested[0][0], tested[1][0])


def test_without_augmentation_images_in_files_are_seen_as_in_a_test(tmp_path: Path) -> None:
    write_images(tmp_path)
    source = Source.of(replace(PRESETS["imagenet"], augment=0), tmp_path)
    [(found, _)] = source.batches(source.train, [torch.tensor([4])], lambda _: 3)
    assert torch.equal(found[0], central_view(Image.open(tmp_path / "train" / "dog" / "1.png")))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_sentence(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a worker reads it."""
    if workers:  # a fork of a process in which other tests have started JAX may wait forever
        monkeypatch.setattr(source, "DataLoader", partial(source.DataLoader, multiprocessing_context="spawn"))
    write_images(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(b"no image")
    images = Source.of(PRESETS["imagenet"], tmp_path, workers)
    batches = images.batches(images.train, torch.tensor([[0, 1], [2, 4]]))
    next(batches)
    with pytest.raises(TrainingError, match=rf"^{path} can't be read as an image \([^\n]*\)\.$"):
        next(batches)


def test_images_in_files_train_a_model(tmp_path: Path) -> None:
    write_images(tmp_path)
    small = replace(PRESETS["imagenet"], model="tiny", batch=2, epochs=1, solver_steps=2, k=1)
    source = Source.of(small, tmp_path)
    training = Training(small, source)
    training.step()
    state = copy.deepcopy(training.state())
    while not training.at_end_of_epoch:
        training.step()
    other = Training(small, source)
    other.restore(state)
    while not other.at_end_of_epoch:
        other.step()
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert training.test().images == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"), [(["--help"], 0, "usage: "), ([], 2, "The example needs torch")]
)
def test_help_and_errors_without_pytorch(arguments: list[str], code: int, words: str) -> None:
    program = "import sys; sys.modules['torch'] = None; from implicit_core.examples.mdeq.__main__ import main"
    command = [sys.executable, "-c", f"{program}; sys.exit(main({arguments}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert (done.stderr if code else done.stdout).startswith(words)

"""The training loop: all models take each step in turn, so that other load on the machine slows them equally."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

import implicit_core as ic
from implicit_core.registry import installed, load_backend

from . import picture, report
from .data import Digits, batches, load
from .model import ESTIMATORS, Array, Model, Parameters, initial_parameters
from .model_numpy import exact_gradient
from .result import Result

BATCH_SIZE, PROBE_SIZE = 64, 128
FRAMEWORKS = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "jax": ("jax",),
    "cupy": ("cupy",),
    "all": ("numpy", "torch", "jax"),
}
"""The choices, and the frameworks of each; ``"all"`` includes CuPy if it finds a GPU."""

CLASSES = {"numpy": "NumPyModel", "torch": "TorchModel", "jax": "JAXModel", "cupy": "CuPyModel"}
"""The classifier of each framework, in a module ``model_<framework>``."""


class NoGPUError(RuntimeError):
    """CuPy has no GPU to compute on."""


@dataclass
class Training:
    """One estimator's model in one framework, and the record of its training."""

    framework: str
    name: str
    model: Model
    losses: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def step(self, images: Array, labels: Array) -> float:
        """Train on one batch; returns the loss."""
        self.model.count(images, labels)
        start = perf_counter()
        loss = self.model.train_step(images, labels)
        self.durations.append(perf_counter() - start)
        self.losses.append(loss)
        return loss

    def measure(self, digits: Digits) -> None:
        """Test accuracy, and the cosine between the estimated and the exact gradient."""
        self.accuracies.append(float(np.mean(self.model.predict(digits.test_images) == digits.test_labels)))
        probe = digits.train_images[:PROBE_SIZE], digits.train_labels[:PROBE_SIZE]
        exact = exact_gradient(self.model.parameters(), *probe)
        self.cosines.append(cosine(self.model.gradient(*probe), exact))

    def result(self) -> Result:
        """The record so far."""
        return Result(
            self.framework,
            self.name,
            np.asarray(self.losses),
            np.asarray(self.durations),
            np.asarray(self.accuracies),
            np.asarray(self.cosines),
            self.model.counts,
            {name: value.copy() for name, value in self.model.parameters().items()},
        )


def cosine(a: Parameters, b: Parameters) -> float:
    """Cosine of the angle between two gradients of W, U and b."""
    x, y = (np.concatenate([gradient[name].ravel() for name in "WUb"]).astype(np.float64) for gradient in (a, b))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def model_classes(framework: str) -> dict[str, Callable[[Parameters, ic.Estimator], Model]]:
    """The classifiers of a framework, or of all; imports the frameworks."""
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework must be one of {', '.join(map(repr, FRAMEWORKS))}, got {framework!r}")
    names = FRAMEWORKS[framework]
    if framework == "all" and installed()["cupy"] and missing_gpu() is None:
        names += ("cupy",)
    if framework == "cupy" and (reason := missing_gpu()):
        raise NoGPUError(reason)
    return {name: getattr(import_module(f"{__package__}.model_{name}"), CLASSES[name]) for name in names}


def missing_gpu() -> str | None:
    """Why CuPy can't compute; None if it can."""
    devices = load_backend("cupy").devices()
    return None if devices[0].startswith("cuda") else devices[0]


def run(
    framework: str = "all",
    epochs: int = 20,
    seed: int = 0,
    output: str | Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Train the classifier with each estimator, print a table and save a picture of the curves.

    Parameters
    ----------
    framework
        ``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"`` or ``"all"``: those and, where CuPy finds a GPU, CuPy.
    epochs
        Passes over the training set, at least 1.
    seed
        Seed of the split, the initial parameters and the order of the batches.
    output
        A file, or a folder to put ``digits-<framework>.png`` in; ``outputs`` if None.
    console
        Where to print; standard output if None.

    Returns
    -------
    list of Result
        One for each estimator in each framework.

    Raises
    ------
    ValueError
        If an argument has a bad value.
    NoGPUError
        For ``"cupy"``, if there is no GPU.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    classes = model_classes(framework)
    console = Console() if console is None else console
    path = picture.picture_path(output, framework)
    digits, rng = load(seed), np.random.default_rng(seed)
    trainings = [
        Training(library, name, create(initial_parameters(seed), estimator))
        for name, estimator in ESTIMATORS.items()
        for library, create in classes.items()
    ]
    steps = epochs * (len(digits.train_labels) // BATCH_SIZE)
    # Threads slow down products of matrices this small, and by far where other programs keep the cores busy.
    with threadpool_limits(1), report.progress(console) as bars:
        tasks = [
            bars.add_task(f"{training.name:<15} {training.framework}", total=steps, loss=float("nan"))
            for training in trainings
        ]
        for _ in range(epochs):
            for images, labels in batches(digits, BATCH_SIZE, rng):
                for task, training in zip(tasks, trainings, strict=True):
                    bars.update(task, advance=1, loss=training.step(images, labels))
            for training in trainings:
                training.measure(digits)
    results = [training.result() for training in trainings]
    report.show(console, results)
    picture.save(path, results)
    console.print(f"Curves: {path}", soft_wrap=True, markup=False, highlight=False)
    return results

"""The settings of a run, and those of the published runs."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import implicit_core as ic
from implicit_core import checks
from implicit_core.arrays import PyTree

from ..program import flag
from .sizes import IMAGENET, LARGE, TINY, Sizes

MODELS = {
    "small": replace(TINY, channels=(16, 16), final=100),
    "small-4": replace(LARGE, channels=(16, 16, 32, 32), head=(8, 8, 16, 16), final=200),
    "tiny": TINY,
    "large": LARGE,
    "imagenet": IMAGENET,
}
DATA = ("digits", "fashion-mnist", "cifar10", "imagenet")
PHANTOM = ("unroll", "neumann")
GRADIENTS = (*PHANTOM, "one-step", "implicit")
OPTIMIZERS = ("sgd", "nesterov", "adam")
PRECISIONS = ("float32", "bfloat16")

LAYERS = 10
"""Applications of the cell in a step of pretraining."""
RESIDUAL = 1e-5
"""A solve ends where the residual of the whole batch is this, a root mean square over its numbers."""


@dataclass(frozen=True)
class Settings:
    """What determines a run; equal settings give equal parameters on the CPU, to the bit.

    Attributes
    ----------
    model
        One of :data:`MODELS`.
    data
        One of :data:`DATA`.
    pixels
        Height and width that larger images are reduced to; 0 leaves them as they are.
    train, test
        The most images; 0 for all.
    gradient
        One of :data:`GRADIENTS`.
    k, lam
        Those of ``unroll`` and ``neumann``.
    products
        Those of ``implicit``: Jacobian products of a backward solve.
    pretraining
        The share of all steps, the first ones, in which the cell is applied ten times to zero, without a solve.
    dropout
        Probability that a channel is left out in a solve.
    solver_steps
        Steps of Broyden's method: evaluations of the cell, the first of which is at the start.
    epochs, batch
        Passes over the images, and images a step, of all processes together. What is left of a pass after its full
        batches is left out.
    optimizer, rate, decay
        One of :data:`OPTIMIZERS`, its highest learning rate, and the weight decay of SGD.
    augment
        1 to crop and flip images at random, else 0.
    precision
        Of the cell, the encoder and the head. States and solves are in float32.
    seed
        Of the initial parameters, of the order of the images and of what is drawn.
    """

    model: str = "small"
    data: str = "digits"
    pixels: int = 16
    train: int = 3000
    test: int = 2000
    gradient: str = "unroll"
    k: int = 5
    lam: float = 0.5
    products: int = 24
    pretraining: float = 0.0
    dropout: float = 0.0
    solver_steps: int = 22
    epochs: int = 8
    batch: int = 16
    optimizer: str = "sgd"
    rate: float = 0.05
    decay: float = 1e-4
    augment: int = 0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("k", "products", "solver_steps", "epochs"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("batch", self.batch, 2)  # for the batch norms of the encoder and the head
        for name in ("pixels", "train", "test", "seed", "augment"):
            checks.integer(name, getattr(self, name), 0)
        for name in ("pretraining", "dropout"):
            checks.real(name, getattr(self, name), 0.0, 1.0)
        checks.real("rate", self.rate, 0.0, low_open=True)
        checks.real("decay", self.decay, 0.0)
        if self.augment > 1:
            raise ValueError(f"augment must be 0 or 1, got {self.augment}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if self.data == "imagenet" and (self.pixels or self.train or self.test):
            raise ValueError("pixels, train and test must be 0 for imagenet, whose files are read as they are needed")
        self.estimator()

    def estimator(self) -> ic.Estimator:
        """The gradient of the implicit layer."""
        match self.gradient:
            case "unroll":
                return ic.Unroll(self.k, self.lam, on_growth="ignore")
            case "neumann":
                return ic.Neumann(self.k, self.lam, on_growth="ignore")
            case "one-step":
                return ic.OneStep()
        return ic.Implicit(products=self.products)

    def solver(self) -> ic.Broyden:
        """The solver of the implicit layer."""
        return ic.Broyden(rtol=0.0, atol=0.0, max_steps=self.solver_steps, stop=WholeBatch(RESIDUAL))

    def sizes(self, image_channels: int, classes: int) -> Sizes:
        """The sizes of the model for such images."""
        sizes = MODELS[self.model]
        return replace(sizes, image_channels=image_channels, classes=classes, dropout=self.dropout)

    def __str__(self) -> str:
        numbers = {"implicit": f"({self.products})", "one-step": ""}.get(self.gradient, f"({self.k}, {self.lam:g})")
        return f"{self.data}, {self.model} model, {self.gradient}{numbers}, seed {self.seed}"

    def flags(self) -> dict[str, str]:
        """The settings that matter, as the command line spells them."""
        of_gradient = {"unroll": ("k", "lam"), "neumann": ("k", "lam"), "implicit": ("products",)}
        left_out = {"k", "lam", "products"}.difference(of_gradient.get(self.gradient, ()))
        left_out |= {"decay"} if self.optimizer == "adam" else set()
        return {flag(name): str(value) for name, value in asdict(self).items() if name not in left_out}


CHOICES: Mapping[str, Any] = {
    "model": tuple(MODELS),
    "data": DATA,
    "gradient": GRADIENTS,
    "optimizer": OPTIMIZERS,
    "precision": PRECISIONS,
}

PUBLISHED = replace(Settings(), pixels=0, train=0, test=0, batch=128, rate=0.1)
CIFAR10 = replace(PUBLISHED, data="cifar10")
PRESETS = {
    "small": Settings(),
    "small-4": Settings(model="small-4", solver_steps=18, products=20, epochs=5),
    "tiny": replace(CIFAR10, model="tiny", solver_steps=22 + 1, epochs=50),
    "large": replace(CIFAR10, model="large", solver_steps=18 + 1, products=20, epochs=220, augment=1),
    "imagenet": replace(
        PUBLISHED, model="imagenet", data="imagenet", lam=0.6, solver_steps=26 + 1, products=27, epochs=100,
        optimizer="nesterov", rate=0.05, decay=5e-5, augment=1,
    ),
}  # fmt: skip
"""The settings of a model: the published ones, but for the small ones.

The published numbers of steps do not count the evaluation at the start.
"""


@dataclass(frozen=True)
class WholeBatch:
    """A test that ends a solve where the root mean square of F(h) - h, over the numbers of all samples, is small.

    The published code stops on the norm of the whole batch, at 1e-5 times the root of its size.
    """

    residual: float

    def __call__(self, h: PyTree, f: PyTree) -> Any:
        """One boolean, a tensor."""
        pairs = list(zip(h, f, strict=True))
        squares = sum((after - before).square().sum() for before, after in pairs)
        return squares.sqrt() <= self.residual * math.sqrt(sum(before.numel() for before, _ in pairs))

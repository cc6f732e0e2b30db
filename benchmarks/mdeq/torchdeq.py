"""The same model with TorchDEQ's implicit layer: its Broyden steps, and its implicit or unrolled gradient."""

import math
from types import SimpleNamespace
from typing import Any

import torchdeq
from torch import Tensor, nn

from implicit_core.adapters import torch as ict
from implicit_core.examples.mdeq import training
from implicit_core.examples.mdeq.model import MDEQ
from implicit_core.examples.mdeq.settings import RESIDUAL, Settings
from implicit_core.examples.mdeq.sizes import Sizes


def through(deq: nn.Module, model: MDEQ, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a model whose cell a layer of TorchDEQ solves, and what that says of the solve.

    Weights and masks are constant within a solve, as in our layer.
    """
    x = model.encoder(images)
    cell = ict.constant_within_solve(model.layer.cell)
    points, info = deq(lambda *h: cell(h, x), model.start(x))
    logits: Tensor = model.head(tuple(points[-1]))
    return logits, info


class Model(MDEQ):
    """An :class:`MDEQ` whose layer is used for a pretraining alone."""

    def __init__(self, sizes: Sizes, settings: Settings) -> None:
        super().__init__(sizes, settings.solver(), settings.estimator())
        self.gradient: dict[str, Any] = {"grad": settings.k, "tau": settings.lam}
        if settings.gradient == "implicit":
            self.gradient = {"ift": True, "b_solver": "broyden", "b_max_iter": settings.products, "b_tol": 0.0}
        self.steps = settings.solver_steps
        self.found: Any = None

    @property
    def stats(self) -> Any:
        """Steps and relative residual of the last solve."""
        return self.layer.stats if self.found is None else self.found

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        """See :class:`MDEQ`."""
        self.found = None
        if options.get("solver") is not None:
            return super().forward(images, **options)
        numbers = sum(
            c * images[0, 0].numel() // 4 ** (i + self.sizes.halvings) for i, c in enumerate(self.sizes.channels)
        )
        tolerance = RESIDUAL * math.sqrt(numbers)
        deq = torchdeq.get_deq(f_solver="broyden", f_max_iter=self.steps, f_tol=tolerance, **self.gradient)
        logits, info = through(deq.train(self.training), self, images)
        # The step of the best point, not the last one.
        self.found = SimpleNamespace(relative=info["rel_lowest"], steps=info["nstep"])
        return logits


class Training(training.Training):
    """A training of this model."""

    def make(self, sizes: Sizes) -> MDEQ:
        """The model."""
        return Model(sizes, self.settings)

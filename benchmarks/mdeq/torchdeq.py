"""The same model with TorchDEQ's implicit layer: its Broyden steps, and its implicit or unrolled gradient."""

import math
from types import SimpleNamespace
from typing import Any

import torchdeq
from torch import Tensor

from implicit_core.adapters import torch as ict
from implicit_core.examples.mdeq import training
from implicit_core.examples.mdeq.model import MDEQ
from implicit_core.examples.mdeq.settings import RESIDUAL, Settings
from implicit_core.examples.mdeq.sizes import Sizes


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
        x = self.encoder(images)
        f, start = ict.constant_within_solve(self.layer.cell), self.start(x)
        size = sum(h[0].numel() for h in start)
        deq = torchdeq.get_deq(
            f_solver="broyden", f_max_iter=self.steps, f_tol=RESIDUAL * math.sqrt(size), **self.gradient
        ).train(self.training)
        points, info = deq(lambda *h: f(h, x), start)
        self.found = SimpleNamespace(relative=info["rel_lowest"], steps=info["nstep"])
        logits: Tensor = self.head(tuple(points[-1]))
        return logits


class Training(training.Training):
    """A training of this model."""

    def make(self, sizes: Sizes) -> MDEQ:
        """The model."""
        return Model(sizes, self.settings)

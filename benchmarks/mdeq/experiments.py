"""What is trained: the rows of the paper's tables, at two scales."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from implicit_core.examples.mdeq.settings import PRESETS, Settings

Changes = Mapping[str, Any]

_LARGE = {"small": "small-4", "paper": "large"}
MODELS = {"ablation": {"small": "small", "paper": "tiny"}, "large": _LARGE, "torchdeq": _LARGE}
"""The model at each scale: of Tab. 1, Fig. 2 and Fig. 3, and of Tab. 3, with our layer and with TorchDEQ's."""
SCALES = tuple(MODELS["ablation"])

DATA: Mapping[str, Changes] = {
    "digits": {"pixels": 0, "train": 0, "test": 0, "epochs": 3},
    "fashion-mnist": {},
    "cifar10": {},
}
"""Settings of the small scale, by data."""

EXACT = {"gradient": "implicit", "optimizer": "adam", "rate": 1e-3, "dropout": 0.25, "pretraining": 0.15}
"""The exact gradient, with the optimizer, the dropout and the pretraining of the code that MDEQ was published with."""
EXACT_SGD = {"gradient": "implicit", "dropout": 0.25}


def phantom(gradient: str, k: int, lam: float, dropout: float = 0.0) -> Changes:
    """The settings of a phantom gradient."""
    return {"gradient": gradient, "k": k, "lam": lam, "dropout": dropout}


ROWS: Mapping[str, Changes] = {
    "implicit": EXACT,
    "implicit-no-pretraining": EXACT | {"pretraining": 0.0},
    "implicit-no-dropout": EXACT | {"dropout": 0.0},
    "implicit-sgd": EXACT_SGD | {"pretraining": 0.15},
    "implicit-sgd-no-pretraining": EXACT_SGD,
    "implicit-sgd-no-pretraining-no-dropout": EXACT_SGD | {"dropout": 0.0},
    "upg-5-0.5": phantom("unroll", 5, 0.5),
    "npg-5-0.5": phantom("neumann", 5, 0.5),
    "upg-9-0.5-dropout": phantom("unroll", 9, 0.5, 0.25),
    "upg-5-0.5-adam-dropout": {**phantom("unroll", 5, 0.5, 0.25), "optimizer": "adam", "rate": 1e-3},
    **{f"upg-{k}-0.5": phantom("unroll", k, 0.5) for k in (1, 2, 9)},
    **{f"upg-5-{lam:g}": phantom("unroll", 5, lam) for lam in (0.25, 0.75, 1.0)},
    **{f"npg-{k}-{lam:g}": phantom("neumann", k, lam) for k, lam in ((1, 1.0), (9, 0.5), (5, 1.0))},
}
"""What a row changes in the settings of its model, which are those of SGD with an unrolled gradient."""
OF_LARGE: Mapping[str, Changes] = {"implicit": {"dropout": 0.3, "pretraining": 0.23}}
"""What the large models change beside that."""


def settings_of(family: str, row: str, scale: str, data: str, seed: int) -> Settings:
    """The settings of a run.

    Parameters
    ----------
    family, row
        Of :data:`MODELS` and :data:`ROWS`.
    scale, data, seed
        Of the command line.
    """
    changes = dict(ROWS[row]) | dict({} if family == "ablation" else OF_LARGE.get(row, {}))
    changes |= DATA[data] if scale == "small" else {}
    return replace(PRESETS[MODELS[family][scale]], data=data, seed=seed, **changes)

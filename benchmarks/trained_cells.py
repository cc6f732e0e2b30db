"""Equilibrium cells at four stages of training, with a batch of inputs each, in ``trained_cells.npz``.

Ten small classifiers: h = tanh(W h + x) and self-attention on the digits of scikit-learn, and a convolution block on
MNIST-1D. They are trained by phantom gradients, without a bound on the contraction of F.
``python -m benchmarks profile --train`` makes the file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from implicit_core.arrays import Array

FILE = Path(__file__).with_suffix(".npz")
RTOL = 1e-5
"""The largest residual of a sample, relative to ‖F(h)‖."""
STAGES = 0, 10, 50, 100
"""Percent of the training steps."""
STEPS, BATCH, KEPT = 200, 32, 16
"""Steps of training, their samples, and the samples of a problem."""
GROUPS = 4


def _normalized(xp: Any, x: Array, axis: int = -1) -> Array:
    mean = xp.mean(x, axis=axis, keepdims=True)
    centered = x - mean
    return centered / xp.sqrt(xp.mean(centered * centered, axis=axis, keepdims=True) + 1e-5)


def _relu(xp: Any, x: Array) -> Array:
    return xp.where(x > 0, x, xp.zeros_like(x))


def _tanh(xp: Any, h: Array, z: Any) -> Array:
    """tanh(W h + x), h (..., width)."""
    return xp.tanh(h @ z["shared"]["w"] + z["x"])


def _convolved(xp: Any, h: Array, kernel: Array) -> Array:
    """Convolve h (..., channels, length) with a kernel (3, channels, channels), zero beyond the ends."""
    zero = xp.zeros_like(h[..., :1])
    before, behind = xp.concat([zero, h[..., :-1]], axis=-1), xp.concat([h[..., 1:], zero], axis=-1)
    return kernel[0] @ before + kernel[1] @ h + kernel[2] @ behind


def _group_norm(xp: Any, h: Array, scale: Array) -> Array:
    grouped = xp.reshape(h, (*h.shape[:-2], GROUPS, -1))
    return xp.reshape(_normalized(xp, grouped), h.shape) * scale


def _convolution(xp: Any, h: Array, z: Any) -> Array:
    """relu(x + norm(W₂ * norm(relu(W₁ * h)))), h (..., channels, length)."""
    w = z["shared"]
    inner = _group_norm(xp, _relu(xp, _convolved(xp, h, w["first"])), w["inner"])
    return _relu(xp, z["x"] + _group_norm(xp, _convolved(xp, inner, w["second"]), w["outer"]))


def _attention(xp: Any, h: Array, z: Any) -> Array:
    """Self-attention and a feed-forward part, both after a norm, h (..., tokens, width)."""
    w = z["shared"]
    y = _normalized(xp, h + z["x"])
    scores = (y @ w["query"]) @ xp.matrix_transpose(y @ w["key"]) / y.shape[-1] ** 0.5
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    mixed = weights @ (y @ w["value"]) + z["x"]
    return mixed + _relu(xp, _normalized(xp, mixed) @ w["up"]) @ w["down"]


FUNCTIONS = {"tanh": _tanh, "convolution": _convolution, "attention": _attention}
MODELS = [
    *(("tanh", width, seed) for width, seed in ((16, 0), (32, 0), (32, 1), (64, 0))),
    *(("convolution", 8, seed) for seed in (0, 1, 2)),
    *(("attention", 16, seed) for seed in (0, 1, 2)),
]
"""Kind, width and seed."""


@dataclass(frozen=True)
class TrainedCell:
    """A cell with a batch.

    Attributes
    ----------
    name, family
        Names; cells of one family have the same function and shapes.
    function
        F: ``(xp, h, z) -> h``.
    start
        Zero, (batch, ...).
    z
        The weights, under "shared", and the injected inputs x, (batch, ...), float64.
    least_norm
        The smallest ‖F(h)‖ of a sample at the fixed point.
    """

    name: str
    family: str
    function: Callable[[Any, Array, Any], Array]
    start: np.ndarray
    z: dict[str, Any]
    least_norm: float


def load() -> list[TrainedCell]:
    """The cells of the file."""
    cells = []
    with np.load(FILE) as file:
        for kind, width, seed in MODELS:
            for stage in STAGES:
                key = f"{kind} {width}, seed {seed}, {stage} %"
                names = [name for name in file.files if name.startswith(f"{key}/")]
                values = {name.rpartition("/")[2]: file[name].astype(np.float64) for name in names}
                x, least = values.pop("x"), float(values.pop("least_norm"))
                z = {"shared": values, "x": x}
                cells.append(TrainedCell(key, f"{kind} {width}", FUNCTIONS[kind], np.zeros_like(x), z, least))
    return cells


# Training, in PyTorch.


def _parameters(kind: str, width: int, rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:
    """The weights of the cell, and of what is before and behind it."""

    def normal(*shape: int, fan_in: int, gain: float = 1.0) -> Array:
        return gain * rng.normal(size=shape) / fan_in**0.5

    if kind == "tanh":
        cell = {"w": normal(width, width, fan_in=width, gain=0.7)}
        return cell, {"in": normal(64, width, fan_in=64, gain=2.0), "out": normal(width, 10, fan_in=width)}
    if kind == "convolution":
        cell = {name: normal(3, width, width, fan_in=3 * width) for name in ("first", "second")}
        cell |= {"inner": np.ones((width, 1)), "outer": np.full((width, 1), 0.25)}
        return cell, {"in": normal(10, width, fan_in=10), "out": normal(width * 20, 10, fan_in=width * 20)}
    cell = {name: normal(width, width, fan_in=width) for name in ("query", "key")}
    cell |= {"value": normal(width, width, fan_in=width, gain=0.5), "up": normal(width, 2 * width, fan_in=width)}
    cell["down"] = normal(2 * width, width, fan_in=2 * width, gain=0.5)
    ends = {"in": normal(8, width, fan_in=8, gain=2.0), "position": normal(8, width, fan_in=1, gain=0.5)}
    return cell, ends | {"out": normal(8 * width, 10, fan_in=8 * width)}


def _injected(kind: str, images: Any, ends: Any) -> Any:
    """x, of images (n, pixels)."""
    if kind == "tanh":
        return images @ ends["in"]
    if kind == "convolution":  # windows of 10 points at every second one
        padded = images.new_zeros(len(images), 48)
        padded[:, 4:44] = images
        return (padded.unfold(1, 10, 2) @ ends["in"]).mT
    return images.reshape(-1, 8, 8) @ ends["in"] + ends["position"]


def _data(kind: str) -> tuple[Array, Array]:
    """Inputs (n, 64) or (n, 40), and classes."""
    if kind != "convolution":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return images / 16, labels
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    return made["x"], made["y"]


def _stages(kind: str, width: int, seed: int) -> Iterator[tuple[int, float, dict[str, Array]]]:
    """Train, and give the weights and the inputs of the kept batch at every stage, with the last loss."""
    import torch
    from array_api_compat import torch as xp
    from torch.nn.functional import cross_entropy

    import implicit_core as ic

    rng = np.random.default_rng(seed)
    images, labels = (torch.from_numpy(np.asarray(a)) for a in _data(kind))
    images = images.float()
    cell, ends = (
        {name: torch.tensor(value, dtype=torch.float32, requires_grad=True) for name, value in group.items()}
        for group in _parameters(kind, width, rng)
    )
    optimizer = torch.optim.Adam([*cell.values(), *ends.values()], lr=3e-3)
    solver, gradient = ic.Anderson(rtol=1e-4, max_steps=60), ic.Unroll(5, 0.5)
    loss = torch.tensor(float("nan"))
    for step in range(STEPS + 1):
        if 100 * step % STEPS == 0 and 100 * step // STEPS in STAGES:
            with torch.no_grad():
                kept = {name: value.numpy().copy() for name, value in cell.items()}
                kept["x"] = _injected(kind, images[:KEPT], ends).numpy().copy()
            yield 100 * step // STEPS, loss.item(), kept
        chosen = torch.from_numpy(rng.integers(KEPT, len(images), BATCH))
        z = {"shared": cell, "x": _injected(kind, images[chosen], ends)}
        h0 = torch.zeros_like(z["x"])
        solution = ic.fixed_point(
            lambda h, z: FUNCTIONS[kind](xp, h, z), h0, z, solver=solver, gradient=gradient, batch_ndim=1
        )
        loss = cross_entropy(solution.value.flatten(1) @ ends["out"], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _least_norm(kind: str, kept: dict[str, Array]) -> tuple[float, bool]:
    """The smallest norm of a fixed point, and whether all were found."""
    import torch
    from array_api_compat import torch as xp

    import implicit_core as ic

    z: dict[str, Any] = {"shared": {n: torch.from_numpy(v).double() for n, v in kept.items() if n != "x"}}
    z["x"] = torch.from_numpy(kept["x"]).double()
    solver = ic.Polyalgorithm(solvers=(ic.Anderson(max_steps=500), ic.Newton(max_steps=50)), rtol=1e-8)
    solution = ic.solve(
        lambda h, z: FUNCTIONS[kind](xp, h, z), torch.zeros_like(z["x"]), z, solver=solver, batch_ndim=1
    )
    return float(solution.value.flatten(1).norm(dim=1).min()), bool(solution.converged.all())


def train(console: Console) -> None:
    """Train all classifiers and write the file."""
    import torch

    torch.manual_seed(0)
    arrays: dict[str, Array] = {}
    for kind, width, seed in MODELS:
        for stage, loss, kept in _stages(kind, width, seed):
            key = f"{kind} {width}, seed {seed}, {stage} %"
            least, found = _least_norm(kind, kept)
            ends = "" if found else ", not found in all samples"
            console.print(f"{key}: loss {loss:.3f}, smallest fixed point {least:.3g}{ends}", highlight=False)
            arrays |= {f"{key}/{name}": value for name, value in kept.items()}
            arrays[f"{key}/least_norm"] = np.asarray(least, np.float32)
    np.savez_compressed(FILE, **arrays)
    console.print(f"Saved in {FILE.name}: {FILE.stat().st_size / 1e6:.2f} MB.", highlight=False)

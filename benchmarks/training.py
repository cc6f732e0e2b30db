"""One training step of a convolution block, solved to a given residual, compared with TorchDEQ."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import implicit_core as ic

from . import report
from .counting import Counted, costs
from .memory import MB
from .timing import interleaved, ratio
from .torch_step import Block, Layer, loss, ours, step, torchdeqs

LAM, K = 0.5, 5
LIMIT = 100
SOLVERS = {
    "plain": (ic.FixedPointIteration, "fixed_point_iter"),
    "Anderson": (ic.Anderson, "anderson"),
    "Broyden": (ic.Broyden, "broyden"),
}
HEAD = ("F", "VJP", "residual", "ms", "IFT / it", "held MB", "peak MB", "cosine")
LEGEND = """\
F          evaluations of F in the forward pass + in the backward pass
VJP        pullbacks through F
residual   largest relative residual of a sample at the solver's result
ms         time of a step: the median
IFT / it   time of TorchDEQ's step with the implicit gradient, divided by ms
held       MB of tensors that are kept for the backward pass
peak       MB of tensors alive at once, at most
cosine     between the gradient of all parameters and the exact one"""


def layers(solver: str, rtol: float, backward_rtol: float) -> dict[str, Layer]:
    """The rows of the table."""
    make, theirs = SOLVERS[solver]
    mine = partial(ours, solver=make(rtol=rtol, atol=0.0, max_steps=LIMIT))
    # The backward pass uses the solver of the forward pass, as in the examples of TorchDEQ.
    stop = {"f_stop_mode": "rel", "f_tol": rtol, "b_stop_mode": "rel", "b_tol": backward_rtol}
    their = partial(torchdeqs, theirs, LIMIT, b_solver=theirs, **stop)
    return {
        "Implicit(GMRES)": mine(ic.Implicit(ic.GMRES(rtol=backward_rtol))),
        "Implicit(BiCGSTAB)": mine(ic.Implicit(ic.BiCGSTAB(rtol=backward_rtol))),
        f"Unroll({K}, {LAM})": mine(ic.Unroll(K, LAM)),
        f"Neumann({K}, {LAM})": mine(ic.Neumann(K, LAM)),
        "OneStep": mine(ic.OneStep()),
        "TorchDEQ IFT": their(ift=True),
        "TorchDEQ IFT (hook)": their(hook_ift=True),
        f"TorchDEQ UPG({K})": their(grad=K, tau=LAM),
    }


def count(layer: Layer, cell: Block, x: Tensor) -> dict[str, Any]:
    """Evaluations, pullbacks, bytes, the residual and the gradient of one step."""
    seen = [float("inf")]

    def watched(h: Tensor, x: Tensor) -> Tensor:
        value = cell(h, x)
        if not value.requires_grad:
            norms = [y.flatten(1).norm(dim=1) for y in (value - h, value)]
            seen.append(float((norms[0] / norms[1]).max()))
        return value

    for leaf in (x, *cell.parameters()):
        leaf.grad = None
    counted = Counted(watched)
    found = costs(counted, lambda: layer(counted, x), loss)
    return {
        **found._asdict(),
        "residual": min(seen),
        "gradient": torch.cat([leaf.grad.flatten() for leaf in cell.parameters()]),
    }


def measure(
    cell: Block, x: Tensor, solver: str, rtols: tuple[float, float], repetitions: int, announce: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All rows of one solver."""
    found = layers(solver, *rtols)
    exact = count(ours(ic.Implicit(ic.GMRES(rtol=1e-5)), ic.Broyden(rtol=1e-6)), cell, x)["gradient"]
    runs = {name: partial(step, layer, cell, x) for name, layer in found.items()}
    times = interleaved(runs, repetitions, announce)
    rows = []
    for name, layer in found.items():
        counts = count(layer, cell, x)
        cosine = float(torch.cosine_similarity(counts.pop("gradient"), exact, dim=0))
        speed = 1 / ratio(times, name, "TorchDEQ IFT")
        rows.append({"name": name, **counts, "cosine": cosine, "times": times[name], "IFT over it": speed})
    return rows


def table(solver: str, rows: list[dict[str, Any]], title: str) -> report.Table:
    """The rows as text."""
    body = [
        (
            row["name"],
            f"{row['forward']}+{row['backward']}",
            str(row["vjps"]),
            f"{row['residual']:.0e}",
            f"{1e3 * median(row['times']):.0f}",
            f"{row['IFT over it']:.2f}",
            f"{row['held'] / MB:.1f}",
            f"{row['peak'] / MB:.1f}",
            f"{row['cosine']:.3f}",
        )
        for row in rows
    ]
    return report.Table((f"after {solver}", *HEAD), body, [title], LEGEND)


def picture(record: dict[str, Any]) -> Any:
    """Speed of each gradient, relative to the implicit gradient of TorchDEQ."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(record["rows"]), figsize=(12, 3.8), sharex=True, squeeze=False)
    for axis, (solver, rows) in zip(axes[0], record["rows"].items(), strict=True):
        names = [row["name"] for row in rows]
        colors = ["0.6" if name.startswith("TorchDEQ") else "C0" for name in names]
        axis.barh(names, [row["IFT over it"] for row in rows], color=colors)
        axis.axvline(1.0, color="k", linewidth=0.8)
        axis.set(title=f"after {solver}", xlabel="speed relative to TorchDEQ's IFT")
        axis.invert_yaxis()
    for axis in axes[0][1:]:
        axis.set_yticklabels([])
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = report.parser("training", __doc__)
    parser.add_argument("--rtol", type=float, default=1e-3, help="tolerance of the solve (default: 1e-3)")
    parser.add_argument(
        "--backward-rtol", type=float, default=1e-3, help="tolerance of exact gradients (default: 1e-3)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    batch, channels, size = (4, 8, 8) if options.quick else (16, 32, 32)
    repetitions = options.repetitions or (3 if options.quick else 9)
    cell, x = Block(channels), torch.randn(batch, channels, size, size).requires_grad_()
    console = Console(width=80)
    rtols = options.rtol, options.backward_rtol
    rows: dict[str, Any] = {}
    with warnings.catch_warnings(), report.progress(console, 3 * len(layers("Anderson", *rtols)) * repetitions) as bar:
        warnings.simplefilter("ignore", ic.InexactGradientWarning)
        for solver in SOLVERS:
            rows[solver] = measure(cell, x, solver, rtols, repetitions, bar)
    record = {"shape": [batch, channels, size, size], "lam": LAM, "k": K, "rows": rows}
    record |= report.facts(options, "torch", "torchdeq")
    title = f"A training step: {batch} x {channels} x {size} x {size}, residual {options.rtol:g}"
    tables = [table(solver, found, title) for solver, found in rows.items()]
    report.publish(console, options.output, "training", tables, record, picture)
    return 0

"""Time and memory of gradients after the solve, compared with TorchDEQ, hand-written loops and backpropagation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import implicit_core as ic

from . import report
from .counting import Counted
from .equations import random_layer
from .memory import MB, LiveTensors
from .timing import interleaved

LAM = 0.5
STEPS = 25
"""Number of steps in full backpropagation."""
HEAD = ("gradient", "F", "VJP", "after / UPG(5)", "pull / VJPs", "held MB", "peak MB")
LEGEND = """\
F          evaluations of F after the solve
VJP        pullbacks through F
after      time of everything after the solve, including the backward pass,
           divided by the same time for TorchDEQ's UPG(5)
pull       time of the backward pass, divided by the time of its VJPs alone
held       MB of tensors that are kept for the backward pass
peak       MB of tensors alive at once, at most, after the solve"""


@dataclass(frozen=True)
class Setting:
    """tanh(h Wᵀ + x) at its fixed point, and a cotangent to pull back to W and x."""

    h: Tensor
    w: Tensor
    x: Tensor
    v: Tensor

    def f(self, h: Tensor, z: tuple[Tensor, Tensor]) -> Tensor:
        """F(h, (W, x))."""
        return torch.tanh(h @ z[0].T + z[1])

    @property
    def z(self) -> tuple[Tensor, Tensor]:
        """The inputs and parameters of the gradient."""
        return self.w, self.x


def build(batch: int, width: int, seed: int) -> Setting:
    """Solve the layer."""
    equation = random_layer(np.random.default_rng(seed), batch, width)
    w, x = (torch.from_numpy(equation.z[name]).requires_grad_() for name in ("w", "x"))
    v = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))
    setting = Setting(torch.zeros(batch, width), w, x, v)
    h = ic.solve(setting.f, setting.h, (w.detach(), x.detach()), solver=ic.Broyden(rtol=1e-5), batch_ndim=1).value
    return Setting(h, w, x, v)


F = Callable[[Tensor, Any], Tensor]
Way = Callable[[F], Tensor]
"""``forward(f)``: the value with its graph, starting at the fixed point."""


def ours(setting: Setting, gradient: ic.Estimator) -> Way:
    """The layer of this library with a solver that returns the known solution, which is checked with one F."""

    def forward(f: F) -> Tensor:
        return ic.fixed_point(
            f, setting.h, setting.z, solver=lambda *_: setting.h, gradient=gradient, batch_ndim=1
        ).value

    return forward


def torchdeqs(setting: Setting, **settings: Any) -> Way:
    """The layer of TorchDEQ with a solver that returns the known solution, without a check."""
    import torchdeq
    from torchdeq.solver import register_solver

    register_solver("known", lambda *_, **__: (setting.h.clone(), [], {}))
    deq = torchdeq.get_deq(f_solver="known", b_max_iter=100, b_stop_mode="rel", b_tol=1e-4, **settings)
    return lambda f: deq(lambda h: f(h, setting.z), setting.h)[0][-1]


def loop(setting: Setting, k: int, lam: float, start: Tensor | None = None) -> Way:
    """A loop of k damped steps."""

    def forward(f: F) -> Tensor:
        h = setting.h if start is None else start
        for _ in range(k):
            h = (1 - lam) * h + lam * f(h, setting.z) if lam < 1 else f(h, setting.z)
        return h

    return forward


def series(setting: Setting, k: int) -> Way:
    """A Neumann series with k terms, in a hook on one F."""

    def forward(f: F) -> Tensor:
        h = setting.h.detach().requires_grad_()
        value = f(h, setting.z)
        within = False

        def hook(v: Tensor) -> Tensor:
            nonlocal within
            if within:
                return v
            within = True
            w = total = LAM * v
            for _ in range(k - 1):
                w = LAM * torch.autograd.grad(value, h, w, retain_graph=True)[0] + (1 - LAM) * w
                total = total + w
            within = False
            return total

        value.register_hook(hook)
        return value

    return forward


def ways(setting: Setting, ks: Sequence[int]) -> dict[str, tuple[Way, tuple[int, int, int] | None]]:
    """All rows, each with the numbers of VJPs with respect to h, z and both in a pullback; None if not fixed."""
    rows: dict[str, tuple[Way, tuple[int, int, int] | None]] = {"OneStep": (ours(setting, ic.OneStep()), (0, 1, 0))}
    for k in ks:
        rows[f"Neumann({k})"] = ours(setting, ic.Neumann(k, LAM)), (k - 1, 1, 0)
    for k in ks:
        rows[f"Unroll({k})"] = ours(setting, ic.Unroll(k, LAM)), (0, 1, k - 1)
    rows["Unroll(5, recompute)"] = ours(setting, ic.Unroll(5, LAM, recompute=True)), None
    rows["Implicit(GMRES)"] = ours(setting, ic.Implicit(ic.GMRES(rtol=1e-4))), None
    rows["Implicit(Richardson)"] = ours(setting, ic.Implicit(ic.Richardson(rtol=1e-4))), None
    rows["TorchDEQ UPG(5)"] = torchdeqs(setting, grad=5, tau=LAM), (0, 1, 4)
    rows["TorchDEQ IFT"] = torchdeqs(setting, ift=True), None
    rows["TorchDEQ IFT (hook)"] = torchdeqs(setting, hook_ift=True), None
    rows["loop, Neumann(5)"] = series(setting, 5), (4, 1, 0)
    rows["loop, Unroll(5)"] = loop(setting, 5, LAM), (0, 1, 4)
    rows[f"backprop, {STEPS} steps"] = loop(setting, STEPS, 1.0, torch.zeros_like(setting.h)), (0, 1, STEPS - 1)
    return rows


def vjps(setting: Setting) -> dict[str, Callable[[], Any]]:
    """One VJP of each kind: with respect to h, to z = (W, x), and to both."""
    h = setting.h.detach().requires_grad_()
    value = setting.f(h, setting.z)
    inputs = {"vjp h": (h,), "vjp z": setting.z, "vjp": (h, *setting.z)}
    return {
        name: partial(torch.autograd.grad, value, wanted, setting.v, retain_graph=True)
        for name, wanted in inputs.items()
    }


def count(setting: Setting, way: Way) -> dict[str, int]:
    """Evaluations, pullbacks and bytes of one forward and backward pass."""
    f = Counted(setting.f)
    with LiveTensors() as live:
        value = way(f)
        held = live.bytes
        live.peak = held
        torch.autograd.grad(value, setting.z, setting.v)
    # The evaluation that checks the solution records no graph, so it is not counted.
    return {"evaluations": f.recorded, "vjps": f.vjps, "held": held, "peak": live.peak}


def measure(
    setting: Setting, ks: Sequence[int], repetitions: int, announce: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All rows."""
    found = ways(setting, ks)
    # TorchDEQ's hook never ends when one graph is differentiated twice, so its pullback is not timed alone.
    values = {name: way(setting.f) for name, (way, kinds) in found.items() if kinds is not None}
    runs: dict[str, Callable[[], Any]] = dict(vjps(setting))
    values_of_z = tuple(x.detach() for x in setting.z)
    runs["check"] = partial(ic.solve, setting.f, setting.h, values_of_z, solver=lambda *_: setting.h, batch_ndim=1)
    for name, (way, _) in found.items():
        runs[f"all {name}"] = lambda way=way: torch.autograd.grad(way(setting.f), setting.z, setting.v)
    for name, value in values.items():
        runs[f"pull {name}"] = partial(torch.autograd.grad, value, setting.z, setting.v, retain_graph=True)
    times = interleaved(runs, repetitions, announce)

    def after(name: str) -> list[float]:
        checked = not name.startswith(("TorchDEQ", "loop", "backprop"))
        return [a - b * checked for a, b in zip(times[f"all {name}"], times["check"], strict=True)]

    rows = []
    for name, (way, kinds) in found.items():
        row: dict[str, Any] = {"name": name, **count(setting, way), "after": after(name)}
        row["over UPG(5)"] = median(a / b for a, b in zip(row["after"], after("TorchDEQ UPG(5)"), strict=True))
        if kinds is not None:
            units = zip(*(times[kind] for kind in ("vjp h", "vjp z", "vjp")), strict=True)
            sums = [sum(n * t for n, t in zip(kinds, unit, strict=True)) for unit in units]
            row["over VJPs"] = median(a / b for a, b in zip(times[f"pull {name}"], sums, strict=True))
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> report.Table:
    """The rows as text."""
    body = [
        (
            row["name"],
            str(row["evaluations"]),
            str(row["vjps"]),
            f"{row['over UPG(5)']:.2f}",
            f"{row['over VJPs']:.2f}" if "over VJPs" in row else "",
            f"{row['held'] / MB:.1f}",
            f"{row['peak'] / MB:.1f}",
        )
        for row in rows
    ]
    return report.Table(HEAD, body, [title], LEGEND)


def picture(record: dict[str, Any]) -> Any:
    """Time and memory as functions of k."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    rows = {row["name"]: row for row in record["rows"]}
    for form in ("Neumann", "Unroll"):
        ks = record["ks"]
        axes[0].plot(ks, [1e3 * median(rows[f"{form}({k})"]["after"]) for k in ks], "o-", label=form)
        axes[1].plot(ks, [rows[f"{form}({k})"]["held"] / MB for k in ks], "o-", label=form)
    for name, style in (("TorchDEQ UPG(5)", "k^"), ("Implicit(GMRES)", "rs")):
        axes[0].plot([5], [1e3 * median(rows[name]["after"])], style, label=name)
        axes[1].plot([5], [rows[name]["held"] / MB], style, label=name)
    axes[0].set(xlabel="k", ylabel="ms after the solve", title="time")
    axes[1].set(xlabel="k", ylabel="MB", title="kept for the backward pass")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = report.parser("gradients", __doc__)
    parser.add_argument("--batch", type=report.positive, help="samples (default: 256)")
    parser.add_argument("--width", type=report.positive, help="size of a state (default: 1024)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    batch, width = options.batch or (32 if options.quick else 256), options.width or (128 if options.quick else 1024)
    ks = [1, 5] if options.quick else [1, 2, 5, 9, 14, 20]
    repetitions = options.repetitions or (5 if options.quick else 9)
    console = Console(width=80)
    setting = build(batch, width, options.seed)
    with report.progress(console, (4 + 2 * len(ways(setting, ks))) * repetitions) as announce:
        rows = measure(setting, ks, repetitions, announce)
    record = {"batch": batch, "width": width, "lam": LAM, "ks": ks, "rows": rows}
    record |= report.facts(options, "torch", "torchdeq")
    title = f"Gradients of tanh(W h + x), {batch} x {width}, after the solve; lambda = {LAM}"
    report.publish(console, options.output, "gradients", [table(rows, title)], record, picture)
    return 0

"""Figure 1 of the paper: cosine of the phantom gradient with the exact one as a function of k.

The synthetic setting: a layer F(h, x) = tanh(W h + U x + b) whose W is spectrally normalized, so that F's Lipschitz
constant in h is L_h = 0.9; a mean square as the loss; gradients with respect to W, U and b, in float64. The exact
gradient is backpropagation through 100 fixed-point iterations, which must leave a relative error below 1e-5. As a
cross-check, 20 steps of Broyden's method on the adjoint system must give a gradient whose cosine with it is above
0.9999. The inexact point is the result of 3 iterations; its gradients are compared with the same exact gradient.

The paper gives neither width nor initialization. W is orthogonal before it is normalized, so that all its singular
values are 0.9 and the series converges slowly; with ``--weight gaussian`` only the largest singular value is 0.9.

The statements of the paper about the figure are checked for the means over the problems, in this form:

1. The cosine rises with k for every λ: from each k to the next, up to 2e-3, and from the first k to the last.
2. With a smaller λ it rises more slowly: at each k it is at most 2e-3 above the cosine of a larger λ, and its mean over
   k is lower. (At k = 1 the Neumann form only scales with λ, so that the cosines are equal.)
3. Both forms agree at the exact fixed point, to 1e-9. At the inexact point the unrolled form's cosine is at least the
   Neumann form's for every λ and k. With λ = 1 and the last k, 1 - cosine of the unrolled form is less than a tenth of
   the Neumann form's: its k steps continue the solve, while the Neumann form uses the Jacobian at a wrong point.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

import implicit_core as ic
from implicit_core.arrays import PyTree

from . import report

Array = np.ndarray[Any, np.dtype[np.float64]]
Curves = dict[tuple[str, str], Array]

CONTRACTION, ITERATIONS, INEXACT, BROYDEN = 0.9, 100, 3, 20
LAMBDAS = (0.1, 0.25, 0.5, 0.75, 1.0)
SHOWN = (1, 2, 5, 10, 20)
FORMS: dict[str, Callable[[int, float], ic.Estimator]] = {"unrolled": ic.Unroll, "Neumann": ic.Neumann}
POINTS = ("exact", "inexact")
NOISE, AGREEMENT = 2e-3, 1e-9
LEGEND = """\
Mean over the problems of the cosine with the exact gradient at the fixed
point; the standard deviation is in the picture and the CSV."""


def value(h: Array, z: PyTree) -> Array:
    """tanh(W h + U x + b), per problem: h and x (problems, batch, width), W and U (problems, width, width)."""
    mapped: Array = np.tanh(h @ z["w"].mT + z["x"] @ z["u"].mT + z["b"])
    return mapped


def linearize(h: Array, z: PyTree) -> ic.Linearization:
    """F at (h, z) and its pullbacks; the inputs x have no gradient."""
    mapped = value(h, z)
    slope = 1 - mapped**2

    def vjp_z(v: Array) -> PyTree:
        v = v * slope
        return {"w": v.mT @ h, "u": v.mT @ z["x"], "b": v.sum(1, keepdims=True), "x": None}

    return ic.Linearization(mapped, vjp_h=lambda v: (v * slope) @ z["w"], vjp_z=vjp_z)


PROBLEM = ic.Problem(value, linearize=linearize, batch_ndim=1)


def draw(rng: np.random.Generator, problems: int, batch: int, width: int, weight: str) -> tuple[PyTree, Array]:
    """Parameters and inputs of independent problems, and the targets of the loss (problems, batch, width)."""
    square, state = (problems, width, width), (problems, batch, width)
    w, u = rng.normal(size=square), rng.normal(size=square)
    if weight == "orthogonal":
        w = np.linalg.qr(w)[0]
    w *= CONTRACTION / np.linalg.norm(w, 2, axis=(1, 2), keepdims=True)
    z = {"w": w, "u": u / np.sqrt(4 * width), "b": 0.1 * rng.normal(size=(problems, 1, width))}
    return z | {"x": rng.normal(size=state)}, rng.normal(size=state)


def gradient(estimator: ic.Estimator, h: Array, z: PyTree, targets: Array) -> Array:
    """Gradient of ½ ‖h - y‖² at the estimator's value, with respect to W, U and b: (problems, parameters)."""
    point, pullback = estimator.vjp(PROBLEM, h, z)
    return flat(pullback(point - targets))


def flat(z_bar: PyTree) -> Array:
    """A cotangent of z as a matrix, one row for each problem."""
    return np.concatenate([z_bar[name].reshape(len(z_bar[name]), -1) for name in ("w", "u", "b")], axis=1)


def adjoint_gradient(h: Array, z: PyTree, targets: Array) -> Array:
    """The exact gradient (Eq. 4) at h by Broyden's method on g = (∂F/∂h)ᵀ g + v, as the paper's cross-check."""
    at, v = linearize(h, z), h - targets
    assert at.vjp_h is not None
    assert at.vjp_z is not None
    pull = at.vjp_h
    solver = ic.Broyden(memory=BROYDEN, rtol=0.0, atol=0.0, max_steps=BROYDEN)
    g = ic.solve(lambda g, v: pull(g) + v, v, v, solver=solver, batch_ndim=2).value
    return flat(at.vjp_z(g))


def cosine(a: Array, b: Array) -> Array:
    """Cosine of each row of ``a`` with the same row of ``b``."""
    similarity: Array = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return similarity


def relative_error(h: Array, z: PyTree) -> Array:
    """‖h - F(h, z)‖ / ‖h‖ of each problem."""
    error: Array = np.linalg.norm(h - value(h, z), axis=(1, 2)) / np.linalg.norm(h, axis=(1, 2))
    return error


def measure(z: PyTree, targets: Array, terms: int, announce: Callable[[str], None]) -> tuple[Curves, dict[str, float]]:
    """The cosines (λ, k, problems) of each form and point, and the checks of the setting."""
    zero = np.zeros_like(targets)
    fixed, pullback = ic.BPTT(ITERATIONS).vjp(PROBLEM, zero, z)
    exact = flat(pullback(fixed - targets))
    points = dict(zip(POINTS, (fixed, ic.BPTT(INEXACT).value(PROBLEM, zero, z)), strict=True))
    curves = {(form, point): np.empty((len(LAMBDAS), terms, len(zero))) for point in POINTS for form in FORMS}
    for (form, point), curve in curves.items():
        for row, lam in zip(curve, LAMBDAS, strict=True):
            announce(f"{form}, {point}, λ = {lam}")
            for k in range(1, terms + 1):
                row[k - 1] = cosine(gradient(FORMS[form](k, lam), points[point], z, targets), exact)
    setting = {
        "relative_error": float(relative_error(fixed, z).max()),
        "inexact_relative_error": float(relative_error(points["inexact"], z).mean()),
        "cross_check": float(cosine(exact, adjoint_gradient(fixed, z, targets)).min()),
    }
    return curves, setting


def contradictions(means: Curves, setting: dict[str, float]) -> list[str]:
    """The statements of the module's docstring that mean cosines (λ, k) contradict."""
    checks = {
        f"relative error {setting['relative_error']:.1e} of the fixed point is below 1e-5": (
            setting["relative_error"] < 1e-5
        ),
        f"cosine {setting['cross_check']:.6f} of the two exact gradients is above 0.9999": (
            setting["cross_check"] > 0.9999
        ),
    }
    for (form, point), mean in means.items():
        where = f"({form} form, {point} fixed point)"
        rises = np.all(np.diff(mean, axis=1) >= -NOISE) and np.all(mean[:, -1] > mean[:, 0])
        checks[f"1. the cosine rises with k for every λ {where}"] = bool(rises)
        ordered = np.all(np.diff(mean, axis=0) >= -NOISE) and np.all(np.diff(mean.mean(axis=1)) > 0)
        checks[f"2. the cosine rises more slowly with a smaller λ {where}"] = bool(ordered)
    gaps = {point: means["unrolled", point] - means["Neumann", point] for point in POINTS}
    lacking = {form: 1 - means[form, "inexact"][-1, -1] for form in FORMS}
    checks["3. both forms agree at the exact fixed point"] = bool(np.all(np.abs(gaps["exact"]) <= AGREEMENT))
    checks["3. the unrolled form is at least as good at the inexact fixed point"] = bool(np.all(gaps["inexact"] >= 0))
    checks["3. the Neumann form levels off at the inexact fixed point, and the unrolled one does not"] = bool(
        lacking["unrolled"] < 0.1 * lacking["Neumann"]
    )
    return [sentence for sentence, holds in checks.items() if not holds]


def rows(curves: Curves) -> list[dict[str, Any]]:
    """One row for each form, fixed point, λ and k, with statistics over the problems."""
    return [
        {
            "form": form,
            "fixed_point": point,
            "lambda": lam,
            "k": k,
            "mean": float(cosines.mean()),
            "standard_deviation": float(cosines.std()),
            "minimum": float(cosines.min()),
        }
        for (form, point), curve in curves.items()
        for lam, by_k in zip(LAMBDAS, curve, strict=True)
        for k, cosines in enumerate(by_k, 1)
    ]


def table(curves: Curves, title: Sequence[str]) -> report.Table:
    """Mean cosines at the values of k in ``SHOWN``."""
    terms = [k for k in SHOWN if k <= next(iter(curves.values())).shape[1]]
    body = [
        (f"{form}, {point}, λ = {lam}", *(f"{by_k[k - 1].mean():.4f}" for k in terms))
        for (form, point), curve in curves.items()
        for lam, by_k in zip(LAMBDAS, curve, strict=True)
    ]
    return report.Table(("form, fixed point, λ", *(f"k = {k}" for k in terms)), body, title, LEGEND)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code, 1 if a statement does not hold."""
    parser = report.parser("fig1", (__doc__ or "").partition("\n")[0], timed=False)
    parser.add_argument("--weight", choices=("orthogonal", "gaussian"), default="orthogonal", help="W before scaling")
    options = parser.parse_args(arguments)
    problems, batch, width, terms = (16, 8, 32, 20) if options.quick else (20, 16, 64, 30)
    z, targets = draw(np.random.default_rng(options.seed), problems, batch, width, options.weight)
    console = Console(width=80)
    with report.progress(console, len(FORMS) * len(POINTS) * len(LAMBDAS)) as announce:
        curves, setting = measure(z, targets, terms, announce)
    title = [
        f"tanh(W h + U x + b), L_h = {CONTRACTION}, W {options.weight}: "
        f"{problems} problems, width {width}, batch {batch}",
        f"exact: {ITERATIONS} iterations, relative error at most {setting['relative_error']:.0e}, "
        f"cross-check {setting['cross_check']:.6f}",
        f"inexact: {INEXACT} iterations, mean relative error {setting['inexact_relative_error']:.2f}",
    ]
    record = {"rows": rows(curves), "setting": setting} | report.facts(options)
    report.publish(console, options.output, "fig1", [table(curves, title)], record, picture)
    if options.output:
        report.save_csv(options.output / "fig1.csv", record["rows"])
    return report.verdict(console, contradictions({key: curve.mean(-1) for key, curve in curves.items()}, setting))


def picture(record: dict[str, Any]) -> Any:
    """A panel for each form (column) and fixed point (row): the mean, with a band of one standard deviation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), sharex=True, sharey=True)
    colors = plt.get_cmap("viridis")(np.linspace(0.9, 0.0, len(LAMBDAS)))
    for axis, (point, form) in zip(axes.flat, ((point, form) for point in POINTS for form in FORMS), strict=True):
        for lam, color in zip(LAMBDAS, colors, strict=True):
            found = [
                row for row in record["rows"] if (row["form"], row["fixed_point"], row["lambda"]) == (form, point, lam)
            ]
            k, mean, deviation = (
                np.array([row[name] for row in found]) for name in ("k", "mean", "standard_deviation")
            )
            axis.plot(k, mean, color=color, lw=1.6, label=f"λ = {lam:g}")
            axis.fill_between(k, mean - deviation, np.minimum(mean + deviation, 1), color=color, alpha=0.2, lw=0)
        axis.text(0.97, 0.05, f"{form}, {point} fixed point", transform=axis.transAxes, ha="right")
        axis.axhline(1, color="0.6", lw=0.8, ls=":")
        axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set(xlabel="k", xlim=(1, k[-1]))
    for axis in axes[:, 0]:
        axis.set(ylabel="cosine with the exact gradient")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(handles, labels, loc="upper center", ncols=len(LAMBDAS), frameon=False)
    return figure

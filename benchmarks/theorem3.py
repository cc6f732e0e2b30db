"""Theorem 3 of the paper: SGD with phantom gradients, compared with its bound.

The implicit layer F(h, θ) = g Q φ(h) + X θ + b has two states and two parameters, with a gain g, X and b for each data
point: Q is a rotation, φ(h) = (h + β sin h) / (1 + β), and |g| ≤ 0.8, so that L_h = 0.8. The loss is the sum over the
states of 1 - cos u + γ log(1 + u²), u = h - y: smooth, bounded below, with bounded gradients and many local minima.
Gains of both signs weigh the data points differently in a truncated series, so that its mean has a bias. Each run has
its own θ and draws a random data point in each step, which gives an unbiased gradient of R. Step sizes are c / √τ.

R and ∇R are computed with Newton's method and a dense solve over all data points, at steps evenly spaced in log τ; each
of these steps also represents the steps since the previous one. ε (Eq. 20) is the largest distance of the phantom
gradient from the exact one (also a dense solve) over all steps and runs; G is the largest norm of an exact gradient.
The plateau is the weighted mean (Eq. 21) over the last half of the steps.

These statements are checked, for means over the runs:

1. With the exact gradient the weighted mean follows log T / √T: the ratio of the two grows by less than a tenth over
   the last decade of T. The curve in the picture is C log T / √T, where C is the largest ratio for T ≥ 10.
2. The ε term: with k = 1 the ratio grows by more than a tenth, and the plateau is at least three times as high.
3. The plateau falls with k (for a larger k it is at most 1.1 times as high), and so does ε.
4. The plateau is at most ε G above the exact gradient's, from the descent lemma with the error Σ η ε ‖∇R‖. This bound
   is loose, since ε and G are maxima. A tighter one: the plateau is at most 2 B above 1.1 times the exact gradient's,
   where B is the mean of ‖E phantom - ∇R‖² over the same steps, since the lemma needs only the mean error.
5. R decreases with every gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console

import implicit_core as ic
from implicit_core.arrays import PyTree

from . import report

Array = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.integer[Any]]]

STATES, PARAMETERS, DATA = 2, 2, 6
CONTRACTION, ANGLE, BETA, GAMMA, RATE = 0.8, 0.3, 0.3, 0.3, 0.1
Q = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
TERMS, LAM = (1, 2, 4, 8), 1.0
GRADIENTS: dict[str, ic.Estimator] = {
    "exact": ic.Implicit(ic.GMRES(rtol=1e-10)),
    **{f"k = {k}": ic.Neumann(k, LAM) for k in TERMS},
}
SOLVER = ic.Anderson(memory=3, rtol=1e-7, atol=1e-7, max_steps=200)
LEGEND = f"""\
Neumann(k, λ = {LAM:g}); means over the runs.
mean     mean of ‖∇R‖² over all steps, weighted by step size (Eq. 21)
plateau  the same mean over the last half of the steps
B        mean of ‖E phantom - ∇R‖² over the last half of the steps
ε        largest ‖phantom - exact‖ (Eq. 20);  G: largest ‖exact‖"""


def phi(h: Array) -> Array:
    """(h + β sin h) / (1 + β), whose slope is in ((1 - β) / (1 + β), 1]."""
    return (h + BETA * np.sin(h)) / (1 + BETA)


def slope(h: Array) -> Array:
    """The derivative of φ."""
    steepness: Array = (1 + BETA * np.cos(h)) / (1 + BETA)
    return steepness


def value(h: Array, z: PyTree) -> Array:
    """F(h, θ) = g Q φ(h) + X θ + b: h and b (samples, 2), θ (samples, 2), g (samples, 1), X (samples, 2, 2)."""
    mapped: Array = z["gain"] * (phi(h) @ Q.T) + (z["x"] @ z["theta"][..., None])[..., 0] + z["b"]
    return mapped


def linearize(h: Array, z: PyTree) -> ic.Linearization:
    """F at (h, θ) and its pullbacks; the data have no gradient."""
    tilt = z["gain"] * slope(h)
    return ic.Linearization(
        value(h, z),
        vjp_h=lambda v: tilt * (v @ Q),
        vjp_z=lambda v: {"gain": None, "x": None, "b": None, "theta": (v[:, None] @ z["x"])[:, 0]},
    )


PROBLEM = ic.Problem(value, linearize=linearize, batch_ndim=1)


def loss(h: Array, y: Array) -> Array:
    """Σ 1 - cos u + γ log(1 + u²) over the states, u = h - y."""
    total: Array = np.sum(1 - np.cos(h - y) + GAMMA * np.log1p((h - y) ** 2), axis=-1)
    return total


def loss_gradient(h: Array, y: Array) -> Array:
    """Gradient of the loss with respect to h."""
    gradient: Array = np.sin(h - y) + 2 * GAMMA * (h - y) / (1 + (h - y) ** 2)
    return gradient


def residual_jacobian(h: Array, z: PyTree) -> Array:
    """I - ∂F/∂h, dense: (samples, 2, 2)."""
    jacobian: Array = np.eye(STATES) - z["gain"][..., None] * Q * slope(h)[:, None, :]
    return jacobian


def newton(h: Array, z: PyTree) -> Array:
    """The fixed point, by dense Newton steps from h."""
    for _ in range(30):
        left = value(h, z) - h
        if np.max(np.abs(left)) < 1e-12:
            return h
        h = h + np.linalg.solve(residual_jacobian(h, z), left[..., None])[..., 0]
    raise RuntimeError(f"Newton's method left a residual of {np.max(np.abs(left)):.1e} after 30 steps")


def dense_gradient(h: Array, z: PyTree, v: Array) -> Array:
    """Xᵀ (I - ∂F/∂h)⁻ᵀ v (Eq. 4) by a dense solve: (samples, 2)."""
    w = np.linalg.solve(residual_jacobian(h, z).mT, v[..., None])
    gradient: Array = (z["x"].mT @ w)[..., 0]
    return gradient


def draw(rng: np.random.Generator) -> PyTree:
    """The data points: gains evenly spaced in ± L_h, and random X, b and targets y."""
    return {
        "gain": rng.permutation(np.linspace(-CONTRACTION, CONTRACTION, DATA))[:, None],
        "x": rng.normal(size=(DATA, STATES, PARAMETERS)),
        "b": 0.5 * rng.normal(size=(DATA, STATES)),
        "y": 2 * rng.normal(size=(DATA, STATES)),
    }


def at(theta: Array, data: PyTree, chosen: Indices) -> PyTree:
    """The argument z of F for samples (θ, data point)."""
    return {"theta": theta} | {name: data[name][chosen] for name in ("gain", "x", "b")}


def estimate(h: Array, z: PyTree, v: Array) -> Array:
    """The gradients of samples (gradients x runs), each part with its own estimator: (samples, 2)."""
    parts = np.split(np.arange(len(h)), len(GRADIENTS))
    found = [
        gradient.vjp(PROBLEM, h[part], {name: leaf[part] for name, leaf in z.items()})[1](v[part])["theta"]
        for part, gradient in zip(parts, GRADIENTS.values(), strict=True)
    ]
    return np.concatenate(found)


@dataclass(frozen=True)
class Trace:
    """The course of every gradient and run.

    Attributes
    ----------
    steps
        τ at which R was evaluated.
    weights
        For each of them, the sum of the step sizes since the previous one.
    squares, biases, risks
        ‖∇R‖², ‖E phantom - ∇R‖² and R: (steps, gradients, runs).
    epsilon
        Largest ‖phantom - exact‖ (Eq. 20) over all steps and runs: (gradients,).
    largest
        G, the largest norm of an exact gradient.
    """

    steps: Array
    weights: Array
    squares: Array
    biases: Array
    risks: Array
    epsilon: Array
    largest: float

    def means(self) -> Array:
        """Σ η ‖∇R‖² / Σ η (Eq. 21) up to each of the steps: (steps, gradients, runs)."""
        total: Array = np.cumsum(self.weights[:, None, None] * self.squares, axis=0)
        return total / np.cumsum(self.weights)[:, None, None]

    def late(self, values: Array) -> Array:
        """The weighted mean of values over the last half of the steps, and over the runs: (gradients,)."""
        half = self.steps > self.steps[-1] / 2
        mean: Array = np.average(values[half].mean(axis=2), axis=0, weights=self.weights[half])
        return mean


def evaluate(theta: Array, data: PyTree, states: Array) -> tuple[Array, Array, Array]:
    """‖∇R‖², ‖E phantom - ∇R‖² and R at θ (samples, 2), from states (samples, data, 2) near the fixed points."""
    samples = len(theta)
    chosen = np.tile(np.arange(DATA), samples)
    z = at(np.repeat(theta, DATA, axis=0), data, chosen)
    h = newton(states.reshape(-1, STATES), z)
    y = data["y"][chosen]
    v = loss_gradient(h, y)
    exact, phantom = (g.reshape(samples, DATA, -1).mean(axis=1) for g in (dense_gradient(h, z, v), estimate(h, z, v)))
    risk = loss(h, y).reshape(samples, DATA).mean(axis=1)
    return np.sum(exact**2, axis=1), np.sum((phantom - exact) ** 2, axis=1), risk


def descend(seed: int, runs: int, steps: int, announce: Callable[[str], None]) -> Trace:
    """SGD with every gradient, from the same starts and on the same data points: (gradients x runs) samples at once."""
    rng = np.random.default_rng(seed)
    data, ways = draw(rng), len(GRADIENTS)
    theta = np.tile(4 * rng.normal(size=(runs, PARAMETERS)), (ways, 1))
    samples = np.arange(len(theta))
    states = np.zeros((len(theta), DATA, STATES))
    grid, seen = evaluated(steps), []
    epsilon, largest = np.zeros(ways), 0.0
    for tau in range(1, steps + 1):
        if tau in grid:
            seen.append(evaluate(theta, data, states))
            announce(f"τ = {tau}")
        chosen = np.tile(rng.integers(DATA, size=runs), ways)
        z = at(theta, data, chosen)
        h = states[samples, chosen] = solved(states[samples, chosen], z)
        v = loss_gradient(h, data["y"][chosen])
        phantom, exact = estimate(h, z, v), dense_gradient(h, z, v)
        errors = np.linalg.norm(phantom - exact, axis=1).reshape(ways, runs)
        epsilon, largest = np.maximum(epsilon, errors.max(axis=1)), max(largest, np.linalg.norm(exact, axis=1).max())
        theta = theta - RATE / np.sqrt(tau) * phantom
    squares, biases, risks = (np.stack(column).reshape(-1, ways, runs) for column in zip(*seen, strict=True))
    sums = np.concatenate([[0.0], np.cumsum(RATE / np.sqrt(np.arange(1, steps + 1)))])
    weights = np.diff(sums[[0, *grid]])
    return Trace(np.array(grid), weights, squares, biases, risks, epsilon, float(largest))


def solved(h: Array, z: PyTree) -> Array:
    """The fixed point, solved from h; all samples must converge."""
    solution = ic.solve(PROBLEM, h, z, solver=SOLVER)
    if not np.all(solution.status == ic.CONVERGED):
        raise RuntimeError(f"{np.sum(solution.status != ic.CONVERGED)} samples did not converge")
    fixed: Array = solution.value
    return fixed


def evaluated(steps: int) -> list[int]:
    """The steps at which R is evaluated: the first, the last, and 40 in each decade."""
    count = 1 + round(40 * np.log10(steps))
    return sorted({round(tau) for tau in np.geomspace(1, steps, count)})


def reference(steps: Array) -> Array:
    """The rate log T / √T (Eq. 21)."""
    shape: Array = np.log(steps) / np.sqrt(steps)
    return shape


def constant(steps: Array, mean: Array) -> float:
    """C: the largest ratio of a mean to log T / √T for T ≥ 10."""
    return float(np.max(mean[steps >= 10] / reference(steps[steps >= 10])))


def growth(steps: Array, mean: Array) -> float:
    """Growth factor of the ratio of a mean to log T / √T over the last decade of T."""
    ends = [np.searchsorted(steps, steps[-1] / 10), -1]
    before, after = mean[ends] / reference(steps[ends])
    return float(after / before)


def summary(trace: Trace) -> dict[str, Any]:
    """The quantities of the statements: curves, and a row for each gradient."""
    columns = {
        "epsilon": trace.epsilon,
        "mean": trace.means()[-1].mean(axis=1),
        "plateau": trace.late(trace.squares),
        "bias": trace.late(trace.biases),
        "first_risk": trace.risks[0].mean(axis=1),
        "last_risk": trace.risks[-1].mean(axis=1),
    }
    means = trace.means().mean(axis=2)
    return {
        "rows": {
            name: {column: float(numbers[i]) for column, numbers in columns.items()} for i, name in enumerate(GRADIENTS)
        },
        "steps": trace.steps.tolist(),
        "means": {name: means[:, i].tolist() for i, name in enumerate(GRADIENTS)},
        "constant": constant(trace.steps, means[:, 0]),
        "growth": {name: growth(trace.steps, means[:, i]) for i, name in enumerate(GRADIENTS)},
        "largest_gradient": trace.largest,
    }


def contradictions(found: Mapping[str, Any]) -> list[str]:
    """The statements of the module's docstring that a summary contradicts."""
    by_name, growths = found["rows"], found["growth"]
    exact, phantoms = by_name["exact"], [row for name, row in by_name.items() if name != "exact"]
    pairs = list(pairwise(phantoms))
    checks = {
        "1. the exact gradient's mean follows log T / √T": growths["exact"] < 1.1,
        "2. the mean of k = 1 does not follow log T / √T": growths["k = 1"] > 1.1,
        "2. the plateau of k = 1 is three times as high": phantoms[0]["plateau"] >= 3 * exact["plateau"],
        "3. the plateau falls with k": all(b["plateau"] <= 1.1 * a["plateau"] for a, b in pairs),
        "3. ε falls with k": all(b["epsilon"] < a["epsilon"] for a, b in pairs),
    }
    for name, row in by_name.items():
        excess = row["plateau"] - exact["plateau"]
        near = 2 * row["bias"] + 0.1 * exact["plateau"]
        checks[f"4. the plateau is within ε G of the exact gradient's ({name})"] = (
            excess <= row["epsilon"] * found["largest_gradient"]
        )
        checks[f"4. the plateau is within 2 B of the exact gradient's ({name})"] = excess <= near
        checks[f"5. R decreases ({name})"] = row["last_risk"] < row["first_risk"]
    return [sentence for sentence, holds in checks.items() if not holds]


def points(trace: Trace) -> list[dict[str, Any]]:
    """One row for each gradient and T: the mean (Eq. 21) over the runs, its standard deviation, and C log T / √T."""
    means = trace.means()
    bound = constant(trace.steps, means[:, 0].mean(axis=1)) * reference(trace.steps)
    return [
        {
            "gradient": name,
            "T": int(tau),
            "mean": float(means[t, i].mean()),
            "standard_deviation": float(means[t, i].std()),
            "square": float(trace.squares[t, i].mean()),
            "risk": float(trace.risks[t, i].mean()),
            "reference": float(bound[t]),
        }
        for i, name in enumerate(GRADIENTS)
        for t, tau in enumerate(trace.steps)
    ]


def table(found: Mapping[str, Any], title: Sequence[str]) -> report.Table:
    """A row for each gradient."""
    largest = found["largest_gradient"]
    body = [
        (
            name,
            f"{row['mean']:.4f}",
            f"{row['plateau']:.4f}",
            f"{row['bias']:.4f}",
            f"{row['epsilon']:.2f}" if name != "exact" else f"{row['epsilon']:.0e}",
            f"{row['epsilon'] * largest:.1f}" if name != "exact" else "0",
            f"{row['first_risk']:.3f}",
            f"{row['last_risk']:.3f}",
        )
        for name, row in found["rows"].items()
    ]
    return report.Table(("gradient", "mean", "plateau", "B", "ε", "ε G", "R first", "R last"), body, title, LEGEND)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code, 1 if a statement does not hold."""
    options = report.parser("theorem3", (__doc__ or "").partition("\n")[0], timed=False).parse_args(arguments)
    runs, steps = (32, 1000) if options.quick else (64, 10_000)
    console = Console(width=80)
    with report.progress(console, len(evaluated(steps))) as announce:
        trace = descend(options.seed, runs, steps, announce)
    found = summary(trace)
    title = [
        f"SGD with steps {RATE} / √τ: {steps} steps, {runs} runs, {DATA} data points, L_h = {CONTRACTION}",
        f"C = {found['constant']:.3f}, G = {trace.largest:.1f}; C log T / √T = "
        f"{found['constant'] * np.log(steps) / np.sqrt(steps):.4f} at the end; over the last decade the",
        f"ratio to it grows by a factor {found['growth']['exact']:.2f} (exact), {found['growth']['k = 1']:.2f} (k = 1)",
    ]
    record = {**found, "points": points(trace)} | report.facts(options)
    report.publish(console, options.output, "theorem3", [table(found, title)], record, picture)
    if options.output:
        report.save_csv(options.output / "theorem3.csv", record["points"])
    return report.verdict(console, contradictions(found))


def picture(record: dict[str, Any]) -> Any:
    """The weighted mean against T, with C log T / √T, and the plateaus at the right edge."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    steps = np.array(record["steps"])
    colors = ["0.7", *plt.get_cmap("viridis")(np.linspace(0.9, 0.2, len(TERMS)))]
    for (name, mean), color in zip(record["means"].items(), colors, strict=True):
        row = record["rows"][name]
        label, width = ("exact", 4) if name == "exact" else (f"{name}, ε = {row['epsilon']:.1f}", 1.6)
        axis.loglog(steps, mean, color=color, lw=width, label=label)
        axis.hlines(row["plateau"], steps[-1] / 2, steps[-1], color=color, lw=3, alpha=0.6)
    later = steps >= 10
    axis.loglog(steps[later], record["constant"] * reference(steps[later]), "k--", lw=1, label="C log T / √T")
    axis.set(xlabel="T", ylabel="weighted mean of ‖∇R‖² (Eq. 21)", xlim=(1, steps[-1]))
    axis.text(0.98, 0.96, "bars: plateaus", transform=axis.transAxes, ha="right", va="top", fontsize=9)
    axis.legend(fontsize=9, loc="lower left", frameon=False)
    axis.grid(alpha=0.25)
    figure.tight_layout()
    return figure

"""The numbers and pictures of docs/paper.md are those of the committed results."""

import json
import re
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from scipy import stats

from benchmarks.mdeq import fig2, fig3, steps, table1, table3
from benchmarks.mdeq.experiments import ROWS, settings_of
from benchmarks.mdeq.tables import Result, best, compared, difference, last, read, seconds, signed
from implicit_core.examples.mdeq.settings import Settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "mdeq" / "results" / "small"
PAGE = (ROOT / "docs" / "paper.md").read_text()
DATA = ("cifar10", "fashion-mnist")
SEEDS = 3
PAIRS = (
    ("upg-5-0.5", "implicit"),
    ("npg-5-0.5", "implicit"),
    ("upg-9-0.5-dropout", "upg-5-0.5"),
    ("npg-5-0.5", "upg-5-0.5"),
    ("implicit", "implicit-no-pretraining"),
    ("implicit", "implicit-no-dropout"),
    ("implicit", "implicit-sgd"),
    ("implicit-sgd", "implicit-sgd-no-pretraining"),
    ("implicit-sgd-no-pretraining", "implicit-sgd-no-pretraining-no-dropout"),
    ("upg-5-0.5", "implicit-sgd-no-pretraining-no-dropout"),
    ("npg-5-0.5", "implicit-sgd-no-pretraining-no-dropout"),
    ("upg-5-0.5-adam-dropout", "implicit-no-pretraining"),
)
"""The differences under Tab. 1, in the order of the page."""


def section_of(title: str) -> str:
    """A section of the page."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def text_of(title: str) -> str:
    """Likewise, on one line."""
    return " ".join(section_of(title).split())


def page(section: str) -> list[list[list[str]]]:
    """The tables of a section: rows of cells, without the head."""
    return tables(section_of(section))


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text in Markdown, likewise."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in t.splitlines()[2:]] for t in found]


@cache
def runs(data: str, family: str, row: str) -> list[Result]:
    """The results of a row, of all seeds."""
    return [read(RESULTS / f"{data}-{family}-{row}-{seed}.json") for seed in range(SEEDS)]


def components(row: str) -> list[str]:
    """Optimizer, dropout and pretraining of a row."""
    settings = settings_of("ablation", row, "small", "cifar10", 0)
    of = {"adam": "Adam", "sgd": "SGD"}[settings.optimizer]
    return [of, "yes" if settings.dropout else "", "yes" if settings.pretraining else ""]


def mean(paper: str) -> float | None:
    """The mean accuracy that the paper has for a row, None for a row that it lacks."""
    return None if paper == "-" else float(paper.split()[0])


def accuracy(results: list[Result]) -> list[str]:
    """Of the last and of the best epoch."""
    return compared(results, results)[1:3]


def test_table_1() -> None:
    rows, _, differences = page("Table 1")
    found = {row: [runs(data, "ablation", row) for data in DATA] for row in table1.PAPER}
    assert rows == [
        [name, *components(row), paper, *accuracy(one), *accuracy(other), f"{seconds(one):.0f}"]
        for (row, (name, paper)), (one, other) in zip(table1.PAPER.items(), found.values(), strict=True)
    ]
    for row, (name, other) in zip(differences, PAIRS, strict=True):
        ours = [signed(difference(a, b)) for a, b in zip(found[name], found[other], strict=True)]
        a, b = mean(table1.PAPER[name][1]), mean(table1.PAPER[other][1])
        assert row[1:] == ["-" if a is None or b is None else f"{a - b:+.1f}", *ours], row


def test_table_2() -> None:
    (rows,) = page("Table 2")
    (lines, *_) = tables((RESULTS / "tables" / "table2.md").read_text())
    assert [row[1:5] for row in rows] == [
        [cell.replace("1.0 + 1.0 K", "1 + K") for cell in line[1:5]]  # a line that was fitted
        for line in lines
    ]


def test_table_3() -> None:
    (rows, *_) = page("Table 3")
    for cells, (row, (name, paper)) in zip(rows, table3.ROWS.items(), strict=True):
        expected = [name, paper]
        for data in DATA:
            results, exact = runs(data, *table3.FAMILIES[row]), runs(data, *table3.FAMILIES["implicit"])
            expected += compared(results, exact)[1:]
        assert cells == expected


def test_times_of_a_step() -> None:
    (rows,) = page("Time of a step")
    files = sorted((RESULTS / "steps").glob("*.json"))
    measured = {path.stem: steps.Steps.of(json.loads(path.read_text())) for path in files}
    assert sorted(row[0] for row in rows) == sorted(measured)
    for name, *cells in rows:
        of = {row.name: row for row in measured[name].rows}
        other = of[steps.THEIR_EXACT]
        times = [
            median(a / b for a, b in zip(of[row].times, other.times, strict=True))
            for row in (steps.EXACT, "UPG(5, 0.5)", "recomputed", "NPG(5, 0.5)", "TorchDEQ UPG")
        ]
        peaks = [of[row].costs.peak / other.costs.peak for row in (steps.EXACT, "UPG(5, 0.5)", "recomputed")]
        counts = of[steps.EXACT].costs
        assert cells == [f"{counts.forward}", f"{counts.vjps}", *(f"{x:.2f}" for x in (*times, *peaks))], name


@pytest.mark.parametrize("data", DATA)
def test_figure_2(data: str) -> None:
    table = page("Figure 2")[DATA.index(data)]
    results = runs(data, "ablation", "implicit")
    moments = [moment["step"] for moment in results[0]["compared"]]

    def middle(i: int, name: str, what: str = "cosine") -> float:
        return float(np.median(fig2.of_all(results, i, name, what)))

    names = ("upg-5-0.5", "npg-5-0.5", "one-step", "implicit")
    for step, *cells in table:
        i = moments.index(int(step))
        residual = median(x for result in results for x in result["compared"][i]["residual"])
        numbers = [*(middle(i, name) for name in names), middle(i, "upg-5-0.5", "length")]
        assert cells == [*(f"{x:.2f}" for x in numbers), f"{residual:.0e}"], step


def test_ranges_of_figure_2() -> None:
    """Those of medians, and the least of single batches, late in the training, as the text of the page has them."""
    text = text_of("Figure 2")
    cifar10, fashion = (runs(data, "ablation", "implicit") for data in DATA)

    def of(results: list[Result], since: int, name: str, what: str = "cosine") -> tuple[str, str, str]:
        moments = [i for i, moment in enumerate(results[0]["compared"]) if moment["step"] >= since]
        batches = [fig2.of_all(results, i, name, what) for i in moments]
        medians = [float(np.median(x)) for x in batches]
        low, high, least = (f"{x:.2f}".replace("0.", ".") for x in (min(medians), max(medians), np.min(batches)))
        return low, high, least

    low, high, least = of(fashion, 150, "upg-5-0.5")
    assert f"the medians of UPG are {low} to {high}" in text
    assert f"Single batches go down to {least}." in text
    low, high, _ = of(fashion, 150, "one-step")
    assert f"those of the one-step gradient {low} to {high}" in text
    low, high, least = of(cifar10, 400, "upg-5-0.5")
    assert f"After step 400 the medians of UPG are {low} to {high}" in text
    assert f"negative, down to {least}" in text
    low, high, least = of(cifar10, 400, "implicit")
    assert f"their medians are {low} to {high}, and single batches go down to {least}." in text
    assert f"the least is {of(fashion, 150, 'implicit')[2]}." in text
    (low, high, _), (other, top, _) = (
        of(results, since, "upg-5-0.5", "length") for results, since in ((fashion, 150), (cifar10, 400))
    )
    assert f"{low} to {high} on Fashion-MNIST from step 150 on, and {other} to {top} on CIFAR-10" in text
    late = [i for i, moment in enumerate(cifar10[0]["compared"]) if moment["step"] >= 400]
    cosines = np.ravel([fig2.of_all(cifar10, i, "upg-5-0.5", "cosine") for i in late])
    assert f"{np.sum(cosines < 0)} of its {cosines.size} batches" in text


def test_figure_3() -> None:
    rows, differences = page("Figure 3")
    for cells, row in zip(rows, fig3.ROWS, strict=True):
        expected = [fig3.label(row)]
        for data in DATA:
            results, base = runs(data, "ablation", row), runs(data, "ablation", "upg-5-0.5")
            expected += compared(results, base)[1:]
        assert cells == expected
    row_of = {fig3.label(row): row for row in fig3.ROWS}
    for name, *cells in differences:
        one, other = (row_of[label] for label in name.split(" - "))
        assert cells == [signed(difference(runs(d, "ablation", one), runs(d, "ablation", other))) for d in DATA], name


def interval(one: str, other: str, data: str) -> tuple[float, float]:
    """The 95 % interval of a difference of the last epoch."""
    mean, error = difference(runs(data, "ablation", one), runs(data, "ablation", other))
    half = stats.t.ppf(0.975, SEEDS - 1) * error
    return mean - half, mean + half


def test_ranges_of_figure_3() -> None:
    """What the text of the page says of k and λ."""
    text = text_of("Figure 3")
    unrolled = [row for row in fig3.ROWS if row.startswith("upg")]
    means = [[np.mean(last(runs(data, "ablation", row))) for row in unrolled] for data in DATA]
    (low, high), (least, most) = ((f"{min(x):.1f}", f"{max(x):.1f}") for x in means)
    assert f"are {low} to {high} on CIFAR-10, and {least} to {most} on Fashion-MNIST" in text
    others = [row for row in unrolled if row != "upg-5-0.5"]
    halves = [[np.ptp(interval(row, "upg-5-0.5", data)) / 2 for row in others] for data in DATA]
    (low, high), (least, most) = ((min(x), max(x)) for x in halves)
    assert f"of {low:.0f} to {high:.0f} points could not be seen on CIFAR-10, and of {least:.1f} to {most:.0f}" in text

    def behind(one: str, other: str, data: str, words: str) -> str:
        low, high = interval(other, one, data)
        return f"{(low + high) / 2:.1f}{words} ({low:.1f} to {high:.1f})"

    assert f"UPG(1) is {behind('upg-1-0.5', 'upg-9-0.5', 'fashion-mnist', ' points behind UPG(9)')}" in text
    assert f"and UPG(2) {behind('upg-2-0.5', 'upg-9-0.5', 'fashion-mnist', '')}" in text
    for row in ("upg-1-0.5", "upg-2-0.5", "upg-9-0.5"):
        low, high = interval(row, "upg-5-0.5", "fashion-mnist")
        assert low < 0 < high
    assert behind("npg-9-0.5", "npg-1-1", "cifar10", " points behind the one-step gradient") in text
    assert f"and {behind('npg-9-0.5', 'upg-5-1', 'cifar10', ' behind UPG(5, 1)')}" in text
    pairs = list(combinations(fig3.ROWS, 2))
    resolved = [[pair for pair in pairs if np.prod(interval(*pair, data)) > 0] for data in DATA]
    assert (len(pairs), len(resolved[0]), len(resolved[1])) == (55, 2, 8)
    lower = {one if sum(interval(one, other, DATA[1])) < 0 else other for one, other in resolved[1]}
    assert lower == {"upg-1-0.5", "upg-2-0.5", "upg-5-0.75"}
    times = [f"{seconds(runs('cifar10', 'ablation', f'upg-{k}-0.5')):.0f}" for k in (1, 2, 5, 9)]
    assert f"takes {', '.join(times[:3])} and {times[3]} s on CIFAR-10" in text


def test_the_two_forms_of_figure_3() -> None:
    """Likewise, of NPG beside UPG."""
    text = text_of("Figure 3")
    kinds = ("5-0.5", "9-0.5", "5-1")

    def both(data: str, of: Callable[[list[Result]], list[float]]) -> tuple[np.ndarray, float, float]:
        """NPG minus UPG, the mean over (k, λ) for each seed, and the variance over seeds of each form."""
        neumann, unrolled = (
            np.array([of(runs(data, "ablation", f"{form}-{kind}")) for kind in kinds]) for form in ("npg", "upg")
        )
        return np.mean(neumann - unrolled, axis=0), *(np.var(x, axis=1, ddof=1).mean() for x in (neumann, unrolled))

    def p(neumann: float, unrolled: float) -> str:
        degrees = len(kinds) * (SEEDS - 1)
        return f"{2 * stats.f.sf(neumann / unrolled, degrees, degrees):.2f}".removeprefix("0")

    minus, *variances = both("cifar10", last)
    neumann, unrolled = np.sqrt(variances)
    assert f"is {neumann:.1f} points, and over UPG's with the same k and λ {unrolled:.1f}" in text
    assert f"(F test: p = {p(*variances)}, as if" in text
    mean, error = -np.mean(minus), np.std(minus, ddof=1) / np.sqrt(SEEDS)
    assert f"of NPG is {mean:.1f} points lower, with a standard error of {error:.1f}, which is not resolved" in text
    assert 4.3 * error > mean
    _, *variances = both("cifar10", best)
    neumann, unrolled = np.sqrt(variances)
    assert f"epoch it is {neumann:.1f} against {unrolled:.1f} (p = {p(*variances)})" in text
    minus, *variances = both("fashion-mnist", last)
    (deviation,) = {f"{np.sqrt(variance):.1f}" for variance in variances}
    assert f"both deviations are {deviation}, and the means differ by {np.mean(minus):.2f} points" in text

    def epochs(row: str, *which: int) -> list[tuple[str, str]]:
        """Accuracy and residual of seed 1."""
        run = runs("cifar10", "ablation", row)[1]["epochs"]
        found = [(run[i - 1]["test/accuracy"], run[i - 1]["test/residual"]) for i in which]
        return [(f"{100 * accuracy:.0f}", f"{residual:.0e}".replace("e-0", "e-")) for accuracy, residual in found]

    (high, before), (low, after) = epochs("npg-5-1", 5, 6)
    assert f"from {high} to {low} % in its sixth epoch, while its residual rises from {before} to {after}" in text
    (high, before), (low, after) = epochs("npg-5-0.5", 4, 6)
    assert f"from {high} to {low} % from the fourth to the sixth epoch" in text
    assert f"and its residual falls from {before} to {after}" in text


def test_settings() -> None:
    """The column of the small model, of what is told beside the paper's."""
    (rows,) = page("What is the same, and what is not")
    cells = {row[0]: row[2] for row in rows}
    s = Settings(data="cifar10")
    assert cells["batch, epochs"] == f"{s.batch}, {s.epochs}"
    assert cells["SGD: rate, momentum, decay"] == f"{s.rate:g}, 0.9, {s.decay:.0e}".replace("e-04", "e-4")
    assert cells["evaluations of F in a forward solve"] == f"{s.solver_steps}"
    assert cells["products of implicit"] == f"{s.products}"
    assert cells["dropout of the implicit gradient"] == f"{ROWS['implicit']['dropout']}"
    assert cells["parameters"] == f"{runs('cifar10', 'ablation', 'implicit')[0]['parameters']:,}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "paper").glob("*.png")), ids=lambda path: path.stem)
def test_pictures(path: Path) -> None:
    shown, made = (sha256(file.read_bytes()).digest() for file in (path, RESULTS / "tables" / path.name))
    assert shown == made  # of bytes themselves pytest would show the difference, for minutes
    assert f"(paper/{path.name})" in PAGE

"""The numbers and pictures of docs/paper.md are those of the committed results."""

import json
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from scipy import stats

from benchmarks.mdeq import fig2, fig3, steps, table1, table3
from benchmarks.mdeq.experiments import ROWS, settings_of
from benchmarks.mdeq.tables import Result, compared, difference, last, read, seconds, signed
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


def test_ranges_of_figure_3() -> None:
    """What the text of the page says of the forms, and of k and λ."""
    text = text_of("Figure 3")
    cifar10, fashion = ({row: np.array(last(runs(d, "ablation", row))) for row in fig3.ROWS} for d in DATA)
    means = [[np.mean(x) for row, x in found.items() if row.startswith("upg")] for found in (cifar10, fashion)]
    (low, high), (least, most) = ((f"{min(x):.1f}", f"{max(x):.1f}") for x in means)
    assert f"are {low} to {high} on CIFAR-10, and {least} to {most} on Fashion-MNIST" in text

    def both(found: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """NPG minus UPG, the mean over (k, λ) for each seed, and the variance over seeds of each form."""
        neumann, unrolled = (
            np.array([found[f"{form}-{kind}"] for kind in ("5-0.5", "9-0.5", "5-1")]) for form in ("npg", "upg")
        )
        return np.mean(neumann - unrolled, axis=0), *(np.var(x, axis=1, ddof=1).mean() for x in (neumann, unrolled))

    minus, of_neumann, of_unrolled = both(cifar10)
    sizes = f"{np.sqrt(of_neumann):.1f} points, and that of UPG with the same k and λ {np.sqrt(of_unrolled):.1f}"
    p = f"{stats.f.sf(of_neumann / of_unrolled, 6, 6):.2f}".removeprefix("0")
    assert f"is {sizes} (F test: p = {p})" in text
    mean, error = -np.mean(minus), np.std(minus, ddof=1) / np.sqrt(SEEDS)
    assert f"is {mean:.1f} points lower; over three seeds, with a standard error of {error:.1f}, that is not" in text
    assert 4.3 * error > mean
    minus, *variances = both(fashion)
    (deviation,) = {f"{np.sqrt(variance):.1f}" for variance in variances}
    assert f"both forms have a deviation of {deviation}, and their means differ by {np.mean(minus):.1f}" in text

    mean, error = difference(*(runs("cifar10", "ablation", row) for row in ("npg-9-0.5", "npg-1-1")))
    low, high = (f"{-mean + side * stats.t.ppf(0.975, SEEDS - 1) * error:.1f}" for side in (-1, 1))
    assert f"{-mean:.1f} points behind the one-step gradient ({low} to {high})" in text
    (run,) = (run for run in runs("cifar10", "ablation", "npg-9-0.5") if f"{last([run])[0]:.1f} %" in text)
    assert {f"{epoch['train/residual']:.0e}" for epoch in run["epochs"][4:]} == {"3e-06"}


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

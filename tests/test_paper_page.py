"""The numbers and pictures of docs/paper.md are those of the committed results."""

import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest

from benchmarks.mdeq import table1
from benchmarks.mdeq.tables import Result, best, difference, last, read, signed, spread

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


def page(section: str) -> list[list[list[str]]]:
    """The tables of a section: rows of cells, without the head."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in t.splitlines()[2:]] for t in tables]


@cache
def runs(data: str, family: str, row: str) -> list[Result]:
    """The results of a row, of all seeds."""
    return [read(RESULTS / f"{data}-{family}-{row}-{seed}.json") for seed in range(SEEDS)]


def accuracy(results: Sequence[Result]) -> list[str]:
    """Of the last and of the best epoch, as the page has them."""
    return [spread(last(results)), f"{spread(best(results))} ({max(best(results)):.1f})"]


def mean(paper: str) -> float | None:
    """The mean accuracy that the paper has for a row, None for a row that it lacks."""
    return None if paper == "-" else float(paper.split()[0])


def test_table_1() -> None:
    rows, _, differences = page("Table 1")
    found = {row: [runs(data, "ablation", row) for data in DATA] for row in table1.PAPER}
    expected = [[table1.PAPER[row][1], *accuracy(one), *accuracy(other)] for row, (one, other) in found.items()]
    assert [row[1:] for row in rows] == expected
    for row, (name, other) in zip(differences, PAIRS, strict=True):
        ours = [signed(difference(a, b)) for a, b in zip(found[name], found[other], strict=True)]
        a, b = mean(table1.PAPER[name][1]), mean(table1.PAPER[other][1])
        assert row[1:] == ["-" if a is None or b is None else f"{a - b:+.1f}", *ours], row


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "paper").glob("*.png")), ids=lambda path: path.stem)
def test_pictures(path: Path) -> None:
    shown, made = (sha256(file.read_bytes()).digest() for file in (path, RESULTS / "tables" / path.name))
    assert shown == made  # of bytes themselves pytest would show the difference, for minutes
    assert f"(paper/{path.name})" in PAGE

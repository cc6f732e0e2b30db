"""mypy on a user's file, and on swapped arguments within the library."""

import re
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[1]

USER = """
import numpy as np
import torch
from numpy.typing import NDArray

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.arrays import H, Z

Array = NDArray[np.float64]


def f(h: Array, z: Array) -> Array:
    result: Array = np.tanh(0.5 * h + z)
    return result


def vjp(h: Array, z: Array, v: Array) -> tuple[Array, Array]:
    g = v / np.cosh(0.5 * h + z) ** 2
    return 0.5 * g, g


z: Array = np.ones(3)
problem = ic.Problem(f, vjp=vjp)
s = ic.solve(problem, np.zeros(3), z)
reveal_type(s.value)  # ndarray[...]
value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, s.value, z)
reveal_type(value)  # ndarray[...]
reveal_type(pullback)  # def (ndarray[...]) -> ndarray[...]


def pair(h: tuple[Array, Array], z: float) -> tuple[Array, Array]:
    return h[1], z * h[0]


reveal_type(ic.fixed_point(pair, (z, z), 0.5).value)  # tuple[ndarray[...], ndarray[...]]


def cell(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.5 * h + x)


def with_aux(h: Array, z: Array) -> tuple[Array, float]:
    return 0.5 * h + z, float(z.sum())


reveal_type(ic.fixed_point(with_aux, z, z, has_aux=True).value)  # ndarray[...]


class Halving:
    def solve(self, problem: ic.Problem[H, Z], h0: H, z: Z, *, trace: bool) -> ic.Solution[H]:
        return ic.solve(problem, h0, z, trace=trace)


reveal_type(ic.solve(f, z, z, solver=Halving()).value)  # ndarray[...]
x = torch.ones(2, 3)
reveal_type(ic.fixed_point(cell, torch.zeros(2, 3), x, batch_ndim=1).value)  # Tensor
reveal_type(ict.ImplicitLayer(cell)(x))  # Tensor
reveal_type(ict.problem(cell))  # Problem[Tensor, Tensor]
ic.solve(f, "zeros", z)  # error
ic.fixed_point(f, z, z, gradient=ic.Anderson())  # error
ic.solve(f, z, z, solver=ic.Anderson)  # error
"""

INSIDE = """
from implicit_core.arrays import History, Mask, Matrices, Numbers, Row, State
from implicit_core.space import Space


def right(space: Space, x: State, y: State, rows: Row, past: History, n: Numbers, m: Mask, w: Matrices) -> None:
    space.where(m & (n > 0.5), space.axpy(n, x, y), y)
    space.combine(space.products(space.row(x), past), past, onto=rows)
    space.select(n <= space.norm(x), n, 2 * n)


def swapped(space: Space, x: State, y: State, rows: Row, past: History, n: Numbers, m: Mask, w: Matrices) -> None:
    space.where(n, x, y)  # error
    space.axpy(x, n, y)  # error
    space.products(past, space.row(x))  # error
    space.combine(n, past)  # error
    space.sub(x, rows)  # error
    space.select(n, m, n)  # error
    space.set_row(x, 0, y)  # error
    space.per_sample(x)  # error
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """For each file: what a comment says that mypy should find in a line, and what it found."""
    folder, texts = tmp_path_factory.mktemp("types"), {"user.py": USER, "inside.py": INSIDE}
    for name, text in texts.items():
        (folder / name).write_text(text)
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(ROOT))
        report, problems, _ = api.run([*settings, *(str(folder / name) for name in texts)])
    assert not problems
    found: dict[tuple[str, int], str] = {}
    for name, number, kind, message in re.findall(r"(\w+\.py):(\d+): (note|error): (.*)", report):
        found.setdefault((name, int(number)), message if kind == "note" else "error")
    expected = {
        (name, number): line.rpartition("  # ")[2]
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(r"^ *\S.*\)  # ", line)
    }
    assert found.keys() <= expected.keys(), report
    return {
        name: [(text, found.get(place, "nothing")) for place, text in expected.items() if place[0] == name]
        for name in texts
    }


def plain(message: str) -> str:
    """A revealed type without the names of modules, and without what an array of NumPy's is made of."""
    name = re.sub(r"\b[a-z_]+\.(?=[A-Za-z_])", "", message.partition('"')[2].rpartition('"')[0])
    result, depth = "", 0  # depth within an ndarray's brackets
    for i, character in enumerate(name):
        if depth:
            depth += {"[": 1, "]": -1}.get(character, 0)
            result += "..." * (depth == 1 and character == "[") + "]" * (depth == 0)
        else:
            result += character
            if character == "[" and name[:i].endswith("ndarray"):
                depth, result = 1, result + "..."
    return result


@pytest.mark.slow
def test_a_users_file(results: dict[str, list[tuple[str, str]]]) -> None:
    assert len(results["user.py"]) == 12
    for expected, found in results["user.py"]:
        assert found == expected or plain(found) == expected, (expected, found)


@pytest.mark.slow
def test_a_swapped_argument_is_an_error(results: dict[str, list[tuple[str, str]]]) -> None:
    assert [found for _, found in results["inside.py"]] == ["error"] * 8

"""The usual test of bracketing root finders, as functions of a Python float and an interval.

G. E. Alefeld, F. A. Potra and Y. Shi, Algorithm 748: enclosing zeros of continuous functions (1995), Table 1.
"""

from collections.abc import Callable, Iterator
from math import e, exp, pi, sin
from typing import NamedTuple


class Bracketed(NamedTuple):
    name: str
    function: Callable[[float], float]
    lower: float
    upper: float


def _rational(x: float) -> float:
    return -2 * sum((2 * i - 5) ** 2 / (x - i * i) ** 3 for i in range(1, 21))


def _kink(n: int, x: float) -> float:
    return n / 20 * (x / 1.5 + sin(x) - 1) if x >= 0 else -n / 20


def _steep(n: int, x: float) -> float:
    if x > 2e-3 / (1 + n):
        return e - 1.859
    return exp((n + 1) * x / 2 * 1e3) - 1.859 if x >= 0 else -0.859


def _problems() -> Iterator[Bracketed]:
    yield Bracketed("1", lambda x: sin(x) - x / 2, pi / 2, pi)
    for n in range(1, 11):
        yield Bracketed(f"2, n={n}", _rational, n * n + 1e-9, (n + 1) ** 2 - 1e-9)
    for a, b in ((-40, -1), (-100, -2), (-200, -3)):
        yield Bracketed(f"3, a={a}", lambda x, a=a, b=b: a * x * exp(b * x), -9.0, 31.0)
    for a, low, high, powers in (
        (0.2, 0.0, 5.0, (4, 6, 8, 10, 12)),
        (1.0, 0.0, 5.0, (4, 6, 8, 10, 12)),
        (1.0, -0.95, 4.05, (8, 10, 12, 14)),
    ):
        for n in powers:
            yield Bracketed(f"4, a={a}, n={n}, lower={low}", lambda x, a=a, n=n: x**n - a, low, high)
    yield Bracketed("5", lambda x: sin(x) - 0.5, 0.0, 1.5)
    for n in (1, 2, 3, 4, 5, 20, 40, 60, 80, 100):
        yield Bracketed(f"6, n={n}", lambda x, n=n: 2 * x * exp(-n) - 2 * exp(-n * x) + 1, 0.0, 1.0)
    for n in (5, 10, 20):
        yield Bracketed(f"7, n={n}", lambda x, n=n: (1 + (1 - n) ** 2) * x - (1 - n * x) ** 2, 0.0, 1.0)
    for n in (2, 5, 10, 15, 20):
        yield Bracketed(f"8, n={n}", lambda x, n=n: x * x - (1 - x) ** n, 0.0, 1.0)
    for n in (1, 2, 4, 5, 8, 15, 20):
        yield Bracketed(f"9, n={n}", lambda x, n=n: (1 + (1 - n) ** 4) * x - (1 - n * x) ** 4, 0.0, 1.0)
    for n in (1, 5, 10, 15, 20):
        yield Bracketed(f"10, n={n}", lambda x, n=n: exp(-n * x) * (x - 1) + x**n, 0.0, 1.0)
    for n in (2, 5, 15, 20):
        yield Bracketed(f"11, n={n}", lambda x, n=n: (n * x - 1) / ((n - 1) * x), 0.01, 1.0)
    for n in (*range(2, 7), *range(7, 34, 2)):
        yield Bracketed(f"12, n={n}", lambda x, n=n: x ** (1 / n) - n ** (1 / n), 1.0, 100.0)
    yield Bracketed("13", lambda x: x * exp(-(x**-2.0)) if x else 0.0, -1.0, 4.0)
    for n in range(1, 41):
        yield Bracketed(f"14, n={n}", lambda x, n=n: _kink(n, x), -1e4, pi / 2)
    for n in (*range(20, 41), *range(100, 1001, 100)):
        yield Bracketed(f"15, n={n}", lambda x, n=n: _steep(n, x), -1e4, 1e-4)


STANDARD = list(_problems())

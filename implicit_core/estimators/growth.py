"""Estimates that grow with their terms instead of shrinking: noticed, and told (Decisions 76 to 78)."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from array_api_compat import array_namespace

from .. import checks
from ..arrays import Count, Mask, Numbers, Real, State
from ..records import Record, is_array
from ..registry import find_backend
from ..solution import sample_names
from ..space import Space
from ..warnings_ import warn
from .base import geometric_count
from .inexact import InexactGradientWarning

E = TypeVar("E")
"""An estimator."""
OnGrowth = Literal["warn", "nan", "ignore"]
"""What to do with the samples whose terms grow."""

MOST = (
    "k must be known where a program is traced or transformed, since it decides how many steps that makes: make k "
    "outside, in JAX as a static argument, or also give the largest number that it can be, {kind}(k, ..., most=8)"
)


class GrowingGradientWarning(InexactGradientWarning):
    """The terms of a phantom gradient grow, so that it is no estimate, in the samples that the warning names."""


def untested(estimator: E) -> E:
    """The estimator without the test, for what measures the error itself."""
    record: Any = estimator
    ignoring: E = replace(record, on_growth="ignore") if hasattr(record, "on_growth") else estimator
    return ignoring


@dataclass(frozen=True)
class GrowthTest:
    """Compares the last of an estimate's k terms with the first, for each sample.

    Parameters
    ----------
    name
        The estimator in words.
    k, lam, on_growth
        As in the estimator. An array in place of λ is None: programs and caches are found by this record.
    """

    name: str
    k: int
    lam: float | None
    on_growth: OnGrowth

    @property
    def active(self) -> bool:
        """Whether there is something to compare, and something to do about it. One term cannot grow."""
        return self.k > 1 and self.on_growth != "ignore"

    @property
    def limit(self) -> float:
        """The growth of k terms at which a scalar map is wrong by ten times its exact derivative (Decision 76)."""
        return float(10.0 ** ((self.k - 1) / self.k))

    def checked(self, space: Space, first: State, last: State, result: State) -> State:
        """``result``, NaN in samples whose terms grew if the setting is ``"nan"``; ``"warn"`` names them.

        Two norms. ``"warn"`` reads one number if no sample grew, and nothing where numbers cannot be read.

        Parameters
        ----------
        space
            The space of all three.
        first, last
            The first and the last term, up to a common factor.
        result
            What the terms add up to, or the last term itself.
        """
        if not self.reads(space, first):
            return result
        return self.checked_norm(space, self.norm(space, first), last, result)

    def reads(self, space: Space, x: State) -> bool:
        """Whether the test can do something with terms like ``x``."""
        return self.active and (self.on_growth == "nan" or space.backend.readable(x[0]))

    def norm(self, space: Space, x: State) -> Numbers:
        """The norm of a term, without a graph."""
        with space.backend.solving():
            return space.norm(x)

    def checked_norm(self, space: Space, before: Numbers, last: State, result: State) -> State:
        """:meth:`checked`, given the norm of the first term."""
        after = self.norm(space, last)
        # Squares of smaller numbers underflow, so their norms cannot be compared.
        floor = float(space.backend.finfo(space.dtype).smallest_normal) ** 0.5
        with space.backend.solving():
            if self.on_growth == "warn":
                shape = space.batch_shape
                space.backend.tell(lambda x, y: self._warn(x, y, floor, shape), before, after)
                return result
            mask = self._grew(before, after, floor)
        # Not NaN times the result: where it is not taken, its derivative would be NaN too.
        return State(tuple(space.filled(a, mask, math.nan) for a in result))

    def _grew(self, before: Numbers, after: Numbers, floor: float) -> Mask:
        """Where ``after`` exceeds ``before`` by the limit. A cotangent that is not finite has not grown."""
        numbers: Any = before
        finite = array_namespace(numbers).isfinite(numbers)
        mask: Any = finite & ~(after / self.limit <= numbers + floor)  # NaN after a finite number is growth
        return mask  # type: ignore[no-any-return]  # booleans are a mask

    def _warn(self, before: Any, after: Any, floor: float, batch_shape: tuple[int, ...]) -> None:
        """Warn if a norm, (N, 1), grew from ``before`` to ``after``."""
        grew: Any = self._grew(before, after, floor)
        if not bool(array_namespace(before).any(grew)):
            return
        backend = find_backend(before, "norms")
        masks = backend.xp.astype(grew, before.dtype)  # read with the norms, at once
        n, numbers = grew.shape[0], backend.numbers(backend.xp.stack([masks, before, after]))
        flags, firsts, lasts = numbers[:n], numbers[n : 2 * n], numbers[2 * n :]
        samples = [i for i, flag in enumerate(flags) if flag]
        growth = max(_ratio(lasts[i], firsts[i]) for i in samples)
        steps = "its steps" if self.lam is None else f"steps with lam={self.lam:g}"
        warn(
            f"{self.name} does not estimate the gradient{sample_names(samples, batch_shape)}: the last of its {self.k} "
            f"terms is up to {growth:.0e} times as large as the first, because {steps} do not "
            "contract. Use gradient=Implicit(), which is exact and needs no contraction (with NewtonKrylov as the "
            "solver), or a smaller lam, which helps where the eigenvalues of ∂F/∂h have real parts below 1",
            GrowingGradientWarning,
        )


class Terms(Record):
    """What estimators of k terms share: the settings of a dataclass with ``k``, ``lam`` and ``on_growth``, and a test.

    It is no dataclass itself, so that each estimator keeps its fields in the paper's order.
    """

    k: Count
    lam: Real
    most: int | None
    on_growth: OnGrowth

    of_samples: ClassVar[frozenset[str]] = frozenset(("k", "lam"))

    def __post_init__(self) -> None:
        k = checks.count("k", self.k, 1)
        if is_array(k) and tuple(k.shape) == () and checks.is_known("k", k):
            k = int(k)
        object.__setattr__(self, "k", k)
        if self.most is not None:
            object.__setattr__(self, "most", checks.integer("most", self.most, 1))
        if checks.is_known("k", k) if is_array(k) else True:
            most = checks.largest(k)
            if self.most is not None and self.most < most and is_array(k):
                raise ValueError(
                    f"most must be at least the largest k, {most}; got {self.most}. dataclasses.replace keeps the most "
                    "of the record: also give most=None"
                )
            object.__setattr__(self, "most", None if isinstance(k, int) else self.most or most)
        elif self.most is None:
            raise TypeError(MOST.format(kind=type(self).__name__))
        object.__setattr__(self, "lam", checks.real("lam", self.lam, 0.0, 1.0, low_open=True))
        if self.on_growth not in ("warn", "nan", "ignore"):
            raise ValueError(f"on_growth must be 'warn', 'nan' or 'ignore', got {self.on_growth!r}")

    @property
    def largest(self) -> int:
        """The largest k of any sample."""
        return self.k if isinstance(self.k, int) else self.most or 1

    def valid(self, space: Space) -> Real:
        """A factor of each sample: NaN where k is not between 1 and ``most``, 1 elsewhere.

        A number unless k is traced, since otherwise k was checked when the record was made.
        """
        k: Any = self.k
        if not is_array(k) or checks.is_known("k", k):
            return 1.0
        xp = space.xp
        one = xp.ones_like(k, dtype=space.dtype)
        factor: Real = xp.where((k >= 1) & (k <= self.largest), one, xp.full_like(one, math.nan))
        return factor

    def accumulated(self, contraction: float) -> float:
        """At most k, and at most 1 / (λ (1 - L_h)), since later products shrink earlier errors."""
        return geometric_count(self.k, self.lam, contraction)

    @property
    def is_tested(self) -> bool:
        """Whether there is something to compare, and something to do about it. One term cannot grow."""
        return self.largest > 1 and self.on_growth != "ignore"

    @property
    def growth(self) -> GrowthTest:
        """The test whether the terms, or the cotangents that stand for them, grow."""
        return GrowthTest(repr(self), self.largest, None if is_array(self.lam) else self.lam, self.on_growth)


def _ratio(after: float, before: float) -> float:
    """``after / before``, infinite if a term is not finite."""
    ratio = after / before if before > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")

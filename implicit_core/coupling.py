"""Does F couple what ``batch_ndim`` takes for independent samples? One product tells (Decision 82)."""

import math
import operator
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

from .arrays import Array, H, Mask, State, Z
from .problem import BoundLinearization, Linearization, Map, Problem
from .registry import find_backend
from .solution import CoupledSamplesError
from .space import Space, normal

R = TypeVar("R")
"""A record of settings."""
SEED = 0
ROUNDING = 32.0
"""Units of rounding that two evaluations of one function may differ by, where sums have no fixed order."""


class Coupling(NamedTuple):
    """What one product found.

    Attributes
    ----------
    found
        Whether the product is nonzero in a sample whose cotangent is zero: one boolean, an array.
    size
        The largest entry there, relative to the largest of the product: an array without axes.
    """

    found: Array
    size: Array


def halves(n: int, seed: int = SEED) -> list[bool]:
    """A random half of n samples."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    chosen = set(order[: n // 2])
    return [i in chosen for i in range(n)]


def as_mask(space: Space, split: Sequence[bool]) -> Mask:
    """The chosen samples of a split, (N, 1)."""
    mask: Mask = space.xp.reshape(space.xp.asarray(split, dtype=space.xp.bool, device=space.device), (space.samples, 1))
    return mask


def separating(n: int) -> list[list[bool]]:
    """Splits of n samples so that each sample is chosen at least once without each other one, 2 ⌈log₂ n⌉ of them."""
    bits = [[bool(i >> b & 1) for i in range(n)] for b in range(max(n - 1, 0).bit_length())]
    return [split for chosen in bits for split in (chosen, [not each for each in chosen])]


def coupling(space: Space, at: BoundLinearization[H, Z], split: Sequence[bool] | None = None) -> Coupling:
    """One product with the Jacobian, of cotangents that are random in some samples and zero in all others.

    Parameters
    ----------
    space
        The space of h, with at least two samples.
    at
        F's derivatives at h. The product is a VJP, or a JVP if F has no VJP.
    split
        Which samples get a cotangent; a random half if None.
    """
    xp, split = space.xp, halves(space.samples) if split is None else split
    chosen = as_mask(space, split)
    cotangent = State(tuple(xp.where(chosen, a, xp.zeros_like(a)) for a in random_state(space, SEED)))
    product = at.vjp_h if at.has("vjp_h") else at.jvp_h
    image = space.pack(product(space.unpack(cotangent)))
    # A NaN is not larger than zero, so 0 · ∞ accuses nobody, and neither does -0.0.
    leaked = xp.max(xp.stack([_largest(space, xp.where(chosen, xp.zeros_like(a), a)) for a in image]))
    largest = xp.max(xp.stack([_largest(space, a) for a in image]))
    return Coupling(leaked > 0, leaked / xp.where(largest > 0, largest, xp.ones_like(largest)))


def random_state(space: Space, seed: int) -> State:
    """Standard normal numbers, of another size in each sample; the same in every framework.

    The samples share their directions, since the array API has no random numbers and Python's are slow to draw.
    """
    draw = random.Random(seed).gauss
    size = normal(space, draw, space.samples, 1)
    size = space.xp.where(size < 0, size - 0.5, size + 0.5)
    return State(tuple(size * normal(space, draw, 1, d) for _, d in space.flat_shapes))


def refuse_coupling(space: Space, at: BoundLinearization[H, Z], f: Map[H, Z], where: str) -> Array | None:
    """Raise if F couples samples.

    Returns
    -------
    Array or None
        Whether F couples samples, where that cannot be read: in ``jax.jit``, ``jax.vmap`` or a captured graph.

    Raises
    ------
    CoupledSamplesError
        If F couples samples, or is random.
    """
    if not testable(space):
        return None
    found, size = coupling(space, at)
    if not space.backend.readable(found):
        return found
    if bool(found) and (message := reason(space, at, f, float(size))):
        raise CoupledSamplesError(f"{where}: {message}")
    return None


def differences(f: Map[H, Z], batch_ndim: int) -> Problem[H, Z]:
    """The problem of F, whose products with the Jacobian are differences F(h + u) - F(h), u as large as h.

    Where F raises, u is a thousandth of that. Where it raises again, the product is zero. They are no derivatives, but
    zero in the samples that a tangent does not reach, and computed without a graph. A coupling has to move another
    sample by a rounding error of F: one of relative size 1e-15 is found in float64, 1e-7 in float32, and 1e-3 under an
    autocast to bfloat16.
    """

    def linearize(h: H, z: Z) -> Linearization[H, Z]:
        backend, value = find_backend(h), f(h, z)
        space = backend.space(h, batch_ndim)
        size = space.magnitude(space.pack(h))

        def jvp_h(v: H) -> H:
            difference: H = backend.map(operator.sub, near(v), value)
            return difference

        def near(v: H) -> H:
            for part in (1.0, 1e-3):
                moved = space.unpack(space.axpy(part * size, space.pack(v), space.pack(h)))
                with suppress(Exception):  # F may be defined near its solutions alone
                    return f(moved, z)
            return value

        return Linearization(value, jvp_h=jvp_h)

    return Problem(f, linearize=linearize, batch_ndim=batch_ndim)


def unchecked(record: R) -> R:
    """A solver or estimator that does not look for coupled samples, nor does a solver among its settings."""
    settings: Any = record
    if not is_dataclass(settings) or isinstance(settings, type):
        return record
    changes = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        new = False if field.name == "check" and value is True else unchecked(value)
        if new is not value:
            changes[field.name] = new
    made: Any = replace(settings, **changes) if changes else record
    return made  # type: ignore[no-any-return]  # of the same class


def testable(space: Space) -> bool:
    """Whether there are two samples, and numbers in them."""
    return space.samples > 1 and space.dimension > 0


def reason(space: Space, at: BoundLinearization[H, Z], f: Map[H, Z], size: float) -> str | None:
    """Why a product is not zero where its cotangent is; None if rounding explains it."""
    difference, bound = repeated(space, at.value, f(at.h, at.z))
    if difference > bound:
        return (
            "F gives another value each time it is evaluated at one point, so it is not a function of (h, z), and its "
            "samples are coupled: draw random numbers, such as the masks of dropout, once per solve"
        )
    if is_rounding(space, difference, bound, size):
        return None
    batch = math.prod(space.batch_shape)
    return (
        f"F couples the {batch} samples that batch_ndim={len(space.batch_shape)} takes for independent: a cotangent of "
        f"one half of them reaches the other half (relative size {size:.1e}), as with batch norm in train mode, "
        "attention over the batch, or a graph whose nodes are taken for samples. Pass batch_ndim=0, which solves and "
        "differentiates them as one system"
    )


def is_rounding(space: Space, difference: float, bound: float, size: float) -> bool:
    """Whether a leak comes from sums without a fixed order, as atomic ones on a GPU, and not from coupling.

    ``difference`` and ``bound`` are those of :func:`repeated`, ``size`` is the relative size of the leak.
    """
    return 0 < difference <= bound and size <= math.sqrt(space.coarsest_eps)


def repeated(space: Space, value: H, again: H) -> tuple[float, float]:
    """The largest difference of two values of F at one point, and what rounding may explain of it."""
    a, b = space.pack(value), space.pack(again)
    xp = space.xp
    alike = bool(space.same(a, b))
    if alike:
        return 0.0, 0.0
    difference = max(float(_largest(space, x - y)) for x, y in zip(a, b, strict=True))
    scale = max(float(_largest(space, xp.where(xp.isfinite(x), x, xp.zeros_like(x)))) for x in a)
    return difference, ROUNDING * space.coarsest_eps * math.sqrt(space.dimension) * scale


def _largest(space: Space, a: Array) -> Array:
    """The largest absolute value of an array that is not NaN; 0 if it is empty."""
    xp = space.xp
    if 0 in a.shape:
        return space.scalar(0.0)
    size = xp.abs(a)
    return xp.max(xp.where(size > 0, size, xp.zeros_like(size)))

"""Implicit Euler steps of stiff partial differential equations, from a hundred to a million unknowns.

u = old + dt R(u), where R has second differences on a uniform grid of the unit interval or square. A solve starts at
the old state. Each g is written once, for any array API namespace.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from implicit_core.arrays import Array

Right = Callable[[Any, Array], Array]


@dataclass(frozen=True)
class Stiff:
    """A step.

    Attributes
    ----------
    name, equation
        Names in the tables; steps of one equation have the same ``right``.
    right
        ``(xp, u) -> R(u)``.
    old
        The state before the step.
    dt
        Its length.
    """

    name: str
    equation: str
    right: Right
    old: np.ndarray
    dt: float

    def residual(self, xp: Any, u: Array, z: Any) -> Array:
        """The residual u - old - dt R(u), for z = {"old": ..., "dt": ...}."""
        return u - z["old"] - z["dt"] * self.right(xp, u)

    @property
    def z(self) -> dict[str, np.ndarray]:
        """What a residual depends on."""
        return {"old": self.old, "dt": np.asarray(self.dt)}


def _neighbours(xp: Any, u: Array, axis: int, *, periodic: bool) -> tuple[Array, Array]:
    """The values before and behind along an axis; zero beyond the ends unless it is periodic."""
    if periodic:
        return xp.roll(u, 1, axis=axis), xp.roll(u, -1, axis=axis)
    first = tuple(slice(0, 1) if i == axis else slice(None) for i in range(u.ndim))
    inner = tuple(slice(0, -1) if i == axis else slice(None) for i in range(u.ndim))
    outer = tuple(slice(1, None) if i == axis else slice(None) for i in range(u.ndim))
    zero = xp.zeros_like(u[first])
    return xp.concat([zero, u[inner]], axis=axis), xp.concat([u[outer], zero], axis=axis)


def laplacian(xp: Any, u: Array, axes: tuple[int, ...], *, periodic: bool = False) -> Array:
    """Second differences on the unit interval or square."""
    total = -2.0 * len(axes) * u
    for axis in axes:
        before, behind = _neighbours(xp, u, axis, periodic=periodic)
        total = total + before + behind
    n = u.shape[axes[0]]
    return total * float(n if periodic else n + 1) ** 2


def _axes(u: Array) -> tuple[int, ...]:
    return tuple(range(u.ndim))


def combustion(xp: Any, u: Array) -> Array:
    """u_t = Δu + λ eᵘ with λ = 3, zero at the boundary: Bratu's equation at rest, to which λ is close to critical."""
    return laplacian(xp, u, _axes(u)) + 3.0 * xp.exp(u)


def burgers(xp: Any, u: Array) -> Array:
    """u_t = -(u²/2)_x + u_xx / 100, zero at the boundary, central differences."""
    before, behind = _neighbours(xp, u, 0, periodic=False)
    return 0.01 * laplacian(xp, u, (0,)) - 0.25 * (u.shape[0] + 1) * (behind * behind - before * before)


def allen_cahn(xp: Any, u: Array) -> Array:
    """u_t = ε² Δu + u - u³ with ε = 0.02, periodic."""
    return 4e-4 * laplacian(xp, u, _axes(u), periodic=True) + u - u * u * u


def gray_scott(xp: Any, u: Array) -> Array:
    """Two species (2, n, n) that react as u + 2 v → 3 v, periodic; feed rate 0.04, kill rate 0.06."""
    a, b = u[0], u[1]
    made = a * b * b
    diffusion = laplacian(xp, u, (1, 2), periodic=True)
    return xp.stack([2e-5 * diffusion[0] - made + 0.04 * (1 - a), 1e-5 * diffusion[1] + made - 0.1 * b])


def porous_medium(xp: Any, u: Array) -> Array:
    """u_t = Δ(u³), zero at the boundary: the diffusion vanishes where u does."""
    return laplacian(xp, u * u * u, _axes(u))


def _bump(n: int, dimensions: int) -> np.ndarray:
    x = np.arange(1, n + 1) / (n + 1)
    line = np.sin(np.pi * x)
    return line if dimensions == 1 else np.outer(line, line)


def _noise(n: int, dimensions: int) -> np.ndarray:
    """Waves of random phases, the same on every grid."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.arange(n) / n] * dimensions, indexing="ij")
    waves = np.zeros((n,) * dimensions)
    for _ in range(12):
        frequency, phase = rng.integers(-6, 7, dimensions), rng.uniform(0, 2 * np.pi)
        waves += 0.3 * np.cos(2 * np.pi * sum(k * x for k, x in zip(frequency, axes, strict=True)) + phase)
    return waves


def _spot(n: int) -> np.ndarray:
    x = np.arange(n) / n - 0.5
    near = np.exp(-60 * (x[:, None] ** 2 + x[None, :] ** 2)) + 0.01 * _noise(n, 2)
    return np.stack([1 - 0.5 * near, 0.25 * near])


def _barenblatt(n: int, dimensions: int) -> np.ndarray:
    x = np.arange(1, n + 1) / (n + 1) - 0.5
    squared = x**2 if dimensions == 1 else x[:, None] ** 2 + x[None, :] ** 2
    return np.sqrt(np.maximum(0.0, 1 - squared / 0.09))


SHAPES: dict[str, tuple[Right, Callable[[], np.ndarray]]] = {
    "combustion, 100": (combustion, partial(_bump, 100, 1)),
    "combustion, 100 x 100": (combustion, partial(_bump, 100, 2)),
    "Burgers, 100": (burgers, partial(_bump, 100, 1)),
    "Burgers, 1000": (burgers, partial(_bump, 1000, 1)),
    "Allen-Cahn, 1000": (allen_cahn, partial(_noise, 1000, 1)),
    "Allen-Cahn, 100 x 100": (allen_cahn, partial(_noise, 100, 2)),
    "Allen-Cahn, 1000 x 1000": (allen_cahn, partial(_noise, 1000, 2)),
    "Gray-Scott, 2 x 70 x 70": (gray_scott, partial(_spot, 70)),
    "Gray-Scott, 2 x 700 x 700": (gray_scott, partial(_spot, 700)),
    "porous medium, 100": (porous_medium, partial(_barenblatt, 100, 1)),
    "porous medium, 1000": (porous_medium, partial(_barenblatt, 1000, 1)),
    "porous medium, 316 x 316": (porous_medium, partial(_barenblatt, 316, 2)),
}
STEPS = {
    "combustion, 100": (0.01, 0.1),
    "combustion, 100 x 100": (0.01, 0.1),
    "Burgers, 100": (0.05, 0.5),
    "Burgers, 1000": (0.01, 0.1),
    "Allen-Cahn, 1000": (0.5, 5.0),
    "Allen-Cahn, 100 x 100": (0.5, 5.0),
    "Allen-Cahn, 1000 x 1000": (0.1,),
    "Gray-Scott, 2 x 70 x 70": (1.0, 20.0),
    "Gray-Scott, 2 x 700 x 700": (1.0,),
    "porous medium, 100": (1e-3, 1e-2),
    "porous medium, 1000": (1e-4,),
    "porous medium, 316 x 316": (1e-4,),
}


def steps(most: int) -> list[Stiff]:
    """All steps with at most so many unknowns."""
    found = []
    for name, (right, start) in SHAPES.items():
        old = start()
        if old.size <= most:
            found += [Stiff(f"{name}, dt {dt:g}", name, right, old, dt) for dt in STEPS[name]]
    return found

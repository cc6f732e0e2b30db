"""Maps with known answers. Each gives F and its hand-written VJP and JVP for any namespace ``xp``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
from libraries import NUMPY, Library, flat, unflat

import implicit_core as ic


@dataclass(frozen=True)
class Case:
    """F with derivatives, a start, and the root; ``h0``, ``z`` and ``root`` are NumPy pytrees."""

    name: str
    f: Callable[..., Any]
    vjp: Callable[..., Any]
    jvp: Callable[..., Any]
    h0: Any
    z: Any
    root: Any = None
    batch_ndim: int = 0
    contraction: float = 0.9
    counts: dict[str, int] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def problem(self, library: Library = NUMPY) -> ic.Problem:
        """The problem on arrays of ``library``, its callbacks counted in ``counts``."""
        self.counts.clear()
        return ic.Problem(
            self.counted(library, "f"),
            vjp=self.counted(library, "vjp"),
            jvp=self.counted(library, "jvp"),
            batch_ndim=self.batch_ndim,
        )

    def linearized(self, library: Library = NUMPY) -> ic.Problem:
        """The same through a ``linearize`` callback with its four parts."""
        self.counts.clear()
        f = self.counted(library, "f")
        vjp, jvp = (library.sealed(lambda *a, g=g: g(library.xp, *a)) for g in (self.vjp, self.jvp))

        def count(name: str, value: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return value

        def linearize(h: Any, z: Any) -> ic.Linearization:
            zeros = library.array(unflat(np.zeros(flat(self.z).size), self.z))
            still = library.array(unflat(np.zeros(flat(self.h0).size), self.h0))
            return ic.Linearization(
                f(h, z),
                vjp_h=lambda v: count("vjp_h", vjp(h, z, v)[0]),
                vjp_z=lambda v: count("vjp_z", vjp(h, z, v)[1]),
                jvp_h=lambda dh: count("jvp_h", jvp(h, z, dh, zeros)),
                jvp_z=lambda dz: count("jvp_z", jvp(h, z, still, dz)),
            )

        return ic.Problem(f, linearize=linearize, batch_ndim=self.batch_ndim)

    def counted(self, library: Library, name: str) -> Callable[..., Any]:
        function = library.sealed(lambda *args: getattr(self, name)(library.xp, *args))

        def call(*args: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args)

        return call

    def dense_jacobians(self, h: Any) -> tuple[np.ndarray, np.ndarray]:
        """∂F/∂h and ∂F/∂z at ``h`` by central differences, d_h × d_h and d_h × d_z."""
        return (
            differences(lambda x: flat(self.f(NUMPY.xp, unflat(x, h), self.z)), flat(h)),
            differences(lambda y: flat(self.f(NUMPY.xp, h, unflat(y, self.z))), flat(self.z)),
        )

    def oracle(self) -> Any:
        """The root: the known one, or SciPy's hybrid Powell method on all samples together."""
        if self.root is not None:
            return self.root
        if "root" not in self.found:
            self.found["root"] = self._search()
        return self.found["root"]

    def _search(self) -> Any:

        def residual(x: np.ndarray) -> np.ndarray:
            return flat(self.f(NUMPY.xp, unflat(x, self.h0), self.z)) - x

        found = scipy.optimize.root(residual, flat(self.h0), method="hybr", options={"xtol": 1e-14})
        assert np.linalg.norm(residual(found.x)) < 1e-11
        return unflat(found.x, self.h0)


def differences(g: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The Jacobian of ``g`` at ``x`` by central differences, one column a variable."""
    columns = [(g(x + step * e) - g(x - step * e)) / (2 * step) for e in np.eye(x.size)]
    return np.stack(columns, axis=-1)


def diagonal() -> Case:
    d = np.asarray([0.9, 0.99, 0.999])
    return Case(
        "diagonal",
        f=lambda xp, h, z: z * h,
        vjp=lambda xp, h, z, v: (z * v, h * v),
        jvp=lambda xp, h, z, dh, dz: z * dh + h * dz,
        h0=np.ones(3),
        z=d,
        root=np.zeros(3),
        contraction=0.999,
    )


def cosine(theta: float, root: float) -> Case:
    return Case(
        f"cosine({theta:.2f})",
        f=lambda xp, h, z: xp.cos(h) + z,
        vjp=lambda xp, h, z, v: (-xp.sin(h) * v, v),
        jvp=lambda xp, h, z, dh, dz: -xp.sin(h) * dh + dz,
        h0=np.asarray(1.0),
        z=np.asarray(theta),
        root=np.asarray(root),
        contraction=0.7 if theta == 0.0 else 1.0,
    )


def exponential() -> Case:
    return Case(
        "exponential",
        f=lambda xp, h, z: xp.exp(-z * h),
        vjp=lambda xp, h, z, v: (-z * xp.exp(-z * h) * v, -h * xp.exp(-z * h) * v),
        jvp=lambda xp, h, z, dh, dz: -xp.exp(-z * h) * (z * dh + h * dz),
        h0=np.asarray([1.0, 0.5]),
        z=np.asarray([1.0, 1.0]),
        root=np.full(2, 0.5671432904097838),
        contraction=0.57,
    )


def pytree() -> Case:
    def f(xp: Any, h: Any, z: Any) -> Any:
        x, y = h["x"], h["y"]
        return {"x": xp.sin(x) * x**2 + z[0], "y": y**3 + z[1]}

    def slopes(xp: Any, h: Any) -> Any:
        x, y = h["x"], h["y"]
        return xp.cos(x) * x**2 + 2 * x * xp.sin(x), 3 * y**2

    def vjp(xp: Any, h: Any, z: Any, v: Any) -> Any:
        a, b = slopes(xp, h)
        return {"x": a * v["x"], "y": b * v["y"]}, (v["x"], v["y"])

    def jvp(xp: Any, h: Any, z: Any, dh: Any, dz: Any) -> Any:
        a, b = slopes(xp, h)
        return {"x": a * dh["x"] + dz[0], "y": b * dh["y"] + dz[1]}

    return Case(
        "pytree",
        f,
        vjp,
        jvp,
        h0={"x": np.full((2, 3), 0.3), "y": np.full((2,), 0.3)},
        z=(np.zeros((2, 3)), np.zeros(2)),
        root={"x": np.zeros((2, 3)), "y": np.zeros(2)},
        batch_ndim=1,
        contraction=0.5,
    )


def rotation(angle: float = 1.0) -> Case:
    turn = np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def rotate(xp: Any, x: Any, sign: float) -> Any:
        cos, sin = float(turn[0, 0]), sign * float(turn[1, 0])
        return xp.stack([cos * x[0] - sin * x[1], sin * x[0] + cos * x[1]])

    center = np.asarray([1.0, -2.0])
    return Case(
        "rotation",
        f=lambda xp, h, z: rotate(xp, h - z, 1.0) + z,
        vjp=lambda xp, h, z, v: (rotate(xp, v, -1.0), v - rotate(xp, v, -1.0)),
        jvp=lambda xp, h, z, dh, dz: rotate(xp, dh - dz, 1.0) + dz,
        h0=np.zeros(2),
        z=center,
        root=center,
        contraction=1.0,
    )


def affine(n: int = 200, radius: float = 0.45, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(n, n))
    m *= radius / np.abs(np.linalg.eigvals(m)).max()
    b = rng.normal(size=n)
    return Case(
        f"affine({n})",
        f=lambda xp, h, z: z["m"] @ h + z["b"],
        vjp=lambda xp, h, z, v: (z["m"].T @ v, {"m": v[:, None] * h[None, :], "b": v}),
        jvp=lambda xp, h, z, dh, dz: z["m"] @ dh + dz["m"] @ h + dz["b"],
        h0=np.zeros(n),
        z={"m": m, "b": b},
        root=np.linalg.solve(np.eye(n) - m, b),
        contraction=radius,
    )


def heat(n: int = 100, dt: float = 0.3) -> Case:
    """One backward Euler step of u_t = (u + u³/3)_xx on a ring; the Jacobian's spectrum lies in [-1.5, 0]."""

    def laplacian(xp: Any, w: Any) -> Any:
        return dt * (xp.roll(w, 1) + xp.roll(w, -1) - 2 * w)

    x = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return Case(
        "heat",
        f=lambda xp, h, z: z + laplacian(xp, h + h**3 / 3),
        vjp=lambda xp, h, z, v: ((1 + h**2) * laplacian(xp, v), v),
        jvp=lambda xp, h, z, dh, dz: laplacian(xp, (1 + h**2) * dh) + dz,
        h0=np.zeros(n),
        z=0.5 * np.sin(x) + 0.2 * np.cos(7 * x),
        contraction=1.5,
    )


def midpoint(n: int = 50, dt: float = 0.5) -> Case:
    """An implicit-midpoint step of n pendulums, h = (angles, momenta)."""

    def field(xp: Any, y: Any) -> Any:
        return xp.concat([y[n:], -xp.sin(y[:n])])

    def transposed(xp: Any, y: Any, v: Any) -> Any:
        return xp.concat([-xp.cos(y[:n]) * v[n:], v[:n]])

    def tangent(xp: Any, y: Any, d: Any) -> Any:
        return xp.concat([d[n:], -xp.cos(y[:n]) * d[:n]])

    def vjp(xp: Any, h: Any, z: Any, v: Any) -> Any:
        half = dt / 2 * transposed(xp, (h + z) / 2, v)
        return half, half + v

    start = np.concatenate([np.linspace(-1.5, 1.5, n), np.linspace(0.0, 1.0, n)])
    return Case(
        "midpoint",
        f=lambda xp, h, z: z + dt * field(xp, (h + z) / 2),
        vjp=vjp,
        jvp=lambda xp, h, z, dh, dz: dz + dt / 2 * tangent(xp, (h + z) / 2, dh + dz),
        h0=start,
        z=start,
        contraction=dt / 2,
    )


def constant() -> Case:
    return Case(
        "constant",
        f=lambda xp, h, z: z + 0 * h,
        vjp=lambda xp, h, z, v: (0 * v, v),
        jvp=lambda xp, h, z, dh, dz: dz + 0 * dh,
        h0=np.zeros((2, 3)),
        z=np.arange(6.0).reshape(2, 3),
        root=np.arange(6.0).reshape(2, 3),
        batch_ndim=1,
        contraction=0.0,
    )


def layer(batch: int = 4, width: int = 6, contraction: float = 0.8, seed: int = 0, scale: float = 1.0) -> Case:
    """tanh(h Wᵀ + x), ‖W‖₂ = ``contraction``; one sample a row."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(width, width))
    w *= contraction / np.linalg.norm(w, 2)
    return tanh_layer("layer", w, scale * rng.normal(size=(batch, width)), contraction)


def symmetric_layer(batch: int = 32, width: int = 128, radius: float = 0.95, seed: int = 0) -> Case:
    """tanh(h Wᵀ + x), W symmetric with eigenvalues evenly in ±radius."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(width, width)))
    w = (q * np.linspace(-radius, radius, width)) @ q.T
    return tanh_layer("symmetric layer", w, 0.3 * rng.normal(size=(batch, width)), radius)


def tanh_layer(name: str, w: np.ndarray, x: np.ndarray, contraction: float) -> Case:
    def slope(xp: Any, h: Any, z: Any) -> Any:
        return 1 - xp.tanh(h @ z["w"].T + z["x"]) ** 2

    def vjp(xp: Any, h: Any, z: Any, v: Any) -> Any:
        g = v * slope(xp, h, z)
        return g @ z["w"], {"w": g.T @ h, "x": g}

    return Case(
        name,
        f=lambda xp, h, z: xp.tanh(h @ z["w"].T + z["x"]),
        vjp=vjp,
        jvp=lambda xp, h, z, dh, dz: slope(xp, h, z) * (dh @ z["w"].T + h @ dz["w"].T + dz["x"]),
        h0=np.zeros_like(x),
        z={"w": w, "x": x},
        batch_ndim=1,
        contraction=contraction,
    )


def scalar(a: float, b: float = 1.0) -> Case:
    return Case(
        f"scalar({a})",
        f=lambda xp, h, z: a * h + z,
        vjp=lambda xp, h, z, v: (a * v, v),
        jvp=lambda xp, h, z, dh, dz: a * dh + dz,
        h0=np.asarray(0.0),
        z=np.asarray(b),
        root=np.asarray(b / (1 - a)),
        contraction=abs(a),
    )


CASES = [
    diagonal(),
    cosine(0.0, 0.7390851332151607),
    cosine(np.pi / 2, np.pi / 2),
    exponential(),
    pytree(),
    rotation(),
    affine(),
    heat(),
    midpoint(),
    constant(),
    layer(),
    scalar(0.5),
]

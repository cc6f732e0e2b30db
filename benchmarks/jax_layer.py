"""Time, compile time and memory of an implicit layer in JAX, compared with jaxopt and optimistix.

Every row solves the same equation to the same residual, then computes the gradient of the same loss with respect to the
input and the weights. README.md explains the table.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import implicit_core as ic

from .report import Table, environment, output, positive, progress, quartiles

MB = 1e6
LAM = 0.5
HEAD = ("solver, gradient", "solve / F", "gradient / F", "compile", "MB", "cosine")
LEGEND = """\
solve / F     time of a solve, divided by the time of one bare evaluation of F:
              median and quartiles
gradient / F  the same for the solve, a loss and its gradient
compile       ms to trace and compile: the solve + the solve and the gradient
MB            temporary memory of the compiled gradient
cosine        between the gradient and the exact one"""

Array = jax.Array
Layer = Callable[[tuple[Array, Array]], Array]


def f(h: Array, z: tuple[Array, Array]) -> Array:
    """F(h, (W, x)) = tanh(W h + x) for a batch of states (batch, width)."""
    return jnp.tanh(h @ z[0].T + z[1])


@dataclass
class Row:
    """Measurements of one layer; times in seconds, memory in bytes."""

    name: str
    temporary: int
    cosine: float
    residual: float
    forward: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    compile_forward: list[float] = field(default_factory=list)
    compile_gradient: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """The problem: initial state, z = (W, x), target of the loss, and largest allowed residual of a sample."""

    h0: Array
    z: tuple[Array, Array]
    target: Array
    residual: float

    def worst(self, h: Array) -> float:
        """The largest residual of a sample."""
        return float(jnp.linalg.norm(f(h, self.z) - h, axis=1).max())

    def loss(self, layer: Layer, z: tuple[Array, Array]) -> Array:
        """The mean square distance from the target."""
        return jnp.mean((layer(z) - self.target) ** 2)


def build(options: argparse.Namespace) -> Setting:
    """W is symmetric, with eigenvalues evenly spaced in ± the radius."""
    rng = np.random.default_rng(options.seed)
    q, _ = np.linalg.qr(rng.normal(size=(options.width, options.width)))
    w = (q * np.linspace(-options.radius, options.radius, options.width)) @ q.T
    x = 0.3 * rng.normal(size=(options.batch, options.width))
    target = rng.normal(size=x.shape)
    w, x, target = (jnp.asarray(a, jnp.float32) for a in (w, x, target))
    return Setting(jnp.zeros_like(x), (w, x), target, options.residual)


def ours(setting: Setting, solver: type[ic.Solver], gradient: ic.Estimator) -> Layer:
    """A layer of this library."""
    settings = solver(rtol=0.0, atol=setting.residual, max_steps=1000)
    return lambda z: ic.fixed_point(f, setting.h0, z, solver=settings, gradient=gradient, batch_ndim=1).value


def jaxopts(setting: Setting, tolerance: Any, solver: str, solve: Any = None) -> Layer:
    """A layer of jaxopt."""
    import jaxopt

    options = {"history_size": 5} if solver == "AndersonAcceleration" else {}
    settings = getattr(jaxopt, solver)(f, maxiter=1000, tol=tolerance, implicit_diff_solve=solve, **options)
    return lambda z: settings.run(setting.h0, z).params


def optimistixs(setting: Setting, tolerance: Any, linear_solver: Any) -> Layer:
    """A layer of optimistix."""
    import optimistix as optx

    solver = optx.FixedPointIteration(rtol=tolerance, atol=tolerance)
    adjoint = optx.ImplicitAdjoint(linear_solver=linear_solver)
    return lambda z: optx.fixed_point(f, solver, setting.h0, args=z, adjoint=adjoint, max_steps=1000, throw=False).value


def calibrated(setting: Setting, make: Callable[..., Layer], *arguments: Any) -> Layer:
    """A layer with another stop test, with the loosest tolerance that reaches the residual."""
    run = jax.jit(lambda tolerance, z: make(setting, tolerance, *arguments)(z))
    for exponent in np.arange(0.0, 8.0, 0.05):
        tolerance = float(10.0**-exponent)
        if setting.worst(run(tolerance, setting.z)) <= setting.residual:
            return make(setting, tolerance, *arguments)
    raise ValueError(f"no tolerance reaches the residual {setting.residual}")


def layers(setting: Setting, k: int) -> dict[str, Layer]:
    """The rows of the table, by name."""
    plain, anderson = ic.FixedPointIteration, ic.Anderson
    gmres, bicgstab, richardson = (ic.Implicit(solver(rtol=1e-5)) for solver in (ic.GMRES, ic.BiCGSTAB, ic.Richardson))
    rows = {
        f"plain, Neumann({k})": ours(setting, plain, ic.Neumann(k, LAM)),
        f"plain, Unroll({k})": ours(setting, plain, ic.Unroll(k, LAM)),
        "plain, GMRES": ours(setting, plain, gmres),
        "plain, BiCGSTAB": ours(setting, plain, bicgstab),
        "plain, Richardson": ours(setting, plain, richardson),
        f"Anderson, Neumann({k})": ours(setting, anderson, ic.Neumann(k, LAM)),
        "Anderson, GMRES": ours(setting, anderson, gmres),
        "Anderson, BiCGSTAB": ours(setting, anderson, bicgstab),
    }
    try:
        from jaxopt import linear_solve

        their_gmres = partial(linear_solve.solve_gmres, tol=1e-5)
        their_bicgstab = partial(linear_solve.solve_bicgstab, tol=1e-5)
        rows |= {
            "jaxopt plain, normal CG": calibrated(setting, jaxopts, "FixedPointIteration"),
            "jaxopt plain, GMRES": calibrated(setting, jaxopts, "FixedPointIteration", their_gmres),
            "jaxopt plain, BiCGSTAB": calibrated(setting, jaxopts, "FixedPointIteration", their_bicgstab),
            "jaxopt Anderson, BiCGSTAB": calibrated(setting, jaxopts, "AndersonAcceleration", their_bicgstab),
        }
    except ModuleNotFoundError:
        pass
    try:
        import lineax

        rows["optimistix plain, GMRES"] = calibrated(setting, optimistixs, lineax.GMRES(rtol=1e-5, atol=1e-8))
    except ModuleNotFoundError:
        pass
    return rows


def compiled(function: Callable[..., Any], z: tuple[Array, Array]) -> tuple[Any, float]:
    """``function`` compiled for z with empty caches, and the seconds that it took."""
    jax.clear_caches()
    begin = time.perf_counter()
    program = jax.jit(function).lower(z).compile()
    return program, time.perf_counter() - begin


def timed(program: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begin


def exact(setting: Setting) -> Array:
    """The exact gradient of W."""
    layer = ours(
        Setting(setting.h0, setting.z, setting.target, 1e-3 * setting.residual),
        ic.Anderson,
        ic.Implicit(ic.GMRES(rtol=1e-6)),
    )
    gradient: Array = jax.jit(jax.grad(partial(setting.loss, layer)))(setting.z)[0]
    return gradient


def measure(options: argparse.Namespace, console: Console) -> list[Row]:
    """All rows; times are divided by the time of a bare evaluation of F in the same round."""
    setting = build(options)
    variants = layers(setting, options.k)
    reference = exact(setting)
    rows: dict[str, Row] = {}
    programs: dict[str, tuple[Any, Any]] = {}

    def loop(h: Array, z: tuple[Array, Array]) -> Array:
        return jax.lax.fori_loop(0, 20, lambda _, h: f(h, z), h)

    with progress(console, len(variants) * (options.repetitions + options.compiles)) as announce:
        for _ in range(options.compiles):
            for name, layer in variants.items():
                announce(name)
                forward, forward_time = compiled(layer, setting.z)
                gradient, gradient_time = compiled(jax.grad(partial(setting.loss, layer)), setting.z)
                programs[name] = forward, gradient
                if name not in rows:
                    g = gradient(setting.z)[0]
                    cosine = float(jnp.vdot(g, reference) / (jnp.linalg.norm(g) * jnp.linalg.norm(reference)))
                    temporary = gradient.memory_analysis().temp_size_in_bytes
                    rows[name] = Row(name, temporary, cosine, setting.worst(forward(setting.z)))
                rows[name].compile_forward.append(forward_time)
                rows[name].compile_gradient.append(gradient_time)
        bare = jax.jit(loop).lower(setting.h0, setting.z).compile()
        timed(bare, setting.h0, setting.z)
        for _ in range(options.repetitions):
            for name, (forward, gradient) in programs.items():
                announce(name)
                unit = timed(bare, setting.h0, setting.z) / 20
                rows[name].forward.append(timed(forward, setting.z) / unit)
                rows[name].gradient.append(timed(gradient, setting.z) / unit)
    return list(rows.values())


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    times = [quartiles(seconds) for seconds in (row.forward, row.gradient)]
    built = [1e3 * quartiles(seconds)[1] for seconds in (row.compile_forward, row.compile_gradient)]
    return (
        row.name,
        *(f"{middle:.0f} ({low:.0f}-{high:.0f})" for low, middle, high in times),
        "+".join(f"{milliseconds:.0f}" for milliseconds in built),
        f"{row.temporary / MB:.1f}",
        f"{row.cosine:.4f}",
    )


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """The settings, the versions and the machine behind the numbers."""
    names = ("batch", "width", "radius", "residual", "k", "repetitions", "compiles", "seed")
    settings = {name: getattr(options, name) for name in names} | {"lam": LAM, "dtype": "float32"}
    return {"settings": settings} | environment("jax", "jaxopt", "optimistix")


def title(found: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    s, v = found["settings"], found["versions"]
    return [
        f"tanh(W h + x), {s['batch']} x {s['width']}, float32, spectral radius {s['radius']}; lambda = {s['lam']}",
        f"largest residual {s['residual']:g}; {s['repetitions']} repetitions, compiled {s['compiles']} times",
        found["machine"]["cpu"],
        f"implicit_core {v['implicit-core']}, jax {v['jax']}, jaxopt {v['jaxopt']}, optimistix {v['optimistix']}",
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks layer",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--batch", type=positive, default=128, help="samples")
    add("--width", type=positive, default=512, help="size of a state")
    add("--radius", type=float, default=0.95, help="spectral radius of W")
    add("--residual", type=float, default=1e-4, help="largest allowed residual of a sample")
    add("--k", type=positive, default=5, help="terms and steps of the phantom gradients")
    add("--repetitions", type=positive, default=20, help="timed runs of each row")
    add("--compiles", type=positive, default=3, help="compilations of each row")
    add("--seed", type=int, default=0, help="seed of weights and input")
    add("--output", type=output, action="append", default=[], help="save as .json or .md; may be repeated")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code.

    Parameters
    ----------
    arguments
        The command line's if None.
    """
    options = parser().parse_args(arguments)
    console = Console(width=80)
    with warnings.catch_warnings(), jax.enable_x64(False):  # jaxopt's Anderson fails in float32 with x64 enabled
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by importing jaxopt
        rows = measure(options, console)
    found = facts(options)
    table = Table(HEAD, [cells(row) for row in rows], title(found), LEGEND)
    table.present(console, found | {"rows": [asdict(row) for row in rows]}, options.output)
    return 0

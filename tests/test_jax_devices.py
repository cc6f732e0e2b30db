"""The JAX layer on several devices: sharded arrays and ``shard_map`` give what one device gives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_layers import assert_close, cell, data, iterate, loop, loss

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters.jax.effects import communication_axes, has_named_axes

TIGHT = {"rtol": 1e-13, "max_steps": 300}
EXACT = ic.Implicit(ic.Richardson(rtol=1e-12))
PAIRS = [
    (ic.FixedPointIteration(**TIGHT), ic.Neumann(200, 1.0)),
    (ic.Anderson(**TIGHT), EXACT),
    (ic.Anderson(**TIGHT), ic.Implicit(ic.GMRES(rtol=1e-12))),
    (ic.Anderson(**TIGHT), ic.Unroll(200, 1.0)),
    (ic.Anderson(**TIGHT), ic.Unroll(200, 1.0, recompute=True)),
    (ic.Anderson(**TIGHT), ic.BPTT(200)),
    (ic.Broyden(**TIGHT), ic.OneStep()),
    (ic.NewtonKrylov(**TIGHT), ic.Neumann(4, 0.5)),
]
IDS = [f"{type(solver).__name__}-{gradient!r}" for solver, gradient in PAIRS]
KINDS = [AxisType.Auto, AxisType.Explicit]
EVERY_PAIR = [  # in one kind of mesh, and some in the other
    *((*pair, AxisType.Explicit) for pair in PAIRS),
    *((*PAIRS[i], AxisType.Auto) for i in (1, 4, 7)),
]
EVERY_ID = [f"{IDS[PAIRS.index(pair[:2])]}-{pair[2].name}" for pair in EVERY_PAIR]

FROM_OUTSIDE = jax.__version_info__ > (0, 10, 0)
"""Whether JAX differentiates a product of a sharded array and an array from outside of the mesh."""


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    assert jax.device_count() == 4
    return jax.make_mesh((4,), ("d",), axis_types=(kind,))


def total(solver: Any, gradient: Any, w: Any, x: Any, **options: Any) -> Any:
    solution = icj.fixed_point(
        cell, jnp.zeros_like(x), {"w": w, "x": (x,)}, solver=solver, gradient=gradient, batch_ndim=1, **options
    )
    return jnp.sum(solution.value**3)


@functools.cache
def expected(gradient: ic.Estimator) -> Any:
    """On one device; of a long loop where the estimator has converged."""
    w, x = data(batch=4)
    if isinstance(gradient, ic.OneStep) or getattr(gradient, "k", 200) < 200:
        return jax.jit(jax.value_and_grad(functools.partial(total, ic.Anderson(**TIGHT), gradient), (0, 1)))(w, x)
    return looped(4, 3)


@functools.cache
def looped(batch: int, width: int) -> Any:
    return jax.jit(jax.value_and_grad(loss(loop), (0, 1)))(*data(batch=batch, width=width))


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize(("solver", "gradient", "kind"), EVERY_PAIR, ids=EVERY_ID)
def test_sharded_arrays(solver: Any, gradient: Any, kind: AxisType) -> None:
    mesh, (w, x) = mesh_of(kind), data(batch=4)
    run = jax.jit(jax.value_and_grad(functools.partial(total, solver, gradient), (0, 1)))
    sharded = jax.device_put(w, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("d")))
    value, gradients = run(*sharded)
    assert_close(on_host((value, gradients)), on_host(expected(gradient)), 1e-9)
    if kind is AxisType.Explicit:
        assert gradients[1].sharding.spec[0] == "d"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_sharded_arrays_in_a_mesh_that_is_set(kind: AxisType) -> None:
    """h0 and the parameters are created in the mesh and not sharded over any axis."""
    mesh, (w, x) = mesh_of(kind), data(batch=4)
    solver, gradient = PAIRS[3]
    with jax.set_mesh(mesh):
        w = w if FROM_OUTSIDE else jax.device_put(w, P())
        run = jax.jit(jax.value_and_grad(functools.partial(total, solver, gradient), (0, 1)))
        ours = on_host(run(w, jax.device_put(x, P("d"))))
    assert_close(ours, on_host(expected(gradient)), 1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_sharded_state(kind: AxisType) -> None:
    """The state's last axis on the devices, and the weights' rows."""
    mesh, (w, x) = mesh_of(kind), data(batch=2, width=4)
    sharded = jax.device_put(w, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P(None, "d")))

    def f(h: Any, z: Any) -> Any:
        sharded = NamedSharding(mesh, P(None, "d"))
        product = jnp.matmul(h, z[0].T, out_sharding=sharded) if kind is AxisType.Explicit else h @ z[0].T
        return jnp.tanh(product + z[1])

    def run(w: Any, x: Any) -> Any:
        options = {"solver": ic.Anderson(**TIGHT), "gradient": ic.Neumann(200, 1.0), "batch_ndim": 1}
        return jnp.sum(icj.fixed_point(f, jnp.zeros_like(x), (w, x), **options).value ** 3)

    ours = on_host(jax.jit(jax.value_and_grad(run, (0, 1)))(*sharded))
    assert_close(ours, on_host(looped(2, 4)), 1e-9)


@pytest.mark.parametrize(("solver", "gradient", "kind"), EVERY_PAIR, ids=EVERY_ID)
def test_shard_map(solver: Any, gradient: Any, kind: AxisType) -> None:
    mesh = mesh_of(kind)
    w, x = data(batch=4)
    sharded = jax.device_put(w, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("d")))

    def run(w: Any, x: Any) -> Any:
        return jax.lax.psum(total(solver, gradient, w, x), "d")

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    ours = jax.jit(jax.value_and_grad(mapped, (0, 1)))(*sharded)
    assert_close(on_host(ours), on_host(expected(gradient)), 1e-9)


@pytest.mark.parametrize("solver", [PAIRS[i][0] for i in (0, 1, 6, 7)], ids=lambda solver: type(solver).__name__)
def test_each_device_takes_its_own_steps(solver: Any) -> None:
    """A start that all devices share, and samples from zero slope to one."""
    mesh = mesh_of(AxisType.Explicit)
    slopes = jnp.asarray([0.0, 0.3, 0.6, 0.9])[:, None]

    def run(slope: Any) -> Any:
        solution = icj.fixed_point(
            lambda h, a: a * jnp.tanh(h) + 1.0,
            jnp.zeros((1, 2)),
            slope,
            solver=solver,
            gradient=ic.OneStep(),
            batch_ndim=1,
        )
        return solution.value, solution.stats.steps, jnp.reshape(solution.stats.evaluations, 1)

    run_alone = jax.jit(run)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    sharded = jax.device_put(slopes, NamedSharding(mesh, P("d")))
    value, steps, evaluations = map(np.asarray, jax.jit(mapped)(sharded))
    assert evaluations[0] < evaluations[3]
    assert steps[0] < steps[3]
    for i in range(4):
        alone = run_alone(slopes[i : i + 1])
        assert_close(on_host((value[i : i + 1], steps[i : i + 1], evaluations[i : i + 1])), on_host(alone), 1e-12)


LINEAR = [
    *(ic.Implicit(solver(rtol=1e-12)) for solver in (ic.Richardson, ic.GMRES, ic.BiCGSTAB)),
    ic.Neumann(200, 1.0),
    ic.Unroll(200, 1.0),
]


def joint_step(h: Any, z: Any, mean: Any) -> Any:
    return 0.5 * jnp.tanh(h @ z[0].T + z[1]) + 0.2 * mean


def uneven() -> tuple[jax.Array, jax.Array]:
    """Samples that would not stop at the same step."""
    w, x = data(batch=4)
    return w, x * jnp.asarray([[0.0], [0.1], [1.0], [3.0]])


@functools.cache
def on_one_device() -> Any:
    """The value and the gradient of a long loop of ``joint_step``."""

    def long(w: Any, x: Any) -> Any:
        return iterate(lambda h: joint_step(h, (w, x), jnp.mean(h, 0, keepdims=True)), jnp.zeros_like(x))

    gradient = jax.grad(lambda w, x: jnp.sum(long(w, x) ** 3), (0, 1))
    return on_host(jax.jit(lambda w, x: (long(w, x), gradient(w, x)))(*uneven()))


@pytest.mark.parametrize(
    ("solver", "gradient", "check_vma"),
    [
        *[(ic.Anderson(**TIGHT), gradient, True) for gradient in LINEAR],
        *[(PAIRS[i][0], LINEAR[1], True) for i in (0, 6, 7)],
        *[(ic.Anderson(**TIGHT), LINEAR[i], False) for i in (1, 3, 4)],
    ],
    ids=lambda value: {True: "varying axes checked", False: "unchecked"}.get(value) or repr(value),
)
def test_an_f_that_devices_compute_together(solver: Any, gradient: Any, check_vma: bool) -> None:
    """Then all devices stop together, and a sample forms one system with the same sample on the other devices."""
    mesh, (w, x) = mesh_of(AxisType.Auto), uneven()

    def together(w: Any, x: Any) -> Any:
        options = {"solver": solver, "gradient": gradient, "batch_ndim": 1}
        step = lambda h, z: joint_step(h, z, jax.lax.pmean(h, "d"))  # noqa: E731
        solution = icj.fixed_point(step, jnp.zeros_like(x), (w, x), **options)
        return solution.value, solution.stats.steps

    mapped = jax.shard_map(together, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check_vma)
    value, steps = jax.jit(mapped)(w, x)
    assert_close(np.asarray(value), on_one_device()[0], 1e-9)
    assert len(set(steps.tolist())) == 1
    ours = jax.jit(jax.grad(lambda w, x: jnp.sum(mapped(w, x)[0] ** 3), (0, 1)))(w, x)
    assert_close(on_host(ours), on_one_device()[1], 1e-9)


def stencil(h: Any, x: Any, left: Any, right: Any) -> Any:
    """A step of neighbors on a line, from what lies left and right of it: (n, 1)."""
    beside = jnp.concatenate([left, h[:, :-1]], axis=1) + jnp.concatenate([h[:, 1:], right], axis=1)
    return 0.3 * beside + 0.1 * jnp.sin(h) + x


def of_neighbors(h: Any, x: Any) -> Any:
    """The same on a ring of which each device has a part."""
    there, back = ([(i, (i + step) % 4) for i in range(4)] for step in (1, -1))
    return stencil(h, x, jax.lax.ppermute(h[:, -1:], "d", there), jax.lax.ppermute(h[:, :1], "d", back))


@pytest.mark.parametrize("by", ["shard_map", "vmap"])
@pytest.mark.parametrize(
    ("solver", "gradient"),
    [(ic.Anderson(**TIGHT), ic.Implicit(ic.GMRES(rtol=1e-12))), (ic.steps(3), ic.Unroll(200, 1.0))],
    ids=repr,
)
def test_an_f_that_devices_exchange_parts_of(solver: Any, gradient: Any, by: str) -> None:
    """JAX records no effect of ``ppermute``, but parts that communicate are one system all the same."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)) * np.linspace(0.1, 10.0, 16))

    def run(x: Any) -> Any:
        options = {"solver": solver, "gradient": gradient, "batch_ndim": 1}
        solution = icj.fixed_point(of_neighbors, jnp.zeros_like(x), x, **options)
        return solution.value, solution.stats.steps[None]

    def mapped(x: Any) -> Any:
        if by == "shard_map":
            both = P(None, "d"), P("d")
            return jax.shard_map(run, mesh=mesh_of(AxisType.Auto), in_specs=P(None, "d"), out_specs=both)(x)
        value, steps = jax.vmap(run, axis_name="d", in_axes=1, out_axes=(1, 0))(x.reshape(2, 4, 4))
        return value.reshape(2, 16), steps[:, 0]

    def whole(x: Any) -> Any:
        return iterate(lambda h: stencil(h, x, h[:, -1:], h[:, :1]), jnp.zeros_like(x))

    value, steps = jax.jit(mapped)(x)
    assert_close(np.asarray(value), np.asarray(whole(x)), 1e-9)
    assert all(len(set(of_sample)) == 1 for of_sample in steps.T.tolist())
    ours, expected = (
        jax.jit(jax.grad(lambda x, run=run: jnp.sum(run(x) ** 3)))(x) for run in (lambda x: mapped(x)[0], whole)
    )
    assert_close(np.asarray(ours), np.asarray(expected), 1e-9)


def test_an_f_that_maps_its_own_parts() -> None:
    """Axes that F binds itself are its own matter."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)))
    parts = P(None, "d")
    f = jax.shard_map(of_neighbors, mesh=mesh_of(AxisType.Auto), in_specs=parts, out_specs=parts)
    program = jax.make_jaxpr(f)(x, x).jaxpr
    assert not has_named_axes(program)
    assert not communication_axes(program)
    solution = icj.fixed_point(f, jnp.zeros_like(x), x, solver=ic.Anderson(**TIGHT), batch_ndim=1)
    whole = iterate(lambda h: stencil(h, x, h[:, -1:], h[:, :1]), jnp.zeros_like(x))
    assert_close(np.asarray(solution.value), np.asarray(whole), 1e-9)


def test_a_nan_on_one_device_is_one_in_the_whole_sample() -> None:
    """XLA's maximum over devices on a CPU passes over NaN."""
    _, x = data(batch=4)

    def together(x: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            return 0.5 * h + 0.1 * jax.lax.pmean(h[:, :1], "d") + x

        solution = icj.fixed_point(step, jnp.zeros_like(x), x, solver=ic.steps(3), gradient=ic.OneStep(), batch_ndim=1)
        return solution.value, solution.status

    mapped = jax.shard_map(together, mesh=mesh_of(AxisType.Auto), in_specs=P("d"), out_specs=P("d"))
    value, status = jax.jit(mapped)(x.at[1, 2].set(jnp.nan))
    assert status.tolist() == [ic.NONFINITE] * 4
    assert not np.asarray(value).any()  # the last finite point is the start


@pytest.mark.parametrize("gradient", [ic.Neumann(200, 1.0), ic.Unroll(200, 1.0), ic.BPTT(200)], ids=repr)
@pytest.mark.parametrize("start", [lambda x: jnp.zeros(3), jnp.zeros_like], ids=["shared start", "own start"])
def test_vmap_over_an_axis_that_devices_share(start: Any, gradient: ic.Estimator) -> None:
    """In an explicit mesh, where the type of each array contains its sharding."""
    mesh, (w, x) = mesh_of(AxisType.Explicit), data(batch=4)

    def run(w: Any, x: Any) -> Any:
        def solve(x: Any) -> Any:
            f = lambda h, z: jnp.tanh(h @ z[0].T + z[1])  # noqa: E731
            return icj.fixed_point(f, start(x), (w, x), solver=ic.Anderson(**TIGHT), gradient=gradient).value

        return jnp.sum(jax.vmap(solve)(x) ** 3)

    with jax.set_mesh(mesh):
        w = w if FROM_OUTSIDE else jax.device_put(w, P())
        ours = jax.jit(jax.value_and_grad(run, (0, 1)))(w, jax.device_put(x, P("d")))
    assert ours[1][1].sharding.spec[0] == "d"
    assert_close(on_host(ours), on_host(looped(4, 3)), 1e-9)

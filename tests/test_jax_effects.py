"""An F that has effects: mutable arrays, Pallas kernels, callbacks, and named axes that it binds itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback, jet, sparse
from jax.experimental import pallas as pl
from jax_layers import EXACT, SOLVER

import implicit_core as ic
from implicit_core.adapters.jax import effects

pytestmark = pytest.mark.slow

Map = Callable[[jax.Array, jax.Array], jax.Array]

LONG = ic.Neumann(80, 1.0)
W = 0.5 * np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
X = np.array([0.3, -0.4, 0.5])
CALLS: list[float] = []


def plain(h: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(h @ W.T + x)


def kernel(a: Any, out: Any) -> None:
    out[...] = jnp.tanh(a[...])


@jax.custom_vjp
def tanh(a: jax.Array) -> jax.Array:
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(a.shape, a.dtype), interpret=True)(a)


tanh.defvjp(lambda a: (tanh(a),) * 2, lambda y, v: (v * (1 - y * y),))


def reading(w: Any = W) -> Map:
    """F with a mutable array, which it only reads."""
    reference = jax.new_ref(jnp.asarray(w))
    return lambda h, x: jnp.tanh(h @ reference[...].T + x)


def local(h: jax.Array, x: jax.Array) -> jax.Array:
    total = jax.new_ref(jnp.asarray(x) + jnp.zeros_like(h))
    for i in range(3):
        total[...] += h[i] * W[:, i]
    return jnp.tanh(total[...])


def both() -> Map:
    """F with a mutable array of its own, in a loop that reads another one, and in a program within it."""
    weight = jax.new_ref(jnp.asarray(W))

    def f(h: jax.Array, x: jax.Array) -> jax.Array:
        total = jax.new_ref(jnp.zeros_like(h))

        def add(i: Any, carry: int) -> int:
            total[...] += weight[:, i] * h[i]
            return carry

        jax.lax.fori_loop(0, 3, add, 0)
        return jax.jit(lambda total, x: jnp.tanh(total[...] + x))(total, x)

    return f


def with_callback(callback: Callable[[jax.Array], Any]) -> Map:
    def f(h: jax.Array, x: jax.Array) -> jax.Array:
        one = callback(jax.lax.stop_gradient(h[0]))
        return plain(h, x) if one is None else plain(h, x) * jax.lax.stop_gradient(one)

    return f


def one(h: Any) -> Any:
    CALLS.append(float(h))
    return np.ones(())


NUMBER = jax.ShapeDtypeStruct((), np.float64)
MAPS: dict[str, Callable[[], Map]] = {
    "read": reading,
    "local": lambda: local,
    "both": both,
    "Pallas": lambda: lambda h, x: tanh(h @ W.T + x),
    "debug.callback": lambda: with_callback(lambda h: jax.debug.callback(one, h)),
    "ordered debug.callback": lambda: with_callback(lambda h: jax.debug.callback(one, h, ordered=True)),
    "io_callback": lambda: with_callback(lambda h: io_callback(one, NUMBER, h)),
    "ordered io_callback": lambda: with_callback(lambda h: io_callback(one, NUMBER, h, ordered=True)),
    "pure_callback": lambda: with_callback(lambda h: jax.pure_callback(one, NUMBER, h, vmap_method="sequential")),
}
ORDERED = [name for name in MAPS if name.startswith("ordered")]


def layer(f: Map, gradient: ic.Estimator = LONG) -> Callable[[jax.Array], jax.Array]:
    return lambda x: ic.fixed_point(f, jnp.zeros(3), x, solver=SOLVER, gradient=gradient).value


def dense(x: Any = X, w: Any = W) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fixed point, and the gradients of the sum of its squares in x and in w, by dense linear algebra."""
    h = np.zeros(3)
    for _ in range(300):
        h = np.tanh(w @ h + x)
    slopes = np.diag(1 - h**2)
    v = np.linalg.solve((np.eye(3) - slopes @ w).T, 2 * h)
    return h, slopes @ v, np.outer(slopes @ v, h)


def squares(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.sum(function(x) ** 2)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", MAPS)
def test_values_and_gradients_are_those_of_dense_linear_algebra(name: str) -> None:
    run = layer(MAPS[name]())
    value, gradient, _ = dense()
    CALLS.clear()
    close(run(X), value)
    close(jax.jit(run)(X), value)
    close(jax.grad(squares(run))(X), gradient)
    close(jax.jit(jax.grad(squares(run)))(X), gradient)
    jax.effects_barrier()
    assert bool(CALLS) == ("callback" in name)
    if "Pallas" not in name:  # a custom_vjp has no forward mode
        close(jax.jvp(squares(run), (X,), (np.ones(3),))[1], gradient.sum())


@pytest.mark.parametrize("name", ["read", "local", "both"])
def test_the_exact_gradient_is_that_of_dense_linear_algebra(name: str) -> None:
    run = layer(MAPS[name](), EXACT)
    batch = np.stack([X, 2 * X])
    close(jax.grad(squares(run))(X), dense()[1])
    close(jax.jit(jax.vmap(jax.grad(squares(run))))(batch), np.stack([dense(x)[1] for x in batch]))


@pytest.mark.parametrize("name", [name for name in MAPS if name not in ORDERED])
def test_under_vmap_each_sample_has_its_own_solve(name: str) -> None:
    run = layer(MAPS[name]())
    batch = np.stack([X, 2 * X])
    close(jax.vmap(run)(batch), np.stack([dense(x)[0] for x in batch]))
    close(jax.jit(jax.vmap(jax.grad(squares(run))))(batch), np.stack([dense(x)[1] for x in batch]))


@pytest.mark.parametrize("gradient", [LONG, EXACT, ic.BPTT(60), ic.Unroll(60, 1.0)], ids=repr)
def test_what_a_mutable_array_holds_is_differentiated(gradient: ic.Estimator) -> None:
    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(layer(reading(w), gradient)(jnp.asarray(X)) ** 2)

    expected = dense()[2]
    assert abs(expected).min() > 1e-3
    close(jax.grad(loss)(W), expected)
    close(jax.jit(jax.grad(loss))(W), expected)
    close(jax.jvp(loss, (W,), (np.ones((3, 3)),))[1], expected.sum())


def test_a_mutable_array_is_read_at_each_call() -> None:
    weight = jax.new_ref(jnp.asarray(W))

    def with_weight(weight: Any, x: Any) -> jax.Array:
        return layer(lambda h, x: jnp.tanh(h @ weight[...].T + x))(x)

    def in_z(*z: Any) -> jax.Array:
        return ic.fixed_point(lambda h, z: jnp.tanh(h @ z[0][...].T + z[1]), jnp.zeros(3), z, solver=SOLVER).value

    for factor in (1.0, 0.5):
        weight[...] = jnp.asarray(factor * W)
        expected = dense(w=factor * W)[0]
        for run in (with_weight, jax.jit(with_weight), in_z, jax.jit(in_z)):
            close(run(weight, jnp.asarray(X)), expected)


def set_to(count: Any, h: jax.Array) -> None:
    count[...] = jnp.sum(h)


@pytest.mark.parametrize(
    "write",
    [
        set_to,
        lambda count, h: jax.ref.addupdate(count, (), h[0]),
        lambda count, h: jax.jit(lambda h: set_to(count, h))(h),
        lambda count, h: jax.lax.fori_loop(0, 2, lambda i, c: (set_to(count, c), c)[1], h),
    ],
    ids=["set", "addupdate", "jit", "fori_loop"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_write_to_a_mutable_array_is_an_error(write: Any, compiled: bool) -> None:
    count = jax.new_ref(jnp.zeros(()))

    def f(h: jax.Array, x: jax.Array) -> jax.Array:
        write(count, h)
        return plain(h, x)

    with pytest.raises(ValueError, match=r"f writes to a mutable array that it closes over .* has_aux=True"):
        (jax.jit(layer(f)) if compiled else layer(f))(X)
    assert count[...] == 0


def test_an_axis_that_f_binds_itself_is_none_that_it_communicates_over() -> None:
    mesh = jax.make_mesh((1,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def f(h: jax.Array, x: jax.Array) -> jax.Array:
        columns = spec(None, "parts")
        product = jax.shard_map(
            lambda w, h: jax.lax.psum(w @ h, "parts"), mesh=mesh, in_specs=(columns, spec("parts")), out_specs=spec()
        )
        return jnp.tanh(product(jnp.asarray(W), h) + x)

    close(layer(f)(X), dense()[0])
    close(jax.jit(jax.grad(squares(layer(f))))(X), dense()[1])


def test_an_axis_of_vmap_that_f_only_asks_for_its_position() -> None:
    def run(x: jax.Array) -> jax.Array:
        return layer(lambda h, x: plain(h, x * (1.0 + jnp.astype(jax.lax.axis_index("samples"), x.dtype))))(x)

    batch = np.stack([X, X])
    expected = np.stack([dense(x)[0] for x in (X, 2 * X)])
    close(jax.vmap(run, axis_name="samples")(batch), expected)


@pytest.mark.parametrize("check_vma", [False, True])
def test_kinds_of_effects_are_found_within_shard_map(check_vma: bool) -> None:
    mesh = jax.make_mesh((1,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, outside = jax.sharding.PartitionSpec("parts"), effects._kinds()
    effects._kinds.cache_clear()
    found = []
    jax.shard_map(
        lambda x: (found.append(effects._kinds()), x)[1], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )(jnp.ones(1))
    assert found == [outside]
    assert all(outside)


@pytest.mark.parametrize("gradient", [LONG, EXACT], ids=repr)
def test_a_linear_transpose_names_the_pullback_which_is_right(gradient: ic.Estimator) -> None:
    def run(x: jax.Array) -> jax.Array:
        return ic.fixed_point(lambda h, x: W @ h + x, jnp.zeros(3), x, solver=SOLVER, gradient=gradient).value

    with pytest.raises(NotImplementedError, match=r"take pullback = jax\.vjp\(layer, x\)\[1\]"):
        jax.linear_transpose(run, X)(X)
    close(jax.vjp(run, np.zeros(3))[1](X)[0], np.linalg.solve((np.eye(3) - W).T, X))


def test_jet_and_sparsify_of_a_layer_raise() -> None:
    with pytest.raises(Exception, match="value_with_rule"):
        jet.jet(layer(plain), (X,), ((X,),))
    with pytest.raises(NotImplementedError, match="sparse rule"):
        sparse.sparsify(layer(plain))(sparse.BCOO.fromdense(jnp.asarray(X)))


@pytest.mark.parametrize("gradient", [LONG, EXACT], ids=repr)
def test_a_sparse_array_in_z_gets_its_gradient(gradient: ic.Estimator) -> None:
    weight = sparse.BCOO.fromdense(jnp.asarray(np.tril(W)))

    @sparse.sparsify
    def f(h: Any, z: Any) -> Any:
        return jnp.tanh(z[0] @ h + z[1])

    def loss(numbers: jax.Array) -> jax.Array:
        z = sparse.BCOO((numbers, weight.indices), shape=(3, 3)), jnp.asarray(X)
        return jnp.sum(ic.fixed_point(f, jnp.zeros(3), z, solver=SOLVER, gradient=gradient).value ** 2)

    value, _, expected = dense(w=np.tril(W))
    found, gradients = jax.value_and_grad(loss)(weight.data)
    assert float(found) == pytest.approx(float(value @ value), abs=1e-10)
    close(gradients, expected[tuple(np.asarray(weight.indices).T)])

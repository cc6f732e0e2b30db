"""The JAX layer under JAX's transformations: the numbers of a long loop, sample by sample."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax_layers import (
    CONVERGED,
    EXACT,
    SOLVER,
    Layer,
    assert_close,
    data,
    iterate,
    layer_of,
    loop,
    loss,
)

import implicit_core as ic
from implicit_core.adapters import jax as icj

pytestmark = pytest.mark.slow

BOTH = (0, 1)
ESTIMATORS = [ic.OneStep(), ic.Neumann(4, 0.5), ic.Unroll(3, 0.5), ic.Unroll(3, 0.5, recompute=True), EXACT]
# States have three numbers here: with a longer memory Anderson's systems are singular, and magnify rounding.
SOLVERS = [ic.FixedPointIteration(), ic.Anderson(memory=2), ic.Broyden(), ic.NewtonKrylov()]

TRANSFORMS: dict[str, Callable[[Layer], Any]] = {
    "vmap": lambda f: jax.vmap(f, (None, 0)),
    "vmap of batches": lambda f: lambda w, x: jax.vmap(f, (None, 0))(w, jnp.stack([x, 2 * x, -x])),
    "vmap over parameters": lambda f: lambda w, x: jax.vmap(f)(jnp.stack([w, 0.5 * w]), x),
    "vmap(vmap)": lambda f: lambda w, x: jax.vmap(jax.vmap(f, (None, 0)), (0, None))(jnp.stack([w, -w]), x),
    "vmap(jit), other axes": lambda f: lambda w, x: jax.vmap(jax.jit(f), (None, 1), 1)(w, x.T),
    "vmap(grad)": lambda f: jax.vmap(jax.grad(loss(f), BOTH), (None, 0)),
    "grad(vmap)": lambda f: jax.grad(lambda w, x: jnp.sum(jax.vmap(f, (None, 0))(w, x) ** 3), BOTH),
    "vmap(hessian)": lambda f: jax.vmap(jax.hessian(loss(f), 1), (None, 0)),
    "jvp(vmap)": lambda f: lambda w, x: jax.jvp(jax.vmap(f, (None, 0)), (w, x), (w, x))[1],
    "linearize": lambda f: lambda w, x: jax.linearize(f, w, x)[1](w, jnp.sin(x)),
    "grad(checkpoint)": lambda f: jax.grad(jax.checkpoint(loss(f)), BOTH),
}


@functools.cache
def reference(name: str) -> Any:
    return jax.jit(TRANSFORMS[name](loop))(*data())


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("estimator", CONVERGED[:3], ids=repr)
def test_transforms_equal_transforms_of_a_long_loop(name: str, estimator: ic.Estimator) -> None:
    atol = 1e-6 if name == "vmap(hessian)" else 1e-7
    assert_close(jax.jit(TRANSFORMS[name](layer_of(estimator)))(*data()), reference(name), atol)


@pytest.mark.parametrize("name", ["vmap", "vmap(grad)", "grad(vmap)", "linearize"])
@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(60, 1.0)], ids=repr)
def test_transforms_without_jit(name: str, estimator: ic.Estimator) -> None:
    closed = layer_of(estimator, closed=True)
    assert_close(TRANSFORMS[name](closed)(*data()), reference(name), 1e-7)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.BPTT(4)], ids=repr)
def test_jit_changes_nothing(estimator: ic.Estimator) -> None:
    """A whole Solution can be returned from ``jit``."""

    def run(w: Any, x: Any) -> Any:
        f = lambda h, x: jnp.tanh(h @ w.T + x)  # noqa: E731
        options = {"gradient": estimator, "batch_ndim": 1, "trace": True}
        solution = icj.fixed_point(f, jnp.zeros_like(x), x, solver=ic.Anderson(rtol=1e-9, max_steps=30), **options)
        return jnp.sum(solution.value**3), solution

    eager, traced = (tr(jax.value_and_grad(run, BOTH, has_aux=True))(*data()) for tr in (lambda f: f, jax.jit))
    assert isinstance(traced[0][1], ic.Solution)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10, rtol=0)  # Anderson's weights amplify rounding
    shapes = jax.eval_shape(run, *data())[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), traced[0][1]
    )


def statuses(x: Any, h0: Any, solver: ic.Solver, batch_ndim: int) -> dict[str, Any]:
    """Statuses for F = slope tanh(h) + x, with the slope in x; F of one sample is infinite from the start."""
    f = lambda h, x: x[..., :1] * jnp.tanh(h) + x[..., 1:]  # noqa: E731
    solution = icj.fixed_point(f, h0, x, solver=solver, gradient=ic.OneStep(), batch_ndim=batch_ndim, trace=True)
    stats = solution.stats
    return {
        "value": solution.value,
        "status": solution.status,
        "steps": stats.steps,
        "residual": stats.residual,
        "trace": stats.trace,
    }


X = jnp.asarray([[0.1, 0.1, 0.2, 0.0], [0.9, 0.3, -0.3, 1.0], [-4.0, 1.0, 2.0, 0.1], [0.5, jnp.nan, 0.0, 0.0]])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_samples_of_vmap_equal_samples_of_a_batch_and_single_samples(solver: ic.Solver) -> None:
    h0 = jnp.zeros((4, 3))
    mapped = jax.jit(jax.vmap(lambda x: statuses(x, jnp.zeros(3), solver, 0)))(X)
    batched = jax.jit(lambda x: statuses(x, h0, solver, 1))(X)
    one = jax.jit(lambda x: statuses(x, jnp.zeros(3), solver, 0))
    single = [one(x) for x in X]
    alone = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    batched["trace"] = batched["trace"].T
    for name in mapped:
        np.testing.assert_array_equal(mapped[name], batched[name])
        exact = name in ("status", "steps")
        np.testing.assert_allclose(mapped[name], alone[name], atol=0 if exact else 1e-7, rtol=0)
    assert mapped["status"][0] == ic.CONVERGED
    assert mapped["status"][3] == ic.NONFINITE
    assert len(set(mapped["steps"].tolist())) > 2


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_sample_that_is_not_finite_changes_no_bit_of_another(solver: ic.Solver) -> None:
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def run(x: Any, h0: Any) -> Any:
        gradient = jax.grad(lambda x: jnp.sum(statuses(x, h0, solver, 0)["value"] ** 3))(x)
        return statuses(x, h0, solver, 0), gradient

    h0 = jnp.zeros((4, 3))
    with_nan, with_number = run(X, h0), run(X.at[3].set(0.2), h0)
    with_infinity = run(X, h0.at[3].set(jnp.inf))
    for other in (with_number, with_infinity):
        for a, b in zip(jax.tree.leaves(with_nan), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a[:3], b[:3])
    assert np.all(np.isfinite(with_nan[1][:3]))


def test_vmap_over_starts_and_over_both() -> None:
    w, x = data()
    f = lambda h, x: jnp.tanh(h @ w.T + x)  # noqa: E731
    starts = jnp.stack([loop(w, x), jnp.zeros_like(x), 3 * jnp.ones_like(x)])

    def solve(h0: Any, x: Any) -> ic.Solution:
        return icj.fixed_point(f, h0, x, solver=SOLVER, gradient=ic.OneStep(), batch_ndim=1)

    by_start = jax.jit(jax.vmap(solve, (0, None)))(starts, x)
    assert_close(by_start.value, jnp.broadcast_to(loop(w, x), starts.shape), 1e-11)
    assert by_start.stats.steps.shape == (3, 2)
    assert np.all(by_start.stats.steps[0] == 1)
    assert np.all(by_start.stats.steps[1] > 15)
    by_both = jax.jit(jax.vmap(solve))(starts, jnp.stack([x, -x, 2 * x]))
    for i, scale in enumerate((1, -1, 2)):
        assert_close(by_both.value[i], loop(w, scale * x), 1e-11)


def test_an_inner_batch_of_vmap_stops_each_sample_by_itself() -> None:
    x = jnp.stack([X[:3], X[jnp.asarray([1, 0, 0])]])
    solve = functools.partial(statuses, solver=ic.Anderson(), batch_ndim=1)
    mapped = jax.jit(jax.vmap(solve, (0, None)))(x, jnp.zeros((3, 3)))
    assert mapped["trace"].shape == (2, ic.Anderson().max_steps, 3)
    for i in range(2):
        assert_close(jax.tree.map(lambda a, i=i: a[i], mapped), solve(x[i], jnp.zeros((3, 3))), 1e-8)


EVERY_INVERSE = [
    *CONVERGED[1:3],
    *(ic.Implicit(solver(rtol=1e-13)) for solver in (ic.Richardson, ic.GMRES, ic.BiCGSTAB)),
]


def coupled(h: Any, z: Any, mean: Any) -> Any:
    return 0.5 * jnp.tanh(h @ z[0].T + z[1]) + 0.2 * mean


def uneven() -> tuple[jax.Array, jax.Array]:
    """Samples that would not stop at the same step."""
    w, x = data()
    return w, x * jnp.asarray([[3.0], [0.1]])


def value_and_both_modes(f: Layer) -> Callable[..., Any]:
    """The value, the gradient of its loss, and a tangent."""
    return jax.jit(lambda w, x: (f(w, x), jax.grad(loss(f), BOTH)(w, x), jax.jvp(f, (w, x), (w, jnp.cos(x)))[1]))


@functools.cache
def joint() -> Any:
    return value_and_both_modes(
        lambda w, x: iterate(lambda h: coupled(h, (w, x), jnp.mean(h, 0, keepdims=True)), jnp.zeros_like(x))
    )(*uneven())


@pytest.mark.parametrize(
    ("estimator", "solver"),
    [
        *((estimator, SOLVERS[1]) for estimator in EVERY_INVERSE),
        *((EVERY_INVERSE[2], s) for s in SOLVERS if s != SOLVERS[1]),
    ],
    ids=lambda value: repr(value) if isinstance(value, ic.Estimator) else type(value).__name__,
)
def test_f_may_communicate_with_other_samples_of_a_vmap(estimator: ic.Estimator, solver: Any) -> None:
    """A collective over a named axis couples the samples to one system."""
    w, x = uneven()
    solver = dataclasses.replace(solver, rtol=1e-13, max_steps=300)

    def run(w: Any, x: Any) -> ic.Solution:
        f = lambda h, z: coupled(h, z, jax.lax.pmean(h, "samples"))  # noqa: E731
        return icj.fixed_point(f, jnp.zeros_like(x), (w, x), solver=solver, gradient=estimator)

    mapped = jax.vmap(run, (None, 0), axis_name="samples")
    solution = jax.jit(mapped)(w, x)
    assert_close(solution.value, joint()[0], 1e-10)
    assert np.all(solution.status == ic.CONVERGED)
    stacked = jax.jit(
        lambda w, x: icj.fixed_point(
            lambda h, z: coupled(h, z, jnp.mean(h, 0, keepdims=True)),
            jnp.zeros_like(x),
            (w, x),
            solver=solver,
            gradient=ic.OneStep(),
        )
    )(w, x)
    assert np.all(solution.stats.steps == stacked.stats.steps)
    if isinstance(solver, ic.Anderson):  # no derivative depends on the solver
        assert_close(value_and_both_modes(lambda w, x: mapped(w, x).value)(w, x), joint(), 1e-7)


@pytest.mark.parametrize("estimator", [ic.Unroll(2, 1.0), ic.BPTT(3)], ids=repr)
def test_what_is_told_of_steps_is_told_of_the_whole_system(estimator: ic.Estimator) -> None:
    """Each mapped sample holds a part of one system, and is told the residual of the whole system."""
    options: dict[str, Any] = {
        "solver": ic.FixedPointIteration(max_steps=3, rtol=1e-9, atol=0.3),
        "gradient": estimator,
    }
    x = jnp.arange(4.0)[:, None]

    def one(x: Any) -> ic.Solution:
        return ic.fixed_point(lambda h, z: 0.5 * jax.lax.pmean(h, "samples") + z, jnp.zeros(1), x, **options)

    parts = jax.vmap(one, axis_name="samples")(x)
    whole = ic.fixed_point(lambda h, z: 0.5 * jnp.mean(h, 0, keepdims=True) + z, jnp.zeros((4, 1)), x, **options)
    assert_close(parts.value, whole.value, 1e-14)
    np.testing.assert_allclose(parts.stats.residual, float(whole.stats.residual), rtol=1e-12)
    assert np.all(parts.status == whole.status)


def test_f_may_communicate_in_a_program_within_it() -> None:
    w, x = uneven()
    for inner in (jax.jit, lambda f: lambda h: jax.lax.scan(lambda c, _: (f(c), None), h, length=1)[0]):

        def run(x: Any, inner: Any = inner) -> Any:
            f = lambda h, z: inner(lambda h: coupled(h, (w, z), jax.lax.pmean(h, "samples")))(h)  # noqa: E731
            return icj.fixed_point(f, jnp.zeros_like(x), x, solver=ic.Broyden(rtol=1e-13), gradient=EXACT)

        solution = jax.jit(jax.vmap(run, axis_name="samples"))(x)
        assert_close(solution.value, joint()[0], 1e-10)
        assert len(set(solution.stats.steps.tolist())) == 1  # the samples are one system


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_callable_solver_is_mapped_as_a_whole_and_not_differentiated(jit: Any) -> None:
    """It sees one sample, whatever `vmap` makes of its operations, and may close over what is differentiated."""

    def run(damping: Any, z: Any) -> Any:
        def picard(problem: ic.Problem, h0: Any, z: Any) -> Any:
            assert h0.shape == (2,)
            return jax.lax.fori_loop(0, 80, lambda _, h: h + damping * (problem(h, z) - h), h0)

        f = lambda h, z: 0.5 * jnp.sin(h) + z  # noqa: E731
        return jnp.sum(icj.fixed_point(f, jnp.zeros(2), z, solver=picard, gradient=EXACT).value ** 2)

    def theirs(z: Any) -> Any:
        return jnp.sum(iterate(lambda h: 0.5 * jnp.sin(h) + z, jnp.zeros(2)) ** 2)

    z = jnp.asarray([[0.3, -0.7], [1.0, 0.0]])
    for_damping, for_z = jit(jax.vmap(jax.grad(run, BOTH), (None, 0)))(jnp.asarray(0.8), z)
    np.testing.assert_array_equal(for_damping, 0.0)
    assert_close(for_z, jax.vmap(jax.grad(theirs))(z), 1e-7)


def test_f_may_ask_which_sample_it_is() -> None:
    """An index of the axis is not communication: samples stay independent."""

    def solve(x: Any) -> Any:
        f = lambda h, z: 0.5 * jnp.tanh(h) + z + 0.1 * jnp.astype(jax.lax.axis_index("samples"), z.dtype)  # noqa: E731
        return icj.fixed_point(f, jnp.zeros(2), x).status

    x = jnp.asarray([[jnp.nan, 0.0], [0.1, 0.2], [0.3, 0.4]])
    found = jax.vmap(solve, axis_name="samples")(x)
    assert found.tolist() == [ic.NONFINITE, ic.CONVERGED, ic.CONVERGED]


@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(60, 1.0), ic.Unroll(60, 1.0)], ids=repr)
def test_a_layer_within_an_f_that_communicates_with_other_samples(estimator: ic.Estimator) -> None:
    options = {"solver": SOLVER, "gradient": estimator}

    def inner(h: Any) -> Any:
        return icj.fixed_point(lambda u, q: 0.3 * jnp.tanh(u) + q, jnp.zeros(3), h, **options).value

    def ours(x: Any) -> Any:
        f = lambda h, z: 0.2 * jax.lax.pmean(h, "samples") + 0.1 * z * inner(h) + z  # noqa: E731
        return icj.fixed_point(f, jnp.zeros(3), x, **options).value

    def theirs(x: Any) -> Any:
        inner = lambda h: iterate(lambda u: 0.3 * jnp.tanh(u) + h, jnp.zeros_like(h), 60)  # noqa: E731
        return iterate(lambda h: 0.2 * jnp.mean(h, 0, keepdims=True) + 0.1 * x * inner(h) + x, jnp.zeros_like(x), 60)

    x = jnp.sin(jnp.arange(6.0).reshape(2, 3))
    mapped = jax.vmap(ours, axis_name="samples")
    assert_close(*(jax.jit(f)(x) for f in (mapped, theirs)), 1e-10)
    assert_close(*(jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 3)))(x) for f in (mapped, theirs)), 1e-7)


LOOPS: dict[str, Callable[[Any], Any]] = {
    "scan": lambda f: lambda a: jax.lax.scan(lambda c, s: (c + f(s * a) ** 3, None), 0.0, jnp.asarray([1.0, 2.0]))[0],
    "map": lambda f: lambda a: jnp.sum(jax.lax.map(lambda s: f(s * a) ** 3, jnp.asarray([1.0, 2.0]))),
    "fori_loop": lambda f: lambda a: jax.lax.fori_loop(1, 3, lambda i, c: c + f(i * a) ** 3, 0.0),
    "checkpointed scan": lambda f: jax.checkpoint(LOOPS["scan"](f)),
    "scan of a checkpoint": lambda f: LOOPS["scan"](jax.checkpoint(f)),
}
SECOND: dict[str, Callable[[Any], Any]] = {
    "hessian": jax.hessian,
    "grad(grad)": lambda f: jax.grad(jax.grad(f)),
    "jit(grad(grad))": lambda f: jax.jit(jax.grad(jax.grad(f))),
    "jacfwd(jacfwd)": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "grad(jacfwd)": lambda f: jax.grad(jax.jacfwd(f)),
    "vmap(hessian)": lambda f: lambda a: jax.vmap(jax.hessian(f))(a[None])[0],
    "grad(grad(grad))": lambda f: jax.grad(jax.grad(jax.grad(f))),
}


# Each loop and each derivative, and for the exact gradient most pairs of them. Unroll is a plain scan without a rule.
HIGHER = [(EXACT, kind, order) for kind in LOOPS for order in ("grad(grad)", "grad(jacfwd)")]
HIGHER += [(EXACT, kind, "grad(grad(grad))") for kind in ("fori_loop", "checkpointed scan")]
HIGHER += [(ic.Unroll(60, 1.0), kind, "hessian") for kind in ("scan", "checkpointed scan")]
for other in (EXACT, ic.Neumann(60, 1.0)):
    HIGHER += [(other, kind, "hessian") for kind in LOOPS]
    HIGHER += [(other, "scan", order) for order in SECOND if (other, "scan", order) not in HIGHER]


@functools.cache
def of_a_long_loop(third: bool) -> Any:
    """All of ``LOOPS`` are one function, and all of ``SECOND`` but the last one derivative."""
    long = lambda a: iterate(lambda h: 0.5 * jnp.tanh(h) + a, jnp.zeros(()), 60)  # noqa: E731
    total = lambda a: long(a) ** 3 + long(2 * a) ** 3  # noqa: E731
    derivative = jax.jacfwd(jax.hessian(total)) if third else jax.hessian(total)
    return jax.jit(derivative)(jnp.asarray(0.7))


@pytest.mark.parametrize(("estimator", "kind", "order"), HIGHER, ids=lambda value: str(value))
def test_higher_derivatives_of_layers_in_loops(estimator: ic.Estimator, kind: str, order: str) -> None:
    """JAX splits a differentiated loop, and must keep the layer's differentiation rule."""

    def layer(a: Any) -> Any:
        f = lambda h, a: 0.5 * jnp.tanh(h) + a  # noqa: E731
        return icj.fixed_point(f, jnp.zeros(()), a, solver=SOLVER, gradient=estimator).value

    theirs = of_a_long_loop(order == "grad(grad(grad))")
    assert abs(theirs) > 1.0
    derivative = SECOND[order](LOOPS[kind](layer))
    derivative = derivative if order.startswith("grad(grad") else jax.jit(derivative)
    assert_close(derivative(jnp.asarray(0.7)), theirs, 1e-6)


def nested(solve: Callable[..., Any], again: Callable[..., Any]) -> Callable[[Any], Any]:
    def within(h: Any, a: Any) -> Any:
        return again(lambda u, q: 0.3 * jnp.tanh(u) + q, h + a)

    return lambda a: solve(lambda h, a: 0.2 * jnp.sin(within(h, a)) + a, a) ** 3


@functools.cache
def hessian_of_nested_loops() -> Any:
    def theirs(f: Any, z: Any) -> Any:
        return iterate(lambda h: f(h, z), jnp.zeros(()), 60)

    return jax.jit(jax.hessian(nested(theirs, theirs)))(jnp.asarray(0.7))


INNER = [EXACT, ic.Neumann(60, 1.0), ic.Unroll(60, 1.0)]


@pytest.mark.parametrize(
    ("inner", "outer"), [*((EXACT, outer) for outer in [*INNER, ic.BPTT(60)]), *((e, e) for e in INNER[1:])], ids=repr
)
def test_second_derivatives_of_layers_within_layers(inner: ic.Estimator, outer: ic.Estimator) -> None:
    def ours(estimator: ic.Estimator) -> Callable[..., Any]:
        options = {"solver": SOLVER, "gradient": estimator}
        return lambda f, z: icj.fixed_point(f, jnp.zeros(()), z, **options).value

    a = jnp.asarray(0.7)
    assert_close(jax.jit(jax.hessian(nested(ours(outer), ours(inner))))(a), hessian_of_nested_loops(), 1e-6)


@functools.cache
def trained(layer: Layer) -> Any:
    """Four steps in a scan."""

    @jax.jit
    def train(w: Any, x: Any) -> Any:
        def step(w: Any, _: Any) -> Any:
            value, gradient = jax.value_and_grad(loss(layer))(w, x)
            return w - 0.05 * gradient, value

        return jax.lax.scan(step, w, length=4)

    return train(*data())


@pytest.mark.parametrize("estimator", CONVERGED[:3], ids=repr)
def test_steps_of_training_in_a_scan(estimator: ic.Estimator) -> None:
    ours = trained(layer_of(estimator))
    assert_close(ours, trained(loop), 1e-7)
    assert np.all(np.diff(ours[1]) < 0)


def plain(f: Any) -> Any:
    return f


@functools.cache
def gradient_of_a_recurrent_network(layer: Layer, wrap: Any) -> Any:
    def total(w: Any, x: Any) -> Any:
        def body(carry: Any, scale: Any) -> Any:
            out = layer(w, scale * x + 0.3 * carry)
            return out, jnp.sum(out**3)

        return jnp.sum(jax.lax.scan(wrap(body), x, jnp.asarray([1.0, -0.5, 2.0]))[1])

    return jax.jit(jax.grad(total, BOTH))(*data())


@pytest.mark.parametrize("wrap", [plain, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("estimator", CONVERGED[:3], ids=repr)
def test_a_layer_in_a_scan_differentiated_from_outside(estimator: ic.Estimator, closed: bool, wrap: Any) -> None:
    """A recurrent network with the layer as its cell."""
    ours = gradient_of_a_recurrent_network(layer_of(estimator, closed), wrap)
    assert_close(ours, gradient_of_a_recurrent_network(loop, plain), 1e-7)


def test_donated_buffers() -> None:
    w, x = data()
    expected = w - 0.1 * jax.grad(loss(loop))(w, x)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w: Any, h0: Any, x: Any) -> Any:
        def total(w: Any) -> Any:
            f = lambda h, z: jnp.tanh(h @ z[0].T + z[1])  # noqa: E731
            h = icj.fixed_point(f, h0, (w, x), solver=SOLVER, gradient=EXACT, batch_ndim=1).value
            return jnp.sum(h**3), h

        gradient, h = jax.grad(total, has_aux=True)(w)
        return w - 0.1 * gradient, h

    h0 = jnp.zeros_like(x)
    new, h = step(w, h0, x)
    assert w.is_deleted()
    assert h0.is_deleted()
    assert_close(new, expected, 1e-9)
    assert_close(h, loop(data()[0], x), 1e-10)


@functools.cache
def in_double_precision(estimator: ic.Estimator) -> Any:
    return jax.jit(jax.grad(loss(layer_of(estimator)), BOTH))(*data())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 2e-2), ("bfloat16", 8e-2), ("float32", 1e-5)])
def test_low_precision(dtype: str, rtol: float, estimator: ic.Estimator) -> None:
    """Values and gradients in the state's dtype, as far from float64's as it rounds."""
    if isinstance(estimator, ic.Implicit):
        estimator = ic.Implicit(ic.GMRES(rtol=rtol / 10))
    solver = ic.Anderson(rtol=rtol / 10 if dtype == "float32" else rtol, max_steps=50)

    def run(w: Any, x: Any) -> Any:
        value = layer_of(estimator, solver=solver)(w, x)
        return jnp.sum(value.astype(jnp.float32) ** 3), value

    arrays = jax.tree.map(lambda a: a.astype(dtype), data())
    gradients, value = jax.jit(jax.grad(run, BOTH, has_aux=True))(*arrays)
    assert {a.dtype for a in (*gradients, value)} == {jnp.dtype(dtype)}
    exact = in_double_precision(estimator)
    assert_relatively_close(value, loop(*data()), 3 * rtol)
    for a, b in zip(gradients, exact, strict=True):
        assert_relatively_close(a, b, 3 * rtol)


def assert_relatively_close(ours: Any, theirs: Any, rtol: float) -> None:
    assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) < rtol * np.linalg.norm(theirs)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("layer", [ic.fixed_point, icj.fixed_point], ids=["ic", "icj"])
def test_aux_is_evaluated_at_the_value_and_differentiable(layer: Any, jit: Any) -> None:
    w, x = data()

    def aux(h: Any, w: Any) -> Any:
        return {"sum": jnp.sum(h**2 @ w), "none": None}

    def ours(w: Any) -> Any:
        f = lambda h, w: (jnp.tanh(h @ w.T + x), aux(h, w))  # noqa: E731
        options = {"solver": SOLVER, "gradient": EXACT, "batch_ndim": 1, "has_aux": True}
        solution = layer(f, jnp.zeros_like(x), w, **options)
        assert solution.aux["none"] is None
        np.testing.assert_equal(jax.tree.structure(solution.aux), jax.tree.structure({"sum": 0, "none": None}))
        return solution.aux["sum"]

    theirs = lambda w: aux(loop(w, x), w)["sum"]  # noqa: E731
    assert_close(jit(ours)(w), theirs(w), 1e-10)
    assert_close(jit(jax.grad(ours))(w), jax.grad(theirs)(w), 1e-7)
    coarse = layer(
        lambda h, w: (0.5 * h + w, h),
        jnp.zeros(2),
        jnp.ones(2),
        solver=ic.FixedPointIteration(max_steps=2),
        gradient=ic.Unroll(2, 1.0),
        has_aux=True,
    )
    np.testing.assert_array_equal(coarse.aux, coarse.value)
    np.testing.assert_array_equal(coarse.value, np.full(2, 1.75))


@pytest.mark.parametrize("result", [lambda h: h, lambda h: (h, 1, 2), lambda h: [h, 1]])
def test_aux_needs_a_pair(result: Any) -> None:
    with pytest.raises(TypeError, match=r"has_aux=True f must return a pair \(h, aux\), got "):
        jax.jit(lambda z: icj.fixed_point(lambda h, z: result(h), jnp.zeros(2), z, has_aux=True))(jnp.ones(2))


# Failures.

SLOPES = jnp.asarray([[0.5], [2.0], [-0.5]])


def diverging(slopes: Any, **options: Any) -> Any:
    solver = ic.FixedPointIteration(max_steps=60)
    return icj.fixed_point(
        lambda h, a: a * h + 1.0, jnp.zeros((3, 2)), slopes, solver=solver, batch_ndim=1, throw=True, **options
    ).value


class Looped:
    """A solver of a user's own: it has ``solve``, and is not derived from :class:`Solver`."""

    def solve(self, problem: ic.Problem[Any, Any], h0: Any, z: Any, *, trace: bool = False) -> ic.Solution[Any]:
        return ic.solve(problem, iterate(lambda h: problem(h, z), h0), z, solver=SOLVER)


@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
def test_a_class_with_a_method_solve(closed: bool) -> None:
    w, x = data()
    ours, theirs = (
        jax.jit(jax.vmap(jax.grad(loss(layer), BOTH), (None, 0)))(w, x)
        for layer in (layer_of(EXACT, closed, Looped()), loop)
    )
    assert_close(ours, theirs, 1e-9)


def test_throw_names_the_samples() -> None:
    with pytest.raises(ic.SolveError, match=r"MAX_STEPS|STAGNATED|DIVERGED") as caught:
        diverging(SLOPES)
    assert "in 1 of 3 samples (1)" in str(caught.value)
    assert caught.value.failures[0].samples == ((1,),)
    with pytest.raises(ic.SolveError, match=r"in 1 of 3 samples \(1\)"):
        jax.grad(lambda a: jnp.sum(diverging(a)))(SLOPES)


def test_throw_under_jit_wants_checkify() -> None:
    with pytest.raises(ValueError, match="checkify"):
        jax.jit(diverging)(SLOPES)


@pytest.mark.parametrize("differentiate", [lambda f: f, jax.grad], ids=["value", "gradient"])
@pytest.mark.parametrize("gradient", [EXACT, ic.Neumann(3), ic.Unroll(3)], ids=repr)
def test_throw_under_checkify(gradient: ic.Estimator, differentiate: Any) -> None:
    total = lambda a: jnp.sum(diverging(a, gradient=gradient))  # noqa: E731
    checked = jax.jit(checkify.checkify(differentiate(total)))
    message = checked(SLOPES)[0].get()
    assert "the solve did not converge: 1 of 3 samples, largest residual " in message
    assert checked(jnp.where(SLOPES > 1, 0.5, SLOPES))[0].get() is None


def test_bptt_throws_for_its_value() -> None:
    with pytest.raises(ic.SolveError, match=r"in \d of 3 samples"):
        diverging(SLOPES, gradient=ic.BPTT(3))
    with pytest.raises(ValueError, match="checkify"):
        jax.jit(lambda a: diverging(a, gradient=ic.BPTT(3)))(SLOPES)


def at_singular_sample(estimator: ic.Estimator) -> Any:
    """I - ∂F/∂h of the second sample is singular, and its right-hand side not in the range."""

    def total(z: Any) -> Any:
        f = lambda h, z: jnp.asarray([[0.5], [1.0], [-0.5]]) * h + z  # noqa: E731
        solver = ic.FixedPointIteration(max_steps=2)
        return jnp.sum(icj.fixed_point(f, jnp.zeros((3, 2)), z, solver=solver, gradient=estimator, batch_ndim=1).value)

    return total


LINEAR_SOLVERS = [ic.GMRES(), ic.BiCGSTAB(), ic.Richardson()]
Z = jnp.ones((3, 2))


@pytest.mark.parametrize("linear_solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("on_failure", ["raise", "nan"])
def test_a_linear_solve_that_fails_is_nan_in_its_samples(on_failure: Any, linear_solver: ic.LinearSolver) -> None:
    gradient = jax.jit(jax.grad(at_singular_sample(ic.Implicit(linear_solver, on_failure))))(Z)
    np.testing.assert_allclose(gradient, [[2.0] * 2, [np.nan] * 2, [2 / 3] * 2], rtol=1e-5)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_linear_solve_that_fails_warns(transform: Any) -> None:
    gradient = transform(jax.grad(at_singular_sample(ic.Implicit(on_failure="warn"))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        result = gradient(Z)
        jax.effects_barrier()
    assert [w.category for w in caught] == [ic.InexactGradientWarning]
    assert "in 1 of 3 samples (1)" in str(caught[0].message)
    np.testing.assert_allclose(result[jnp.asarray([0, 2])], [[2.0] * 2, [2 / 3] * 2], rtol=1e-5)
    assert np.all(np.isfinite(result))


def test_an_estimator_called_eagerly_raises() -> None:
    problem = icj.problem(lambda h, z: jnp.asarray([[0.5], [1.0]]) * h + z, batch_ndim=1)
    _, pullback = ic.Implicit().vjp(problem, jnp.zeros((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ic.SolveError, match=r"linear solve of Implicit did not converge: .* in 1 of 2 samples \(1\)"):
        pullback(jnp.ones((2, 2)))

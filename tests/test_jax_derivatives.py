"""Derivatives of the JAX layer, of every order and in both modes, against derivatives of a long loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from libraries import unflat
from problems import symmetric_layer

import implicit_core as ic
from implicit_core.adapters import jax as icj

pytestmark = pytest.mark.slow

AT_FIXED_POINT = [EXACT, ic.Neumann(4, 0.5), ic.OneStep()]
TRUNCATED = [*AT_FIXED_POINT[1:], ic.Unroll(3, 0.5), ic.Unroll(3, 0.5, recompute=True), ic.BPTT(4)]
BOTH = (0, 1)


def jvp(f: Layer) -> Layer:
    return lambda w, x: jax.jvp(f, (w, x), (jnp.ones_like(w), jnp.cos(x)))[1]


DERIVATIVES: dict[str, tuple[Callable[[Layer], Any], float]] = {
    "grad": (lambda f: jax.grad(loss(f), BOTH), 1e-7),
    "jvp": (jvp, 1e-7),
    "hessian": (lambda f: jax.hessian(loss(f), BOTH), 1e-6),
    "jacrev(grad)": (lambda f: jax.jacrev(jax.grad(loss(f), BOTH), BOTH), 1e-6),
    "jacfwd(jacfwd)": (lambda f: jax.jacfwd(jax.jacfwd(loss(f), 1), 1), 1e-6),
    "jacrev(jacfwd)": (lambda f: jax.jacrev(jax.jacfwd(loss(f), 1), 1), 1e-6),
}


@functools.cache
def reference(name: str) -> Any:
    return jax.jit(DERIVATIVES[name][0](loop))(*data())


ALL = [(estimator, name) for estimator in CONVERGED for name in DERIVATIVES]
for other in (ic.Neumann(300, 0.9), ic.Unroll(300, 1.0, recompute=True)):
    ALL += [(other, name) for name in ("grad", "jvp", "hessian")]


@pytest.mark.parametrize(("estimator", "name"), ALL, ids=str)
def test_derivatives_equal_derivatives_of_a_long_loop(name: str, estimator: ic.Estimator) -> None:
    transform, tolerance = DERIVATIVES[name]
    assert_close(jax.jit(transform(layer_of(estimator)))(*data()), reference(name), tolerance)


@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "jacrev(grad)"])
@pytest.mark.parametrize("estimator", CONVERGED, ids=repr)
def test_derivatives_in_closed_over_arrays(name: str, estimator: ic.Estimator) -> None:
    transform, tolerance = DERIVATIVES[name]
    assert_close(jax.jit(transform(layer_of(estimator, closed=True)))(*data()), reference(name), tolerance)


@pytest.mark.parametrize("linear_solver", [ic.BiCGSTAB(rtol=1e-12), ic.GMRES(rtol=1e-12)], ids=repr)
@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "jacrev(grad)"])
def test_linear_solvers(name: str, linear_solver: ic.LinearSolver) -> None:
    transform, tolerance = DERIVATIVES[name]
    assert_close(jax.jit(transform(layer_of(ic.Implicit(linear_solver))))(*data()), reference(name), tolerance)


@pytest.mark.parametrize("transform", [jax.grad, jax.hessian])
def test_conjugate_gradients(transform: Callable[..., Any]) -> None:
    """For F with a symmetric Jacobian: the gradient of a convex function."""
    case = symmetric_layer(batch=2, width=4, radius=0.7)
    w, x = jnp.asarray(case.z["w"]), jnp.asarray(case.z["x"])

    def f(h: Any, x: Any) -> Any:
        return jnp.tanh(h @ w) @ w + x

    def ours(x: Any) -> Any:
        gradient = ic.Implicit(ic.CG(rtol=1e-12))
        value = icj.fixed_point(f, jnp.zeros_like(x), x, solver=SOLVER, gradient=gradient, batch_ndim=1).value
        return jnp.sum(value**3)

    def theirs(x: Any) -> Any:
        return jnp.sum(iterate(lambda h: f(h, x), jnp.zeros_like(x)) ** 3)

    assert_close(jax.jit(transform(ours))(x), jax.jit(transform(theirs))(x), 1e-7)


def test_a_third_derivative() -> None:
    w, x = data(batch=1, width=2)

    def third(f: Layer) -> Any:
        return jax.jit(jax.jacfwd(jax.jacrev(jax.grad(lambda x: loss(f)(w, x)))))(x)

    assert_close(third(layer_of(EXACT)), third(loop), 1e-6)


@functools.cache
def gradient_of_looked_up_rows() -> Any:
    w, x = data(contraction=0.005)
    order = jnp.asarray([1, 0])
    return jax.jit(jax.grad(lambda w, x: loss(loop)(w, jnp.sin(x)[order] + 0.1), BOTH))(w, x)


@pytest.mark.parametrize("way", ["grad", "jit(grad)", "grad(jit)"])
@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(5, 1.0), ic.Unroll(5, 1.0), ic.BPTT(5)], ids=repr)
def test_closed_over_arrays_of_numbers_and_of_indices(estimator: ic.Estimator, way: str) -> None:
    """All of them are traced under ``jit``, and no tracer may leak."""
    w, x = data(contraction=0.005)  # few steps: where leaks are looked for, each is compiled
    order = jnp.asarray([1, 0])

    def closed(w: Any, x: Any, order: Any) -> Any:
        rows = jnp.sin(x)

        def f(h: Any, b: Any) -> Any:
            return jnp.tanh(h @ w.T + rows[order] + b)

        options = {"solver": SOLVER, "gradient": estimator, "batch_ndim": 1}
        return jnp.sum(icj.fixed_point(f, jnp.zeros_like(x), 0.1, **options).value ** 3)

    ways: dict[str, Any] = {
        "grad": jax.grad(closed, BOTH),
        "jit(grad)": jax.jit(jax.grad(closed, BOTH)),
        "grad(jit)": jax.grad(jax.jit(closed), BOTH),
    }
    with jax.checking_leaks():
        ours = ways[way](w, x, order)
    assert_close(ours, gradient_of_looked_up_rows(), 1e-7)


@functools.cache
def of_a_moved_leaf(estimator: ic.Estimator | None, transform: Callable[..., Any]) -> Any:
    """``transform`` of a layer, or of a long loop, with a leaf that does not depend on z."""
    h0 = {"moved": jnp.zeros(2), "still": (jnp.zeros(()), jnp.zeros(2))}

    def f(h: Any, z: Any) -> Any:
        one, two = h["still"]
        return {"moved": 0.5 * jnp.tanh(h["moved"] + z) + one * two, "still": (0.5 * jnp.cos(one), 0.3 * two + one)}

    def total(z: Any) -> Any:
        if estimator is None:
            h = iterate(lambda h: f(h, z), h0)
        else:
            h = icj.fixed_point(f, h0, z, solver=SOLVER, gradient=estimator).value
        return jnp.sum(h["moved"] ** 3) + h["still"][0] * jnp.sum(h["still"][1] * h["moved"])

    return jax.jit(transform(total))(jnp.asarray([0.3, -0.7]))


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.hessian], ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("estimator", CONVERGED, ids=repr)
def test_a_leaf_of_f_that_no_parameter_changes(estimator: ic.Estimator, transform: Callable[..., Any]) -> None:
    """The tangent of this leaf is a symbolic zero in JAX."""
    assert_close(of_a_moved_leaf(estimator, transform), of_a_moved_leaf(None, transform), 1e-7)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(60, 1.0), ic.Unroll(60, 1.0), ic.BPTT(60)], ids=repr)
def test_leaves_of_z_that_are_not_differentiated(estimator: ic.Estimator, jit: Any) -> None:
    arrays = {
        "w": jnp.asarray([0.3, -0.4, 0.2]),
        "indices": jnp.asarray([2, 0, 1]),
        "mask": jnp.asarray([True, False, True]),
        "key": jax.random.key(3),
    }
    rest = {"none": None, "slope": 0.5, "name": "tanh", "function": jnp.sin, "numbers": np.asarray([1.0, 2.0, 3.0])}

    def f(h: Any, z: Any) -> Any:
        assert z["none"] is None
        noise = jax.random.normal(z["key"], (3,))
        inner = z["function"](z["w"])[z["indices"]] + jnp.where(z["mask"], z["numbers"], 0.0) + 0.1 * noise
        return getattr(jnp, z["name"])(z["slope"] * h + inner)

    def ours(arrays: Any) -> Any:
        return jnp.sum(icj.fixed_point(f, jnp.zeros(3), arrays | rest, solver=SOLVER, gradient=estimator).value ** 3)

    def theirs(w: Any) -> Any:
        return jnp.sum(iterate(lambda h: f(h, arrays | rest | {"w": w}), jnp.zeros(3)) ** 3)

    gradient = jit(jax.grad(lambda w, others: ours(others | {"w": w})))
    expected = jax.jit(jax.grad(theirs))(arrays["w"])
    assert_close(gradient(arrays["w"], arrays), expected, 1e-7)
    everywhere = jit(jax.grad(lambda z: ours(z | {"key": arrays["key"]}), allow_int=True))(
        {name: arrays[name] for name in ("w", "indices", "mask")}
    )
    assert_close(everywhere["w"], expected, 1e-7)
    assert everywhere["indices"].dtype == everywhere["mask"].dtype == jax.dtypes.float0


NUMBERS = [0.25, np.float32(0.25), np.asarray(0.25), jnp.asarray(0.25)]


@pytest.mark.parametrize(
    ("estimator", "h0"),
    [*((EXACT, h0) for h0 in NUMBERS), *((estimator, NUMBERS[1]) for estimator in CONVERGED[1:])],
    ids=lambda value: repr(value) if isinstance(value, ic.Estimator) else type(value).__name__,
)
def test_scalar_states(estimator: ic.Estimator, h0: Any) -> None:
    """h = cos(h) + θ, by the formulas h' = 1 / (1 + sin h) and h'' = -cos(h) h'³."""

    def root(theta: Any) -> Any:
        return icj.fixed_point(lambda h, z: jnp.cos(h) + z, h0, theta, solver=SOLVER, gradient=estimator).value

    dtype = jnp.asarray(h0).dtype
    atol = 1e-9 if dtype == jnp.float64 else 5e-6  # linear solvers accept 16 ε (‖A‖ ‖x‖ + ‖b‖)
    theta = jnp.asarray(0.0, dtype)
    h = root(theta)
    assert (h.shape, h.dtype) == ((), dtype)
    expected = 0.7390851332151607
    slope = 1 / (1 + np.sin(expected))
    np.testing.assert_allclose(h, expected, atol=atol)
    np.testing.assert_allclose(jax.jit(jax.grad(root))(theta), slope, atol=atol)
    np.testing.assert_allclose(jax.jit(jax.hessian(root))(theta), -np.cos(expected) * slope**3, atol=atol)


def test_a_number_as_h0_has_the_dtype_of_f() -> None:
    h = icj.fixed_point(lambda h, z: 0.5 * h + z, 0.0, jnp.float32(1.0), solver=ic.Anderson()).value
    assert h.dtype == jnp.float32
    assert h == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", [EXACT, *TRUNCATED], ids=repr)
def test_h0_has_a_gradient_of_exactly_zero(estimator: ic.Estimator, jit: Any) -> None:
    _, x = data()

    def total(h0: Any, x: Any) -> Any:
        solver = ic.FixedPointIteration(max_steps=3)  # far from the root, so that the value depends on h0
        f = lambda h, x: jnp.tanh(0.5 * h + x)  # noqa: E731
        return jnp.sum(icj.fixed_point(f, h0, x, solver=solver, gradient=estimator, batch_ndim=1).value ** 2)

    h0 = jnp.ones_like(x)
    assert abs(float(total(h0, x) - total(5 * h0, x))) > 1e-3
    by_h0, by_x = jit(jax.grad(total, BOTH))(h0, x)
    np.testing.assert_array_equal(by_h0, np.zeros(x.shape))
    assert np.all(np.abs(by_x) > 1e-3)
    tangent = jit(lambda h0: jax.jvp(lambda h0: total(h0, x), (h0,), (jnp.ones_like(h0),))[1])(h0)
    np.testing.assert_array_equal(tangent, 0.0)


ORDERS: dict[str, Callable[..., Any]] = {
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("estimator", [ic.Neumann(3, 0.5), ic.Neumann(2, 1.0), ic.OneStep()], ids=repr)
def test_a_second_derivative_is_the_surrogates(estimator: ic.Estimator, order: str) -> None:
    """By dense matrices: G(h, x) = (∂F/∂x)ᵀ Dᵀ ∂L/∂h, and the derivative of h is the surrogate again."""
    w, x = data(batch=1)
    x = x[0]
    k, lam = getattr(estimator, "k", 1), getattr(estimator, "lam", 1.0)

    def f(h: Any, x: Any) -> Any:
        return jnp.tanh(h @ w.T + x)

    def surrogate(h: Any, x: Any) -> Any:
        b = lam * jax.jacrev(f)(h, x) + (1 - lam) * jnp.eye(3)
        return lam * sum(jnp.linalg.matrix_power(b, i) for i in range(k)) @ jax.jacrev(f, 1)(h, x)

    def gradient(h: Any, x: Any) -> Any:
        return 3 * h**2 @ surrogate(h, x)

    h = loop(w, x)
    expected = jax.jit(lambda h, x: jax.jacrev(gradient, 1)(h, x) + jax.jacrev(gradient)(h, x) @ surrogate(h, x))(h, x)
    assert np.abs(expected - expected.T).max() > 1e-3  # not symmetric, so not the Hessian of any function
    ours = ORDERS[order](lambda x: loss(layer_of(estimator))(w, x))
    assert_close(jax.jit(ours)(x), expected, 1e-9)


def surrogate_loop(estimator: Any, w: Any, x: Any) -> Layer:
    """k damped steps from the fixed point, or plain ones from zero."""
    start = jnp.zeros_like(x) if isinstance(estimator, ic.BPTT) else loop(w, x)
    lam = getattr(estimator, "lam", 1.0)

    def steps(w: Any, x: Any) -> Any:
        h = start
        for _ in range(estimator.k):
            h = lam * jnp.tanh(h @ w.T + x) + (1 - lam) * h
        return h

    return steps


@functools.cache
def of_the_steps(estimator: ic.Estimator, name: str) -> Any:
    return jax.jit(DERIVATIVES[name][0](surrogate_loop(estimator, *data())))(*data())


@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "jacrev(grad)"])
@pytest.mark.parametrize(
    ("estimator", "closed"),
    [
        (ic.Unroll(3, 0.5), False),
        (ic.Unroll(3, 0.5), True),
        (ic.Unroll(10, 0.5), False),
        (ic.Unroll(3, 0.5, recompute=True), False),
        (ic.Unroll(3, 0.5, recompute=True), True),
        (ic.BPTT(4), False),
    ],
    ids=str,
)
def test_unroll_is_the_derivative_of_its_steps(estimator: ic.Estimator, closed: bool, name: str) -> None:
    ours = jax.jit(DERIVATIVES[name][0](layer_of(estimator, closed)))(*data())
    assert_close(ours, of_the_steps(estimator, name), 1e-9)


@pytest.mark.parametrize("estimator", [ic.Neumann(4, 0.5), ic.OneStep(), ic.Neumann(12, 0.5)], ids=repr)
def test_reverse_and_forward_mode_are_adjoint(estimator: ic.Estimator) -> None:
    rows, columns = (jax.jit(jac(layer_of(estimator), BOTH))(*data()) for jac in (jax.jacrev, jax.jacfwd))
    assert_close(rows, columns, 1e-10)


@pytest.mark.parametrize("estimator", [ic.Neumann(1, 0.5), ic.Neumann(4, 0.5), ic.OneStep(), EXACT], ids=repr)
def test_the_layer_is_its_estimator(estimator: ic.Estimator) -> None:
    """The same estimator in NumPy, with hand-written derivatives, at the same point."""
    w, x = data()
    value, pull = jax.vjp(layer_of(estimator), w, x)
    v = np.asarray(jnp.sin(x))
    numpy_layer = symmetric_layer(batch=2, width=3).problem()  # it has the vjp of any tanh layer
    z = {"w": np.asarray(w), "x": np.asarray(x)}
    expected = estimator.vjp(numpy_layer, np.asarray(value), z)[1](v)
    assert_close(pull(jnp.asarray(v)), (expected["w"], expected["x"]), 1e-10)


@jax.custom_vjp
def opaque(x: Any) -> Any:
    return jnp.tanh(x)


opaque.defvjp(lambda x: (jnp.tanh(x), x), lambda x, v: (v * (1 - jnp.tanh(x) ** 2),))


@jax.custom_jvp
def with_rule(x: Any) -> Any:
    return jnp.tanh(x)


with_rule.defjvp(lambda x, dx: (with_rule(*x), dx[0] * (1 - with_rule(*x) ** 2)))

INNER: dict[str, Callable[[Any], Any]] = {
    "custom_jvp": with_rule,
    "scan": lambda y: jax.lax.scan(lambda c, i: (jnp.tanh(c + 0.1 * i), None), y, jnp.arange(3.0))[0],
    "cond": lambda y: jax.lax.cond(jnp.sum(y) > 0, jnp.tanh, jnp.sin, y),
    "checkpoint": jax.checkpoint(jnp.tanh),
    "jit": jax.jit(jnp.tanh),
    "fori_loop": lambda y: jax.lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c), y),
}


def solved(inner: Callable[[Any], Any], estimator: ic.Estimator) -> Callable[[Any], Any]:
    w = data()[0]

    def call(x: Any) -> Any:
        f = lambda h, x: inner(h @ w.T + x)  # noqa: E731
        return jnp.sum(icj.fixed_point(f, jnp.zeros_like(x), x, solver=SOLVER, gradient=estimator).value ** 3)

    return call


def first_and_second(total: Callable[[Any], Any]) -> Any:
    return jax.jit(lambda x: (jax.grad(total)(x), jax.hessian(total)(x)))(data(batch=1)[1][0])


@functools.cache
def looped_first_and_second(name: str) -> Any:
    w = data(batch=1)[0]

    def looped(x: Any) -> Any:
        return jnp.sum(iterate(lambda h: INNER[name](h @ w.T + x), jnp.zeros_like(x)) ** 3)

    return first_and_second(looped)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("estimator", CONVERGED[:3], ids=repr)
def test_control_flow_and_rules_within_f(name: str, estimator: ic.Estimator) -> None:
    ours, theirs = first_and_second(solved(INNER[name], estimator)), looped_first_and_second(name)
    assert_close(ours[0], theirs[0], 1e-7)
    assert_close(ours[1], theirs[1], 1e-6)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(90, 1.0), ic.Unroll(90, 1.0), ic.BPTT(90)], ids=repr)
def test_a_custom_vjp_within_f(estimator: ic.Estimator, jit: Any) -> None:
    """F has no pushforward then, and JAX raises an error."""
    x = data(batch=1)[1][0]
    ours = solved(opaque, estimator)
    assert_close(jit(jax.grad(ours))(x), looped_first_and_second("jit")[0], 1e-7)
    with pytest.raises(TypeError, match="forward-mode"):
        jit(lambda x: jax.jvp(ours, (x,), (x,)))(x)


def test_a_custom_vjp_in_a_program_within_f() -> None:
    x = data(batch=1)[1][0]
    for within in (jax.jit(opaque), lambda y: jax.lax.scan(lambda c, _: (opaque(c), None), y, length=1)[0]):
        assert_close(jax.grad(solved(within, EXACT))(x), looped_first_and_second("jit")[0], 1e-7)


@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(4, 0.5)], ids=repr)
@pytest.mark.parametrize("outer", [jax.jacrev, jax.jacfwd])
def test_a_custom_vjp_within_f_is_differentiable_once(outer: Any, estimator: ic.Estimator) -> None:
    x = data(batch=1)[1][0]
    with pytest.raises((NotImplementedError, TypeError), match=r"differentiable once|forward-mode"):
        outer(jax.grad(solved(opaque, estimator)))(x)


def test_complete_jacobians_of_a_pytree_by_finite_differences() -> None:
    """A check without JAX: central differences of a NumPy solve."""
    h0 = {"a": np.zeros((2, 3)), "b": (np.zeros(2),)}

    def f(xp: Any, h: Any, z: Any) -> Any:
        return {"a": xp.tanh(0.5 * h["a"] + z[:, None]), "b": (0.3 * h["b"][0] + h["a"].sum(axis=1) * z,)}

    def root(z: np.ndarray) -> np.ndarray:
        h = h0
        for _ in range(120):
            h = f(np, h, z)
        return np.concatenate([h["a"].ravel(), h["b"][0]])

    z, step = np.asarray([0.4, -0.2]), 1e-6
    expected = np.stack([(root(z + step * e) - root(z - step * e)) / (2 * step) for e in np.eye(2)], axis=-1)
    for jac in (jax.jacrev, jax.jacfwd):
        ours = jac(
            lambda z: (
                icj.fixed_point(lambda h, z: f(jnp, h, z), h0, z, solver=SOLVER, gradient=EXACT, batch_ndim=1).value
            )
        )(jnp.asarray(z))
        assert jax.tree.structure(ours) == jax.tree.structure(unflat(np.zeros(8), h0))
        flat = np.concatenate([np.asarray(ours["a"]).reshape(6, 2), np.asarray(ours["b"][0])])
        np.testing.assert_allclose(flat, expected, atol=1e-8)


@pytest.mark.parametrize(
    "estimator",
    [EXACT, ic.Implicit(ic.GMRES(rtol=1e-12)), ic.NeumannSeries(1.0, 1e-11), ic.Neumann(90, 1.0), ic.Unroll(60, 1.0)],
    ids=repr,
)
def test_a_while_loop_within_f_has_forward_mode(estimator: ic.Estimator) -> None:
    """JAX cannot transpose the loop, so no pullback is needed where there is none."""

    def f(h: Any, z: Any) -> Any:
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, 0.8 * jnp.tanh(s[1]) + 0.3 * z), (0, h))[1]

    def unrolled(z: Any) -> Any:
        return jax.lax.scan(lambda h, _: (0.8 * jnp.tanh(h) + 0.3 * z, None), jnp.zeros(3), length=300)[0]

    def ours(z: Any) -> Any:
        return icj.fixed_point(f, jnp.zeros(3), z, solver=ic.Anderson(rtol=1e-13), gradient=estimator).value

    z = jnp.asarray([1.0, 2.0, 0.5])
    tangent = jnp.asarray([1.0, -1.0, 2.0])

    def twice(g: Any) -> Any:
        return jax.jvp(lambda z: jax.jvp(g, (z,), (tangent,))[1], (z,), (tangent,))[1]

    for transform in (lambda g: jax.jacfwd(g)(z), lambda g: jax.jit(jax.jacfwd(g))(z), twice):
        np.testing.assert_allclose(transform(ours), transform(unrolled), rtol=1e-7, atol=1e-9)
    mapped = jax.vmap(jax.jacfwd(ours))(jnp.stack([z, -z]))
    np.testing.assert_allclose(mapped[1], jax.jacfwd(unrolled)(-z), rtol=1e-7, atol=1e-9)
    if isinstance(estimator, (ic.Implicit, ic.NeumannSeries)):
        with pytest.raises(NotImplementedError, match="forward mode alone"):
            jax.grad(lambda z: ours(z).sum())(z)

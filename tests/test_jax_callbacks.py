"""Problems with the user's own derivatives, and the user's own estimators, under JAX's transformations."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_layers import SOLVER, assert_close, data, loop

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.estimators import AtFixedPoint, Derivative

GMRES = ic.Implicit(ic.GMRES(rtol=1e-12))
EXACT = ic.Implicit(ic.Richardson(rtol=1e-12))
ESTIMATORS = [EXACT, ic.Neumann(20, 1.0), ic.Unroll(20, 1.0), ic.Unroll(20, 1.0, recompute=True), ic.BPTT(20)]
ONCE = "differentiable once"


def f(h: Any, z: Any) -> Any:
    return jnp.tanh(h @ z["w"].T + z["x"])


def vjp(h: Any, z: Any, v: Any) -> Any:
    g = v * (1 - f(h, z) ** 2)
    return g @ z["w"], {"w": g.T @ h, "x": g}


def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
    return (1 - f(h, z) ** 2) * (dh @ z["w"].T + h @ dz["w"].T + dz["x"])


def host_vjp(h: Any, z: Any, v: Any) -> Any:
    """The same in NumPy."""

    def on_host(h: Any, w: Any, x: Any, v: Any) -> Any:
        h, w, x, v = map(np.asarray, (h, w, x, v))
        g = v * (1 - np.tanh(h @ w.T + x) ** 2)
        return g @ w, np.swapaxes(g, -1, -2) @ h, g

    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (h, z["w"], z["x"]))
    v_h, v_w, v_x = jax.pure_callback(on_host, shapes, h, z["w"], z["x"], v, vmap_method="sequential")
    return v_h, {"w": v_w, "x": v_x}


def linearize(h: Any, z: Any) -> ic.Linearization:
    zero = jax.tree.map(jnp.zeros_like, z)
    return ic.Linearization(
        f(h, z),
        vjp_h=lambda v: vjp(h, z, v)[0],
        vjp_z=lambda v: vjp(h, z, v)[1],
        jvp_h=lambda dh: jvp(h, z, dh, zero),
        jvp_z=lambda dz: jvp(h, z, jnp.zeros_like(h), dz),
    )


PROBLEMS = {
    "vjp": ic.Problem(f, vjp=vjp, batch_ndim=1),
    "host": ic.Problem(f, vjp=host_vjp, batch_ndim=1),
    "jvp": ic.Problem(f, jvp=jvp, batch_ndim=1),
    "both": ic.Problem(f, vjp=vjp, jvp=jvp, batch_ndim=1),
    "linearize": ic.Problem(f, linearize=linearize, batch_ndim=1),
}
REVERSE, FORWARD = ["vjp", "host", "both", "linearize"], ["jvp", "both", "linearize"]


def loss_of(problem: str, estimator: ic.Estimator) -> Callable[[Any], Any]:
    def total(z: Any) -> Any:
        h0 = jnp.zeros_like(z["x"])
        return jnp.sum(icj.fixed_point(PROBLEMS[problem], h0, z, solver=SOLVER, gradient=estimator).value ** 3)

    return total


def arguments() -> dict[str, Any]:
    w, x = data(contraction=0.3)
    return {"w": w, "x": x}


def looped(z: Any) -> Any:
    return jnp.sum(loop(z["w"], z["x"]) ** 3)


@functools.cache
def looped_in(mode: str) -> Any:
    """The long loop under one of ``MODES`` or ``tangent_of``."""
    z = arguments()
    if mode == "vmap(grad)":
        z["x"] = jnp.stack([z["x"], -z["x"]])
    return tangent_of(looped)(z) if mode == "jvp" else jax.jit(MODES[mode](looped))(z)


def tangent_of(f: Any) -> Any:
    """f's tangent along the cosine of its argument."""
    return jax.jit(lambda z: jax.jvp(f, (z,), (jax.tree.map(jnp.cos, z),))[1])


MODES: dict[str, Callable[..., Any]] = {
    "grad": jax.grad,
    "jit(grad)": lambda f: jax.jit(jax.grad(f)),
    "grad(jit)": lambda f: jax.grad(jax.jit(f)),
    "vmap(grad)": lambda f: jax.jit(jax.vmap(jax.grad(f), ({"w": None, "x": 0},))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(20, 1.0), ic.Unroll(20, 1.0)], ids=repr)
@pytest.mark.parametrize("problem", REVERSE)
def test_reverse_mode(problem: str, estimator: ic.Estimator, mode: str) -> None:
    z = arguments()
    if mode == "vmap(grad)":
        z["x"] = jnp.stack([z["x"], -z["x"]])
    ours = MODES[mode](loss_of(problem, estimator))(z)
    assert_close(ours, looped_in(mode), 1e-7)


@pytest.mark.parametrize("estimator", [*ESTIMATORS[3:], GMRES], ids=repr)
def test_reverse_mode_of_other_estimators(estimator: ic.Estimator) -> None:
    assert_close(jax.jit(jax.grad(loss_of("vjp", estimator)))(arguments()), looped_in("grad"), 1e-7)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", ESTIMATORS[:3], ids=repr)
@pytest.mark.parametrize("problem", FORWARD)
def test_forward_mode(problem: str, estimator: ic.Estimator, jit: Any) -> None:
    z = arguments()
    tangent = lambda f: jit(lambda z: jax.jvp(f, (z,), (jax.tree.map(jnp.cos, z),))[1])  # noqa: E731
    assert_close(tangent(loss_of(problem, estimator))(z), looped_in("jvp"), 1e-7)


@pytest.mark.parametrize("problem", [*PROBLEMS])
def test_without_derivatives_the_value_is_there(problem: str) -> None:
    z = arguments()
    for run in (loss_of(problem, EXACT), jax.jit(loss_of(problem, EXACT))):
        assert_close(run(z), looped(z), 1e-10)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", ESTIMATORS[:3], ids=repr)
def test_a_mode_without_its_callback_raises(estimator: ic.Estimator, jit: Any) -> None:
    z = arguments()
    with pytest.raises(TypeError, match="forward-mode"):
        jit(lambda z: jax.jvp(loss_of("vjp", estimator), (z,), (z,)))(z)
    with pytest.raises((NotImplementedError, TypeError), match=r"VJP|[Tt]ranspos"):
        jit(jax.grad(loss_of("jvp", estimator)))(z)


def test_a_problem_without_callbacks_is_differentiated_as_its_f() -> None:
    def total(z: Any) -> Any:
        problem = ic.Problem(f, batch_ndim=1)
        return jnp.sum(icj.fixed_point(problem, jnp.zeros_like(z["x"]), z, solver=SOLVER, gradient=EXACT).value ** 3)

    assert_close(jax.grad(total)(arguments()), jax.grad(looped)(arguments()), 1e-7)


ORDERS: dict[str, Callable[..., Any]] = {
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over reverse": jax.hessian,
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("estimator", ESTIMATORS[:3], ids=repr)
@pytest.mark.parametrize("problem", ["both", "linearize"])
def test_second_derivatives_raise(problem: str, estimator: ic.Estimator, jit: Any, order: str) -> None:
    with pytest.raises(NotImplementedError, match=ONCE):
        jit(ORDERS[order](loss_of(problem, estimator)))(arguments())


def test_second_derivatives_of_a_vjp_alone_raise() -> None:
    with pytest.raises(NotImplementedError, match=ONCE):
        jax.jit(ORDERS["reverse over reverse"](loss_of("vjp", EXACT)))(arguments())


@jax.custom_vjp
def opaque(x: Any) -> Any:
    return jnp.tanh(x)


opaque.defvjp(lambda x: (jnp.tanh(x), x), lambda x, v: (v * (1 - jnp.tanh(x) ** 2),))


def additive(h: Any, z: Any) -> Any:
    """The Jacobians do not depend on z. Only the value does, and JAX takes it for a constant."""
    return 0.5 * jnp.tanh(h) + z


ADDITIVE: dict[str, Any] = {
    "vjp": {"vjp": lambda h, z, v: (0.5 * v * (1 - jnp.tanh(h) ** 2), v)},
    "jvp": {"jvp": lambda h, z, dh, dz: 0.5 * dh * (1 - jnp.tanh(h) ** 2) + dz},
}
ADDITIVES = {
    "vjp": ic.Problem(additive, **ADDITIVE["vjp"]),
    "jvp": ic.Problem(additive, **ADDITIVE["jvp"]),
    "both": ic.Problem(additive, **ADDITIVE["vjp"], **ADDITIVE["jvp"]),
    "custom_vjp": lambda h, z: 0.5 * opaque(h) + z,
}
IN_LOOPS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda f: f,
    "scan": lambda f: lambda a: jax.lax.scan(lambda c, s: (c + f(s * a), None), 0.0, jnp.ones(2))[0],
    "map": lambda f: lambda a: jnp.sum(jax.lax.map(lambda s: f(s * a), jnp.ones(2))),
}


@pytest.mark.parametrize("loop_kind", IN_LOOPS)
@pytest.mark.parametrize("problem", ADDITIVES)
@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(30, 1.0)], ids=repr)
def test_second_derivatives_raise_also_where_no_product_depends_on_z(
    estimator: ic.Estimator, problem: str, loop_kind: str
) -> None:
    def total(a: Any) -> Any:
        h = icj.fixed_point(ADDITIVES[problem], jnp.zeros(()), a, solver=SOLVER, gradient=estimator).value
        return h**3

    looped = IN_LOOPS[loop_kind](total)
    if problem != "jvp":
        with pytest.raises(NotImplementedError, match=ONCE):
            jax.jit(ORDERS["reverse over reverse"](looped))(jnp.asarray(0.7))
    if problem in ("jvp", "both"):
        with pytest.raises(NotImplementedError, match=ONCE):
            jax.jit(ORDERS["forward over forward"](looped))(jnp.asarray(0.7))


@pytest.mark.parametrize("problem", ["vjp", "both", "linearize"])
@pytest.mark.parametrize("name", ["w", "x"])
@pytest.mark.parametrize("estimator", [EXACT, ic.Unroll(30, 1.0)], ids=repr)
def test_a_gradient_in_one_leaf_of_several(estimator: ic.Estimator, name: str, problem: str) -> None:
    z = arguments()
    ours, whole = loss_of(problem, estimator), jax.grad(lambda z: jnp.sum(loop(z["w"], z["x"]) ** 3))(z)
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacrev):
        assert_close(transform(lambda a: ours(z | {name: a}))(z[name]), whole[name], 1e-7)


def test_no_cotangent_is_a_gradient_of_zero() -> None:
    """None in the result of a callback."""
    w, x = data(contraction=0.3)
    for given in ({}, {"jvp": lambda h, z, dh, dz: jvp(h, z, dh, dz | {"w": 0 * w})}):
        problem: Any = ic.Problem(f, vjp=lambda h, z, v: (vjp(h, z, v)[0], vjp(h, z, v)[1] | {"w": None}), **given)
        total = lambda z, p=problem: jnp.sum(icj.fixed_point(p, jnp.zeros_like(x), z, gradient=EXACT).value)  # noqa: E731
        gradient = jax.grad(total)({"w": w, "x": x})
        np.testing.assert_array_equal(gradient["w"], 0.0)
        assert np.all(gradient["x"] != 0.0)


@pytest.mark.parametrize("mode", ["grad", "jit(grad)", "grad(jit)"])
@pytest.mark.parametrize(
    "callbacks", [{"vjp": None}, {"jvp": None}, {"vjp": None, "jvp": None}], ids=lambda c: "+".join(c)
)
def test_arrays_that_callbacks_close_over_have_no_gradient(callbacks: Any, mode: str) -> None:
    w, x = data(contraction=0.3)

    def total(w: Any) -> Any:
        given = {
            "vjp": lambda h, x, v: (vjp(h, {"w": w, "x": x}, v)[0], vjp(h, {"w": w, "x": x}, v)[1]["x"]),
            "jvp": lambda h, x, dh, dx: jvp(h, {"w": w, "x": x}, dh, {"w": 0 * w, "x": dx}),
        }
        problem = ic.Problem(lambda h, x: f(h, {"w": w, "x": x}), batch_ndim=1, **{c: given[c] for c in callbacks})
        return jnp.sum(icj.fixed_point(problem, jnp.zeros_like(x), x, gradient=ic.Neumann(3)).value ** 3)

    with pytest.raises(ValueError, match=r"pass them in z, or take the Problem of implicit_core\.adapters\.jax"):
        MODES[mode](total)(w)
    assert jax.jit(total)(w) > -jnp.inf  # nothing is differentiated here


@pytest.mark.parametrize("mode", ["grad", "jit(grad)", "grad(jit)"])
def test_arrays_that_callbacks_close_over_may_be_traced(mode: str) -> None:
    """They are constants of the derivative."""
    w, x = data(contraction=0.3)

    def total(x: Any, w: Any) -> Any:
        problem = ic.Problem(
            lambda h, x: f(h, {"w": w, "x": x}),
            vjp=lambda h, x, v: (vjp(h, {"w": w, "x": x}, v)[0], vjp(h, {"w": w, "x": x}, v)[1]["x"]),
            batch_ndim=1,
        )
        return jnp.sum(icj.fixed_point(problem, jnp.zeros_like(x), x, solver=SOLVER, gradient=EXACT).value ** 3)

    assert_close(MODES[mode](total)(x, w), jax.grad(lambda x: looped({"w": w, "x": x}))(x), 1e-7)


def test_leaves_of_z_that_are_not_differentiated() -> None:
    z = {"x": jnp.asarray([0.3, -0.2]), "order": jnp.asarray([1, 0]), "slope": 0.5, "none": None}
    problem = ic.Problem(
        lambda h, z: z["slope"] * h + z["x"][z["order"]],
        vjp=lambda h, z, v: (z["slope"] * v, {"x": v[z["order"]], "order": None, "slope": None, "none": None}),
    )

    def total(x: Any, order: Any) -> Any:
        layer = icj.fixed_point(problem, jnp.zeros(2), z | {"x": x, "order": order}, solver=SOLVER, gradient=EXACT)
        return jnp.vdot(layer.value, jnp.asarray([1.0, 10.0]))

    for run in (jax.grad(total), jax.jit(jax.grad(total))):
        assert_close(run(z["x"], z["order"]), jnp.asarray([20.0, 2.0]), 1e-10)


# Estimators of the user's.


@dataclass(frozen=True)
class TwoTerms(AtFixedPoint):
    """D = I + c ∂F/∂h, which is Neumann(2, 1.0) for c = 1; of CONTRIBUTING.md."""

    weight: float = 1.0

    def inverse(self, space: Any, jacobian: Any, v: Any) -> Any:
        return space.axpy(self.weight, jacobian(v), v)


@dataclass(frozen=True)
class ToTolerance(AtFixedPoint):
    """The Neumann series until a term is small."""

    tolerance: float = 1e-13
    derivative: ClassVar[Derivative] = Derivative.ONCE

    def inverse(self, space: Any, jacobian: Any, v: Any) -> Any:
        def active(carry: Any) -> Any:
            return (space.largest(carry[1]) > self.tolerance,)

        def add(carry: Any, _: Any) -> Any:
            term = jacobian(carry[1])
            return space.add(carry[0], term), term

        return space.backend.while_loop(active, add, (v, v), max_steps=500)[0]


@dataclass(frozen=True)
class Half(ic.Estimator):
    """Half of ∂F/∂z, with twice the solver's point as a value: an estimator from scratch."""

    def value(self, problem: Any, h: Any, z: Any) -> Any:
        return 2 * h

    def vjp(self, problem: Any, h: Any, z: Any) -> Any:
        at = problem.linearize(h, z)
        return 2 * h, lambda v: jax.tree.map(lambda g: 0.5 * g, at.vjp_z(v))

    def jvp(self, problem: Any, h: Any, z: Any, dz: Any) -> Any:
        return 2 * h, 0.5 * problem.linearize(h, z).jvp_z(dz)


def plain(estimator: ic.Estimator, closed: bool = False) -> Callable[[Any], Any]:
    def total(z: Any) -> Any:
        h0, options = jnp.zeros_like(z["x"]), {"solver": SOLVER, "gradient": estimator, "batch_ndim": 1}
        if closed:
            return jnp.sum(icj.fixed_point(lambda h, _: f(h, z), h0, None, **options).value ** 3)
        return jnp.sum(icj.fixed_point(f, h0, z, **options).value ** 3)

    return total


@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.jacrev(jax.grad(f))])
def test_an_estimator_with_its_own_inverse(transform: Any, closed: bool) -> None:
    ours, theirs = (jax.jit(transform(plain(e, closed)))(arguments()) for e in (TwoTerms(), ic.Neumann(2, 1.0)))
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("mode", ["grad", "jit(grad)", "grad(jit)"])
def test_an_estimator_whose_number_of_products_depends_on_data(mode: str, closed: bool) -> None:
    """JAX can't transpose its loop, and needn't: the estimator's own ``vjp`` runs it."""
    z = arguments()
    assert_close(MODES[mode](plain(ToTolerance(), closed))(z), looped_in("grad"), 1e-7)


def test_an_adaptive_estimator_in_forward_mode_and_under_vmap() -> None:
    z = arguments()
    tangent = lambda f: jax.jit(lambda z: jax.jvp(f, (z,), (z,))[1])  # noqa: E731
    assert_close(tangent(plain(ToTolerance()))(z), tangent(looped)(z), 1e-7)
    many = {"w": z["w"], "x": jnp.stack([z["x"], -2 * z["x"]])}
    assert_close(MODES["vmap(grad)"](plain(ToTolerance()))(many), MODES["vmap(grad)"](looped)(many), 1e-7)


def test_an_adaptive_estimator_is_differentiable_once() -> None:
    with pytest.raises(NotImplementedError, match=ONCE):
        jax.jit(ORDERS["forward over reverse"](plain(ToTolerance())))(arguments())


@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_estimator_from_scratch(jit: Any, closed: bool) -> None:
    z = arguments()
    h = loop(z["w"], z["x"])
    total = plain(Half(), closed)
    expected = jax.tree.map(lambda g: 0.5 * g, vjp(h, z, 3 * (2 * h) ** 2)[1])
    assert_close(jit(total)(z), jnp.sum((2 * h) ** 3), 1e-10)
    assert_close(jit(jax.grad(total))(z), expected, 1e-10)
    tangent = jit(lambda z: jax.jvp(total, (z,), (z,))[1])(z)
    assert_close(tangent, sum(jnp.vdot(expected[name], z[name]) for name in z), 1e-10)

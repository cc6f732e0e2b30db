"""Without ``jit``: what is compiled is kept by what it computes, so that a second call compiles nothing."""

import dataclasses
import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.experimental.xla_metadata import set_xla_metadata

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters.jax import maps, programs
from implicit_core.adapters.jax.closure import hoist
from implicit_core.adapters.jax.leaves import is_array, partition
from implicit_core.estimators import AtFixedPoint

W = 0.4 * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
X = np.random.default_rng(1).normal(size=(4, 3))
SOLVERS = [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()]
GRADIENTS = [
    ic.Unroll(20, 1.0),
    ic.Unroll(20, 1.0, recompute=True),
    ic.Neumann(40, 1.0),
    ic.NeumannSeries(1.0, 1e-9),
    ic.OneStep(),
    ic.Implicit(),
    ic.Implicit(ic.BiCGSTAB()),
    ic.BPTT(40),
]


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """Grows by the seconds of each compilation."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def exact(w: Any, x: Any) -> tuple[Any, Any]:
    """The fixed point of tanh(h wᵀ + x) by a long loop, and the gradient of its sum by dense linear algebra."""
    h = np.zeros_like(x)
    for _ in range(200):
        h = np.tanh(h @ w.T + x)
    slopes, gradient = 1 - h**2, np.zeros_like(w)
    for row, slope in zip(h, slopes, strict=True):
        u = np.linalg.solve((np.eye(3) - slope[:, None] * w).T, np.ones(3))
        gradient += np.outer(u * slope, row)
    return h, gradient


def cell(w: Any) -> Callable[[Any, Any], Any]:
    return lambda h, x: jnp.tanh(h @ w.T + x)


def loss(w: Any, x: Any, solver: ic.Solver, gradient: ic.Estimator) -> Any:
    """A closure that is made anew at each call."""
    return ic.fixed_point(cell(w), jnp.zeros_like(x), x, solver=solver, gradient=gradient, batch_ndim=1).value.sum()


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_second_gradient_compiles_nothing(
    solver: ic.Solver, gradient: ic.Estimator, compilations: list[float]
) -> None:
    with jax.enable_x64(True):
        for transform in (jax.grad, jax.value_and_grad):  # one compiles, the other finds
            w, x = (jnp.asarray(a + 0.01 * len(compilations)) for a in (W, X))
            compilations.clear()
            result = transform(loss)(w, x, solver, gradient)
        assert compilations == []
        value, bar = exact(np.asarray(w), np.asarray(x))
        np.testing.assert_allclose(result[0], value.sum(), rtol=1e-4)
        if not isinstance(gradient, ic.OneStep):
            np.testing.assert_allclose(result[1], bar, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian, lambda f: jax.vmap(jax.grad(f))])
@pytest.mark.parametrize("gradient", [ic.Neumann(9, 1.0), ic.Unroll(9, 1.0), ic.Implicit()], ids=repr)
def test_other_transformations_compile_nothing_again(
    transform: Any, gradient: ic.Estimator, compilations: list[float]
) -> None:
    results = []
    for _ in range(3):
        w = jnp.asarray(W)

        def one(x: Any, w: Any = w) -> Any:
            return ic.fixed_point(cell(w), jnp.zeros(3), x, gradient=gradient).value.sum()

        mapped = transform(one)
        compilations.clear()
        results.append(
            mapped(jnp.asarray(X) if mapped.__name__ == "vmap" or transform not in PLAIN else jnp.asarray(X[0]))
        )
    assert compilations == []
    np.testing.assert_array_equal(results[0], results[2])
    with jax.disable_jit():  # a loop of the steps, differentiated

        def steps(x: Any) -> Any:
            h = jnp.zeros(3)
            for _ in range(60):
                h = cell(jnp.asarray(W))(h, x)
            return h.sum()

        expected = transform(steps)(jnp.asarray(X) if transform not in PLAIN else jnp.asarray(X[0]))
    np.testing.assert_allclose(results[0], expected, rtol=5e-2, atol=2e-2)


PLAIN = (jax.jacfwd, jax.jacrev, jax.hessian)


def kernel(scale: float) -> Callable[[Any], Any]:
    def write(a: Any, out: Any) -> None:
        out[...] = scale * a[...]

    return lambda a: pallas.pallas_call(write, out_shape=jax.ShapeDtypeStruct(a.shape, a.dtype), interpret=True)(a)


def with_jvp(scale: float) -> Callable[[Any], Any]:
    """The value has no number of the closure, but the rule has."""

    @jax.custom_jvp
    def f(x: Any) -> Any:
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (f(*primals), scale * tangents[0]))
    return f


def with_vjp(scale: float) -> Callable[[Any], Any]:
    @jax.custom_vjp
    def f(x: Any) -> Any:
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), None), lambda _, v: (scale * v,))
    return f


def own_derivative(scale: float) -> Callable[[Any], Any]:
    """A rule that calls its own function."""

    @jax.custom_jvp
    def f(x: Any) -> Any:
        return jnp.exp(x)

    f.defjvp(lambda primals, tangents: (f(*primals), scale * f(*primals) * tangents[0]))
    return f


def under_second_rule(scale: float) -> Callable[[Any], Any]:
    """Value and derivative have no number of the closure, but the derivative's derivative has."""

    @jax.custom_jvp
    def derivative(x: Any) -> Any:
        return jnp.cos(x)

    derivative.defjvp(lambda primals, tangents: (derivative(*primals), scale * tangents[0]))

    @jax.custom_jvp
    def f(x: Any) -> Any:
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (f(*primals), derivative(*primals) * tangents[0]))
    return f


def twin_in_rule(scale: float) -> Callable[[Any], Any]:
    """The rule calls another function of the same value, whose own rule has the number."""
    return within_a_rule(own_derivative(scale))


def within_a_rule(derivative: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @jax.custom_jvp
    def f(x: Any) -> Any:
        return jnp.exp(x)

    f.defjvp(lambda primals, tangents: (f(*primals), derivative(*primals) * tangents[0]))
    return f


MAKERS: dict[str, Callable[[float], Callable[[Any], Any]]] = {
    "a number": lambda scale: lambda x: scale * x,
    "an exponent": lambda scale: lambda x: x**scale,
    "jit": lambda scale: jax.jit(lambda x: scale * x),
    "cond": lambda scale: lambda x: jax.lax.cond(x[0] > 0, lambda x: scale * x, lambda x: -x, x),
    "scan": lambda scale: lambda x: jax.lax.scan(lambda c, _: (scale * c, None), x, length=3)[0],
    "while": lambda scale: lambda x: jax.lax.while_loop(lambda c: c[0] < scale, lambda c: 2.0 * c, x),
    "a kernel": kernel,
    "a rule": with_jvp,
    "a rule for pullbacks": with_vjp,
    "a rule in its own terms": own_derivative,
    "a rule in a rule": under_second_rule,
    "a rule of a twin": twin_in_rule,
    "relu": lambda scale: lambda x: scale * jax.nn.relu(x),
    "softmax": lambda scale: lambda x: jax.nn.softmax(scale * x),
    "checkpoint": lambda scale: jax.checkpoint(lambda x: scale * x),
    "a constant in an operation": lambda scale: lambda x: x + jnp.asarray([scale, 0.0, 1.0]),
    "an index": lambda scale: lambda x: jnp.roll(x, int(scale)),
    "a sort": lambda scale: lambda x: scale * jnp.sort(x),
    "a solve": lambda scale: lambda x: jnp.linalg.solve(scale * jnp.eye(3), x),
}


@pytest.mark.parametrize("name", MAKERS)
def test_programs_are_one_if_and_only_if_they_compute_the_same(name: str) -> None:
    x = jnp.ones(3)
    one, same, other = (hoist(MAKERS[name](scale), x) for scale in (2.0, 2.0, 4.0))
    assert one.program.shared
    assert one.program is same.program
    if name == "a constant in an operation":  # the numbers of an array are an argument
        assert other.program is one.program
        assert not np.array_equal(other.closed_over[0], one.closed_over[0])
    else:
        assert other.program is not one.program


def test_where_an_operation_is_placed_is_a_part_of_its_program() -> None:
    def marked(name: str) -> Callable[[Any], Any]:
        def f(x: Any) -> Any:
            with set_xla_metadata(group=name):
                return 2.0 * x

        return f

    one, same, other = (hoist(marked(name), jnp.ones(3)).program for name in ("a", "a", "b"))
    assert one is same
    assert one is not other


@pytest.mark.parametrize(("a", "b"), [(1, True), (1, 1.0), (0.0, -0.0), (True, 1.0)])
def test_static_leaves_that_are_equal_but_not_the_same_are_told_apart(a: Any, b: Any) -> None:
    x = jnp.ones(2)
    (_, one), (_, same), (_, other) = (partition({"x": x, "n": n}, is_array) for n in (a, a, b))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray, lambda scale: np.full(3, scale)])
@pytest.mark.parametrize("make", [with_jvp, with_vjp])
def test_arrays_that_a_rule_closes_over_are_told_apart(make: Any, convert: Any) -> None:
    """F has no such argument, so the program either holds their numbers or is not shared."""

    def slope(scale: float) -> Any:
        function = make(convert(scale))

        def total(z: Any) -> Any:
            gradient = ic.Implicit()
            return ic.fixed_point(lambda h, z: 0.5 * function(h) + z, jnp.zeros(3), z, gradient=gradient).value.sum()

        return jax.grad(total)(jnp.ones(3)), jax.jit(jax.grad(total))(jnp.ones(3))

    for scale in (0.5, 0.25, 0.5):
        for found in slope(scale):
            np.testing.assert_allclose(found, 1 / (1 - scale / 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [(0.0, -0.0), (1.0, np.nextafter(1.0, 2.0)), (float("inf"), -float("inf")), (2, 2.0), (True, 1)],
    ids=repr,
)
def test_numbers_within_a_program_are_told_apart(one: Any, other: Any) -> None:
    with jax.enable_x64(True):
        x = jnp.ones(3)
        programs_of = [hoist(lambda x, c=c: jax.lax.full_like(x, c), x).program for c in (one, other, one)]
        assert programs_of[0] is programs_of[2]
        if float(one) != float(other) or str(one) == "0.0":
            assert programs_of[0] is not programs_of[1]
        nan = [hoist(lambda x: x * float("nan"), x).program for _ in range(2)]
        assert nan[0] is nan[1]


def test_a_number_that_f_closes_over_may_change_between_calls(compilations: list[float]) -> None:
    """The code of f is one object throughout."""
    settings = {"slope": 0.5}

    def f(h: Any, z: Any) -> Any:
        return settings["slope"] * h + z

    def total(z: Any) -> Any:
        return ic.fixed_point(f, jnp.zeros(2), z, gradient=ic.Implicit()).value.sum()

    problem = icj.problem(f)
    for slope in (0.5, 0.25, 0.5):
        settings["slope"] = slope
        compilations.clear()
        np.testing.assert_allclose(jax.grad(total)(jnp.ones(2)), 1 / (1 - slope), rtol=1e-5)
        np.testing.assert_allclose(total(jnp.ones(2)), 2 / (1 - slope), rtol=1e-4)
        np.testing.assert_allclose(ic.solve(f, jnp.zeros(2), jnp.ones(2)).value, 1 / (1 - slope), rtol=1e-4)
        _, pullback = ic.Neumann(60, 1.0).vjp(problem, jnp.full(2, 1 / (1 - slope)), jnp.ones(2))
        np.testing.assert_allclose(pullback(jnp.ones(2)), 1 / (1 - slope), rtol=1e-5)
    assert compilations == []


def test_the_settings_of_jax_are_a_part_of_a_program() -> None:
    def total(z: Any) -> Any:
        return ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros(2), z, gradient=ic.Implicit()).value

    for wide in (False, True, False):
        with jax.enable_x64(wide):
            assert total(jnp.ones(2)).dtype == (jnp.float64 if wide else jnp.float32)


NUMBER = [1.0]
"""What code of the user's reads besides its settings."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Scaled(ic.Solver):
    p: Any = 1

    def init(self, system: Any, x: Any) -> None:
        return None

    def step(self, system: Any, memory: None, point: Any) -> tuple[Any, None]:
        factor = NUMBER[0] * (1.0 if self.p is True or str(self.p) == "0.0" else 0.25)
        return system.space.axpy(factor, point.residual, point.x), None


@dataclasses.dataclass(frozen=True, repr=False)
class Halved(AtFixedPoint):
    def inverse(self, space: Any, jacobian: Any, v: Any) -> Any:
        return space.axpy(NUMBER[0], jacobian(v), v)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_code_of_the_users_may_read_more_than_its_settings(transform: Any, compilations: list[float]) -> None:
    x = jnp.ones(1)
    for number in (1.0, 0.5, 0.25, 0.25):
        compilations.clear()
        NUMBER[0] = number

        def total(x: Any) -> Any:
            return ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros(1), x, gradient=Halved()).value.sum()

        def value(x: Any) -> Any:
            return ic.solve(lambda h, z: 0.5 * h + z, jnp.zeros(1), x, solver=Scaled(max_steps=3, p=True)).value

        np.testing.assert_allclose(transform(jax.grad(total))(x), 1 + 0.5 * number, rtol=1e-6)
        expected = 0.0
        for _ in range(2):
            expected += number * (1 - 0.5 * expected)
        np.testing.assert_allclose(transform(value)(x), expected, rtol=1e-6)
    NUMBER[0] = 1.0
    if transform is not jax.jit:
        assert compilations == []


@pytest.mark.parametrize(("one", "other"), [(True, 1), (1, True), (0.0, -0.0), (-0.0, 0.0)])
def test_settings_that_are_equal_but_not_the_same_are_told_apart(one: Any, other: Any) -> None:
    for p in (one, other):
        solver = Scaled(max_steps=3, p=p)
        values = [ic.solve(lambda h, z: 0.5 * h + z, xp.zeros(1), xp.ones(1), solver=solver).value for xp in (jnp, np)]
        np.testing.assert_allclose(*values)


def test_a_solve_within_a_step() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class Nested(ic.Solver):
        def init(self, system: Any, x: Any) -> None:
            return None

        def step(self, system: Any, memory: None, point: Any) -> tuple[Any, None]:
            inner = ic.solve(lambda h, z: 0.5 * (h + z), jnp.zeros((2, 1)), point.f[0], batch_ndim=1)
            return system.space.pack(inner.value), None

    h0, z = jnp.zeros((2, 1)), jnp.ones((2, 1))
    for gradient in (ic.OneStep(), ic.Unroll()):
        options: dict[str, Any] = {"solver": Nested(), "gradient": gradient, "batch_ndim": 1}
        solution = ic.fixed_point(lambda h, z: 0.5 * h + z, h0, z, **options)
        np.testing.assert_allclose(solution.value, 2.0, rtol=1e-3)


def test_callables_on_the_host_are_compared_by_identity() -> None:
    @dataclasses.dataclass(eq=False)
    class Times:
        factor: float = dataclasses.field(compare=False)

        def __call__(self, h: Any) -> Any:
            return np.asarray(self.factor * h)

    for factor in (0.5, 0.25):
        times = Times(factor)

        def f(h: Any, z: Any, times: Times = times) -> Any:
            return jax.pure_callback(times, jax.ShapeDtypeStruct((1,), h.dtype), h) + z

        value = ic.fixed_point(f, jnp.zeros(1), jnp.ones(1), gradient=ic.OneStep()).value
        np.testing.assert_allclose(value, 1 / (1 - factor), rtol=1e-4)


def test_what_the_first_half_of_a_vjp_returns_is_a_part_of_its_program() -> None:
    def twin(first: bool) -> Callable[[Any], Any]:
        @jax.custom_vjp
        def g(x: Any) -> Any:
            return 0.1 * jnp.round(x)

        g.defvjp(lambda x: (0.3 * (jnp.sin(x) if first else jnp.cos(x)), None), lambda _, v: (v,))
        return g

    for first in (True, False):

        def f(h: Any, z: Any, g: Any = twin(first)) -> Any:
            return g(h) + z

        # What does not depend on z calls g itself: the fixed point, and the first step from it, which are both 1.1.
        value, _ = jax.value_and_grad(
            lambda z, f=f: ic.fixed_point(f, jnp.zeros(()), z, gradient=ic.Unroll(2, 1.0)).value
        )(1.0)
        np.testing.assert_allclose(value, 0.3 * (np.sin(1.1) if first else np.cos(1.1)) + 1, rtol=1e-5)


def test_a_third_derivative_of_rules_within_rules() -> None:
    """Functions of one value, whose rules differ three rules down."""

    def nested(number: float, depth: int) -> Callable[[Any], Any]:
        @jax.custom_jvp
        def g(h: Any) -> Any:
            return jnp.tanh(h)

        def rule(primals: Any, tangents: Any) -> Any:
            (x,), (dx,) = primals, tangents
            inner = jnp.tanh(x) if depth < 0 else nested(number, depth - 1)(x)
            return g(x), (number if depth == 0 else 1.0) * (1 - inner**2) * dx

        g.defjvp(rule)
        return g

    def third(number: float) -> float:
        g = nested(number, 2)

        def value(z: Any) -> Any:
            settings: dict[str, Any] = {
                "solver": ic.FixedPointIteration(rtol=1e-12),
                "gradient": ic.Neumann(80, 1.0),
            }
            return ic.fixed_point(lambda h, z: 0.5 * g(h) + z, jnp.zeros(()), z, **settings).value

        derivative: Any = value
        for _ in range(3):
            derivative = jax.grad(derivative)
        return float(derivative(jnp.float64(0.3)))

    alone = third(0.5)
    programs._compiled.cache_clear()
    maps._kept_linearization.cache_clear()
    gc.collect()
    assert third(1.0) != pytest.approx(alone, rel=1e-3)
    assert third(0.5) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("make", [lambda a: jax.jit(lambda h: a * h), lambda a: jax.jit(jax.jit(lambda h: a * h))])
def test_arrays_that_a_compiled_function_within_f_closes_over_are_not_kept(
    make: Any, compilations: list[float]
) -> None:
    kept = []
    for number in (0.1, 0.2, 0.3):
        array = jnp.full(3, number)
        kept.append(weakref.ref(array))
        g = make(array)

        def total(z: Any, g: Any = g) -> Any:
            return ic.fixed_point(lambda h, z: g(h) + z, jnp.zeros(3), z, gradient=ic.Implicit()).value.sum()

        compilations.clear()
        np.testing.assert_allclose(jax.grad(total)(jnp.ones(3)), 1 / (1 - number), rtol=1e-4)
        del array, g, total
    assert compilations == []
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_function_as_solver_made_anew_compiles_nothing(compilations: list[float]) -> None:
    for number in (1.0, 2.0, 3.0):
        array = jnp.full(2, number)

        def solver(f: Any, h0: Any, z: Any, array: Any = array) -> Any:
            return 0.0 * array + 2.0

        compilations.clear()
        value = ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros(2), jnp.ones(2), solver=solver).value
        np.testing.assert_allclose(value, 2.0)
        ref = weakref.ref(array)
        del array, solver
    assert compilations == []
    gc.collect()
    assert ref() is None


@jax.custom_batching.custom_vmap
def halved(h: Any) -> Any:
    return 0.5 * h


@halved.def_vmap
def _(size: int, is_mapped: Any, h: Any) -> Any:
    return 0.5 * h, is_mapped[0]


def test_a_rule_of_vmap_in_f_compiles_nothing_again(compilations: list[float]) -> None:
    for _ in range(2):
        compilations.clear()
        value = ic.fixed_point(lambda h, z: halved(h) + z, jnp.zeros(2), jnp.ones(2), gradient=ic.OneStep()).value
        np.testing.assert_allclose(value, 2.0, rtol=1e-4)
    assert compilations == []


@pytest.mark.parametrize("numbers", [(2, 2.0), (1, True), (0.0, -0.0)])
def test_the_value_has_the_structure_of_its_own_start(numbers: Any) -> None:
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["a"], meta_fields=["tag"])
    @dataclasses.dataclass
    class State:
        a: Any
        tag: Any

    for tag in numbers:
        for solve in (ic.fixed_point, ic.solve):
            value = solve(lambda h, z: State(0.5 * h.a + z, h.tag), State(jnp.zeros(3), tag), jnp.ones(3)).value
            assert repr(value.tag) == repr(tag)


def test_units_are_compared_by_their_numbers(compilations: list[float]) -> None:
    def value(scale: Any) -> Any:
        solution = ic.fixed_point(
            lambda h, z: jnp.asarray([0.5, 0.9]) * h + z, jnp.zeros(2), jnp.asarray([1.0, 1e-6]), scale=scale
        )
        return float(solution.stats.residual)

    first, other = value(jnp.asarray([1.0, 1e-6])), value(jnp.asarray([1.0, 1e3]))
    assert first != other
    compilations.clear()
    assert value(jnp.asarray([1.0, 1e-6])) == first
    assert compilations == []


def test_equal_layers_of_a_model_share_their_program() -> None:
    def model(layers: int) -> int:
        def total(ws: Any, x: Any) -> Any:
            for w in ws:
                x = ic.fixed_point(cell(w), jnp.zeros_like(x), x, gradient=ic.Implicit(), batch_ndim=1).value
            return x.sum()

        ws = [jnp.asarray(W, jnp.float32)] * layers
        return len(jax.jit(jax.grad(total)).lower(ws, jnp.asarray(X, jnp.float32)).as_text())

    one, six = model(1), model(6)
    assert six < 2.5 * one


def test_how_many_programs_are_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = functools.lru_cache(maxsize=4)(programs._compiled.__wrapped__)
    monkeypatch.setattr(programs, "_compiled", made)
    assert maps._kept_linearization.cache_info().maxsize == programs.KEPT
    gc.collect()
    size = len(programs._PROGRAMS)
    for i in range(8):
        ic.fixed_point(lambda h, z, i=i: (0.1 + 0.001 * i) * h + z, jnp.zeros(2), jnp.ones(2), gradient=ic.OneStep())
    gc.collect()
    before = len(programs._PROGRAMS)
    assert made.cache_info().currsize == 4
    assert before - size <= 4 + 8, "linearizations are kept, too"
    made.cache_clear()
    gc.collect()
    assert len(programs._PROGRAMS) < before, "a program lives as long as what is compiled for it"


def test_what_a_compiled_solve_notices_is_looked_into() -> None:
    """Coupled samples raise, failures warn and throw, and small units are taken, as in a Python loop."""
    mixing = jnp.asarray([[0.1], [1.0]])
    z = jnp.asarray([[0.0], [1.0]])

    def coupled(h: Any, z: Any) -> Any:
        return 0.9 * h.mean() * mixing + z

    for solve in (ic.solve, ic.fixed_point):
        with pytest.raises(ic.CoupledSamplesError):
            solve(coupled, jnp.zeros((2, 1)), z, batch_ndim=1, solver=ic.Broyden())
        free = solve(coupled, jnp.zeros((2, 1)), z, batch_ndim=1, solver=ic.Broyden(check=False))
        assert free.value.shape == (2, 1)
        with pytest.raises(ic.SolveError, match="MAX_STEPS"):
            solve(lambda h, z: h + z, jnp.zeros(2), jnp.ones(2), solver=ic.Anderson(max_steps=3), throw=True)
        small = solve(lambda h, z: 0.5 * h + z, jnp.zeros(2), jnp.full(2, 1e-30), solver=ic.Anderson(atol=0.0))
        assert small.converged
        np.testing.assert_allclose(small.value / 1e-30, 2.0, rtol=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ic.fixed_point(lambda h, z: h + z, jnp.zeros(2), jnp.ones(2), solver=ic.Anderson(max_steps=3))
    assert [each.category for each in caught] == [ic.ConvergenceWarning]


def host(h: Any) -> Any:
    RUNS.append(h.shape)
    return np.asarray(h)


RUNS: list[Any] = []


@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda s: type(s).__name__)
def test_a_compiled_solve_evaluates_f_as_often_as_it_says(solver: ic.Solver, compilations: list[float]) -> None:
    def f(h: Any, z: Any) -> Any:
        return jnp.tanh(jax.pure_callback(host, jax.ShapeDtypeStruct(h.shape, h.dtype), 0.5 * h)) + z

    for solve in (ic.solve, lambda *a, **k: ic.fixed_point(*a, gradient=ic.OneStep(), **k)):
        solve(f, jnp.zeros(3), jnp.ones(3), solver=solver)
        RUNS.clear()
        compilations.clear()
        solution = solve(f, jnp.zeros(3), jnp.ones(3), solver=solver)
        assert compilations == []
        assert len(RUNS) == solution.stats.evaluations
        assert isinstance(solution.stats.evaluations, int)


def reads(h: Any, z: Any) -> Any:
    """A slope that depends on a number, which JAX cannot trace."""
    return (0.5 if float(jax.lax.stop_gradient(h).sum()) < 100.0 else 0.25) * h + z


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_an_f_that_is_never_traced(gradient: ic.Estimator) -> None:
    problem = icj.problem(reads, jit=False)
    if isinstance(gradient, ic.Unroll) and gradient.recompute:
        with pytest.raises(NotImplementedError, match="recompute=False"):
            ic.fixed_point(problem, jnp.zeros(2), jnp.ones(2), gradient=gradient)
        return

    def total(z: Any) -> Any:
        return ic.fixed_point(problem, jnp.zeros(2), z, gradient=gradient).value.sum()

    derivative = 1.0 if isinstance(gradient, ic.OneStep) else 2.0
    np.testing.assert_allclose(total(jnp.ones(2)), 4.0, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(total)(jnp.ones(2)), derivative, rtol=1e-4)
    np.testing.assert_allclose(jax.jvp(total, (jnp.ones(2),), (jnp.ones(2),))[1], 2 * derivative, rtol=1e-4)
    with pytest.raises(jax.errors.ConcretizationTypeError) as told:
        ic.fixed_point(reads, jnp.zeros(2), jnp.ones(2), gradient=gradient)
    assert "jit=False" in "".join(told.value.__notes__)


def test_an_f_of_numpy_is_solved_as_it_is() -> None:
    def f(h: Any, z: Any) -> Any:
        return np.tanh(0.5 * np.asarray(h)) + np.asarray(z)

    x = np.zeros(2)
    for _ in range(60):
        x = np.tanh(0.5 * x) + 1
    problem = icj.problem(f, jit=False)
    for solver in SOLVERS[:3]:
        np.testing.assert_allclose(
            ic.fixed_point(problem, jnp.zeros(2), jnp.ones(2), solver=solver, gradient=ic.OneStep()).value, x, rtol=1e-4
        )
        np.testing.assert_allclose(ic.solve(problem, jnp.zeros(2), jnp.ones(2), solver=solver).value, x, rtol=1e-4)
        as_array = ic.solve(lambda h, z: jnp.asarray(f(h, z)), jnp.zeros(2), jnp.ones(2), solver=solver)
        np.testing.assert_allclose(as_array.value, x, rtol=1e-4)


def test_arrays_that_an_f_which_is_never_traced_closes_over_are_refused_derivatives() -> None:
    def total(w: Any) -> Any:
        problem = icj.problem(lambda h, z: w * h + 1.0, jit=False)
        return ic.fixed_point(problem, jnp.zeros(2), None, gradient=ic.Implicit()).value.sum()

    assert total(jnp.asarray(0.5)) == pytest.approx(4.0, rel=1e-4)
    with pytest.raises(ValueError, match="pass them in z"):
        jax.grad(total)(jnp.asarray(0.5))


@pytest.mark.parametrize("gradient", [ic.Neumann(60, 1.0), ic.NeumannSeries(1.0, 1e-6), ic.Implicit(), ic.Unroll(60)])
def test_where_jax_traces_the_solve_they_have_derivatives(gradient: ic.Estimator) -> None:
    """F is traced then, whatever its problem says."""

    def total(w: Any) -> Any:
        problem = icj.problem(lambda h, z: w * h + 1.0, jit=False)
        return ic.fixed_point(problem, jnp.zeros(2), None, gradient=gradient).value.sum()

    w = jnp.asarray(0.5)  # the derivative of 2 / (1 - w) is 8
    np.testing.assert_allclose(jax.jit(jax.grad(total))(w), 8.0, rtol=1e-3)
    np.testing.assert_allclose(jax.jit(lambda w: jax.jvp(total, (w,), (w,)))(w)[1], 4.0, rtol=1e-3)


def test_threads_find_their_own_programs() -> None:
    results: list[tuple[float, float]] = []

    def work(slope: float) -> None:
        def total(z: Any) -> Any:
            return ic.fixed_point(lambda h, z: slope * h + z, jnp.zeros(3), z, gradient=ic.Implicit()).value.sum()

        results.extend((slope, float(jax.grad(total)(jnp.ones(3))[0])) for _ in range(5))

    threads = [threading.Thread(target=work, args=(slope,)) for slope in (0.5, 0.25, 0.125)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    np.testing.assert_allclose([found for _, found in results], [1 / (1 - slope) for slope, _ in results], rtol=1e-4)


def test_what_is_kept_within_a_transformation_serves_all_others() -> None:
    """No tracer stays in a cache, whichever transformation filled it."""

    def total(z: Any) -> Any:
        settings: dict[str, Any] = {"solver": ic.Anderson(rtol=1e-6), "gradient": ic.Implicit()}
        return ic.fixed_point(lambda h, z: jnp.tanh(0.31 * h) + z, jnp.zeros(3), z, **settings).value.sum()

    x, slope = jnp.ones(3), jax.grad(total)
    with jax.checking_leaks():
        first = jax.jit(slope)(x)
        others = [
            slope(x),
            jax.vmap(slope)(x[None])[0],
            jax.lax.scan(lambda c, _: (c, slope(c)), x, None, length=2)[1][0],
            jax.checkpoint(slope)(x),
        ]
        second = jax.jit(jax.hessian(total))(x), jax.hessian(total)(x)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)
    np.testing.assert_allclose(*second, rtol=1e-4, atol=1e-6)

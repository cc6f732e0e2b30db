"""Two calls have one program if, and only if, they compute the same."""

import dataclasses
import functools
import gc
from collections.abc import Callable
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

"""JAX: settings that are arrays, traced or mapped, against the same settings as numbers, and against long loops."""

import contextlib
import copy
import dataclasses
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from libraries import JAX  # noqa: F401  # sets JAX's precision

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters.jax.settings import split
from implicit_core.arrays import State
from implicit_core.layer import LayerOptions
from implicit_core.records import flatten
from implicit_core.theory import certify

RNG = np.random.default_rng(0)
W = jnp.asarray(0.6 * np.linalg.qr(RNG.normal(size=(3, 3)))[0])
X = jnp.asarray(RNG.normal(size=(4, 3)) * [[0.01], [1.0], [1.0], [2.0]])
H0 = jnp.zeros((4, 3))


def f(h: Any, z: Any) -> Any:
    w, x = z
    return jnp.tanh(h @ w.T + x)


def layer(w: Any = W, x: Any = X, **options: Any) -> ic.Solution:
    return ic.fixed_point(f, H0, (w, x), batch_ndim=1, **options)


def loss(w: Any, solver: Any = ic.Anderson(rtol=1e-10), gradient: Any = ic.Unroll()) -> Any:
    return jnp.sum(layer(w, solver=solver, gradient=gradient).value ** 2)


def as_arrays(record: Any, names: Any) -> Any:
    """The record with arrays in place of these numbers."""
    return dataclasses.replace(record, **{name: jnp.asarray(getattr(record, name)) for name in names})


def assert_same(ours: ic.Solution, theirs: ic.Solution, tolerance: float = 1e-12) -> None:
    np.testing.assert_array_equal(ours.status, theirs.status)
    np.testing.assert_array_equal(ours.stats.steps, theirs.stats.steps)
    assert int(ours.stats.evaluations) == int(theirs.stats.evaluations)
    for a, b in ((ours.value, theirs.value), *((getattr(x.stats, n) for x in (ours, theirs)) for n in ("residual",))):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.stats.tolerance, theirs.stats.tolerance, rtol=1e-12)


# Records.


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeavyBall(ic.Solver):
    """A solver of the user's own, with a setting that is checked nowhere."""

    momentum: float = 0.3
    weights: Any = None

    def init(self, system: Any, x: State) -> State:
        return x

    def step(self, system: Any, memory: State, point: Any) -> tuple[State, State]:
        space = system.space
        return space.axpy(self.momentum, space.sub(point.x, memory), point.f), point.x


@dataclasses.dataclass(frozen=True)
class TwoTerms(ic.estimators.AtFixedPoint):
    """An estimator of the user's own."""

    weight: float = 1.0

    def inverse(self, space: Any, jacobian: Any, v: State) -> State:
        return space.axpy(self.weight, jacobian(v), v)


RECORDS = [
    ic.FixedPointIteration(),
    ic.Anderson(),
    ic.Broyden(),
    ic.NewtonKrylov(),
    ic.Compacting(ic.Anderson()),
    ic.CallableSolver(lambda problem, h0, z: h0),
    HeavyBall(),
    ic.Unroll(),
    ic.Neumann(),
    ic.NeumannSeries(),
    ic.Implicit(),
    ic.OneStep(),
    ic.BPTT(),
    TwoTerms(),
    ic.GMRES(),
    ic.CG(),
    ic.BiCGSTAB(),
    ic.Richardson(),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_numbers_has_no_leaves_and_a_hash(record: Any) -> None:
    assert jax.tree.leaves(record) == []
    again = jax.tree.unflatten(jax.tree.structure(record), [])
    assert type(again) is type(record)
    assert again == record == copy.copy(record)
    assert hash(again) == hash(record)
    assert repr(again) == repr(record)


@pytest.mark.parametrize(
    ("record", "paths"),
    [
        (ic.Anderson(rtol=jnp.asarray(1e-3)), [".rtol"]),
        (ic.Anderson(rtol=jnp.asarray(1e-3), damping=jnp.asarray(0.5)), [".rtol", ".damping"]),
        (ic.Neumann(lam=jnp.asarray([0.5, 1.0])), [".lam"]),
        (ic.Neumann(lam=np.asarray([0.5, 1.0])), [".lam"]),
        (ic.Implicit(ic.GMRES(rtol=jnp.asarray(1e-3))), [".linear_solver.rtol"]),
        (ic.NewtonKrylov(linear_solver=ic.CG(atol=jnp.asarray(1e-3))), [".linear_solver.atol"]),
        (ic.Compacting(ic.Anderson(max_steps=jnp.asarray(3)), (True, False)), [".solver.max_steps"]),
        (ic.NeumannSeries(contraction=jnp.asarray(0.5)), [".contraction"]),
        (HeavyBall(momentum=jnp.asarray(0.5)), [".momentum"]),
        (TwoTerms(jnp.asarray(0.5)), [".weight"]),
    ],
    ids=repr,
)
def test_arrays_are_leaves(record: Any, paths: list[str]) -> None:
    found, structure = jax.tree_util.tree_flatten_with_path(record)
    assert [jax.tree_util.keystr(path) for path, _ in found] == paths
    again = jax.tree.unflatten(structure, [leaf for _, leaf in found])
    assert again == record
    assert jax.tree.structure(again) == structure
    hash(structure)
    # What JAX puts in the places of leaves are leaves, too, whatever it is.
    for leaf in (0, object(), 0.5):
        replaced = jax.tree.map(lambda _, leaf=leaf: leaf, record)
        assert jax.tree.leaves(replaced) == [leaf] * len(paths)
        assert jax.tree.structure(replaced) == structure
    assert jax.tree.leaves(jax.tree.map(lambda _: None, record)) == []
    doubled = jax.tree.map(lambda x: 2 * x, record)
    for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(record), strict=True):
        np.testing.assert_array_equal(a, 2 * b)
    assert doubled != record


def test_a_record_with_an_array_says_why_it_has_no_hash() -> None:
    with pytest.raises(TypeError, match=r"Anderson holds an array in rtol, so it has no hash: pass it to jit as"):
        hash(ic.Anderson(rtol=jnp.asarray(1e-3)))
    with pytest.raises(TypeError, match=r"GMRES holds an array in atol.*atol=float\(...\)"):
        hash(ic.Implicit(ic.GMRES(atol=jnp.asarray(1e-3))))
    static = jax.jit(lambda x, solver: x, static_argnames="solver")
    with pytest.raises((TypeError, ValueError), match="rtol"):
        static(1.0, solver=ic.Anderson(rtol=jnp.asarray(1e-3)))


def test_records_compare_by_value() -> None:
    one = ic.Anderson(rtol=jnp.asarray(1e-3))
    assert one == ic.Anderson(rtol=jnp.asarray(1e-3)) != ic.Anderson(rtol=jnp.asarray(1e-4))
    assert one != ic.Anderson(rtol=1e-3)  # another pytree
    assert one != ic.Anderson(rtol=jnp.asarray([1e-3]))
    assert one != ic.Anderson(rtol=jnp.asarray(1e-3), memory=4)
    assert ic.Neumann() != ic.Unroll()
    assert ic.Implicit(ic.CG(rtol=jnp.asarray(0.1))) == ic.Implicit(ic.CG(rtol=jnp.asarray(0.1)))
    assert len({ic.Broyden(), ic.Broyden(), ic.Broyden(memory=3), ic.Anderson()}) == 3
    assert hash(ic.Compacting(ic.Broyden(), {"x": True})) == hash(ic.Compacting(ic.Broyden(), {"x": False}))


def test_words_show_the_type_of_an_array() -> None:
    assert repr(ic.Neumann(lam=jnp.asarray(0.5, jnp.float32))) == "Neumann(k=5, lam=float32[])"
    assert repr(ic.Neumann(lam=jnp.ones(3))) == "Neumann(k=5, lam=float64[3])"
    assert "linear_solver=GMRES(rtol=float64[]," in repr(ic.Implicit(ic.GMRES(rtol=jnp.asarray(1e-3))))
    seen = []
    jax.jit(lambda lam: seen.append(repr(ic.Unroll(lam=lam))))(0.5)
    assert seen == ["Unroll(k=5, lam=float64[], recompute=False)"]


def test_records_with_arrays_are_copied_replaced_and_pickled() -> None:
    record = ic.Anderson(rtol=jnp.asarray(1e-3), memory=3)
    through_jit = jax.jit(lambda record: record)(record)
    for one in (record, through_jit):
        assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
        other = dataclasses.replace(one, damping=0.5)
        assert (other.memory, other.damping, float(other.rtol)) == (3, 0.5, 1e-3)
        assert jax.tree.leaves(dataclasses.replace(one, rtol=0.1)) == []
        if sys.version_info >= (3, 13):
            assert copy.replace(one, damping=0.5) == other


def test_numbers_of_numpy_stay_numbers() -> None:
    """Nothing traces them."""
    for half in (np.float32(0.5), np.float64(0.5), np.asarray(0.5), 0.5):
        assert ic.Neumann(lam=half) == ic.Neumann(lam=0.5)
        assert type(ic.Neumann(lam=half).lam) is float
    assert type(ic.Anderson(max_steps=np.int64(7)).max_steps) is int
    assert type(ic.Anderson(max_steps=np.asarray(7)).max_steps) is int
    of_class = HeavyBall(weights=np.float32)  # which has the attributes of an array
    assert jax.tree.leaves(of_class) == []
    assert hash(of_class) == hash(HeavyBall(weights=np.float32))


def test_a_class_that_its_author_registered_stays_as_it_is() -> None:
    @jax.tree_util.register_static
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(HeavyBall):
        pass

    assert jax.tree.leaves(Mine(momentum=jnp.asarray(0.5))) == []
    with pytest.raises(ValueError, match="Duplicate"):
        jax.tree_util.register_pytree_node(Mine, flatten, lambda *_: None)


@pytest.mark.parametrize("first", ["jax", "implicit_core as ic"])
def test_records_are_nodes_whichever_package_is_imported_first(first: str) -> None:
    imports = {"jax", "implicit_core as ic"}
    code = "\n".join(f"import {name}" for name in (first, *(imports - {first})))
    code += (
        "\nprint(jax.tree.leaves((ic.Anderson(), ic.Implicit())), jax.tree.leaves(ic.Neumann(lam=jax.numpy.ones(2))))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[] [Array([1., 1.], dtype=float32)]\n"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda n: ic.Neumann(k=n), "k"),
        (lambda n: ic.Unroll(k=n), "k"),
        (lambda n: ic.Anderson(memory=n), "memory"),
        (lambda n: ic.Broyden(memory=n), "memory"),
        (lambda n: ic.Anderson(check_every=n), "check_every"),
        (lambda n: ic.GMRES(restart=n), "restart"),
        (lambda n: ic.Anderson(freeze=n > 1), "freeze"),
        (lambda n: ic.GMRES(check=n > 1), "check"),
        (lambda n: ic.Unroll(recompute=n > 1), "recompute"),
    ],
)
def test_settings_that_cannot_be_traced_say_so(make: Callable[[Any], Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be known whe.*static argument"):
        jax.jit(lambda n: jax.tree.leaves(make(n)))(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ic.Neumann(lam=jnp.asarray([0.5, 1.5])), r"lam must lie in \(0, 1\], got \[0.5 1.5\]"),
        (lambda: ic.Unroll(lam=jnp.asarray(0.0)), r"lam must lie in \(0, 1\]"),
        (lambda: ic.Anderson(rtol=jnp.asarray(-1.0)), r"rtol must lie in \[0, inf\)"),
        (lambda: ic.Anderson(atol=jnp.asarray(jnp.nan)), r"atol must lie in \[0, inf\)"),
        (lambda: ic.Anderson(max_steps=jnp.asarray(0)), "max_steps must be at least 1, got 0"),
        (lambda: ic.NeumannSeries(contraction=jnp.asarray(1.0)), r"contraction must lie in \[0, 1\)"),
        (lambda: ic.Neumann(lam=jnp.asarray(True)), "lam must be a real number, got an array of dtype bool"),
        (lambda: ic.Neumann(lam=jnp.asarray(1j)), "lam must be a real number, got an array of dtype complex128"),
        (
            lambda: ic.Anderson(max_steps=jnp.asarray(3.0)),
            "max_steps must be an integer, got an array of dtype fl",
        ),
    ],
)
def test_numbers_in_arrays_are_checked_where_they_can_be_read(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_constant_of_a_program_is_checked() -> None:
    lam = jnp.asarray(1.5)
    with pytest.raises(ValueError, match=r"lam must lie in \(0, 1\], got 1.5"):
        jax.jit(lambda: jax.tree.leaves(ic.Neumann(lam=lam)))()


# Solvers.


def picard(problem: Any, h0: Any, z: Any) -> Any:
    return jax.lax.fori_loop(0, 30, lambda _, h: problem(h, z), h0)


ARRAYS = {
    ic.FixedPointIteration(rtol=1e-7, damping=0.8): ("rtol", "damping"),
    ic.Anderson(rtol=1e-7, damping=0.8, regularization=1e-6): ("rtol", "damping", "regularization"),
    ic.Anderson(rtol=0.0, atol=1e-6): ("rtol", "atol"),
    ic.Anderson(rtol=1e-30): ("rtol",),
    ic.Anderson(rtol=0.2): ("rtol",),
    ic.Broyden(rtol=1e-7, atol=1e-5): ("rtol", "atol", "max_steps"),
    ic.Broyden(rtol=1e-7, max_steps=3): ("max_steps",),
    ic.FixedPointIteration(rtol=1e-7, max_steps=1): ("max_steps",),
    ic.FixedPointIteration(rtol=1e-9, check_every=4, max_steps=11): ("rtol", "max_steps"),
    ic.FixedPointIteration(rtol=1e-9, check_every=4, max_steps=100): ("max_steps",),
    ic.NewtonKrylov(rtol=1e-9): ("rtol", "max_steps"),
    HeavyBall(rtol=1e-7): ("rtol", "momentum"),
    ic.CallableSolver(picard, rtol=1e-7): ("rtol",),
    ic.CallableSolver(picard, rtol=1e-20): ("rtol",),
    ic.Compacting(ic.Anderson(rtol=1e-7), (False, True)): (),
}


def with_arrays(solver: Any) -> Any:
    if isinstance(solver, ic.Compacting):
        return dataclasses.replace(solver, solver=as_arrays(solver.solver, ("rtol", "damping")))
    return as_arrays(solver, ARRAYS[solver])


@pytest.mark.parametrize("call", ["solve", "layer"])
@pytest.mark.parametrize("solver", ARRAYS, ids=lambda solver: f"{type(solver).__name__}-{'-'.join(ARRAYS[solver])}")
def test_a_solve_with_arrays_is_one_with_numbers(solver: Any, call: str) -> None:
    """Eager; traced with the record as an argument; and where all but the settings is known."""

    def run(solver: Any) -> ic.Solution:
        if call == "layer":
            return layer(solver=solver, gradient=ic.Neumann())
        return ic.solve(f, H0, (W, X), solver=solver, batch_ndim=1)

    expected, arrays = run(solver), with_arrays(solver)
    assert_same(run(arrays), expected)
    if isinstance(solver, ic.Compacting):  # where shapes are fixed it is the solver alone
        expected = run(solver.solver)
    traced = jax.jit(run)(arrays)
    assert_same(traced, expected)
    mapped = jax.vmap(run)(jax.tree.map(lambda x: x[None], arrays))
    assert_same(jax.tree.map(lambda x: x[0], mapped), expected)


def test_the_trace_needs_a_number_of_steps_that_is_known() -> None:
    def residuals(solver: Any) -> Any:
        return layer(solver=solver, trace=True).stats.trace

    solver = ic.Anderson(max_steps=6)
    expected = residuals(solver)
    assert expected.shape == (6, 4)
    np.testing.assert_allclose(jax.jit(residuals)(as_arrays(solver, ["rtol"])), expected, rtol=1e-9, atol=1e-9)
    # Another program, which may round otherwise.
    np.testing.assert_allclose(residuals(as_arrays(solver, ["max_steps"])), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match="trace=True needs a max_steps that is known when the program is traced"):
        jax.jit(residuals)(as_arrays(solver, ["max_steps"]))


def test_steps_are_forced_by_numbers_alone() -> None:
    """An array of zero is a tolerance that nothing meets: a program does not depend on what it holds."""
    assert int(layer(solver=ic.Anderson(rtol=0.0, atol=0.0, max_steps=30)).stats.evaluations) == 30
    solver = ic.FixedPointIteration(rtol=jnp.asarray(0.0), atol=jnp.asarray(0.0), max_steps=1000)
    solution = layer(x=jnp.ones((4, 3)), solver=solver, gradient=ic.OneStep())
    assert int(solution.stats.evaluations) < 1000
    assert np.all((solution.stats.residual == 0) == solution.converged)


@pytest.mark.parametrize("wrong", [np.nan, -1.0])
@pytest.mark.parametrize(
    ("solver", "name", "same"),
    [(ic.Anderson(atol=0.0), "rtol", 1e-300), (ic.Anderson(), "atol", 0.0), (ic.GMRES(), "atol", 0.0)],
    ids=["rtol", "atol", "linear"],
)
def test_a_traced_tolerance_out_of_range_is_the_smallest(solver: Any, name: str, same: float, wrong: float) -> None:
    """No residual is above NaN, so that all samples would seem to have converged."""

    def run(number: Any) -> Any:
        record = dataclasses.replace(solver, **{name: number})
        if isinstance(record, ic.Solver):
            return ic.solve(f, H0, (W, X), solver=record, batch_ndim=1)
        return ic.solve_linear(lambda v: v - v @ W, X, solver=record, batch_ndim=1)

    expected = jax.jit(lambda: run(same))()
    for make in (jax.jit(run), lambda number: jax.tree.map(lambda x: x[0], jax.vmap(run)(number[None]))):
        solution = make(jnp.asarray(wrong))
        np.testing.assert_array_equal(solution.status, expected.status)
        np.testing.assert_array_equal(solution.stats.steps, expected.stats.steps)


def test_a_linear_solve_with_a_relative_tolerance_of_nan_has_not_converged() -> None:
    status = jax.jit(lambda r: ic.solve_linear(lambda v: 0.5 * v, X, solver=ic.GMRES(rtol=r), batch_ndim=1).status)
    assert np.all(status(np.nan) != ic.CONVERGED)
    assert np.all(status(1e-6) == ic.CONVERGED)


@pytest.mark.parametrize("number", [1.5, 0.0, -0.5, np.nan])
def test_a_traced_setting_out_of_its_interval_is_nan(number: float) -> None:
    """No error can be raised there, and a wrong λ would be silent."""
    gradient = jax.jit(jax.grad(lambda w, lam: loss(w, gradient=ic.Neumann(lam=lam))))(W, number)
    assert np.all(np.isnan(gradient))
    solution = jax.jit(lambda lam: layer(gradient=ic.Unroll(lam=lam)))(number)
    assert np.all(np.isnan(solution.value))
    assert np.all(solution.status == ic.NONFINITE)
    damped = jax.jit(lambda damping: layer(solver=ic.Anderson(damping=damping), gradient=ic.OneStep()))(number)
    assert np.all(damped.status == ic.NONFINITE)
    # As well for a record that JAX made, which it does without a check.
    record = jax.tree.map(lambda lam: lam * number, ic.Neumann(lam=jnp.asarray(1.0)))
    gradient = jax.jit(jax.grad(lambda w, record: loss(w, gradient=record)))(W, record)
    assert np.all(np.isnan(gradient))
    with pytest.raises(ValueError, match=r"lam must lie in \(0, 1\]"):
        jax.grad(lambda w: loss(w, gradient=record))(W)


def test_settings_have_the_shape_and_the_framework_of_one_number() -> None:
    with pytest.raises(ValueError, match=r"rtol of Anderson must be one number.*shape \(2,\).*jax.vmap"):
        layer(solver=ic.Anderson(rtol=jnp.asarray([1e-3, 1e-4])))
    with pytest.raises(ValueError, match="lam of Unroll must be one number"):
        layer(gradient=ic.Unroll(lam=jnp.asarray([0.5, 1.0])))
    with pytest.raises(ValueError, match="lam of Neumann must be one number"):
        jax.grad(lambda w: loss(w, gradient=ic.Neumann(lam=jnp.asarray([0.5, 1.0]))))(W)
    with pytest.raises(ValueError, match="rtol of GMRES must be one number"):
        ic.solve_linear(lambda v: v, np.ones(2), solver=ic.GMRES(rtol=np.ones(2)))
    with pytest.raises(TypeError, match=r"rtol of Anderson is an array of jax, and the state one of numpy: write"):
        ic.solve(lambda h, z: 0.5 * h, np.ones(2), None, solver=ic.Anderson(rtol=jnp.asarray(1e-3)))


def test_a_setting_of_another_class_is_left_to_it() -> None:
    """An array in a field that is not annotated as a number may have any shape."""
    weights = jnp.arange(3.0)
    expected = layer(solver=HeavyBall(rtol=1e-7))
    assert_same(layer(solver=HeavyBall(rtol=1e-7, weights=weights)), expected)
    assert_same(jax.jit(lambda s: layer(solver=s))(HeavyBall(rtol=1e-7, weights=weights)), expected)


def test_mapped_states_and_mapped_settings() -> None:
    """One after the other, in both orders, and together."""
    rtols = jnp.asarray([1e-9, 1e-2])

    def one(x: Any, rtol: Any) -> Any:
        solution = ic.fixed_point(
            f, jnp.zeros(3), (W, x), solver=ic.Anderson(rtol=rtol, check=False), gradient=ic.OneStep()
        )
        return solution.value, solution.stats.steps, solution.stats.residual

    table = [[one(x, rtol) for x in X] for rtol in rtols]
    loop = jax.tree.map(lambda *rows: jnp.stack(rows), *[jax.tree.map(lambda *a: jnp.stack(a), *row) for row in table])
    outer = jax.vmap(lambda rtol: jax.vmap(lambda x: one(x, rtol))(X))(rtols)
    inner = jax.vmap(lambda x: jax.vmap(lambda rtol: one(x, rtol))(rtols), out_axes=1)(X)
    together = jax.vmap(jax.vmap(one, (0, None)), (None, 0))(X, rtols)
    for found in (outer, inner, together, jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(X, rtols)):
        np.testing.assert_array_equal(found[1], loop[1])
        np.testing.assert_allclose(found[0], loop[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found[2], loop[2], rtol=1e-5, atol=1e-15)
    assert len(set(np.unique(loop[1]))) > 2
    diagonal = jax.vmap(one)(X[:2], rtols)
    np.testing.assert_allclose(diagonal[0], jnp.stack([loop[0][0, 0], loop[0][1, 1]]), rtol=1e-12, atol=1e-14)


# Estimators.

Make = Callable[[Any], Any]
ESTIMATORS: list[tuple[str, Make]] = [
    ("Neumann", lambda lam: ic.Neumann(4, lam)),
    ("Neumann nan", lambda lam: ic.Neumann(4, lam, on_growth="nan")),
    ("Unroll", lambda lam: ic.Unroll(4, lam)),
    ("Unroll nan", lambda lam: ic.Unroll(4, lam, on_growth="nan")),
    ("Unroll recompute", lambda lam: ic.Unroll(4, lam, recompute=True)),
    ("NeumannSeries", lambda lam: ic.NeumannSeries(lam, 1e-2 * lam)),
    ("NeumannSeries contraction", lambda lam: ic.NeumannSeries(0.5, contraction=lam)),
    ("GMRES", lambda lam: ic.Implicit(ic.GMRES(rtol=0.1 * lam), on_failure="nan")),
    ("BiCGSTAB", lambda lam: ic.Implicit(ic.BiCGSTAB(rtol=0.1 * lam, atol=1e-3 * lam), on_failure="nan")),
    ("Richardson", lambda lam: ic.Implicit(ic.Richardson(relaxation=lam, rtol=1e-6), on_failure="nan")),
    ("TwoTerms", TwoTerms),
]


@pytest.mark.parametrize(("name", "make"), ESTIMATORS, ids=[name for name, _ in ESTIMATORS])
def test_a_gradient_with_arrays_is_one_with_numbers(name: str, make: Make) -> None:
    """Eager, traced, and mapped over λ; by the layer, and by the estimator's own methods on JAX's derivatives."""
    lams = jnp.asarray([0.5, 0.8])
    value_and_grad = jax.value_and_grad(lambda w, gradient: loss(w, gradient=gradient))
    loop = [value_and_grad(W, make(float(lam))) for lam in lams]
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *loop)
    records = jax.vmap(make)(lams) if name != "NeumannSeries" else make(lams)
    assert jax.tree.leaves(records)[0].shape == (2,)
    of_records = jax.vmap(lambda gradient: value_and_grad(W, gradient))
    for found in (of_records(records), jax.jit(of_records)(records)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)
    one = make(lams[0])
    for found in (value_and_grad(W, one), jax.jit(value_and_grad)(W, one)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, loop[0])

    problem, dz = icj.problem(f, batch_ndim=1), (jnp.ones_like(W), jnp.ones_like(X))
    h = layer(solver=ic.Anderson(rtol=1e-10), gradient=ic.OneStep()).value

    def products(gradient: Any) -> Any:
        value, pullback = gradient.vjp(problem, h, (W, X))
        return value, pullback(jnp.ones_like(h)), gradient.jvp(problem, h, (W, X), dz)

    theirs = products(make(0.5))
    for ours in (products(make(lams[0])), jax.jit(lambda lam: products(make(lam)))(0.5)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, theirs)


SOLVERS = [ic.FixedPointIteration, ic.Anderson, ic.Broyden, ic.NewtonKrylov]


@pytest.mark.parametrize(("name", "make"), ESTIMATORS[::2], ids=[name for name, _ in ESTIMATORS[::2]])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_with_every_estimator(solver: Any, name: str, make: Make) -> None:
    """Both traced."""

    @jax.jit
    def run(number: Any) -> Any:
        options = {"solver": solver(rtol=1e-7 * number), "gradient": make(number)}
        return jax.value_and_grad(lambda w: (jnp.sum((s := layer(w, **options)).value ** 2), s), has_aux=True)(W)

    options = {"solver": solver(rtol=1e-7 * 0.5), "gradient": make(0.5)}
    (_, theirs), expected = jax.value_and_grad(
        lambda w: (jnp.sum((s := layer(w, **options)).value ** 2), s), has_aux=True
    )(W)
    (_, ours), found = run(0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert_same(ours, theirs, 1e-9)


def counted(call: Callable[..., Any]) -> tuple[Any, list[None]]:
    """A jitted function, and a list that grows when it is traced."""
    traced: list[None] = []

    @jax.jit
    def program(*args: Any) -> Any:
        traced.append(None)
        return call(*args)

    return program, traced


@pytest.mark.parametrize("gradient", [ic.Neumann, ic.Unroll])
def test_a_schedule_is_compiled_once(gradient: Any) -> None:
    step, traced = counted(lambda w, record: jax.grad(loss)(w, gradient=record))
    for lam in np.linspace(0.3, 1.0, 5):
        found = step(W, gradient(lam=jnp.asarray(lam)))
        np.testing.assert_allclose(found, jax.grad(loss)(W, gradient=gradient(lam=lam)), rtol=1e-10, atol=1e-12)
    assert len(traced) == 1
    step, traced = counted(lambda rtol: layer(solver=ic.Anderson(rtol=rtol)).stats.steps)
    steps = [step(rtol) for rtol in np.geomspace(1e-2, 1e-10, 5)]
    assert len(traced) == 1
    expected = [layer(solver=ic.Anderson(rtol=rtol)).stats.steps for rtol in np.geomspace(1e-2, 1e-10, 5)]
    np.testing.assert_array_equal(steps, expected)
    assert len({tuple(np.asarray(row)) for row in steps}) == 5


def test_records_of_numbers_are_static_arguments() -> None:
    traced: list[None] = []

    @functools.partial(jax.jit, static_argnames=("solver", "gradient"))
    def call(x: Any, solver: Any, gradient: Any) -> Any:
        traced.append(None)
        return layer(x=x, solver=solver, gradient=gradient).value

    for solver, times in ((ic.Anderson(), 1), (ic.Anderson(), 1), (ic.Anderson(rtol=1e-3), 2)):
        call(X, solver=solver, gradient=ic.Neumann(k=3))
        assert len(traced) == times
    # As arguments that are not static, numbers are part of the structure.
    program, traced = counted(lambda solver: layer(solver=solver).value)
    for solver, times in ((ic.Anderson(), 1), (ic.Anderson(), 1), (ic.Anderson(rtol=1e-3), 2)):
        program(solver)
        assert len(traced) == times


def test_an_annealed_tolerance_in_a_scan() -> None:
    """The record is what the scan carries."""

    def step(solver: Any, _: None) -> Any:
        solution = layer(solver=solver)
        return dataclasses.replace(solver, rtol=0.1 * solver.rtol), (solution.stats.steps, solution.status)

    start = ic.Anderson(rtol=jnp.asarray(1e-2))
    end, (steps, status) = jax.lax.scan(step, start, length=5)
    np.testing.assert_allclose(end.rtol, 1e-7)
    expected = [layer(solver=ic.Anderson(rtol=10.0 ** -(i + 2))).stats.steps for i in range(5)]
    np.testing.assert_array_equal(steps, expected)
    assert np.all(status == ic.CONVERGED)


# Derivatives with respect to settings. For h = a h + z all is known: B = λ a + 1 - λ, and h* = z / (1 - a).

A = 0.4


def scalar_layer(z: Any, lam: Any, gradient: Any, solver: Any = None) -> Any:
    solver = ic.FixedPointIteration(rtol=1e-3) if solver is None else solver
    return ic.fixed_point(lambda h, z: A * h + z, jnp.zeros(()), z, solver=solver, gradient=gradient(3, lam)).value


def series(lam: float) -> float:
    """A_{k,λ} of the scalar layer for k = 3."""
    return float(lam * sum((lam * A + 1 - lam) ** t for t in range(3)))


def d_series(lam: float, step: float = 1e-6) -> float:
    return (series(lam + step) - series(lam - step)) / (2 * step)


@pytest.mark.parametrize("wrap", [lambda g: g, jax.jit], ids=["eager", "jit"])
def test_the_value_of_unroll_has_a_derivative_in_lam(wrap: Any) -> None:
    """h_k = h* + Bᵏ (h_0 - h*), from an inaccurate h_0."""
    z, lam, root = 1.3, 0.7, 1.3 / (1 - A)
    h_0 = float(ic.solve(lambda h, z: A * h + z, jnp.zeros(()), z, solver=ic.FixedPointIteration(rtol=1e-3)).value)
    expected = 3 * (lam * A + 1 - lam) ** 2 * (A - 1) * (h_0 - root)
    assert abs(expected) > 1e-6
    found = wrap(jax.grad(scalar_layer, 1), **({"static_argnums": 2} if wrap is jax.jit else {}))(z, lam, ic.Unroll)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    forward = jax.jvp(lambda lam: scalar_layer(z, lam, ic.Unroll), (lam,), (1.0,))[1]
    np.testing.assert_allclose(forward, expected, rtol=1e-8)


@pytest.mark.parametrize("gradient", [ic.Neumann, ic.Unroll])
def test_the_gradient_has_a_derivative_in_lam(gradient: Any) -> None:
    """The value of Neumann does not depend on λ; its gradient does."""
    for lam in (0.3, 0.9):
        slope = jax.grad(scalar_layer)
        np.testing.assert_allclose(slope(1.0, lam, gradient), series(lam), rtol=1e-12)
        for second in (jax.grad(slope, 1), jax.jacfwd(slope, 1), jax.jit(jax.grad(slope, 1), static_argnums=2)):
            np.testing.assert_allclose(second(1.0, lam, gradient), d_series(lam), rtol=1e-6)
    if gradient is ic.Neumann:
        assert jax.grad(scalar_layer, 1)(1.0, 0.5, gradient) == 0
        both = jax.grad(scalar_layer, (0, 1))(1.0, 0.5, gradient)
        np.testing.assert_allclose(both, (series(0.5), 0.0), rtol=1e-12)


@pytest.mark.parametrize(
    "gradient", [ic.NeumannSeries(), ic.Implicit(), ic.Neumann(), ic.Unroll(), ic.BPTT(3)], ids=repr
)
def test_tolerances_have_no_derivative(gradient: Any) -> None:
    """Of the value nor of the gradient, in both modes."""

    def value(rtol: Any) -> Any:
        return loss(W, ic.Anderson(rtol=rtol, damping=1e3 * rtol), gradient)

    def squared_gradient(rtol: Any) -> Any:
        of_gradient = gradient
        if isinstance(gradient, ic.NeumannSeries):
            of_gradient = ic.NeumannSeries(lam=500 * rtol, rtol=rtol)
        if isinstance(gradient, ic.Implicit):
            of_gradient = ic.Implicit(ic.GMRES(rtol=rtol))
        return jnp.sum(jax.grad(loss)(W, ic.Anderson(rtol=rtol), of_gradient) ** 2)

    for function in (value, squared_gradient):
        assert jax.grad(function)(1e-3) == 0
        assert jax.jit(jax.jacfwd(function))(1e-3) == 0


def test_solves_outside_of_a_layer_have_no_derivative_in_their_settings() -> None:
    def total(rtol: Any) -> Any:
        solution = ic.solve(f, H0, (W, X), solver=ic.Anderson(rtol=rtol, damping=900 * rtol), batch_ndim=1)
        return jnp.sum(solution.value) + jnp.sum(solution.stats.residual)

    assert jax.grad(total)(1e-3) == 0
    assert jax.jit(jax.grad(total))(1e-3) == 0


@pytest.mark.parametrize("gradient", [ic.Neumann, ic.Unroll])
def test_a_layer_of_callbacks_refuses_a_derivative_in_lam(gradient: Any) -> None:
    def total(z: Any, lam: Any) -> Any:
        problem = ic.Problem(lambda h, z: A * h + z, vjp=lambda h, z, v: (A * v, v))
        return ic.fixed_point(problem, jnp.zeros(()), z, gradient=gradient(3, lam)).value

    np.testing.assert_allclose(jax.grad(total)(1.0, 0.3), series(0.3), rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(1.0, 0.3), series(0.3), rtol=1e-12)
    mapped = jax.vmap(jax.grad(total), (None, 0))(1.0, jnp.asarray([0.3, 0.9]))
    np.testing.assert_allclose(mapped, [series(0.3), series(0.9)], rtol=1e-12)
    for wrt in (1, (0, 1)):
        with pytest.raises(NotImplementedError, match="settings of an estimator have no derivative in a layer that is"):
            jax.grad(total, wrt)(1.0, 0.3)
    constant = jax.grad(lambda z, lam: total(z, jax.lax.stop_gradient(lam)), (0, 1))(1.0, 0.3)
    np.testing.assert_allclose(constant, (series(0.3), 0.0), rtol=1e-12)


# Linear solvers, growth, certificates.


@pytest.mark.parametrize(
    "solver",
    [
        ic.GMRES(rtol=1e-5, restart=2, max_steps=7),
        ic.GMRES(rtol=1e-9, max_steps=2),
        ic.BiCGSTAB(rtol=1e-5, atol=1e-4),
        ic.CG(rtol=1e-8),
        ic.Richardson(rtol=1e-5, relaxation=0.9, check_every=3),
    ],
    ids=repr,
)
def test_linear_solves(solver: ic.LinearSolver) -> None:
    m = 0.2 * (W + W.T) if isinstance(solver, ic.CG) else 0.5 * W
    names = ["rtol", "atol", "max_steps", *(["relaxation"] if isinstance(solver, ic.Richardson) else [])]

    def run(solver: Any) -> ic.Solution:
        return ic.solve_linear(lambda v: v - v @ m, X, solver=solver, batch_ndim=1)

    expected, arrays = run(solver), as_arrays(solver, names)
    mapped = jax.vmap(run)(jax.tree.map(lambda x: x[None], arrays))
    for found in (run(arrays), jax.jit(run)(arrays), jax.tree.map(lambda x: x[0], mapped)):
        np.testing.assert_array_equal(found.status, expected.status)
        np.testing.assert_array_equal(found.stats.steps, expected.stats.steps)
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-12, atol=1e-13)


def test_a_mapped_right_hand_side_without_jit() -> None:
    """New arrays are known there, and the vector is not."""
    found = jax.vmap(lambda b: ic.solve_linear(lambda v: v - 0.5 * v, b, batch_ndim=1).value)(X[None])
    np.testing.assert_allclose(found[0], 2 * X, rtol=1e-5)


@pytest.mark.parametrize("terms", [1, 3, 200])
def test_the_most_terms_of_a_series(terms: int) -> None:
    def total(z: Any, gradient: Any) -> Any:
        return ic.fixed_point(lambda h, z: A * h + z, jnp.zeros(()), z, gradient=gradient).value

    def series(n: Any) -> ic.NeumannSeries:
        return ic.NeumannSeries(lam=1.0, rtol=1e-9, max_terms=n)

    expected = (1 - A**terms) / (1 - A) if terms < 200 else 1 / (1 - A)
    slope = jax.grad(total)
    with pytest.warns(ic.InexactGradientWarning) if terms < 200 else contextlib.nullcontext():
        np.testing.assert_allclose(slope(1.0, series(jnp.asarray(terms))), expected, rtol=1e-8)
        np.testing.assert_allclose(jax.jit(slope)(1.0, series(jnp.asarray(terms))), expected, rtol=1e-8)
        jax.effects_barrier()


def test_growth_with_a_traced_lam() -> None:
    """Steps with λ = 1 grow in the second sample, those with λ = 0.2 do not."""
    slopes = jnp.asarray([[0.5], [-3.0]])

    def total(z: Any, gradient: Any) -> Any:
        point = lambda problem, h0, z: z / (1 - slopes)  # noqa: E731
        return ic.fixed_point(
            lambda h, z: slopes * h + z, jnp.zeros((2, 1)), z, solver=point, gradient=gradient, batch_ndim=1
        ).value.sum()

    for make in (functools.partial(ic.Neumann, on_growth="nan"), functools.partial(ic.Unroll, on_growth="nan")):
        slope = jax.jit(jax.grad(total))
        np.testing.assert_array_equal(np.isnan(slope(jnp.ones((2, 1)), make(8, jnp.asarray(1.0)))), [[False], [True]])
        np.testing.assert_array_equal(np.isnan(slope(jnp.ones((2, 1)), make(8, jnp.asarray(0.2)))), [[False], [False]])
        sweep = jax.vmap(lambda g: jax.grad(total)(jnp.ones((2, 1)), g))(make(8, jnp.asarray([1.0, 0.2])))
        np.testing.assert_array_equal(np.isnan(sweep[..., 0]), [[False, True], [False, False]])
    with pytest.warns(ic.GrowingGradientWarning, match="because its steps do not contract"):
        jax.grad(total)(jnp.ones((2, 1)), ic.Neumann(8, jnp.asarray(1.0)))


def test_certificates_are_of_numbers() -> None:
    problem, z = icj.problem(lambda h, z: 0.5 * h + z), jnp.ones(2)
    found = certify(problem, 2 * z, z, ic.Neumann(3, jnp.asarray(1.0)))
    assert found.to_dict() == certify(problem, 2 * z, z, ic.Neumann(3, 1.0)).to_dict()
    assert found.gradient == ic.Neumann(3, 1.0)
    with pytest.raises(TypeError, match=r"gradient must have settings that are numbers here, but lam of Neumann is an"):
        jax.jit(lambda lam: certify(problem, 2 * z, z, ic.Neumann(3, lam)).left_out)(0.5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("gradient", [ic.Unroll, ic.Neumann])
def test_settings_leave_the_dtype_of_the_state(gradient: Any, dtype: Any) -> None:
    x = X.astype(dtype)
    w = W.astype(dtype)
    solver = as_arrays(ic.Anderson(rtol=1e-2, damping=0.9, regularization=1e-5), ["rtol", "damping", "regularization"])

    def value(w: Any, lam: Any, solver: Any) -> Any:
        return ic.fixed_point(
            f, jnp.zeros((4, 3), dtype), (w, x), batch_ndim=1, solver=solver, gradient=gradient(3, lam)
        ).value

    numbers = ic.Anderson(rtol=1e-2, damping=0.9, regularization=1e-5)
    ours, theirs = value(w, jnp.asarray(0.3), solver), value(w, 0.3, numbers)
    assert ours.dtype == dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=tolerance, atol=tolerance)
    slope = jax.jit(jax.grad(lambda w, lam: value(w, lam, solver).astype(jnp.float32).sum()))(w, 0.3)
    assert slope.dtype == dtype


# Several devices.


@pytest.mark.parametrize(
    "make", [ic.Neumann, ic.Unroll, lambda lam: ic.Implicit(ic.GMRES(rtol=1e-9 * lam, max_steps=as_count(lam)))]
)
def test_settings_on_several_devices(make: Any) -> None:
    """Each device with its own loop, where settings have to vary as the samples do; and one sharded program."""
    if make in (ic.Neumann, ic.Unroll):
        make = functools.partial(make, 4)
    options = ic.Anderson(rtol=1e-9, damping=0.9), make(0.5)
    arrays = as_arrays(options[0], ["rtol", "damping", "max_steps"]), make(jnp.asarray(0.5))
    expected = jax.grad(lambda w: jnp.sum(layer(w, solver=options[0], gradient=options[1]).value ** 2))(W)

    def of_shard(w: Any, x: Any, solver: Any, gradient: Any) -> Any:
        solution = ic.fixed_point(f, jnp.zeros_like(x), (w, x), solver=solver, gradient=gradient, batch_ndim=1)
        return jnp.sum(solution.value**2)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    total = jax.shard_map(
        lambda *args: jax.lax.psum(of_shard(*args), "data"),
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec(), spec()),
        out_specs=spec(),
    )
    np.testing.assert_allclose(jax.jit(jax.grad(total))(W, X, *arrays), expected, rtol=1e-9, atol=1e-12)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(X, jax.sharding.NamedSharding(mesh, spec("data")))
        found = jax.jit(jax.grad(of_shard))(W, sharded, *arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def as_count(lam: Any) -> Any:
    """60, as an array beside one."""
    return jnp.asarray(60) if isinstance(lam, jax.Array) else 60


# What the adapter keeps.


def test_options_are_split_in_a_key_and_arrays() -> None:
    def options(rtol: Any, lam: Any, **others: Any) -> LayerOptions:
        return LayerOptions(ic.Anderson(rtol=rtol), ic.Neumann(lam=lam), **others)

    static, arrays = split(options(jnp.asarray(1e-3), jnp.asarray(0.5)))
    assert [float(x) for x in arrays] == [1e-3, 0.5]
    joined = static.join(arrays)
    assert (joined.solver.rtol, joined.gradient.lam) == tuple(arrays)
    other, _ = split(options(jnp.asarray(1e-4), jnp.asarray(0.7)))
    assert other == static
    assert hash(other) == hash(static)
    for different in (
        options(1e-3, jnp.asarray(0.5)),
        options(jnp.asarray(1e-3), 0.5),
        options(jnp.asarray(1e-3), jnp.asarray(0.5), throw=True),
        LayerOptions(ic.Broyden(rtol=jnp.asarray(1e-3)), ic.Neumann(lam=jnp.asarray(0.5))),
    ):
        assert split(different)[0] != static
    assert split(LayerOptions(ic.Anderson(), ic.Neumann()))[1] == []

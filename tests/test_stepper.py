"""A loop of the user's own makes the points, residuals and statuses of a solve."""

import copy
import itertools
import pickle
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import JAX, NUMPY, TORCH, Library
from third_party.solver import HeavyBall

import implicit_core as ic

SOLVERS = [
    ic.FixedPointIteration(),
    ic.FixedPointIteration(damping=0.7),
    ic.Anderson(memory=3),
    ic.Broyden(memory=3),
    ic.Broyden(),
    ic.NewtonKrylov(),
]
NAMES = ["plain", "damped", "anderson", "short-broyden", "broyden", "newton"]
WEIGHT = 0.8 * np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
INPUT = np.random.default_rng(1).standard_normal((3, 5)) * np.array([[0.1], [1.0], [3.0]])


def layer(library: Library, dtype: Any = np.float64) -> tuple[Any, Any, Any]:
    """A tanh layer with its JVP, a start and z, for a batch of three samples that finish at different steps."""
    xp = library.xp

    def f(h: Any, z: Any) -> Any:
        return xp.tanh(h @ z[0] + z[1])

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        return (dh @ z[0] + h @ dz[0] + dz[1]) * (1 - f(h, z) ** 2)

    z = tuple(library.array(x.astype(dtype)) for x in (WEIGHT, INPUT))
    return lambda **options: ic.Problem(f, jvp=jvp, **options), library.array(np.zeros((3, 5), dtype)), z


def assert_same(library: Library, got: Any, wanted: Any) -> None:
    """To rounding: JAX compiles a solve, and a step that some samples may undo selects, which moves its memory."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        rounding = 1e-4 if library is JAX or a.dtype in (np.float16, np.float32) else 1e-10
        np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-2 * rounding)


def assert_same_solution(library: Library, got: ic.Solution[Any], wanted: ic.Solution[Any]) -> None:
    assert wanted.stats.evaluations == got.stats.evaluations
    for a, b in ((got.value, wanted.value), (got.status, wanted.status)):
        assert_same(library, library.numpy(a), library.numpy(b))
    for name in ("steps", "residual", "relative", "tolerance"):
        a, b = (library.numpy(getattr(solution.stats, name)) for solution in (got, wanted))
        assert_same(library, a, b)


def assert_steps_are_those_of_solve(
    library: Library, problem: ic.Problem[Any, Any], solver: ic.Solver, h0: Any, z: Any, evaluations: int
) -> None:
    """After n evaluations a state says what a solve of n evaluations returns, and traces."""
    stepper = ic.Stepper(problem, solver=solver)
    state = stepper.init(h0, z)
    trace = library.numpy(
        ic.solve(problem, h0, z, solver=replace(solver, max_steps=evaluations), trace=True).stats.trace
    )
    for n in range(2, evaluations + 1):  # a solve of one evaluation has its norms in other units
        before, state = state, stepper.step(state, z)
        wanted = ic.solve(problem, h0, z, solver=replace(solver, max_steps=n))
        if wanted.stats.evaluations < n:
            assert library.numpy(before.finished).all()
            break
        got = stepper.solution(state)
        assert_same_solution(library, got, wanted)
        residual, active = library.numpy(state.residual), ~library.numpy(before.finished)
        assert_same(library, residual[active], trace[n - 1][active])
        np.testing.assert_equal(library.numpy(state.steps), library.numpy(wanted.stats.steps))
        converged = library.numpy(state.converged)
        np.testing.assert_equal(converged, library.numpy(wanted.converged))
        assert_same(library, flat(library, state.value)[converged], flat(library, wanted.value)[converged])


def flat(library: Library, tree: Any) -> np.ndarray:
    leaves = [np.asarray(x) for x in jax.tree.leaves(library.numpy(tree))]
    return np.concatenate([x.reshape(3, -1) for x in leaves], axis=1)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_a_batch(library: Library, solver: ic.Solver) -> None:
    make, h0, z = layer(library)
    assert_steps_are_those_of_solve(library, make(batch_ndim=1), solver, h0, z, 6 if library is JAX else 26)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_one_system_in_units(library: Library, solver: ic.Solver) -> None:
    make, h0, z = layer(library)
    units = np.logspace(-1, 1, 15).reshape(3, 5)
    stepper = ic.Stepper(make(scale=library.array(units)), solver=solver)
    state, evaluations = stepper.init(h0, z), 6 if library is JAX else 14
    for _ in range(evaluations - 1):
        state = stepper.step(state, z)
    wanted = ic.solve(make(scale=library.array(units)), h0, z, solver=replace(solver, max_steps=evaluations))
    if wanted.stats.evaluations == evaluations:
        assert_same_solution(library, stepper.solution(state), wanted)
    # The residual is the one in these units, at the point that is shown.
    h = library.numpy(state.value)
    apart = (np.tanh(h @ WEIGHT + INPUT) - h) / units
    assert float(library.numpy(state.residual)) == pytest.approx(np.linalg.norm(apart), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_half_precision(solver: ic.Solver) -> None:
    for library, dtype in ((NUMPY, np.float16), (TORCH, np.float16), (TORCH, np.float32), (JAX, np.float16)):
        make, h0, z = layer(library, dtype)
        assert_steps_are_those_of_solve(library, make(batch_ndim=1), solver, h0, z, 5 if library is JAX else 12)


def test_a_pytree(library: Library) -> None:
    xp = library.xp

    def f(h: Any, z: Any) -> Any:
        return {"x": 0.5 * xp.sin(h["x"]) + z, "y": (0.3 * h["y"][0] + xp.sum(h["x"], axis=1),)}

    h0 = {"x": library.array(np.zeros((3, 2))), "y": (library.array(np.ones(3)),)}
    z = library.array(np.array([[0.0, 1.0], [2.0, -1.0], [0.1, 0.1]]))
    for solver in SOLVERS[:4]:
        problem = ic.Problem(f, batch_ndim=1)
        assert_steps_are_those_of_solve(library, problem, solver, h0, z, 5 if library is JAX else 12)


@pytest.mark.parametrize("solver", [*SOLVERS, HeavyBall(momentum=0.05)], ids=[*NAMES, "third-party"])
def test_compiled_by_jax(solver: ic.Solver) -> None:
    """Steps under jit, within a loop of the user's and within a scan are those of a compiled solve."""
    make, h0, z = layer(JAX)
    problem = make(batch_ndim=1)
    stepper = ic.Stepper(problem, solver=solver)
    wanted = jax.jit(lambda z: ic.solve(problem, h0, z, solver=solver))(z)
    step, state = jax.jit(stepper.step), jax.jit(stepper.init)(h0, z)
    while not state.finished.all():
        state = step(state, z)
    assert step._cache_size() == 1  # type: ignore[attr-defined]  # a test may look
    in_loop = jax.jit(
        lambda z: jax.lax.while_loop(lambda s: ~s.finished.all(), lambda s: stepper.step(s, z), stepper.init(h0, z))
    )(z)
    from_eager = jax.lax.while_loop(lambda s: ~s.finished.all(), lambda s: stepper.step(s, z), stepper.init(h0, z))
    count = int(wanted.stats.evaluations) - 1
    scanned, residuals = jax.lax.scan(lambda s, _: (stepper.step(s, z), s.residual), stepper.init(h0, z), length=count)
    assert residuals.shape == (count, 3)
    for end in (state, in_loop, from_eager, scanned):
        np.testing.assert_array_equal(end.status, wanted.status)
        np.testing.assert_array_equal(end.steps, wanted.stats.steps)
        np.testing.assert_allclose(end.value, wanted.value, rtol=0, atol=1e-13)
        np.testing.assert_allclose(jax.jit(stepper.solution)(end).value, wanted.value, rtol=0, atol=1e-13)


def test_mapped_by_jax() -> None:
    make, h0, z = layer(JAX)
    stepper = ic.Stepper(make())
    state = jax.jit(jax.vmap(lambda h, x: stepper.init(h, (z[0], x))))(h0, z[1])
    step = jax.jit(jax.vmap(lambda s, x: stepper.step(s, (z[0], x))))
    while not state.finished.all():
        state = step(state, z[1])
    wanted = ic.solve(make(batch_ndim=1), h0, z)
    np.testing.assert_allclose(state.value, wanted.value, atol=1e-12)
    np.testing.assert_array_equal(state.steps, wanted.stats.steps)


def test_endings_are_those_of_solve() -> None:
    """NaN, divergence, stagnation, and a finished sample, each in a batch of its own samples."""

    def f(h: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.stack([0.5 * h[0], np.log(h[1] + 1) - 4, 3.0 * h[2] + 1, 1 - h[3], h[4] + 1], axis=0)

    h0 = np.ones((5, 1))
    for solver in (ic.FixedPointIteration(damping=1.0), ic.Anderson(), ic.Broyden()):
        problem = ic.Problem(f, batch_ndim=1)
        stepper = ic.Stepper(problem, solver=solver)
        state, seen = stepper.init(h0, None), set[int]()
        for n in range(2, 140):
            state = stepper.step(state, None)
            wanted = ic.solve(problem, h0, None, solver=replace(solver, max_steps=n))
            seen |= set(wanted.status.tolist())
            if wanted.stats.evaluations < n:
                break
            assert_same_solution(NUMPY, stepper.solution(state), wanted)
        assert state.finished[[0, 1]].all()
        assert {ic.CONVERGED, ic.NONFINITE} <= seen
    assert seen >= {ic.CONVERGED, ic.NONFINITE, ic.MAX_STEPS}


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_a_step_changes_no_earlier_state(library: Library, solver: ic.Solver) -> None:
    """Every state goes on as it did the first time, with its memory full and in use by later steps."""
    make, h0, z = layer(library)
    stepper = ic.Stepper(make(batch_ndim=1), solver=replace(solver, rtol=1e-12))
    states = [stepper.init(h0, z)]
    for _ in range(4 if library is JAX else 7):
        states.append(stepper.step(states[-1], z))
    for state, after in itertools.pairwise(states):
        again = stepper.step(state, z)
        np.testing.assert_array_equal(library.numpy(again.value), library.numpy(after.value))
        further, beyond = stepper.step(again, z), stepper.step(after, z)
        np.testing.assert_array_equal(library.numpy(further.value), library.numpy(beyond.value))


@pytest.mark.parametrize("library", [NUMPY, TORCH], ids=["numpy", "torch"])
def test_what_a_state_shows_is_a_copy(library: Library) -> None:
    make, h0, z = layer(library)
    stepper = ic.Stepper(make(batch_ndim=1), solver=ic.Broyden())
    state, kept = (stepper.step(stepper.init(h0, z), z) for _ in range(2))
    for shown in (state.value, state.residual, state.steps, state.status, state.finished):
        shown[...] = 7
    assert_same_solution(library, stepper.solution(state), stepper.solution(kept))
    assert_same_solution(library, *(stepper.solution(stepper.step(s, z)) for s in (state, kept)))


def test_a_state_is_kept_on_disk() -> None:
    for library in (NUMPY, TORCH, JAX):
        make, h0, z = layer(library)
        stepper = ic.Stepper(make(batch_ndim=1))
        state = stepper.step(stepper.init(h0, z), z)
        for kept in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            a, b = (library.numpy(stepper.step(s, z).value) for s in (kept, state))
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_the_loop_is_the_users(solver: ic.Solver) -> None:
    """The solver's own max_steps does not end it."""
    make, h0, z = layer(NUMPY)
    stepper = ic.Stepper(make(batch_ndim=1), solver=replace(solver, max_steps=2))
    state = stepper.init(h0, z)
    while not state.finished.all():
        state = stepper.step(state, z)
    assert state.converged.all()
    wanted = ic.solve(make(batch_ndim=1), h0, z, solver=solver)
    np.testing.assert_allclose(state.value, wanted.value, rtol=1e-9)
    np.testing.assert_array_equal(state.steps, wanted.stats.steps)


def test_inputs_that_change() -> None:
    """Forced steps of plain iteration follow z: each point is F of the last point at the last z."""
    stepper = ic.Stepper(lambda h, z: 0.5 * h + z, solver=ic.FixedPointIteration(rtol=0.0, atol=0.0))
    inputs = np.random.default_rng(0).standard_normal((200, 4))
    state, h = stepper.init(np.zeros(4), inputs[0]), np.zeros(4)
    for before, z in itertools.pairwise(inputs):
        state, h = stepper.step(state, z), 0.5 * h + before
        np.testing.assert_array_equal(state.value, h)
        assert state.residual == pytest.approx(np.linalg.norm(0.5 * h + z - h))
        assert not state.finished


def test_a_finished_sample_goes_on_where_its_inputs_changed() -> None:
    stepper = ic.Stepper(lambda h, z: 0.5 * h + z, batch_ndim=1)
    z = np.ones((2, 1))
    state = stepper.init(np.zeros((2, 1)), z)
    for _ in range(6):
        state = stepper.step(state, z)
    assert state.converged.all()
    changed = np.array([[1.0], [2.0]])
    state = stepper.step(state, changed)
    assert state.finished.tolist() == [True, False]
    for _ in range(6):
        state = stepper.step(state, changed)
    assert state.converged.all()
    np.testing.assert_allclose(state.value, 2 * changed, rtol=1e-4)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_a_start_out_of_range(size: float) -> None:
    """Squares of these float32 numbers are infinite or zero, so an eager loop measures in units of its own."""
    for library in (NUMPY, TORCH):
        z = library.array(np.asarray([size, 2 * size], np.float32))
        stepper = ic.Stepper(lambda h, z: 0.5 * h + z, solver=ic.Anderson(atol=0.0))
        state = stepper.init(0 * z, z)
        for _ in range(5):
            state = stepper.step(state, z)
        wanted = ic.solve(lambda h, z: 0.5 * h + z, 0 * z, z, solver=ic.Anderson(atol=0.0))
        assert state.converged
        np.testing.assert_allclose(library.numpy(state.value), [2 * size, 4 * size], rtol=1e-4)
        np.testing.assert_array_equal(library.numpy(stepper.solution(state).value), library.numpy(wanted.value))
        np.testing.assert_array_equal(library.numpy(state.residual), library.numpy(wanted.stats.residual))
    z = jnp.asarray([size, 2 * size], jnp.float32)
    state = jax.jit(stepper.init)(0 * z, z)
    assert state.finished
    assert state.status == ic.NONFINITE
    assert jax.jit(stepper.step)(state, z).status == ic.NONFINITE


def test_a_state_is_a_constant() -> None:
    weight = torch.eye(2, requires_grad=True)
    state = ic.Stepper(lambda h, z: torch.tanh(0.5 * h @ z + 1), solver=ic.Anderson()).init(torch.zeros(2), weight)
    assert not state.value.requires_grad
    stepper = ic.Stepper(lambda h, z: jnp.tanh(0.5 * h + z), solver=ic.NewtonKrylov())

    def loss(z: Any) -> Any:
        state = stepper.step(stepper.init(z, z), z)
        return stepper.solution(state).value.sum() + state.value.sum() + state.residual

    assert jax.jit(jax.grad(loss))(jnp.array(1.0)) == 0
    assert jax.jit(lambda z: jax.jvp(loss, (z,), (z,)))(jnp.array(1.0))[1] == 0


def test_nothing_is_read_after_the_start() -> None:
    """Numbers cannot be read from tracers, so it is enough that everything runs on them."""
    make, h0, z = layer(JAX)
    stepper = ic.Stepper(make(batch_ndim=1), solver=ic.Broyden())
    shapes = jax.eval_shape(stepper.step, jax.eval_shape(stepper.init, h0, z), z)
    assert shapes.value.shape == (3, 5)
    assert shapes.finished.shape == (3,)


def test_f_that_writes_to_its_argument() -> None:
    def f(h: np.ndarray, z: np.ndarray) -> np.ndarray:
        h += z
        return h

    with pytest.raises(ValueError, match="f wrote to its argument h"):
        ic.Stepper(f).init(np.zeros(2), np.ones(2))
    # PyTorch hands copies to it, at every step.
    stepper = ic.Stepper(lambda h, z: 0.5 * h.relu_() + z, solver=ic.FixedPointIteration(rtol=1e-9))
    z = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    state = stepper.init(0 * z, z)
    while not state.finished:
        state = stepper.step(state, z)
    np.testing.assert_allclose(state.value.numpy(), [-1.0, 4.0], atol=1e-7)


def test_a_start_of_numbers_or_of_another_framework() -> None:
    for cos in (np.cos, jnp.cos):
        stepper = ic.Stepper(lambda h, z, cos=cos: cos(h))
        state = stepper.init(0.5, None)
        while not state.finished:
            state = stepper.step(state, None)
        np.testing.assert_allclose(state.value, 0.739085, rtol=1e-4)
    state = ic.Stepper(lambda h, z: 0.5 * h + z).init(np.zeros(2), torch.ones(2, dtype=torch.float64))
    assert torch.is_tensor(state.value)


@pytest.mark.parametrize("other", SOLVERS, ids=NAMES)
def test_a_state_of_another_solver_is_refused_in_a_sentence(library: Library, other: ic.Solver) -> None:
    make, h0, z = layer(library)
    problem = make(batch_ndim=1)
    for solver in SOLVERS:
        state = ic.Stepper(problem, solver=solver).init(h0, z)
        if type(solver) is type(other):  # other settings may go on: tolerances that change, for one
            continue
        if isinstance(other, ic.FixedPointIteration):  # it has no memory, and goes on from any
            ic.Stepper(problem, solver=other).step(state, z)
        else:
            with pytest.raises(
                TypeError, match=r"from another solver, other settings or other shapes; .*init\(state.value, z\)"
            ):
                ic.Stepper(problem, solver=other).step(state, z)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_an_error_of_f_is_told_as_it_is(library: Library, solver: ic.Solver) -> None:
    h0 = library.array(np.ones((3, 5)))

    def f(h: Any, z: Any) -> Any:
        if isinstance(z, str):
            raise KeyError(z)
        return 0.5 * h

    stepper = ic.Stepper(ic.Problem(f, jvp=lambda h, z, dh, dz: 0.5 * dh, batch_ndim=1), solver=solver)
    state = stepper.step(stepper.init(h0, None), None)
    with pytest.raises(KeyError, match="unknown"):
        stepper.step(state, "unknown")


def test_solvers_without_steps_are_refused_in_a_sentence() -> None:
    class Own(ic.Anderson):
        def solve(self, problem: Any, h0: Any, z: Any, *, trace: bool = False) -> Any:
            return super().solve(problem, h0, z, trace=trace)

    with pytest.raises(TypeError, match="pass the solver that it contains"):
        ic.Stepper(lambda h, z: h, solver=ic.Compacting(ic.Anderson()))  # type: ignore[arg-type]
    for solver in (lambda p, h, z: h, ic.CallableSolver(lambda p, h, z: h), Own(), ic.Anderson, None):
        with pytest.raises(TypeError, match="a solver that has init and step"):
            ic.Stepper(lambda h, z: h, solver=solver)  # type: ignore[arg-type]
    stepper = ic.Stepper(lambda h, z: 0.5 * h)
    with pytest.raises(TypeError, match=r"state must be a StepperState, such as stepper.init\(h0, z\)"):
        stepper.step(np.zeros(2), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="complex"):
        stepper.init(np.zeros(2, complex), None)
    with pytest.raises(ValueError, match="the result of f must have the shape of h0"):
        ic.Stepper(lambda h, z: h[:1]).init(np.zeros(2), None)
    assert "Anderson" in repr(stepper)
    assert "status" in repr(stepper.init(np.zeros(2), None))

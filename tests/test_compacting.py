"""``Compacting``: the same steps, with F evaluated for the unfinished samples alone."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import JAX, LIBRARIES, NUMPY, Library

import implicit_core as ic
import implicit_core.adapters.torch as ict

BATCH, WIDTH = 40, 6
SLOW = [3, 17, 18, 39]
SOLVERS = [
    ic.FixedPointIteration(rtol=1e-9, max_steps=400),
    ic.Anderson(rtol=1e-9, damping=0.8),
    ic.Broyden(rtol=1e-9),
    ic.Broyden(rtol=1e-9, memory=3),
    ic.NewtonKrylov(rtol=1e-9),
    ic.Anderson(rtol=1e-9, check_every=4),
]
# Eager JAX compiles each operation for each number of rows.
QUICK = [x for x in LIBRARIES if x is not JAX]
CASES = [*((x, s) for x in QUICK for s in SOLVERS), (JAX, SOLVERS[1]), (JAX, SOLVERS[2])]
IDS = [f"{type(s).__name__}{i}" for i, s in enumerate(SOLVERS)]


@dataclass
class Layer:
    """A tanh layer whose samples have their own rates, and count of the rows that F was evaluated for."""

    library: Library
    batch: tuple[int, ...] = (BATCH,)
    scale: Any = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.rows: list[int] = []
        w = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
        rates = np.full(self.batch, 0.3)
        rates.reshape(-1)[SLOW] = 0.9
        inputs = {"rates": rates[..., None], "x": rng.normal(size=(*self.batch, WIDTH))}
        self.h0 = self.library.array(np.zeros((*self.batch, WIDTH)))
        self.z = self.library.array((inputs, w))

    def f(self, h: Any, z: Any) -> Any:
        inputs, w = z
        self.rows.append(h.shape[0])
        return inputs["rates"] * self.library.xp.tanh(h @ w) + inputs["x"]

    def jvp(self, h: Any, z: Any, dh: Any, dz: Any) -> Any:
        inputs, w = z
        return inputs["rates"] * (1 - self.library.xp.tanh(h @ w) ** 2) * (dh @ w)

    def problem(self) -> ic.Problem:
        return ic.Problem(self.f, jvp=self.jvp, batch_ndim=len(self.batch), scale=self.scale)

    def solve(self, solver: Any, **options: Any) -> tuple[ic.Solution, list[int]]:
        self.rows.clear()
        solution = ic.solve(self.problem(), self.h0, self.z, solver=solver, **options)
        return solution, list(self.rows)


def assert_same(library: Library, a: ic.Solution, b: ic.Solution, rtol: float = 1e-12) -> None:
    np.testing.assert_array_equal(library.numpy(a.status), library.numpy(b.status))
    np.testing.assert_array_equal(library.numpy(a.stats.steps), library.numpy(b.stats.steps))
    np.testing.assert_allclose(library.numpy(a.value), library.numpy(b.value), rtol=rtol, atol=1e-13)
    for name in ("residual", "relative", "tolerance", "trace"):
        x, y = getattr(a.stats, name), getattr(b.stats, name)
        if x is not None:
            np.testing.assert_allclose(library.numpy(x), library.numpy(y), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(("library", "solver"), CASES, ids=[f"{x.name}-{IDS[SOLVERS.index(s)]}" for x, s in CASES])
def test_the_steps_are_the_solvers_own_and_most_rows_are_saved(library: Library, solver: ic.Solver) -> None:
    layer = Layer(library)
    whole, all_rows = layer.solve(solver, trace=True)
    part, rows = layer.solve(ic.Compacting(solver, batched=(True, False)), trace=True)
    assert_same(library, whole, part)
    assert set(all_rows) == {BATCH}
    assert len(all_rows) == (1 if library is JAX else whole.stats.evaluations)  # JAX traces F once
    assert len(rows) == whole.stats.evaluations + 1 == part.stats.evaluations
    assert rows.pop() == BATCH  # the test
    assert rows == sorted(rows, reverse=True)
    assert min(rows) <= len(SLOW)
    # No more than the work of each sample until the batch is halved, and of the slow ones afterwards.
    fast = sum(n == BATCH for n in rows)
    assert sum(rows) <= BATCH * fast + 2 * len(SLOW) * (len(rows) - fast) < 0.8 * BATCH * whole.stats.evaluations


@pytest.mark.parametrize("library", QUICK, ids=[x.name for x in QUICK])
@pytest.mark.parametrize("solver", SOLVERS[:3], ids=IDS[:3])
def test_rows_of_a_batch_with_two_axes(solver: ic.Solver, library: Library) -> None:
    layer = Layer(library, batch=(BATCH // 2, 2))
    whole, _ = layer.solve(solver)
    part, rows = layer.solve(ic.Compacting(solver, batched=(True, False)))
    assert_same(library, whole, part)
    assert part.value.shape == whole.value.shape
    assert min(rows) <= len({i // 2 for i in SLOW})


@pytest.mark.parametrize("start", [1e20, 1e-25])
def test_in_units_of_its_own(start: float) -> None:
    rates = np.array([[0.1], [0.1], [0.1], [0.8]], np.float32)
    rows = []

    def f(h: Any, z: Any) -> Any:
        rows.append(len(h))
        return z[0] * h + z[1]

    z = (rates, np.full((4, 3), start, np.float32))
    h0, solver = np.zeros((4, 3), np.float32), ic.FixedPointIteration(rtol=1e-5, atol=0.0)
    solution = ic.solve(f, h0, z, solver=ic.Compacting(solver), batch_ndim=1)
    assert set(rows) == {4, 1}
    np.testing.assert_allclose(solution.value, z[1] / (1 - rates), rtol=1e-4)
    assert_same(NUMPY, ic.solve(f, h0, z, solver=solver, batch_ndim=1), solution, rtol=1e-6)


def test_scales_of_each_sample_and_of_all() -> None:
    by_sample = 10.0 ** np.arange(BATCH)[:, None] * np.ones(WIDTH)
    for scale in (by_sample, np.arange(1.0, WIDTH + 1)):
        layer = Layer(NUMPY, scale=scale)
        for solver in SOLVERS[:5]:
            assert_same(
                NUMPY, layer.solve(solver)[0], layer.solve(ic.Compacting(solver, batched=(True, False)))[0], rtol=1e-9
            )


def test_samples_that_never_converge_leave_or_stay_as_without_it() -> None:
    rates = np.array([0.1, 0.1, 0.1, 0.1, np.nan, 3.0, -1.0, 0.9])[:, None]  # NaN, runs away, turns for ever, slow

    def f(h: Any, z: Any) -> Any:
        return z * h + 1.0

    for solver in (ic.FixedPointIteration(max_steps=40), ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=9)):
        h0 = np.full((8, 1), 0.3)
        whole = ic.solve(f, h0, rates, solver=solver, batch_ndim=1, trace=True)
        part = ic.solve(f, h0, rates, solver=ic.Compacting(solver), batch_ndim=1, trace=True)
        assert_same(NUMPY, whole, part)
        assert whole.stats.evaluations <= part.stats.evaluations <= whole.stats.evaluations + 1


@dataclass(frozen=True, kw_only=True)
class Momentum(ic.Solver):
    """A solver of a user, whose memory has numbers of samples, a constant as long as the batch, and a counter."""

    def init(self, system: Any, x: Any) -> Any:
        space = system.space
        return {
            "before": x,
            "constant": space.xp.arange(BATCH),
            "samples": space.xp.reshape(space.full(0.5), (1, -1)),
            "counter": space.xp.zeros(()),
        }

    def step(self, system: Any, memory: Any, point: Any) -> Any:
        space = system.space
        assert memory["constant"].shape == (BATCH,)
        assert float(memory["counter"]) == point.index
        weight = space.xp.reshape(memory["samples"], (-1, 1)) * 0.2
        x = space.axpy(weight, space.sub(point.x, memory["before"]), point.f)
        return x, {**memory, "before": point.x, "counter": memory["counter"] + 1}


def test_memory_of_a_solver_of_somebody_else() -> None:
    layer, solver = Layer(NUMPY), Momentum(rtol=1e-9, max_steps=300)
    part, rows = layer.solve(ic.Compacting(solver, batched=(True, False)))
    assert_same(NUMPY, layer.solve(solver)[0], part)
    assert min(rows) < BATCH


def test_layers_of_pytorch_have_the_same_values_and_gradients() -> None:
    rng = np.random.default_rng(0)
    w = torch.tensor(np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0], requires_grad=True)
    x = torch.tensor(rng.normal(size=(BATCH, WIDTH)))
    rates = torch.full((BATCH, 1), 0.3, dtype=torch.float64)
    rates[SLOW] = 0.9
    rows = []

    def f(h: Any, z: Any) -> Any:
        rows.append(len(h))
        return z[0] * torch.tanh(h @ w) + z[1]  # w is closed over

    found = []
    for solver in (ic.Anderson(rtol=1e-9), ic.Compacting(ic.Anderson(rtol=1e-9))):
        for gradient in (ic.Unroll(), ic.Implicit()):
            solution = ic.fixed_point(
                f, torch.zeros_like(x), (rates, x), solver=solver, gradient=gradient, batch_ndim=1, throw=True
            )
            found.append((solution.value.detach(), *torch.autograd.grad(solution.value.sum(), w)))
    assert min(rows) < BATCH // 2
    for a, b in zip(found[:2], found[2:], strict=True):
        for u, v in zip(a, b, strict=True):
            torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-9)


def test_a_module_says_that_its_input_is_batched() -> None:
    cell = _Cell().double()
    layer = ict.ImplicitLayer(cell, solver=ic.Compacting(ic.Anderson(rtol=1e-9)), gradient=ic.Implicit())
    x = torch.randn(BATCH, WIDTH + 1, dtype=torch.float64)
    x[:, 0] = 0.3
    x[SLOW, 0] = 0.9
    value = layer(x, torch.zeros(BATCH, WIDTH, dtype=torch.float64))
    assert min(cell.rows) < BATCH // 2
    alone = ict.ImplicitLayer(cell, solver=ic.Anderson(rtol=1e-9), gradient=ic.Implicit())
    torch.testing.assert_close(value, alone(x, torch.zeros(BATCH, WIDTH, dtype=torch.float64)), rtol=1e-8, atol=1e-8)


class _Cell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(WIDTH, WIDTH, bias=False))
        self.rows: list[int] = []

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(h))
        return x[:, :1] * torch.tanh(self.linear(h)) + x[:, 1:]


def test_traced_by_jax_it_is_the_solver_alone() -> None:
    x = jnp.linspace(-1.0, 1.0, 8)[:, None]
    h0 = jnp.zeros_like(x)

    def f(h: Any, z: Any) -> Any:
        return 0.5 * jnp.sin(h) + z

    def loss(x: Any, solver: Any) -> Any:
        return ic.fixed_point(f, h0, x, solver=solver, gradient=ic.Implicit(), batch_ndim=1).value.sum()

    for transform in (jax.grad, lambda g: jax.jit(jax.grad(g), static_argnums=1)):
        expected = transform(loss)(x, ic.Anderson())
        np.testing.assert_allclose(transform(loss)(x, ic.Compacting(ic.Anderson())), expected, rtol=1e-12)


def test_what_is_no_row_of_a_sample_is_refused() -> None:
    layer = Layer(NUMPY)
    with pytest.raises(ValueError, match=r"shape \(6, 6\) in z .* 40 rows .*batched=\(True, False\)"):
        layer.solve(ic.Compacting(SOLVERS[0]))
    with pytest.raises(ValueError, match=r"batched=\(True, False, False\) does not fit z"):
        layer.solve(ic.Compacting(SOLVERS[0], batched=(True, False, False)))
    with pytest.raises(ValueError, match="pass batch_ndim=1"):
        ic.solve(np.cos, np.zeros(3), None, solver=ic.Compacting(SOLVERS[0]))
    with pytest.raises(TypeError, match="batched must be"):
        ic.Compacting(SOLVERS[0], batched=(1, 0))
    with pytest.raises(TypeError, match="solver must be"):
        ic.Compacting(lambda problem, h0, z: h0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="freeze=True"):
        ic.Compacting(ic.Anderson(freeze=False))


def test_a_part_with_other_values_is_refused() -> None:
    rates = np.array([[0.1], [0.1], [0.1], [0.9]])

    def coupled(h: Any, z: Any) -> Any:
        return z * np.sin(h) + 1e-3 * h.sum(axis=0) / len(h) + 1.0

    def not_batched(h: Any, z: Any) -> Any:
        return z[: len(h)] * np.sin(h) + 1.0

    solver = ic.FixedPointIteration(check=False)
    for f, batched in ((coupled, True), (not_batched, False)):
        with pytest.raises(ValueError, match="F of all rows has other residuals"):
            ic.solve(f, np.zeros((4, 1)), rates, solver=ic.Compacting(solver, batched=batched), batch_ndim=1)

    def closed_over(h: Any, z: Any) -> Any:
        return np.concatenate([rates, rates], axis=1) * np.sin(h) + 1.0

    with pytest.raises(ValueError, match="the result of f must have"):
        ic.solve(closed_over, np.zeros((4, 2)), None, solver=ic.Compacting(solver), batch_ndim=1)


def test_what_only_a_later_part_shows_is_refused() -> None:
    """The first part is the first rows, so that a slice of closed-over rows is right there; the second is not."""
    rates = np.array([[0.6], [0.9], [0.6], [0.6], [0.1], [0.1], [0.1], [0.1]])
    rows = np.arange(1.0, 9.0)[:, None]
    late = np.array([[0.1]] * 6 + [[0.85], [0.95]])

    def sliced(h: Any, z: Any) -> Any:
        return z * h + rows[: len(h)]

    def coupled_where_large(h: Any, z: Any) -> Any:
        return z * h + 1 + np.where(np.abs(h).max() > 9.0, 0.3, 0.0)

    solver = ic.Compacting(ic.FixedPointIteration(max_steps=400))
    for f, z in ((sliced, rates), (coupled_where_large, late)):
        with pytest.raises(ValueError, match="F of all rows has other residuals"):
            ic.solve(f, np.zeros((8, 1)), z, solver=solver, batch_ndim=1)


def test_weak_coupling_is_refused_in_single_precision() -> None:
    rng = np.random.default_rng(0)
    rates = np.linspace(0.0, 0.9, BATCH, dtype=np.float32)[:, None]
    x = rng.normal(size=(BATCH, WIDTH)).astype(np.float32) + 2

    def f(h: Any, z: Any) -> Any:
        return z[0] * np.tanh(h) + z[1] + np.float32(1e-3) * h.mean(0)

    with pytest.raises(ValueError, match=r"other residuals|couples"):
        ic.solve(f, np.zeros_like(x), (rates, x), solver=ic.Compacting(ic.Anderson(check=False)), batch_ndim=1)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "vmap"])
def test_transforms_of_torch_take_the_solver_alone(transform: str) -> None:
    x = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)[:, None]

    def value(x: torch.Tensor, solver: Any) -> torch.Tensor:
        f = lambda h, z: 0.5 * torch.sin(h) + z  # noqa: E731
        return ic.fixed_point(f, torch.zeros_like(x), x, solver=solver, gradient=ic.Implicit(), batch_ndim=1).value

    def run(solver: Any) -> torch.Tensor:
        if transform == "vmap":
            return torch.func.vmap(lambda x: value(x, solver))(torch.stack([x, 2 * x]))
        function = (lambda x: value(x, solver).sum()) if transform == "grad" else (lambda x: value(x, solver))
        return getattr(torch.func, transform)(function)(x)

    torch.testing.assert_close(run(ic.Compacting(ic.Anderson(rtol=1e-9))), run(ic.Anderson(rtol=1e-9)))


def test_a_layer_of_jax_takes_the_solver_alone() -> None:
    """F is traced for one number of rows, which an operation that is compiled for itself depends on."""
    x = jnp.full((8, 1), 0.2).at[0].set(0.9)

    def loss(z: Any, solver: Any) -> Any:
        f = lambda h, z: z[0] * jax.nn.relu(h * z[1]) + 1.0  # noqa: E731
        solution = ic.fixed_point(f, jnp.zeros((8, 1)), z, solver=solver, gradient=ic.Implicit(), batch_ndim=1)
        return solution.value.sum()

    inner = ic.FixedPointIteration()
    got, expected = (jax.grad(loss)((x, 0.5), s)[0] for s in (ic.Compacting(inner, batched=(True, False)), inner))
    np.testing.assert_allclose(got, expected)


def test_a_certificate_of_a_layer_takes_the_solver_alone() -> None:
    layer = ict.ImplicitLayer(_Cell(), solver=ic.Compacting(ic.Anderson()), gradient=ic.Neumann())
    assert layer.certify(torch.rand(2, WIDTH + 1), torch.zeros(2, WIDTH)).gradient == ic.Neumann()


def test_a_solver_with_a_loop_of_its_own_is_refused() -> None:
    class Own(ic.FixedPointIteration):
        def solve(self, problem: Any, h0: Any, z: Any, *, trace: bool = False) -> Any:
            return super().solve(problem, h0, z, trace=trace)

    with pytest.raises(TypeError, match="which Own replaces"):
        ic.Compacting(Own())


@dataclass(frozen=True, kw_only=True)
class Flat(Momentum):
    """A memory whose samples have no axis of their own."""

    def init(self, system: Any, x: Any) -> Any:
        return super().init(system, x) | {"flat": system.space.xp.reshape(x[0], (-1,))}


def test_memory_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(TypeError, match="the memory of Flat among 40 samples"):
        Layer(NUMPY).solve(ic.Compacting(Flat(rtol=1e-9), batched=(True, False)))


def test_an_error_of_f_says_how_many_rows_it_got() -> None:
    mask = np.array([[0.1], [0.1], [0.1], [0.9]])

    def f(h: Any, z: Any) -> Any:
        if len(h) != len(mask):
            raise RuntimeError("the mask has 4 rows")
        return mask * np.sin(h) + 1.0

    with pytest.raises(RuntimeError, match="the mask has 4 rows") as caught:
        ic.solve(f, np.zeros((4, 1)), None, solver=ic.Compacting(ic.FixedPointIteration()), batch_ndim=1)
    assert "called with 1 of 4 rows" in caught.value.__notes__[0]


# Both tolerances are zero, and samples end by a test of the user's own, or by a number of steps for each.

ENDED_BY_THE_USER = [
    ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=40, stop=lambda h, f: np.linalg.norm(f - h, axis=-1) < 1e-3),
    ic.steps(np.array([1, 1, 0, 2, 1, 1, 3, 40])),
]
RATES = np.array([[0.1], [0.1], [0.1], [0.1], [0.1], [0.2], [0.9], [1.01]])


@pytest.mark.parametrize("solver", ENDED_BY_THE_USER, ids=["stop", "steps"])
def test_samples_that_only_the_user_ends_leave(solver: ic.Solver) -> None:
    rows: list[int] = []

    def f(h: Any, z: Any) -> Any:
        rows.append(len(h))
        return z * h + 1

    plain = ic.solve(f, np.zeros((8, 1)), RATES, solver=solver, batch_ndim=1)
    assert rows == [8] * 40
    rows.clear()
    found = ic.solve(f, np.zeros((8, 1)), RATES, solver=ic.Compacting(solver), batch_ndim=1)
    assert sum(rows) < 0.5 * 8 * 40
    assert found.stats.evaluations == len(rows) == 41
    assert found.aux is None
    for name in ("steps", "residual", "tolerance"):
        np.testing.assert_array_equal(getattr(found.stats, name), getattr(plain.stats, name))
    np.testing.assert_array_equal(found.status, plain.status)
    np.testing.assert_array_equal(found.value, plain.value)


@pytest.mark.parametrize("solver", ENDED_BY_THE_USER, ids=["stop", "steps"])
def test_other_values_are_refused_where_only_the_user_ends_samples(solver: ic.Solver) -> None:
    """Also of samples that run out of steps, whose value is a step past the point whose residual is told."""
    shifts = np.arange(1.0, 9.0)[:, None]
    solver = ic.Compacting(solver)
    with pytest.raises(ValueError, match="F of all rows has other residuals"):
        ic.solve(lambda h, z: z * h + shifts[: len(h)], np.zeros((8, 1)), RATES, solver=solver, batch_ndim=1)

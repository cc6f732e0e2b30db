"""Recursive models in PyTorch, trained with the library and by hand: the same parameters, bit for bit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import recursive_loops as by_hand
import recursive_models as library
import torch
from cells import SelfAttention
from torch import Tensor, nn

import implicit_core as ic
from implicit_core.adapters import torch as ict

BATCH, WIDTH, TOKENS, STEPS = 4, 8, 5, 20


class Net(nn.Module):
    """A layer with one hidden layer, a residual connection and a normalization; what is injected is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, injected: Tensor) -> Tensor:
        u = h + injected
        return nn.functional.rms_norm(u + self.second(nn.functional.silu(self.first(u))), (WIDTH,))


class Mixer(nn.Module):
    """Channels are mixed, and then time, by a linear recurrence; h is (batch, time, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.channels.weight, gain=0.5)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        u, gate = torch.tanh(self.channels(h) + x), torch.sigmoid(self.gate(x))
        before, mixed = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            before = gate[:, t] * before + (1 - gate[:, t]) * u[:, t]
            mixed.append(before)
        return torch.stack(mixed, 1)


class Recurrent(nn.Module):
    """A cell that sees its previous state and an input; h is (batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.before = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.inner.weight, gain=0.5)

    def forward(self, h: Tensor, inputs: tuple[Tensor, Tensor]) -> Tensor:
        previous, x = inputs
        return torch.tanh(self.inner(h) + self.before(previous) + x)


class Model(nn.Module):
    def __init__(self, *cells: nn.Module) -> None:
        super().__init__()
        self.embed, self.head, self.cells = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2), nn.ModuleList(cells)


def constant(state: Any) -> Any:
    return tuple(map(constant, state)) if isinstance(state, tuple) else state.detach()


def until_converged(cell: library.Cell, h: Tensor, x: Any, rtol: float, most: int) -> Tensor:
    """Plain iteration without a graph until each sample has converged; such a sample keeps its point."""
    norm = lambda a: torch.linalg.vector_norm(a.flatten(1), dim=1)  # noqa: E731
    with torch.no_grad():
        for step in range(most):
            f = cell(h, x)
            residual, tolerance = norm(f - h), rtol * norm(f) + 1e-3 * rtol
            if step == 0:  # the residual also has to fall
                cap = torch.maximum(min(max(10 * rtol, 0.1), 0.5) * residual, 2 * tolerance)
            active = residual > torch.minimum(tolerance, cap)
            if not active.any() or step == most - 1:
                return h
            h = torch.where(active.view(-1, *[1] * (h.ndim - 1)), f, h)
    raise AssertionError


def damped(cell: library.Cell, h: Tensor, x: Any, k: int, lam: float) -> Tensor:
    for _ in range(k):
        h = torch.add((1 - lam) * h, cell(h, x), alpha=lam)
    return h


def fp_rnn(cell: library.Cell, h: Tensor, x: Any) -> Tensor:
    return cell(until_converged(cell, h, x, 0.01, 30), x)


def implicit_language_model(cell: library.Cell, x: Tensor, trained: bool) -> Tensor:
    h = torch.zeros_like(x)
    if trained:
        return damped(cell, until_converged(cell, h, x, 0.05, 32), x, 4, 0.8)
    return damped(cell, constant(by_hand.recur(constant, cell, h, x, 4, 0)), x, 1, 0.8)


# A loop advances a state by one training step: (cells, state, injected input, draws) -> state.

Advance = Callable[[nn.ModuleList, Any, Tensor, "Draws"], Any]


@dataclass
class Draws:
    """What a training step draws, from a generator of its own."""

    step: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    def poisson(self, mean: float) -> int:
        return int(torch.poisson(torch.tensor(mean), generator=self.generator))

    def uniform(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))


@dataclass(frozen=True)
class Loop:
    name: str
    make: Callable[[], list[nn.Module]]
    library: Advance
    by_hand: Advance
    evaluations: Callable[[Draws], int] | None = None
    """Of the cells in one training step, where no tolerance stops the loop. It draws what the loop draws."""
    pair: bool = False
    sequence: bool = False


def graded(step: int) -> int:
    """HRM-Text's schedule, here from 2 graded steps to all 8."""
    return 2 + int(min(1.0, step / 10) * 6)


def depths_of_huginn(draws: Draws) -> tuple[int, int]:
    return draws.poisson(2.0), draws.uniform(1, 3)


def depths_of_fpdm(draws: Draws) -> tuple[int, int]:
    return draws.uniform(0, 4), draws.uniform(1, 3)


def depths_of_parcae(draws: Draws) -> tuple[Tensor, Tensor]:
    """Of each sequence."""
    n = torch.poisson(torch.full((BATCH,), 1.5), generator=draws.generator).long()
    return n, torch.randint(1, 4, (BATCH,), generator=draws.generator)


def parcae(cell: nn.Module, x: Tensor, draws: Draws) -> Tensor:
    h, (n, k) = draws.normal(x), depths_of_parcae(draws)
    most = int(n.max()), int(k.max())
    return by_hand.parcae(constant, torch.where, cell, h, x, n[:, None], k[:, None], most)


LOOPS = [
    Loop(
        "HRM",
        lambda: [Net(), Net()],
        lambda cells, state, x, draws: library.hrm(*cells, state, x),
        lambda cells, state, x, draws: by_hand.hrm(constant, *cells, state, x),
        lambda draws: 2 * 3 + 2,
        pair=True,
    ),
    Loop(
        "TRM",
        lambda: [Net()],
        lambda cells, state, x, draws: library.trm(*cells, state, x),
        lambda cells, state, x, draws: by_hand.trm(constant, *cells, state, x),
        lambda draws: 3 * 4,
        pair=True,
    ),
    Loop(
        "EqR",
        lambda: [Net()],
        lambda cells, state, x, draws: library.trm(
            library.noisy(cells[0], draws.normal), (draws.normal(x), draws.normal(x)), x
        ),
        lambda cells, state, x, draws: by_hand.trm(
            constant,
            lambda h, x: 0.95 * cells[0](h, x) + 0.05 * h + 0.01 * draws.normal(h),
            (draws.normal(x), draws.normal(x)),
            x,
        ),
        lambda draws: 3 * 4,
        pair=True,
    ),
    Loop(
        "Huginn",
        lambda: [Net()],
        lambda cells, state, x, draws: library.recur(cells[0], draws.normal(x), x, *depths_of_huginn(draws)),
        lambda cells, state, x, draws: by_hand.recur(constant, cells[0], draws.normal(x), x, *depths_of_huginn(draws)),
        lambda draws: (draws.normal(torch.empty(BATCH, WIDTH, dtype=torch.float64)), sum(depths_of_huginn(draws)))[1],
    ),
    Loop(
        "Parcae",
        lambda: [Net()],
        lambda cells, state, x, draws: library.parcae(cells[0], draws.normal(x), x, *depths_of_parcae(draws)),
        lambda cells, state, x, draws: parcae(cells[0], x, draws),
        lambda draws: (
            draws.normal(torch.empty(BATCH, WIDTH, dtype=torch.float64)),
            sum(int(n.max()) for n in depths_of_parcae(draws)),
        )[1],
    ),
    Loop(
        "HRM-Text",
        lambda: [Net(), Net()],
        lambda cells, state, x, draws: library.hrm_text(*cells, x, torch.ones_like(x), graded(draws.step)),
        lambda cells, state, x, draws: by_hand.hrm_text(constant, *cells, x, torch.ones_like(x), graded(draws.step)),
        lambda draws: 2 * 3 + 2,
    ),
    Loop(
        "FPDM",
        lambda: [Net()],
        lambda cells, state, x, draws: library.recur(cells[0], state, x, *depths_of_fpdm(draws)),
        lambda cells, state, x, draws: by_hand.recur(constant, cells[0], state, x, *depths_of_fpdm(draws)),
        lambda draws: sum(depths_of_fpdm(draws)),
    ),
    Loop(
        "FP-RNN",
        lambda: [Mixer()],
        lambda cells, state, x, draws: library.fp_rnn(cells[0], torch.zeros_like(x), x),
        lambda cells, state, x, draws: fp_rnn(cells[0], torch.zeros_like(x), x),
        sequence=True,
    ),
    Loop(
        "FP-RNN, step by step",
        lambda: [Recurrent()],
        lambda cells, state, x, draws: torch.stack(
            library.fp_rnn_step_by_step(cells[0], torch.zeros_like(x[:, 0]), x.unbind(1)), 1
        ),
        lambda cells, state, x, draws: torch.stack(
            by_hand.step_by_step(fp_rnn, cells[0], torch.zeros_like(x[:, 0]), x.unbind(1)), 1
        ),
        sequence=True,
    ),
    Loop(
        "implicit language model",
        lambda: [SelfAttention(WIDTH, 0.8)],
        lambda cells, state, x, draws: library.implicit_language_model(
            cells[0], torch.zeros_like(x), x, draws.step >= 10
        ),
        lambda cells, state, x, draws: implicit_language_model(cells[0], x, draws.step >= 10),
        sequence=True,
    ),
]


@dataclass
class Trained:
    parameters: list[Tensor]
    evaluations: list[int]
    """Of the cells, in each training step."""


def batch(sequence: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, TOKENS) if sequence else (BATCH,)
    x, target = (torch.randn(*shape, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return x, target


def train(loop: Loop, advance: Advance) -> Trained:
    """Twenty steps, in which a state is carried on, as deep supervision does."""
    torch.manual_seed(0)
    model = Model(*loop.make()).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls[-1] += 1

    for cell in model.cells:
        cell.register_forward_pre_hook(count)
    x, target = batch(loop.sequence)
    state: Any = torch.zeros_like(model.embed(x)).detach()
    state = (state, state) if loop.pair else state
    draws = Draws()
    for step in range(STEPS):
        draws.step = step
        calls.append(0)
        state = advance(model.cells, state, model.embed(x), draws)
        loss = (model.head(state[0] if loop.pair else state) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = constant(state)
    return Trained([p.detach() for p in model.parameters()], calls)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_a_loop_trains_as_the_loop_by_hand_does(loop: Loop) -> None:
    """Bit for bit, and with as many evaluations: n + k where both are given, or as many as a tolerance takes."""
    ours, theirs = train(loop, loop.library), train(loop, loop.by_hand)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, theirs.parameters, strict=True))
    assert ours.evaluations == theirs.evaluations
    if loop.evaluations is not None:
        draws = Draws()
        assert ours.evaluations == [loop.evaluations(draws) for draws.step in range(STEPS)]


# TRM as it is trained: deep supervision, halting of each sample, averaged weights.


class Recursion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, state: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return library.recursion(self.net)(state, x)


class TRM(nn.Module):
    """An embedding, the recursions as a layer, and heads for the answer and for halting."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.answer, self.halt = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 1)
        # No check of the cell, which evaluates it once for each shape and mode: evaluations are counted here.
        self.layer = ict.ImplicitLayer(
            Recursion(), solver=ic.steps(2), eval_solver=ic.steps(5), gradient=ic.Unroll(1, 1.0), check=False
        )

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        state = self.layer(self.embed(x), h0=state)
        return state, self.answer(state[0]), self.halt(state[0])[:, 0]


class ByHand(TRM):
    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        cycles = 3 if self.training else 6
        state = by_hand.trm(constant, self.layer.cell.net, state, self.embed(x), cycles)
        return state, self.answer(state[0]), self.halt(state[0])[:, 0]


def reset_by_hand(carry: Any, fresh: Any, where: Tensor) -> Any:
    (y, z), *data = carry
    (y_0, z_0), *new = fresh
    reset = lambda a, b: torch.where(where[:, None], b, a)  # noqa: E731
    return ((reset(y, y_0), reset(z, z_0)), *map(reset, data, new))


def supervised(model: TRM, reset: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The parameters, the averaged ones, and when samples halted, after twenty steps of deep supervision."""
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draws = Draws()
    start = tuple(draws.normal(torch.empty(2, 1, WIDTH, dtype=torch.float64)).expand(2, BATCH, WIDTH))
    carry = (start, torch.zeros(BATCH, 3).double(), torch.zeros(BATCH, 2).double())
    halted, log = torch.ones(BATCH, dtype=torch.bool), []
    for _ in range(STEPS):
        puzzle = [draws.normal(data) for data in carry[1:]]
        state, x, target = reset(carry, (start, *puzzle), where=halted)
        state, answer, halt = model(x, state)
        error = (answer - target).square().sum(1)
        solved = (error.detach() < 1.5).double()
        loss = error.mean() + nn.functional.binary_cross_entropy_with_logits(halt, solved)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
        # The layer cuts its start from the graph, so the library needs no detach; the loop by hand cuts it as well.
        carry, halted = (state, x, target), halt.detach() > 0
        log.append(halted)
    with torch.no_grad():
        evaluated = averaged.eval()(carry[1], carry[0])[1]
    return list(model.parameters()), [*averaged.parameters(), evaluated], torch.stack(log)


def test_trm_with_deep_supervision_halting_and_averaged_weights() -> None:
    """A sample that halts gets a new puzzle and a new start. The averaged model, a copy, recurs longer."""
    results = []
    for kind, reset in ((TRM, ic.reset), (ByHand, reset_by_hand)):
        torch.manual_seed(0)
        results.append(supervised(kind().double(), reset))
    (ours, our_average, our_halts), (theirs, their_average, their_halts) = results
    assert all(torch.equal(a, b) for a, b in zip([*ours, *our_average], [*theirs, *their_average], strict=True))
    assert torch.equal(our_halts, their_halts)
    assert 0 < our_halts.sum() < our_halts.numel(), "some samples halt, and some go on"


def test_a_layer_of_recursions_counts_its_evaluations() -> None:
    model, calls = TRM().double(), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.layer.cell.register_forward_pre_hook(count)
    x = torch.ones(BATCH, 3).double()
    state = (torch.zeros(BATCH, WIDTH).double(),) * 2
    for mode, n in ((True, 3), (False, 6)):
        calls = 0
        model.train(mode)(x, state)
        assert calls == n


def test_eqr_chooses_among_restarts_by_the_last_step() -> None:
    torch.manual_seed(0)
    net = Net().double()
    x, restarts = torch.randn(BATCH, WIDTH).double(), 6
    starts = tuple(torch.randn(2, restarts, BATCH, WIDTH).double())
    found = library.eqr_restarts(library.noisy(net, Draws().normal), starts, x)
    draws = Draws()
    noisy = lambda h, x: 0.95 * net(h, x) + 0.05 * h + 0.01 * draws.normal(h)  # noqa: E731
    with torch.no_grad():
        before = by_hand.trm(constant, noisy, starts, x, cycles=3)
        last = by_hand.trm(constant, noisy, before, x, cycles=1)
    length = torch.cat([a - b for a, b in zip(last, before, strict=True)], -1).norm(dim=-1)
    best = length.argmin(0)
    assert len(best.unique()) > 1
    for a, b in zip(found, last, strict=True):
        assert torch.equal(a, b[best, torch.arange(BATCH)])


# Evaluation.


@pytest.fixture
def trained() -> TRM:
    """A model after twenty steps, in eval mode."""
    torch.manual_seed(0)
    model = TRM().double()
    supervised(model, ic.reset)
    return model.eval()


def test_states_and_residuals_by_depth_come_from_one_solve(trained: TRM) -> None:
    calls = 0

    def cell(state: Any, x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return trained.layer.cell(state, x)

    x = torch.randn(BATCH, 3).double()
    start = (torch.zeros(BATCH, WIDTH).double(),) * 2
    with torch.no_grad():
        injected = trained.embed(x)
        found = list(library.by_depth(cell, start, injected, 7))
        assert calls == 8
        state = start
        for value, residual in found:
            after = by_hand.trm(constant, trained.layer.cell.net, state, injected, cycles=1)
            difference = torch.cat([a - b for a, b in zip(after, state, strict=True)], 1)
            torch.testing.assert_close(residual, difference.norm(dim=1), rtol=1e-13, atol=0.0)
            assert all(torch.equal(a, b) for a, b in zip(value, state, strict=True))
            state = after
        answer = trained.answer(found[6][0][0])
        assert torch.equal(trained(x, start)[1], answer), "eval_solver makes 5 steps, and one more follows"


def test_samples_that_halt_leave_the_batch(trained: TRM) -> None:
    """A halting head as the test that ends samples. As many rows are evaluated as are left, and all once more."""
    net, rows = trained.layer.cell.net, []
    net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    x = torch.randn(32, WIDTH).double()
    start = (torch.zeros_like(x),) * 2
    with torch.no_grad():
        # A threshold of which some samples are beyond soon, some later, and some never.
        threshold = by_hand.trm(constant, net, start, x, cycles=12)[0][:, 0].quantile(0.4)
        halts = lambda state: state[0][:, 0] > threshold  # noqa: E731
        rows.clear()
        solution = library.until_halted(trained.layer.cell, start, x, halts, most=12)
        ours = sum(rows)
        rows.clear()
        states = []
        for i in range(32):
            state = tuple(part[i : i + 1] for part in start)
            for _ in range(12):
                after = by_hand.trm(constant, net, state, x[i : i + 1], cycles=1)
                if halts(state):
                    break
                state = after
            states.append(state)
        alone = len(rows)
    for a, b in zip(solution.value, zip(*states, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b), rtol=1e-10, atol=1e-12)
    halted = solution.status == ic.CONVERGED
    assert torch.equal(halted, halts(solution.value))
    assert 0 < halted.sum() < 32
    assert len(solution.stats.steps.unique()) > 2
    assert int(solution.stats.steps.sum()) * 4 == alone
    assert ours < 0.8 * 32 * 4 * 12
    assert ours <= 2 * alone + 32 * 4, "at least half of the rows are in use"


# torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients_of_trm(model: TRM, step: Callable[..., Tensor]) -> list[Tensor]:
    """Of three steps, whose states are carried on."""
    draws, found = Draws(), []
    state = (torch.zeros(BATCH, WIDTH).double(),) * 2
    for _ in range(3):
        model.zero_grad()
        x, target = (draws.normal(torch.empty(BATCH, n).double()) for n in (3, 2))
        state = step(x, target, state)
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("what", ["cell", "step"])
def test_compiled_gradients_are_the_eager_ones(what: str, fresh_compiler: None) -> None:
    torch.manual_seed(0)
    model = TRM().double()

    def step(x: Tensor, target: Tensor, state: Any) -> Any:
        state, answer, halt = model(x, state)
        loss = (answer - target).square().mean() + halt.square().mean()
        loss.backward()
        return constant(state)

    expected = gradients_of_trm(model, step)
    if what == "cell":
        model.layer.cell.net = torch.compile(model.layer.cell.net, backend="aot_eager")
    compiled = torch.compile(step, backend="aot_eager") if what == "step" else step
    found = gradients_of_trm(model, compiled)
    assert len(found) == 3 * len(list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

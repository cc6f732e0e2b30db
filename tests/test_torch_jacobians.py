"""Products with the Jacobian, and the whole of it, from the graph of one evaluation."""

from typing import Any

import pytest
import torch
from torch import Tensor

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.adapters.torch import jacobian
from implicit_core.adapters.torch.jacobian import GraphJacobian

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    """As within a solve. Where autograd records, products go forward."""
    with torch.no_grad():
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(sum(shape)))


def pair(h: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Two leaves of a sample, which depend on one another."""
    a, b = h
    return torch.sin(z * b.sum(-1, keepdim=True) * a), a[..., :2] * b


def pair_jacobian(h: tuple[Tensor, Tensor], z: float) -> Tensor:
    """Of one sample, by hand."""
    a, b = h
    slope = z * torch.cos(z * b.sum() * a)
    above = torch.cat([torch.diag(slope * b.sum()), (slope * a)[:, None].expand(3, 2)], dim=1)
    below = torch.cat([torch.diag(b), torch.zeros(2, 1, dtype=DOUBLE), torch.diag(a[:2])], dim=1)
    return torch.cat([above, below])


@pytest.mark.parametrize("most", [1 << 22, 7])
def test_the_matrix_of_each_sample(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(jacobian, "MOST_NUMBERS", most)
    h = draw(4, 3), draw(4, 2)
    at = ict.problem(pair, batch_ndim=1).linearize(h, torch.tensor(0.7, dtype=DOUBLE))
    expected = torch.stack([pair_jacobian(sample, 0.7) for sample in zip(*h, strict=True)])
    torch.testing.assert_close(at.matrix_h(), expected)
    u = draw(4, 3), draw(4, 2)
    for _ in range(2):
        torch.testing.assert_close(
            torch.cat(at.jvp_h(u), dim=1), torch.einsum("sij,sj->si", expected, torch.cat(u, dim=1))
        )


def test_newton_takes_the_same_steps_with_the_matrix_as_with_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In units, and with an image whose numbers are ordered in memory as they are not in C."""
    h0 = (draw(2, 3, 2, 2).contiguous(memory_format=torch.channels_last), 1e3 * draw(2, 2))

    def f(h: Any, z: Any) -> Any:
        image, tail = h
        mixed = image.flip(1) * 0.3 + 1e-3 * tail[:, :, None, None].sum(1, keepdim=True)
        return torch.tanh(mixed) + z, 1e3 * torch.sin(1e-3 * tail + image.mean((1, 2))) * 0.2

    def g(h: Any, z: Any) -> Any:
        return tuple(1e-4 * (x - y) for x, y in zip(h, f(h, z), strict=True))

    solver, scale, z = ic.Newton(rtol=1e-12), (1.0, 1e3), torch.tensor(0.4, dtype=DOUBLE)

    def solved() -> list[Any]:
        return [
            ic.solve(ict.problem(f, batch_ndim=1, scale=scale), h0, z, solver=solver),
            ic.root(g, h0, z, solver=solver, batch_ndim=1, scale=scale, g_scale=(1e-4, 0.1)),
        ]

    made, matrix = [], GraphJacobian.matrix

    def counted(self: GraphJacobian) -> Any:
        made.append(matrix(self))
        return made[-1]

    monkeypatch.setattr(GraphJacobian, "matrix", counted)
    by_matrix = solved()
    assert len(made) == sum(int(solution.stats.evaluations) - 1 for solution in by_matrix)  # but where it ends
    assert all(isinstance(each, Tensor) for each in made)
    monkeypatch.setattr(GraphJacobian, "matrix", lambda *_: None)
    for one, other in zip(by_matrix, solved(), strict=True):
        assert torch.all(one.status == ic.CONVERGED)
        assert int(one.stats.evaluations) == int(other.stats.evaluations) < 10
        for a, b in zip(one.value, other.value, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [ic.Newton(rtol=1e-10), ic.NewtonKrylov(rtol=1e-10)], ids=repr)
def test_sparse_operations_have_neither_forward_mode_nor_a_rule_of_vmap(solver: ic.Solver) -> None:
    n = 5
    dense = 3 * torch.eye(n, dtype=DOUBLE) - torch.diag(torch.ones(n - 1, dtype=DOUBLE), 1)
    a = dense.to_sparse()
    solution = ic.root(
        lambda x, z: torch.sparse.mm(a, x) + x**3 - z, torch.zeros(n, 1, dtype=DOUBLE), 1.0, solver=solver
    )
    x = solution.value
    assert solution.converged
    torch.testing.assert_close(dense @ x + x**3, torch.ones(n, 1, dtype=DOUBLE), rtol=1e-8, atol=0)


class Square(torch.autograd.Function):
    """Its backward leaves the graph, so that a second derivative would be zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return (2 * ctx.saved_tensors[0] * v).detach()

    @staticmethod
    def jvp(ctx: Any, u: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * u


def test_forward_mode_differentiates_an_autograd_function() -> None:
    h, u = draw(4), draw(4) + 1
    at = ict.problem(lambda h, z: Square.apply(h)).linearize(h, None)
    torch.testing.assert_close(at.jvp_h(u), 2 * h * u)
    assert at.matrix_h() is None


def test_forward_mode_replaces_second_derivatives_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def missing(self: GraphJacobian) -> Any:
        tries.append(self)
        raise RuntimeError("the derivative of a backward is not implemented")

    monkeypatch.setattr(GraphJacobian, "_pullback_with_graph", missing)
    h, u = draw(4), draw(4)
    at = ict.problem(lambda h, z: torch.sin(h)).linearize(h, None)
    for _ in range(2):
        torch.testing.assert_close(at.jvp_h(u), torch.cos(h) * u)
    assert len(tries) == 1


def test_hooks_of_f_are_a_part_of_its_jacobian() -> None:
    """As of its pullback. The product is the adjoint of that, and makes its graph once."""
    called: list[Tensor] = []

    def f(h: Tensor, z: Any) -> Tensor:
        h = 2 * h
        if h.requires_grad:
            h.register_hook(lambda v: called.append(v) or 100 * v)
        return torch.sin(h)

    h, u = draw(4), draw(4)
    at = ict.problem(f).linearize(h, None)
    slope = 200 * torch.cos(2 * h)
    for _ in range(3):
        torch.testing.assert_close(at.jvp_h(u), slope * u)
    assert len(called) == 1
    torch.testing.assert_close(at.matrix_h(), torch.diag(slope))
    torch.testing.assert_close(at.vjp_h(u), slope * u)


def of_sparse(h: Tensor) -> Tensor:
    """A matrix with the values h: autograd takes its backward for constant."""
    places = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return (torch.sparse_coo_tensor(places, h, (4, 4)) @ torch.ones(4, 1, dtype=DOUBLE)).flatten() ** 2


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_backward_that_autograd_takes_for_constant_is_noticed() -> None:
    """Its second derivative is no error, but zero. Forward mode has no rule for it, and says so."""
    h, u = draw(4), draw(4)
    at = ict.problem(lambda h, z: of_sparse(h)).linearize(h, None)
    with pytest.raises(NotImplementedError, match="forward AD"):
        at.jvp_h(u)
    torch.testing.assert_close(at.matrix_h(), torch.diag(2 * h))
    solution = ic.root(lambda x, z: of_sparse(x) + x - 2, torch.ones(4, dtype=DOUBLE), None, solver=ic.Newton())
    torch.testing.assert_close(solution.value, torch.ones(4, dtype=DOUBLE))


AROUND = {
    "sinc": (torch.sinc, 0.0),
    "where": (lambda h: torch.where(h == 0, 1.0, torch.sin(h) / h), 0.0),
    "std": (lambda h: h + 0.5 * h.std(), 1.0),
    "norm": (lambda h: h + h.norm(p=3), 0.0),
}


@pytest.mark.parametrize("name", AROUND)
def test_products_are_finite_where_forward_mode_is(name: str) -> None:
    """The pullback's own pullback is NaN at some points, and so are some matrices."""
    function, place = AROUND[name]
    h, u = torch.full((4,), place, dtype=DOUBLE), draw(4)
    at = ict.problem(lambda h, z: function(h)).linearize(h, None)
    torch.testing.assert_close(at.jvp_h(u), torch.func.jvp(function, (h,), (u,))[1])
    solution = ic.root(lambda x, z: function(x) - 3 * x - 1, h, None, solver=ic.Newton())
    assert solution.converged


def test_products_in_inference_mode() -> None:
    with torch.inference_mode():
        h, u = draw(4), draw(4)
        at = ict.problem(lambda h, z: h**3).linearize(h, None)
        torch.testing.assert_close(at.jvp_h(u), 3 * h**2 * u)
        torch.testing.assert_close(at.matrix_h(), torch.diag(3 * h**2))


def test_a_function_that_does_not_depend_on_h_changes_no_products() -> None:
    """What f closes over may come out of an ``autograd.Function``, such as another implicit layer."""
    inner = Square.apply(draw(4).requires_grad_())
    h, u = draw(4), draw(4)
    at = ict.problem(lambda h, z: h**2 + inner).linearize(h, None)
    torch.testing.assert_close(at.matrix_h(), torch.diag(2 * h))
    torch.testing.assert_close(at.jvp_h(u), 2 * h * u)


@pytest.mark.parametrize(
    "solver", [ic.Newton(rtol=1e-10), ic.NewtonKrylov(rtol=1e-10), ic.Broyden(rtol=1e-10)], ids=repr
)
@pytest.mark.filterwarnings("ignore")  # of Dynamo, of its own access to .grad
def test_a_compiled_function_after_a_layer(solver: ic.Solver) -> None:
    """Dynamo once took code compiled while a layer looked on for that of a solve, with other operations."""

    def cell(h: Tensor, x: Tensor) -> Tensor:
        return 2 * h - x + 0.5 * torch.tanh(h)

    compiled = torch.compile(cell, backend="eager")
    for scale in (1.0, 2.0, 3.0):
        z = scale * torch.linspace(0.1, 1, 4, dtype=DOUBLE)
        found = ict.root(compiled, torch.zeros(4, dtype=DOUBLE), z, solver=solver)
        assert found.converged
        assert float(cell(found.value, z).norm()) <= 1e-8


def test_where_autograd_records_products_have_a_graph() -> None:
    h, u = draw(4), draw(4).requires_grad_()
    z = draw(4).requires_grad_()
    at = ict.problem(lambda h, z: z * h**2).linearize(h, z)
    with torch.enable_grad():
        along = at.jvp_h(u)
        by_u, by_z = torch.autograd.grad(along.sum(), (u, z))
    torch.testing.assert_close(by_u, (2 * z * h).detach())
    torch.testing.assert_close(by_z, (2 * h * u).detach())
    assert not at.jvp_h(u).requires_grad


@pytest.mark.parametrize("odd", [0.0, float("nan")], ids=["no pullback", "NaN"])
def test_a_sample_without_a_pullback_leaves_the_others_as_they_are(odd: float) -> None:
    """``sinc`` has none at zero. To the last bit, as forward mode differs by rounding."""
    weight, z, u = draw(7, 7), draw(3, 7), draw(3, 7)

    def f(h: Tensor, z: Tensor) -> Tensor:
        return torch.sinc(h @ weight.T) * torch.softmax(h, 1) - z

    usual = draw(3, 1) + torch.linspace(0, 1, 7, dtype=DOUBLE)
    unusual = torch.where(torch.tensor([[False], [True], [False]]), odd, usual)
    by_usual, by_unusual = (ict.problem(f, batch_ndim=1).linearize(h, z).jvp_h(u) for h in (usual, unusual))
    forward = torch.func.jvp(lambda h: f(h, z), (unusual,), (u,))[1]
    assert torch.equal(by_usual[::2], by_unusual[::2])
    assert not torch.equal(forward[::2], by_usual[::2])
    torch.testing.assert_close(by_unusual, forward, equal_nan=True)
    solved = [ic.solve(ict.problem(f, batch_ndim=1), h, z, solver=ic.Newton(rtol=1e-10)) for h in (usual, unusual)]
    assert torch.equal(solved[0].value[::2], solved[1].value[::2])
    assert solved[1].converged[1] if odd == 0 else solved[1].status[1] == ic.NONFINITE

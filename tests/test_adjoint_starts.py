"""A start of the adjoint solve saves products and changes no gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library

import implicit_core as ic

N = 30
WEIGHTS = np.random.default_rng(0).normal(size=(N, N)) / 15
Z = np.random.default_rng(1).normal(size=(2, N))


def solution() -> np.ndarray:
    h = np.zeros_like(Z)
    for _ in range(400):
        h = np.tanh(h @ WEIGHTS.T + Z)
    return h


H = solution()


def adjoint(v: np.ndarray) -> np.ndarray:
    """w by dense linear algebra, the gradient in a term that is added to F."""
    jacobian = (1 - H**2)[..., None] * WEIGHTS
    return np.linalg.solve(np.swapaxes(np.eye(N) - jacobian, -1, -2), v[..., None])[..., 0]


class Counting(ic.GMRES):
    """GMRES that notes how many products its solves took."""

    def run(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().run(*arguments, **keywords)
        COUNTS.append(result.products)
        return result


COUNTS: list[int] = []
COUNTING = Counting(rtol=1e-12, restart=N)


def counted(problem: ic.Problem[Any, Any], h: Any, z: Any, v: Any, x0: Any) -> tuple[Any, int]:
    """The gradient, and the products of the pullback."""
    COUNTS.clear()
    return ic.Implicit(COUNTING, x0=x0).vjp(problem, h, z)[1](v), sum(COUNTS)


@pytest.mark.parametrize("scale", [None, np.logspace(-0.3, 0.3, N)], ids=["", "scale"])
@pytest.mark.parametrize("kind", [ic.Problem, ic.RootProblem])
def test_the_solution_as_a_start_costs_one_product(kind: Any, scale: Any, library: Library) -> None:
    """The start is the gradient in a term that is added to F, or to g."""
    weights, is_root = library.array(WEIGHTS), kind is ic.RootProblem
    xp = library.xp

    def f(h: Any, z: Any) -> Any:
        value = xp.tanh(h @ weights.T + z[0])
        return 3 * (h - value) + z[1] if is_root else value + z[1]

    def vjp(h: Any, z: Any, v: Any) -> Any:
        through = v * (1 - xp.tanh(h @ weights.T + z[0]) ** 2)
        return (3 * (v - through @ weights), (-3 * through, v)) if is_root else (through @ weights, (through, v))

    units = None if scale is None else library.array(scale)
    problem = kind(f, vjp=vjp, batch_ndim=1, scale=units)
    h, z, v = library.array(H), (library.array(Z), library.array(0 * Z)), library.array(np.ones_like(Z))
    (cold, w), most = counted(problem, h, z, v, None)
    expected = adjoint(np.ones_like(Z))
    np.testing.assert_allclose(library.numpy(w), -expected / 3 if is_root else expected, rtol=1e-6)
    for x0, least, limit in [(w, 1, 1), (w * (1 + 1e-5), 2, 0.85 * most), (w * 1e6, most + 1, most + 1)]:
        (warm, _), products = counted(problem, h, z, v, x0)
        np.testing.assert_allclose(library.numpy(warm), library.numpy(cold), rtol=1e-6)
        assert least <= products <= limit


def at_solution(problem: Any, h0: Any, z: Any) -> Any:
    """A solver that knows the solution."""
    return h0


def test_a_start_in_torch_in_both_orders() -> None:
    weights, h = torch.asarray(WEIGHTS), torch.asarray(H)
    z, b = torch.asarray(Z).requires_grad_(), torch.zeros(2, N, dtype=torch.float64, requires_grad=True)
    direction = torch.asarray(np.random.default_rng(2).normal(size=(2, N)))

    def derivatives(x0: Any) -> tuple[Any, Any, Any]:
        COUNTS.clear()
        layer = ic.fixed_point(
            lambda h, z: torch.tanh(h @ weights.T + z) + b, h, z, solver=at_solution,
            gradient=ic.Implicit(COUNTING, x0=x0), batch_ndim=1,
        ).value  # fmt: skip
        grad, w = torch.autograd.grad((layer**2).sum(), (z, b), create_graph=True)
        first = sum(COUNTS)
        return w, first, (grad.detach(), torch.autograd.grad((grad * direction).sum(), z)[0])

    w, cold, expected = derivatives(None)
    np.testing.assert_allclose(w.detach().numpy(), adjoint(2 * H), rtol=1e-9)
    # A start that has a graph is a constant all the same.
    again, products, found = derivatives(w)
    assert products == 1 < cold
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-7, atol=1e-10)
    # Each of mapped cotangents starts there.
    cotangents = torch.stack([torch.asarray(2 * H), torch.ones(2, N, dtype=torch.float64)])
    layer = ic.fixed_point(
        lambda h, z: torch.tanh(h @ weights.T + z), h, z, solver=at_solution,
        gradient=ic.Implicit(COUNTING, x0=again), batch_ndim=1,
    ).value  # fmt: skip
    rows = torch.vmap(lambda v: torch.autograd.grad(layer, z, v)[0])(cotangents)
    np.testing.assert_allclose(rows[0].numpy(), expected[0].numpy(), rtol=1e-9)

    def loss(z: Any) -> Any:  # whose transform leaves the start out
        gradient = ic.Implicit(COUNTING, x0={"of": z}["of"])
        solver = ic.Anderson(rtol=1e-12)
        return (ic.fixed_point(lambda h, z: torch.tanh(h @ weights.T + z), h, z, solver=solver, gradient=gradient,
                               batch_ndim=1).value ** 2).sum()  # fmt: skip

    np.testing.assert_allclose(torch.func.grad(loss)(z.detach()).numpy(), expected[0].numpy(), rtol=1e-7)


def test_a_start_in_jax() -> None:
    """A pytree made in the function that is traced, mapped, and differentiated twice, in few products."""
    weights = jnp.asarray(WEIGHTS)

    def f(h: Any, z: Any) -> Any:
        return {"h": jnp.tanh(h["h"] @ weights.T + z[0]) + z[1]}

    def derivatives(h: Any, z: Any, w: Any, b: Any, steps: Any) -> Any:
        def loss(z: Any, b: Any) -> Any:
            gradient = ic.Implicit(ic.GMRES(rtol=1e-10, restart=N, max_steps=steps), x0={"h": w})
            return jnp.sum(ic.fixed_point(f, {"h": h}, (z, b), solver=at_solution, gradient=gradient).value["h"] ** 2)

        grads = jax.grad(loss, argnums=(0, 1))
        return grads(z, b), jax.jvp(lambda z: grads(z, b)[0], (z,), (jnp.ones(N),))[1]

    zeros, h, z = jnp.zeros((2, N)), jnp.asarray(H), jnp.asarray(Z)
    mapped = jax.jit(jax.vmap(derivatives, in_axes=(0, 0, 0, 0, None)))
    (grad, w), along = mapped(h, z, zeros, zeros, 200)
    np.testing.assert_allclose(w, adjoint(2 * H), rtol=1e-7)
    (again, _), along_again = mapped(h, z, w, zeros, 200)
    np.testing.assert_allclose(again, grad, rtol=1e-7)
    np.testing.assert_allclose(along_again, along, rtol=1e-6, atol=1e-9)
    # With one product there is a gradient only where the start is the solution.
    few = jax.jit(jax.vmap(lambda *a: derivatives(*a)[0][0], in_axes=(0, 0, 0, 0, None)))
    np.testing.assert_allclose(few(h, z, w, zeros, 1), grad, rtol=1e-7)
    assert np.all(np.isnan(few(h, z, zeros, zeros, 1)))


def test_a_start_is_part_of_the_record() -> None:
    first, second, other = (ic.Implicit(x0={"h": x}) for x in (np.ones(2), np.ones(2), np.zeros(2)))
    assert first == second != other != ic.Implicit()
    assert repr(ic.Implicit(x0=np.ones(2))) == repr(ic.Implicit())[:-1] + ", x0=float64[2])"
    with pytest.raises(TypeError, match="holds an array in x0, so it has no hash"):
        hash(first)


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        (np.ones(3), ValueError, r"x0 of Implicit must have the shape of h, \(2,\), got \(3,\)"),
        (np.ones(2, dtype=np.float32), TypeError, "x0 of Implicit must have the dtype of h, float64, got float32"),
        ([np.ones(2)], TypeError, "x0 of Implicit must have the structure of h"),
        (torch.ones(2), TypeError, "x0 of Implicit must hold arrays of numpy"),
        ("w", TypeError, "x0 must be an array, or a pytree of arrays"),
    ],
)
def test_what_is_no_start_is_refused(x0: Any, error: type[Exception], message: str) -> None:
    problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    with pytest.raises(error, match=message):
        ic.Implicit(x0=x0).vjp(problem, np.ones(2), np.ones(2))


def test_a_pushforward_starts_from_zero() -> None:
    problem = ic.Problem(lambda h, z: 0.5 * h + z, jvp=lambda h, z, dh, dz: 0.5 * dh + dz)
    COUNTS.clear()
    tangent = ic.Implicit(COUNTING, x0=2 * np.ones(2)).jvp(problem, np.ones(2), np.ones(2), np.ones(2))[1]
    np.testing.assert_allclose(tangent, 2.0)
    assert COUNTS == [2]

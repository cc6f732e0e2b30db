"""Complex states by their real and imaginary parts, against complex linear algebra and loops in complex arithmetic."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import JAX, NUMPY, TORCH, Library

import implicit_core as ic
from implicit_core.adapters import torch as ict

N = 4
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape) + 1j * RNG.standard_normal(shape)


A, B, SHIFT = 0.4 * normal(N, N) / N, 0.4 * normal(N, N) / N, normal(N)
TIGHT = ic.Anderson(rtol=1e-12, atol=1e-13)


def real_matrix(linear: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A map that is linear over the reals, as a matrix for (real, imaginary)."""
    columns = [linear(x) for x in (*np.eye(N), *(1j * np.eye(N)))]
    return np.concatenate([np.real(columns), np.imag(columns)], axis=1).T


def root_of_affine() -> np.ndarray:
    """h = A h + B conj(h) + z, by a dense solve of twice the size."""
    matrix = np.eye(2 * N) - real_matrix(lambda h: A @ h + B @ h.conj())
    x = np.linalg.solve(matrix, np.concatenate([SHIFT.real, SHIFT.imag]))
    return x[:N] + 1j * x[N:]


def complex_array(library: Library, x: np.ndarray) -> Any:
    return library.array(np.asarray(x, complex))


@pytest.mark.parametrize(
    "solver", [ic.FixedPointIteration(rtol=1e-12), TIGHT, ic.Broyden(rtol=1e-12)], ids=["plain", "anderson", "broyden"]
)
def test_an_affine_map_with_a_conjugate(library: Library, solver: ic.Solver) -> None:
    xp = library.xp

    def f(h: Any, z: Any) -> Any:
        return z[0] @ h + z[1] @ xp.conj(h) + z[2]

    z = tuple(complex_array(library, x) for x in (A, B, SHIFT))
    h0 = ic.to_real(complex_array(library, np.zeros(N)))
    solution = ic.solve(ic.as_real(f), h0, z, solver=solver)
    assert bool(solution.converged)
    found = library.numpy(ic.to_complex(solution.value))
    assert found.dtype == np.complex128
    np.testing.assert_allclose(found, root_of_affine(), atol=1e-10)


def test_newton_with_derivatives_of_the_parts() -> None:
    """∂F/∂h of a map of the parts is A dh + B conj(dh), and its transpose Aᴴ v + Bᵀ conj(v)."""

    def product(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        dh, dz = ic.to_complex((dh, dz))
        return ic.to_real(A @ dh + B @ dh.conj() + dz)

    def pullback(h: Any, z: Any, v: Any) -> Any:
        v = ic.to_complex(v)
        return ic.to_real(A.conj().T @ v + B.T @ v.conj()), v

    problem = ic.Problem(ic.as_real(lambda h, z: A @ h + B @ h.conj() + z), jvp=product, vjp=pullback)
    h0 = ic.to_real(np.zeros(N, complex))
    solution = ic.solve(problem, h0, SHIFT, solver=ic.NewtonKrylov(rtol=1e-12))
    np.testing.assert_allclose(ic.to_complex(solution.value), root_of_affine(), atol=1e-10)
    v = normal(N)
    exact = ic.Implicit(ic.GMRES(rtol=1e-13)).vjp(problem, solution.value, SHIFT)[1](ic.to_real(v))
    transposed = np.linalg.inv(np.eye(2 * N) - real_matrix(lambda h: A @ h + B @ h.conj())).T
    wanted = transposed @ np.concatenate([v.real, v.imag])
    np.testing.assert_allclose(np.concatenate([exact.real, exact.imag]), wanted, atol=1e-10)
    series = ic.Neumann(120, 1.0).vjp(problem, solution.value, SHIFT)[1](ic.to_real(v))
    np.testing.assert_allclose(series, exact, atol=1e-10)
    assert ic.check(problem, h0, SHIFT).ok


@pytest.mark.parametrize(
    "x", [1 + 2j, complex(0.0, -0.0), complex(np.inf, 1.0), complex(2.0, np.nan), complex(1, np.inf)]
)
def test_there_and_back(library: Library, x: complex) -> None:
    if library.name == "array_api_strict" and not np.isfinite(x):
        x = 3j  # the standard cannot join infinite parts
    tree = {
        "psi": complex_array(library, np.full((2, 3), x)),
        "rest": [library.array(np.ones(2)), library.array(np.arange(3))],
        "number": complex_array(library, np.asarray(x)),
        "none": None,
    }
    parts = ic.to_real(tree)
    assert isinstance(parts["psi"], ic.ComplexParts)
    assert parts["rest"][0] is tree["rest"][0]
    assert "float64" in str(parts["psi"].real.dtype)
    back = ic.to_complex(parts)
    assert back["none"] is None
    for a, b in zip(jax.tree.leaves(library.numpy(back)), jax.tree.leaves(library.numpy(tree)), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    one = ic.to_complex(ic.to_real(tree["psi"]))
    np.testing.assert_array_equal(library.numpy(one), library.numpy(tree["psi"]))


def test_single_precision() -> None:
    for library in (NUMPY, TORCH, JAX):
        x = library.array(np.asarray([1 + 2j, 3.0], np.complex64))
        parts = ic.to_real(x)
        assert "float32" in str(parts.imag.dtype)
        assert "complex64" in str(ic.to_complex(parts).dtype)
        solution = ic.solve(ic.as_real(lambda h, z: 0.5j * h + z), parts, x)
        np.testing.assert_allclose(
            library.numpy(ic.to_complex(solution.value)), library.numpy(x) / (1 - 0.5j), rtol=1e-4
        )


# Gradients. The maps conjugate, take absolute values, or neither, and z holds complex and real arrays.


def holomorphic(xp: Any, h: Any, z: Any) -> Any:
    return 0.5 * xp.sin(z["W"] @ h) + z["b"]


def conjugating(xp: Any, h: Any, z: Any) -> Any:
    return z["W"] @ xp.conj(h) * z["r"] / (1 + xp.abs(h) ** 2) + z["b"]


MAPS = {"holomorphic": holomorphic, "conjugating": conjugating}
PARAMETERS = {"W": 1.5 * A, "b": 0.5 * SHIFT, "r": np.linspace(0.5, 1.0, N)}
TARGET = normal(N)


def torch_loss(layer: Callable[[Any], Any], z: dict[str, Any]) -> dict[str, Any]:
    leaves = {name: torch.asarray(x).requires_grad_() for name, x in z.items()}
    loss = (layer(leaves) * torch.asarray(TARGET)).real.sum() + layer(leaves).abs().square().sum()
    loss.backward()
    return {name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in leaves.items()}


def unrolled(f: Callable[[Any, Any], Any], h: Any, z: Any) -> Any:
    for _ in range(150):
        h = f(h, z)
    return h


ESTIMATORS = {
    "implicit": ic.Implicit(ic.GMRES(rtol=1e-13)),
    "neumann": ic.Neumann(120, 1.0),
    "unroll": ic.Unroll(120, 1.0),
    "bptt": ic.BPTT(120),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", MAPS)
def test_gradients_in_pytorch(name: str, estimator: ic.Estimator) -> None:
    def f(h: Any, z: Any) -> Any:
        return MAPS[name](torch, h, z)

    zeros = torch.zeros(N, dtype=torch.complex128)

    def layer(z: Any) -> Any:
        solution = ic.fixed_point(ic.as_real(f), ic.to_real(zeros), z, solver=TIGHT, gradient=estimator)
        return ic.to_complex(solution.value)

    got, wanted = (torch_loss(g, PARAMETERS) for g in (layer, lambda z: unrolled(f, zeros, z)))
    assert np.abs(wanted["W"].imag).max() > 0.01
    for key, x in wanted.items():
        np.testing.assert_allclose(got[key], x, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.promotes("complex numbers")
def test_gradients_in_jax(name: str, estimator: ic.Estimator) -> None:
    def f(h: Any, z: Any) -> Any:
        return MAPS[name](jnp, h, z)

    zeros, z = jnp.zeros(N, complex), {key: jnp.asarray(x) for key, x in PARAMETERS.items()}

    def layer(z: Any) -> Any:
        solution = ic.fixed_point(ic.as_real(f), ic.to_real(zeros), z, solver=TIGHT, gradient=estimator)
        return ic.to_complex(solution.value)

    def by_loop(z: Any) -> Any:
        return jax.lax.scan(lambda h, _: (f(h, z), None), zeros, length=150)[0]

    def loss(layer: Callable[[Any], Any], z: Any) -> Any:
        h = layer(z)
        return jnp.sum((h * TARGET).real) + jnp.sum(jnp.abs(h) ** 2)

    wanted = jax.jit(jax.grad(lambda z: loss(by_loop, z)))(z)
    got = [jax.jit(jax.grad(lambda z: loss(layer, z)))(z)]
    if estimator == ic.Implicit(ic.GMRES(rtol=1e-13)):
        got.append(jax.grad(lambda z: loss(layer, z))(z))
        tangents = jax.tree.map(lambda x: jnp.ones_like(x) * (1 + 0.5j if jnp.iscomplexobj(x) else 1), z)
        pushed, right = (jax.jit(lambda z, g=g: jax.jvp(g, (z,), (tangents,))[1])(z) for g in (layer, by_loop))
        np.testing.assert_allclose(pushed, right, atol=1e-9)
    for gradient in got:
        assert jax.tree.structure(gradient) == jax.tree.structure(wanted)
        for key, x in wanted.items():
            np.testing.assert_allclose(gradient[key], x, atol=1e-9, err_msg=key)


def test_the_two_conventions() -> None:
    """Of z itself as the state: PyTorch's gradient of |z|² is 2 z, and JAX's its conjugate."""
    z = 1 + 2j

    def loss(h0: Any, z: Any) -> Any:
        h = ic.fixed_point(
            ic.as_real(lambda h, z: 0.5 * h + z), ic.to_real(h0), z, solver=TIGHT, gradient=ic.Implicit()
        )
        h = ic.to_complex(h.value)
        return (h * h.conj()).real.sum()

    tensor = torch.asarray([z], dtype=torch.complex128, requires_grad=True)
    loss(torch.zeros(1, dtype=torch.complex128), tensor).backward()
    assert tensor.grad is not None
    np.testing.assert_allclose(tensor.grad.numpy(), [8 * z], rtol=1e-5)
    gradient = jax.grad(lambda z: loss(jnp.zeros(1, complex), z))(jnp.asarray([z]))
    np.testing.assert_allclose(gradient, [8 * z.conjugate()], rtol=1e-5)


@pytest.mark.promotes("complex numbers")
def test_a_batch_of_mixed_leaves() -> None:
    """A wave and a real field, three samples of different difficulty, one of them without a finite start."""

    def f(h: Any, z: Any) -> Any:
        psi, field = h["psi"], h["field"]
        return {"psi": 0.5j * psi * field[:, None] + z, "field": 0.3 * (psi * psi.conj()).real.sum(axis=1) / 10 + 0.1}

    z = np.array([[0.1, 0.2j], [1.0, -1.0j], [0.5 + 0.5j, 1.0]])
    h0 = {"psi": np.zeros((3, 2), complex), "field": np.zeros(3)}
    h0["psi"][2, 1] = complex(0, np.nan)
    solution = ic.solve(ic.as_real(f), ic.to_real(h0), z, batch_ndim=1, solver=TIGHT)
    assert solution.status.tolist() == [ic.CONVERGED, ic.CONVERGED, ic.NONFINITE]
    h = ic.to_complex(solution.value)
    again = f(h, z)
    for key in h:
        np.testing.assert_allclose(h[key][:2], again[key][:2], atol=1e-10)
    mapped = jax.vmap(
        lambda h, z: ic.to_complex(
            ic.solve(
                ic.as_real(lambda h, z: jax.tree.map(lambda x: x[0], f(jax.tree.map(lambda x: x[None], h), z[None]))),
                ic.to_real(h),
                z,
                solver=TIGHT,
            ).value
        )
    )(jax.tree.map(lambda x: jnp.asarray(x[:2]), h0), jnp.asarray(z[:2]))
    for key in h:
        np.testing.assert_allclose(mapped[key], h[key][:2], atol=1e-10)


def test_tensors_that_f_closes_over() -> None:
    weight = torch.asarray(A, dtype=torch.complex128).requires_grad_()
    z = torch.asarray(SHIFT)

    def f(h: Any, z: Any) -> Any:
        return torch.tanh(weight @ h) + z

    zeros = torch.zeros(N, dtype=torch.complex128)
    loop = unrolled(f, zeros, z).abs().sum()
    (wanted,) = torch.autograd.grad(loop, weight)
    solution = ict.fixed_point(
        ic.as_real(f), ic.to_real(zeros), z, solver=TIGHT, gradient=ic.Implicit(ic.GMRES(rtol=1e-13))
    )
    (got,) = torch.autograd.grad(ic.to_complex(solution.value).abs().sum(), weight)
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=1e-9)


def test_aux() -> None:
    f = ic.as_real(lambda h, z: (A @ h + z, {"phase": h * 1j}), has_aux=True)
    solution = ic.fixed_point(f, ic.to_real(np.zeros(N, complex)), SHIFT, solver=TIGHT, has_aux=True)
    root = np.linalg.solve(np.eye(N) - A, SHIFT)
    np.testing.assert_allclose(ic.to_complex(solution.value), root, atol=1e-10)
    np.testing.assert_allclose(solution.aux["phase"], 1j * root, atol=1e-10)
    with pytest.raises(TypeError, match=r"must return a pair \(h, aux\)"):
        ic.solve(ic.as_real(lambda h, z: h, has_aux=True), ic.to_real(np.zeros(N, complex)), None)


def test_refusals_name_the_helper() -> None:
    zeros = np.zeros(2, complex)
    with pytest.raises(
        TypeError, match=r"complex128; solve for.*implicit_core.as_real\(f\), with implicit_core.to_real\(h0\)"
    ):
        ic.solve(lambda h, z: h, zeros, None)
    with pytest.raises(TypeError, match="as_real"):
        ic.fixed_point(lambda h, z: h, torch.zeros(2, dtype=torch.complex64), torch.ones(2))
    with pytest.raises(TypeError, match="as_real"):
        ic.fixed_point(lambda h, z: h, jnp.zeros(2, complex), jnp.ones(2))
    with pytest.raises(TypeError, match="the result of f must have the dtype of h, complex128, got float64"):
        ic.solve(ic.as_real(lambda h, z: abs(h)), ic.to_real(zeros), None)
    with pytest.raises(ValueError, match="the result of f must have the shape of h"):
        ic.solve(ic.as_real(lambda h, z: h[:1]), ic.to_real(zeros), None)
    with pytest.raises(TypeError, match=r"make the Problem of as_real\(f\)"):
        ic.as_real(ic.Problem(lambda h, z: h))
    with pytest.raises(TypeError, match="f must be callable"):
        ic.as_real(None)  # type: ignore[arg-type]
    for convert in (ic.to_real, ic.to_complex):
        with pytest.raises(TypeError, match="tree must be an array"):
            convert({"a": 1.0})

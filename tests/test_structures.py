"""F may return lists where h0 has tuples, and the other way round, and named tuples: the leaves are the same."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optree
import pytest
import torch
from libraries import JAX, NUMPY, TORCH, Library
from torch import Tensor

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters import torch as ict
from implicit_core.adapters.jax.problem import compiled_once


class Pair(NamedTuple):
    a: Any
    b: Any


class Other(NamedTuple):
    a: Any
    b: Any


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "named": Pair,
    "nested": lambda a, b: {"x": [(a,), Pair(b, None)]},
    "other nested": lambda a, b: {"x": ([a], (b, None))},
}
ALIKE = [
    ("tuple", "list"),
    ("list", "tuple"),
    ("named", "tuple"),
    ("tuple", "named"),
    ("list", "named"),
    ("nested", "other nested"),
]
SOLVERS = [
    ic.FixedPointIteration(rtol=1e-12),
    ic.Anderson(rtol=1e-12),
    ic.Broyden(rtol=1e-12),
    ic.NewtonKrylov(rtol=1e-12),
    ic.Compacting(ic.FixedPointIteration(rtol=1e-12), batched=False),
]
ESTIMATORS = [
    ic.Neumann(4, 0.5),
    ic.Unroll(4, 0.5),
    ic.Unroll(1, 1.0),
    ic.Unroll(4, 1.0, recompute=True),
    ic.BPTT(40),
    ic.Implicit(ic.GMRES(rtol=1e-12)),
    ic.NeumannSeries(rtol=1e-10),
]
A, B = np.array([[0.2, 0.9], [0.8, 0.1]]), np.array([[0.3], [0.7]])


def parts(tree: Any) -> list[Any]:
    """The two arrays of a state, whatever holds them."""
    return [leaf for leaf in optree.tree_leaves(tree) if hasattr(leaf, "dtype")]


def map_of(tanh: Any, kind: str) -> Any:
    def f(h: Any, z: Any) -> Any:
        a, b = parts(h)
        return KINDS[kind](tanh(0.4 * a + 0.2 * b + z), tanh(0.3 * b - 0.1 * a[:, :1] + z))

    return f


def problem(library: Library, kind: str, at: str) -> ic.Problem:
    """F, and its derivatives, all of which return ``kind``; ``at`` is the structure of h0."""
    f = map_of(library.xp.tanh, kind)

    def slopes(h: Any, z: Any) -> Any:
        assert optree.tree_structure(h) == optree.tree_structure(KINDS[at](z, z)), "a state in the structure of h0"
        return [1 - x * x for x in parts(f(h, z))]

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        (s, t), (a, b) = slopes(h, z), parts(dh)
        return KINDS[kind](s * (0.4 * a + 0.2 * b + dz), t * (0.3 * b - 0.1 * a[:, :1] + dz))

    def vjp(h: Any, z: Any, v: Any) -> Any:
        assert optree.tree_structure(v) == optree.tree_structure(KINDS[at](z, z))
        (s, t), (a, b) = slopes(h, z), parts(v)
        xp, a, b = library.xp, s * a, t * b
        first = 0.4 * a + xp.concat([-0.1 * b, xp.zeros_like(b)], axis=1)
        return KINDS[kind](first, 0.2 * xp.sum(a, axis=1, keepdims=True) + 0.3 * b), xp.sum(a) + xp.sum(b)

    return ic.Problem(f, vjp=vjp, jvp=jvp, batch_ndim=1)


def start(library: Library, kind: str) -> Any:
    return KINDS[kind](*library.array((A, B)))


def root() -> list[np.ndarray]:
    h: Any = (A, B)
    for _ in range(200):
        h = map_of(np.tanh, "tuple")(h, 0.3)
    return list(h)


def alike(library: Library, tree: Any, kind: str, expected: list[np.ndarray], atol: float = 1e-9) -> None:
    assert optree.tree_structure(tree) == optree.tree_structure(KINDS[kind](0.0, 0.0))
    for x, y in zip(parts(tree), expected, strict=True):
        np.testing.assert_allclose(library.numpy(x), y, rtol=0, atol=atol)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(("at", "kind"), ALIKE)
def test_a_solution_has_the_structure_of_h0(library: Library, at: str, kind: str, solver: Any) -> None:
    z = library.array(np.array(0.3))
    solution = ic.solve(problem(library, kind, at), start(library, at), z, solver=solver)
    alike(library, solution.value, at, root())
    callable_solver = ic.solve(problem(library, kind, at), start(library, at), z, solver=iterated)
    alike(library, callable_solver.value, at, root(), 1e-6)


def iterated(problem: Any, h: Any, z: Any) -> Any:
    for _ in range(30):
        h = problem(h, z)
    return h


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(("at", "kind"), ALIKE)
def test_products_of_estimators(library: Library, at: str, kind: str, gradient: ic.Estimator) -> None:
    """As those of a problem whose functions all return the structure of h0."""
    z, h = library.array(np.array(0.3)), library.array(KINDS[at](*root()))
    found = []
    for each in (kind, at):
        given = problem(library, each, at)
        value, pullback = gradient.vjp(given, h, z)
        z_bar = pullback(KINDS[each](*parts(h)))
        pushed, tangent = gradient.jvp(given, h, z, z)
        shapes = [optree.tree_structure(tree) for tree in (value, pushed, tangent, gradient.value(given, h, z))]
        assert set(shapes) == {optree.tree_structure(h)}
        found.append([*map(library.numpy, (*parts(value), z_bar, *parts(tangent)))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(("at", "kind"), [("tuple", "list"), ("list", "named"), ("nested", "other nested")])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_layer_of_torch(at: str, kind: str, gradient: ic.Estimator) -> None:
    def value(z: Tensor, each: str) -> Any:
        f = map_of(torch.tanh, each)
        return ic.fixed_point(f, start(TORCH, at), z, gradient=gradient, solver=SOLVERS[1], batch_ndim=1).value

    def loss(z: Tensor, each: str) -> Tensor:
        return sum((x.square().sum() for x in parts(value(z, each))), torch.zeros(()))

    z, found = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), []
    for each in (kind, at):
        (first,) = torch.autograd.grad(loss(z, each), z, create_graph=True)
        (second,) = torch.autograd.grad(first, z)
        found.append([first, second])
        if not getattr(gradient, "recompute", False):
            found[-1] += [
                torch.func.grad(loss)(z, each),
                torch.func.jvp(lambda z, each=each: loss(z, each), (z,), (z,))[1],
            ]
    alike(TORCH, optree.tree_map(torch.detach, value(z, kind)), at, root(), 1e-6)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_layer_of_torch_under_autocast() -> None:
    weight = torch.eye(2, dtype=torch.float32)

    def f(h: Any, z: Any) -> Any:
        return [torch.tanh(0.5 * h[0] @ weight + z)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = ic.fixed_point(f, (torch.zeros(3, 2),), torch.ones(()), batch_ndim=1, solver=ic.Anderson(rtol=1e-2))
    assert isinstance(solution.value, tuple)
    assert solution.value[0].dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_a_layer_of_jax(gradient: ic.Estimator, compiled: bool) -> None:
    def loss(z: Any, each: str) -> Any:
        f = map_of(jax.numpy.tanh, each)
        solution = ic.fixed_point(f, start(JAX, "tuple"), z, gradient=gradient, solver=SOLVERS[1], batch_ndim=1)
        assert type(solution.value) is tuple
        return sum((x**2).sum() for x in solution.value)

    transform: Any = jax.jit if compiled else lambda f: f
    found = [transform(jax.value_and_grad(lambda z, each=each: loss(z, each)))(0.3) for each in ("list", "tuple")]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("make", [ict.problem, icj.problem, lambda f: icj.problem(compiled_once(f))])
def test_problems_of_adapters(make: Any) -> None:
    library = TORCH if make is ict.problem else JAX
    h, z = start(library, "tuple"), library.array(np.array(0.3))
    found = []
    for kind in ("list", "tuple"):
        at = make(map_of(library.xp.tanh, kind)).linearize(h, z)
        results = at.value, at.vjp_h(h), at.jvp_h(h), at.jvp_z(z), at.jvp(h, z), at.vjp(h)[0]
        assert {type(result) for result in results} == {tuple}
        found.append([library.numpy(x) for x in optree.tree_leaves((results, at.vjp_z(h)))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


REFUSED: dict[str, tuple[Any, Any]] = {
    "another length": ((1, 2), [1, 2, 3]),
    "a dict": ((1, 2), {"a": 1, "b": 2}),
    "other keys": ({"a": (1, 2)}, {"b": [1, 2]}),
    "two named tuples": (Pair(1, 2), Other(1, 2)),
    "another depth": ((1, (2,)), [1, 2]),
    "an ordered dict": ({"a": (1,)}, collections.OrderedDict(a=[1])),
    "an array": ((1,), 1),
}


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("framework", [NUMPY, TORCH, JAX], ids=lambda library: library.name)
def test_other_differences_are_errors(framework: Library, name: str) -> None:
    x = framework.array(np.ones(2))
    h0, value = (optree.tree_map(lambda _: x, tree) for tree in REFUSED[name])
    with pytest.raises(TypeError, match="must have the structure of h0"):
        ic.solve(lambda h, z: value, h0, None)
    with pytest.raises(TypeError, match="must have the structure of h"):
        ic.fixed_point(lambda h, z: value, h0, None)


def test_numbers_of_a_list_become_arrays() -> None:
    """A Python float stands for an array without axes, also where a list stands for a tuple."""
    solution = ic.solve(lambda h, z: [0.5, 0.5 * h[1]], (np.array(1.0), np.ones(2)), None)
    assert solution.value[0] == 0.5
    assert isinstance(solution.value, tuple)

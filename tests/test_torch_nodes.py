"""Dataclasses, and other nodes of PyTorch's own pytrees, as states and inputs."""

import collections
import dataclasses
import subprocess
import sys
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.backends.torch import BACKEND


@dataclasses.dataclass
class Carry:
    high: Any
    low: Any


@dataclasses.dataclass
class Inputs:
    x: Any
    steps: int = 3
    other: Any = None


@dataclasses.dataclass
class Unregistered:
    high: Any
    low: Any


@dataclasses.dataclass
class Private:
    """A dataclass with a field that is no part of the pytree."""

    high: Any
    low: Any
    note: str = "default"


class Box:
    """No dataclass: a node with functions of its own."""

    def __init__(self, parts: list[Any], name: str) -> None:
        self.parts, self.name = parts, name


def register(kind: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.6 warns of a function that it calls itself
        torch.export.register_dataclass(kind)


register(Carry)
register(Inputs)
torch_pytree.register_pytree_node(Private, lambda h: ([h.high, h.low], None), lambda parts, _: Private(*parts))
torch_pytree.register_pytree_node(Box, lambda box: (box.parts, box.name), lambda parts, name: Box(list(parts), name))

KINDS: dict[str, Any] = {
    "dataclass": Carry,
    "dropped field": Private,
    "box": lambda a, b: Box([a, b], "name"),
    "nested": lambda a, b: {"carry": [Carry(a, (b,)), Carry(None, None)]},
}


def parts(h: Any) -> list[Tensor]:
    return [x for x in torch_pytree.tree_leaves(h) if isinstance(x, Tensor)]


def pair(h: Any, z: Any) -> tuple[Tensor, Tensor]:
    """F of two leaves, as a tuple."""
    a, b = parts(h)
    (x,) = parts(z)
    return torch.tanh(0.4 * b + 0.1 * a), torch.tanh(0.3 * a + x)


SOLVERS = [
    ic.FixedPointIteration(rtol=1e-12),
    ic.Anderson(rtol=1e-12),
    ic.Broyden(rtol=1e-12),
    ic.NewtonKrylov(rtol=1e-12),
    ic.Compacting(ic.Anderson(rtol=1e-12)),
    lambda problem, h, z: problem(problem(h, z), z),
]
ESTIMATORS = [
    ic.Neumann(4, 0.5),
    ic.Unroll(4, 0.5),
    ic.Unroll(4, 1.0, recompute=True),
    ic.Implicit(ic.GMRES(rtol=1e-12)),
    ic.BPTT(5),
]
X = torch.tensor([[0.3, -0.2], [0.9, 1.4]], dtype=torch.float64)


def both(make: Any, solve: Any) -> None:
    """A solve of states of a kind, and of tuples, which has the same numbers."""
    found = []
    for kind in (make, lambda a, b: (a, b)):
        x = X.clone().requires_grad_()
        value = solve(kind, kind(torch.zeros_like(X), torch.zeros_like(X)), x)
        assert type(value) is type(kind(0, 0))
        gradient = torch.autograd.grad(sum(leaf.square().sum() for leaf in parts(value)), x)[0]
        found.append([*(leaf.detach() for leaf in parts(value)), gradient])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    "solver", SOLVERS, ids=lambda solver: repr(solver) if isinstance(solver, ic.Solver) else "callable"
)
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.filterwarnings("ignore::implicit_core.ConvergenceWarning")
def test_states(name: str, solver: Any, gradient: ic.Estimator) -> None:
    def solve(kind: Any, h0: Any, x: Tensor) -> Any:
        options: Any = {"solver": solver, "gradient": gradient, "batch_ndim": 1}
        return ict.fixed_point(lambda h, x: kind(*pair(h, x)), h0, x, **options).value

    both(KINDS[name], solve)


@pytest.mark.parametrize("name", list(KINDS))
def test_layers(name: str) -> None:
    def solve(kind: Any, h0: Any, x: Tensor) -> Any:
        layer = ict.ImplicitLayer(lambda h, z: kind(*pair(h, z)), h0=lambda z: h0, solver=ic.Anderson(rtol=1e-12))
        return layer(Inputs(x, 3, None))

    both(KINDS[name], solve)


@pytest.mark.parametrize("gradient", [ic.Neumann(4, 0.5), ic.Unroll(4, 0.5), ic.Implicit()], ids=repr)
def test_products_of_a_problem(gradient: ic.Estimator) -> None:
    """Fields of z without a derivative have the cotangent None, as leaves of tuples have."""
    h, z = Carry(X, 0.5 * X), Inputs(X, 3, None)
    value, pullback = gradient.vjp(ict.problem(lambda h, z: Carry(*pair(h, z)), batch_ndim=1), h, z)
    expected = gradient.vjp(ict.problem(pair, batch_ndim=1), (X, 0.5 * X), (X,))[1]((X, X))
    z_bar = pullback(Carry(X, X))
    assert isinstance(value, Carry)
    assert isinstance(z_bar, Inputs)
    assert z_bar.steps is None
    assert z_bar.other is None
    assert torch.equal(z_bar.x, expected[0])
    tangent = gradient.jvp(ict.problem(lambda h, z: Carry(*pair(h, z)), batch_ndim=1), h, z, Inputs(X, 0, None))[1]
    assert isinstance(tangent, Carry)


def test_certificates_and_checks() -> None:
    problem = ict.problem(lambda h, z: Carry(*pair(h, z)), batch_ndim=1)
    flat = ict.problem(pair, batch_ndim=1)
    solution = ic.solve(problem, Carry(torch.zeros_like(X), torch.zeros_like(X)), X, solver=ic.Anderson(rtol=1e-12))
    h = solution.value
    ours, theirs = (
        ic.theory.certify(p, at, X, ic.Neumann(4, 0.5), steps=4) for p, at in ((problem, h), (flat, tuple(parts(h))))
    )
    assert torch.equal(ours.contraction.value, theirs.contraction.value)
    assert ours.condition_6.left.value == theirs.condition_6.left.value
    assert ic.check(lambda h, z: Carry(*pair(h, z)), h, X, batch_ndim=1).ok


def test_units_and_masked_arrays_in_a_dataclass() -> None:
    h0 = Carry(torch.zeros_like(X), torch.zeros_like(X))

    def residual(scale: Any, kind: Any, h0: Any) -> Tensor:
        problem = ic.Problem(lambda h, z: kind(*pair(h, z)), batch_ndim=1, scale=scale)
        return ic.solve(problem, h0, X, solver=ic.FixedPointIteration(max_steps=1)).stats.residual

    ours = residual(Carry(2.0, torch.tensor([1.0, 3.0])), Carry, h0)
    assert torch.equal(ours, residual((2.0, torch.tensor([1.0, 3.0])), lambda a, b: (a, b), tuple(parts(h0))))
    with pytest.raises(TypeError, match="z must not hold masked arrays"):
        ic.solve(lambda h, z: Carry(*pair(h, X)), h0, Inputs(np.ma.ones(2), other=X))


def test_registered_after_its_first_use() -> None:
    @dataclasses.dataclass
    class Late:
        high: Any
        low: Any

    h0 = Late(torch.zeros_like(X), torch.zeros_like(X))
    with pytest.raises(TypeError, match=r"register the dataclass Late as a pytree: torch.export.register_dataclass"):
        ict.fixed_point(lambda h, x: Late(*pair(h, x)), h0, X)
    register(Late)
    assert isinstance(ict.fixed_point(lambda h, x: Late(*pair(h, x)), h0, X).value, Late)


def test_registered_before_the_library_is_imported() -> None:
    program = """
import dataclasses, sys, torch
@dataclasses.dataclass
class Carry:
    high: torch.Tensor
    low: torch.Tensor
torch.export.register_dataclass(Carry)
assert "implicit_core" not in sys.modules
import implicit_core as ic
f = lambda h, x: Carry(torch.tanh(0.5 * h.low), torch.tanh(0.3 * h.high + x))
print(type(ic.fixed_point(f, Carry(torch.zeros(2), torch.zeros(2)), torch.ones(2)).value).__name__)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "Carry"


@pytest.mark.parametrize("xp", [torch, jnp], ids=["torch", "jax"])
def test_an_unregistered_dataclass_says_how_to_register_it(xp: Any) -> None:
    x = xp.ones(2)
    remedy = (
        r"(?m); register the dataclass Unregistered as a pytree: torch.export.register_dataclass\(Unregistered\), or "
        r"for JAX jax.tree_util.register_dataclass\(Unregistered\)$"
    )
    carry = Unregistered(x, x)
    for h0 in (carry, (x, carry)):
        with pytest.raises(TypeError, match=remedy):
            ic.fixed_point(lambda h, z: h, h0, x)
    with pytest.raises(TypeError, match=remedy):
        ic.solve(lambda h, z: h, carry, None)
    for h0 in (x, (x, x)):
        with pytest.raises(TypeError, match=remedy):
            ic.fixed_point(lambda h, z: carry, h0, x)


TREES: list[Any] = [
    {"b": 1, "a": (2, [3, None])},
    collections.OrderedDict(b=1, a=2),
    collections.defaultdict(list, b=1, a=2),
    collections.deque([1, (2, 3)]),
    [None, "text", 2.0, object, len],
]


@pytest.mark.parametrize("none_is_leaf", [False, True])
def test_other_containers_are_what_they_were(none_is_leaf: bool) -> None:
    for tree in TREES:
        leaves, structure = BACKEND.flatten(tree, none_is_leaf=none_is_leaf)
        assert (leaves, structure) == optree.tree_flatten(tree, none_is_leaf=none_is_leaf)
        assert BACKEND.unflatten(structure, leaves) == tree
        assert BACKEND.map(lambda *x: x, tree, tree) == optree.tree_map(lambda *x: x, tree, tree)


def test_dictionaries_are_sorted_whatever_pytorch_does() -> None:
    """PyTorch's namespace of optree keeps the order of insertion, where two equal dictionaries have other leaves."""
    import torch.utils._cxx_pytree  # noqa: F401  # switches it on

    one, other = BACKEND.flatten({"a": 1, "b": 2}), BACKEND.flatten({"b": 2, "a": 1})
    assert one == other
    assert one[0] == [1, 2]


def test_structures_of_dataclasses_compare_and_hash() -> None:
    def structure(h: Any) -> Any:
        return BACKEND.flatten(h)[1]

    for make in KINDS.values():
        assert structure(make(1, 2)) == structure(make(3, 4))
        assert hash(structure(make(1, 2))) == hash(structure(make(3, 4)))
    assert structure(Box([1], "a")) != structure(Box([1], "b"))
    assert structure(Carry(1, 2)) != structure(Private(1, 2))
    assert structure(Carry(1, None)) != structure(Carry(1, 2))

"""A function, with the parameters that the modules it refers to have now.

``torch.func.functional_call`` replaces the parameters of a module for the time of one call. A function that is
evaluated again after that call would find other parameters.
"""

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Iterable, Iterator
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicit_core.arrays import H, Z
from implicit_core.problem import Map

from .identity import IdentitySet

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that PyTorch gives to all modules."""


def with_present_parameters(f: Map[H, Z]) -> Map[H, Z]:
    """``f``, whose modules have their present parameters and buffers whenever it is called."""
    call = _Call(f)
    # Each module under one name, and each tensor under all names that it has in one: functional_call restores a module
    # with two names wrongly, if it looks for tied tensors itself.
    state = {
        f"{path}.{name}": x
        for path, part in call.named_modules()
        for own in (part.named_parameters, part.named_buffers)
        for name, x in own(recurse=False, remove_duplicate=False)
    }
    return lambda h, z: functional_call(call, state, (h, z), tie_weights=False)


class _Call(nn.Module, Generic[H, Z]):
    """A function as a module, whose submodules are those that the function refers to."""

    def __init__(self, f: Map[H, Z]) -> None:
        super().__init__()
        self.functions = (f,)  # in a tuple: an attribute that is a module would be registered under a second name
        found = modules_of(f)
        inner = {part for module in found for part in module.modules() if part is not module}
        self.modules_of_f = nn.ModuleList(module for module in found if module not in inner)

    def forward(self, h: H, z: Z) -> H:
        value: H = self.functions[0](h, z)
        return value


def modules_of(f: Map[H, Z]) -> list[nn.Module]:
    """The modules among the variables of a function, and among the variables of the functions it refers to."""
    return [x for x in _referenced(f) if isinstance(x, nn.Module)]


def trained_by(f: Map[H, Z]) -> list[Tensor]:
    """The tensors that require a gradient among these variables, and the parameters of these modules."""
    found = _referenced(f)
    parameters = [x for part in found if isinstance(part, nn.Module) for x in part.parameters()]
    closed_over = [x for x in found if isinstance(x, Tensor)]
    return [x for x in IdentitySet([*parameters, *closed_over]) if x.requires_grad]


def generators_of(f: Map[H, Z], z: object = None) -> list[torch.Generator]:
    """The random number generators in z, among the variables of a function, and in these modules.

    Attributes of a module or of another object may be generators, or lists, tuples and dictionaries of them.
    """
    found = _referenced((f, z), others := list[object]())
    parts = (part for module in found if isinstance(module, nn.Module) for part in module.modules())
    generators = [x for x in found if isinstance(x, torch.Generator)]
    for owner in itertools.chain(parts, others):
        attributes = vars(owner)
        generators += _generators_among(attributes[name] for name in attributes.keys() - _OF_EVERY_MODULE)
    return list(IdentitySet(generators))


def _generators_among(values: Iterable[object]) -> Iterator[torch.Generator]:
    """The generators among these values, and among those of the containers that the values are."""
    for value in values:  # a look at the types alone, since there may be many modules
        if type(value) is torch.Generator:
            yield value
        elif type(value) in (list, tuple, dict):
            items: Any = value.values() if isinstance(value, dict) else value
            yield from (x for x in items if type(x) is torch.Generator)


def _referenced(f: object, others: list[object] | None = None) -> list[nn.Module | Tensor | torch.Generator]:
    """What a function refers to. ``others`` is given the objects whose attributes are not looked at."""
    found: list[nn.Module | Tensor | torch.Generator] = []
    pending: list[Any] = [f]
    visited: IdentitySet[object] = IdentitySet()
    while pending:
        a = pending.pop()
        if a in visited:
            continue
        visited.add(a)
        if isinstance(a, (nn.Module, Tensor, torch.Generator)):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            pending += a
        elif isinstance(a, dict):
            pending += a.values()
        elif isinstance(a, functools.partial):
            pending += [a.func, a.args, a.keywords]
        elif inspect.ismethod(a):
            pending += [a.__func__, a.__self__ if isinstance(a.__self__, nn.Module) else vars(a.__self__)]
        elif inspect.isfunction(a):
            pending += _variables(a)
        elif callable(a) and not isinstance(a, type) and hasattr(a, "__dict__"):
            pending.append(vars(a))
        elif others is not None and hasattr(a, "__dict__") and not isinstance(a, (type, types.ModuleType)):
            others.append(a)
    return found


def _variables(f: types.FunctionType) -> list[object]:
    """The values of the global names, defaults and closure cells of a function; empty for one of PyTorch's own."""
    if (f.__module__ or "").partition(".")[0] == "torch":
        return []
    values = [f.__globals__[name] for name in f.__code__.co_names if name in f.__globals__]
    values += [*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
    for cell in f.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that is not assigned yet
            values.append(cell.cell_contents)
    return values

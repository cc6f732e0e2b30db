"""What a function closes over, and the same function with that as an argument."""

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Map

PyTree = Any
Tensors = tuple[Tensor, ...]
OnLeaves = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensors]

ANOTHER = (
    "f used another parameter when it was called again for a derivative than in the solve; if functional_call replaced "
    "it for a while, pass the module to fixed_point itself, or its parameters in z"
)


class Hoisted(NamedTuple):
    """One evaluation of F.

    Attributes
    ----------
    value
        F(h, z).
    externals
        All the tensors beside h that it is a function of: the leaves of z, and what f closes over.
    leaves
        Tells the leaves of autograd's graph that f made itself, as a layer within a layer does.
    """

    value: PyTree
    externals: Tensors
    leaves: Callable[[], list[Tensor]]


def hoist(f: Map, h: PyTree, z: PyTree, usable: Callable[[Tensor], bool]) -> Hoisted:
    """Evaluate F, and see what it is a function of.

    What f closes over is seen as it enters PyTorch's functions. Hidden is what compiled and scripted code holds.
    Tensors that are not ``usable``, as those that a vmap within f has wrapped, are nothing that f closes over.
    """
    with Watch(tensors(h)) as watch:
        value = f(h, z)
    watch.enter(tensors(value))  # f may return what it closes over, untouched
    found = {id(x): x for x in tensors(z)} | watch.outside
    return Hoisted(value, tuple(x for x in found.values() if usable(x)), watch.leaves)


def pure(f: Map, structure: Any, z: PyTree, seen: Sequence[Tensor], externals: Sequence[Tensor]) -> OnLeaves:
    """``f`` as a function of the leaves of h, and of tensors in the place of ``externals``.

    Parameters
    ----------
    f
        F.
    structure
        That of h.
    z
        Where the tensors of z stand.
    seen
        Those that :func:`hoist` found.
    externals
        Some of them.
    """
    known = {id(x) for x in seen}
    f = _with_modules_as_they_are(f, tensors(z), seen)

    def call(h_leaves: Sequence[Tensor], replacements: Sequence[Tensor]) -> Tensors:
        new = {id(old): x for old, x in zip(externals, replacements, strict=True)}

        def replace(x: Any) -> Any:
            if isinstance(x, nn.Parameter) and id(x) not in known:
                raise RuntimeError(ANOTHER)
            return new.get(id(x), x)

        with _Replace(replace):
            value = f(BACKEND.unflatten(structure, list(h_leaves)), BACKEND.map(replace, z))
        return tuple(new.get(id(x), x) for x in BACKEND.flatten(value)[0])

    return call


def has_storage(x: Tensor) -> bool:
    """Whether ``x`` is a dense tensor, and none that ``torch.func`` has wrapped."""
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def is_alive(x: Tensor) -> bool:
    """Whether ``x`` can be computed with: one that a vmap has wrapped can't be after it."""
    try:
        x.detach()
    except RuntimeError:
        return False
    return True


def tensors(tree: PyTree) -> list[Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in BACKEND.flatten(tree)[0] if isinstance(leaf, Tensor)]


def _with_modules_as_they_are(f: Map, z: Sequence[Tensor], seen: Sequence[Tensor]) -> Map:
    """``f`` with the parameters its modules have now: ``functional_call`` gives them others for the time of a call."""
    explicit = {id(x) for x in z}
    if all(isinstance(x, nn.Parameter) or id(x) in explicit for x in seen):
        return f
    call = _Call(f)
    parts = [part for _, part in call.named_modules(remove_duplicate=False)]
    if len(parts) > len(set(parts)):  # functional_call restores a module of two names wrongly: better not found at all
        return f
    state = dict(call.named_parameters()) | dict(call.named_buffers())
    return lambda h, z: functional_call(call, state, (h, z))


class _Call(nn.Module):
    """A function, with the modules it refers to."""

    def __init__(self, f: Map) -> None:
        super().__init__()
        self.functions = (f,)  # not an attribute of its own: a module would have one more name
        found = _modules(f)
        inner = {part for module in found for part in module.modules() if part is not module}
        self.modules_of_f = nn.ModuleList(module for module in found if module not in inner)

    def forward(self, h: PyTree, z: PyTree) -> PyTree:
        return self.functions[0](h, z)


def _modules(f: Any) -> list[nn.Module]:
    """The modules among the variables of a function, and of the functions among them."""
    found: list[nn.Module] = []
    pending: list[Any] = [f]
    visited: dict[int, Any] = {}  # with the objects, so that no id is given out anew
    while pending:
        a = pending.pop()
        if id(a) in visited:
            continue
        visited[id(a)] = a
        if isinstance(a, nn.Module):
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
    return found


def _variables(f: types.FunctionType) -> list[Any]:
    """What the names in a function of the user's stand for."""
    if f.__module__.partition(".")[0] == "torch":
        return []
    values = [f.__globals__[name] for name in f.__code__.co_names if name in f.__globals__]
    for cell in f.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that is yet to be assigned
            values.append(cell.cell_contents)
    return values


class Watch(TorchFunctionMode):
    """Notes the tensors that enter PyTorch's functions without having come out of one."""

    def __init__(self, inside: Sequence[Tensor]) -> None:
        super().__init__()
        self.outside: dict[int, Tensor] = {}
        self._inside = {id(x): weakref.ref(x) for x in inside}

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.enter(nested((args, tuple(kwargs.values()))))
        result = func(*args, **kwargs)
        for x in nested(result):
            self._inside[id(x)] = weakref.ref(x)
        return result

    def enter(self, arguments: Iterable[Tensor]) -> None:
        """Note those from outside."""
        for x in arguments:
            made = self._inside.get(id(x))  # an id alone may be that of a tensor that is gone
            if made is None or made() is not x:
                self.outside[id(x)] = x

    def leaves(self) -> list[Tensor]:
        """Tensors that came out of one, and require a gradient of their own."""
        alive = [x for made in self._inside.values() if (x := made()) is not None]
        return [x for x in alive if x.requires_grad and x.is_leaf]


class _Replace(TorchFunctionMode):
    """Hands PyTorch's functions other tensors than they are called with."""

    def __init__(self, replace: Callable[[Any], Any]) -> None:
        super().__init__()
        self._replace = replace

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(
            *(self._in(a) for a in args),
            **{name: self._in(a) for name, a in kwargs.items()},
        )

    def _in(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._replace(a)
        if next(nested(a), None) is None:
            return a
        if isinstance(a, dict):
            return {name: self._in(b) for name, b in a.items()}
        parts = [self._in(b) for b in a]
        return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)


def nested(a: Any) -> Iterator[Tensor]:
    """The tensors in an argument, or in a result."""
    if isinstance(a, Tensor):
        yield a
    elif isinstance(a, (list, tuple, dict)):
        for b in a.values() if isinstance(a, dict) else a:
            yield from nested(b)

"""Records of settings: in words, compared by value, and as nodes of pytrees whose leaves are arrays (Decision 110)."""

import importlib
import sys
import threading
from collections.abc import Callable
from dataclasses import Field, fields
from numbers import Real
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakKeyDictionary, WeakSet

from array_api_compat import array_namespace

UNHASHABLE = (
    "{kind} holds an array in {name}, so it has no hash: pass it to jit as an argument that is not static, or write a "
    "number, {name}=float(...), outside of the program that is traced"
)

Register = Callable[[type["Record"]], None]
"""Makes a class of records a node of a framework's pytrees."""

PLAIN = frozenset((float, int, bool, str, type(None)))
"""Classes of most settings, which are neither arrays nor records."""

_JOINING = {"jax": "implicit_core.backends.jax"}
"""Frameworks that registered nothing yet, and the modules that call :func:`subscribe`."""
_REGISTER: list[Register] = []
_KINDS: WeakSet[type["Record"]] = WeakSet()
"""The classes that have instances. A class is registered no earlier, so that its author can register it otherwise."""
_NAMES: WeakKeyDictionary[Any, dict[Any, tuple[str, ...]]] = WeakKeyDictionary()
_LOCK = threading.RLock()


class Record:
    """A frozen dataclass of settings.

    It shows a field with ``repr=False`` only where it is not the default. So what most users never set stays out of
    sight, and ``eval`` of the words still gives the record, unless it holds an array.

    Settings may be arrays, which a framework may trace: they are leaves of the record as a pytree, while numbers are
    part of its structure. Records compare by value. One that holds an array has no hash.
    """

    of_samples: ClassVar[frozenset[str]] = frozenset()
    """Settings of which each sample of a batch may have its own, in an array that broadcasts to the batch's shape."""

    def __new__(cls, *_args: Any, **_settings: Any) -> Self:
        """A new record, of a class that frameworks know as a node of their pytrees from now on."""
        if _JOINING:
            for framework, module in list(_JOINING.items()):
                if sys.modules.get(framework) is not None:
                    importlib.import_module(module)
                    _JOINING.pop(framework, None)
        if cls not in _KINDS:
            with _LOCK:
                for register in _REGISTER:
                    register(cls)
                _KINDS.add(cls)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Otherwise `dataclass` writes two that know nothing of arrays.
        for name in ("__eq__", "__hash__"):
            if name not in vars(cls):
                setattr(cls, name, getattr(Record, name))

    def __repr__(self) -> str:
        values = ((field, getattr(self, field.name)) for field in _fields(self))
        shown = (
            f"{field.name}={in_words(value)}"
            for field, value in values
            if field.repr or is_array(value) or value != field.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        kind: Any = type(self)
        return all(_same(getattr(self, name), getattr(other, name)) for name in _names(kind, _is_compared))

    def __hash__(self) -> int:
        kind: Any = type(self)
        names = _names(kind, _is_hashed)
        values = [getattr(self, name) for name in names]
        for name, value in zip(names, values, strict=True):
            if type(value) not in PLAIN and (is_array(value) or isinstance(value, Data)):
                raise TypeError(UNHASHABLE.format(kind=type(self).__name__, name=name))
        return hash((type(self), *values))


class Data(NamedTuple):
    """A pytree of arrays in a record, which is a node of a pytree in every framework."""

    tree: Any


class Rest:
    """A record without its leaves: the structure of a node."""

    def __init__(self, record: Record, leaves: tuple[str, ...]) -> None:
        self.kind: Any = type(record)
        self.leaves = leaves
        self.settings = {field.name: getattr(record, field.name) for field in _fields(record)}
        for name in leaves:
            del self.settings[name]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rest) or (self.kind, self.leaves) != (other.kind, other.leaves):
            return False
        return list(map(exact, self.settings.values())) == list(map(exact, other.settings.values()))

    def __hash__(self) -> int:
        names = _names(self.kind, _is_hashed)
        return hash((self.kind, self.leaves, *(self.settings[name] for name in names if name in self.settings)))

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def subscribe(register: Register) -> None:
    """From now on ``register`` is called with every class of records that has an instance, the existing ones included.

    Parameters
    ----------
    register
        Makes the class a node of a framework's pytrees, by :func:`flatten` and :func:`unflatten`.
    """
    with _LOCK:
        _REGISTER.append(register)
        for kind in list(_KINDS):
            register(kind)


def flatten(record: Record) -> tuple[tuple[Any, ...], Rest]:
    """The leaves of a record, its arrays and the records in it, and the rest."""
    names = vars(record).get("_leaves")
    if names is None:
        values = ((field.name, getattr(record, field.name)) for field in _fields(record))
        names = tuple(name for name, value in values if is_array(value) or isinstance(value, (Record, Data)))
    return tuple(getattr(record, name) for name in names), Rest(record, names)


def unflatten(rest: Rest, leaves: Any) -> Any:
    """The inverse of :func:`flatten`. Leaves may be anything, since a framework puts axes and types in their places."""
    record = object.__new__(rest.kind)
    settings = rest.settings | dict(zip(rest.leaves, leaves, strict=True))
    if rest.leaves:
        settings["_leaves"] = rest.leaves  # whatever stands for an array remains a leaf
    vars(record).update(settings)
    return record


def is_array(value: object) -> bool:
    """Whether a setting is an array. NumPy's scalars are numbers, and their classes have these attributes, too."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, (Real, type))


def exact(value: Any) -> tuple[type, Any]:
    """A value, to compare programs by: 1, 1.0 and True differ, and 0.0 from -0.0, while NaN equals itself."""
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def in_words(value: object) -> str:
    """A setting in words: of an array its type alone, ``float32[]``, since its numbers may not be known."""
    if isinstance(value, Data):
        leaves, _ = _flattened(value)
        words = ", ".join(map(in_words, leaves))
        return words if len(leaves) == 1 and leaves[0] is value.tree else f"<{words}>"
    if not is_array(value):
        return repr(value)
    array: Any = value
    return f"{str(array.dtype).rpartition('.')[2]}{list(array.shape)}"


def shown(number: Any) -> str:
    """A number in words, to six digits; an array as in :func:`in_words`."""
    return in_words(number) if is_array(number) else f"{number:g}"


def _fields(record: Any) -> tuple[Field[Any], ...]:
    return fields(record)


def _names(kind: Any, predicate: Callable[[Field[Any]], bool]) -> tuple[str, ...]:
    """The names of the fields that satisfy ``predicate``; kept, since a static argument is hashed at every call."""
    of_kind = _NAMES.setdefault(kind, {})
    if predicate not in of_kind:
        of_kind[predicate] = tuple(field.name for field in _fields(kind) if predicate(field))
    return of_kind[predicate]


def _is_compared(field: Field[Any]) -> bool:
    return field.compare


def _is_hashed(field: Field[Any]) -> bool:
    return field.compare if field.hash is None else field.hash


def _flattened(data: Data) -> tuple[list[Any], Any]:
    from .registry import flattened  # which imports this module

    return flattened(data.tree)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Data) and isinstance(b, Data):
        (leaves, structure), (others, other_structure) = _flattened(a), _flattened(b)
        return bool(structure == other_structure) and all(map(_same, leaves, others))
    if type(a) in PLAIN or not (is_array(a) or is_array(b)):
        return not is_array(b) and bool(a == b)
    if not (is_array(a) and is_array(b)) or tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    return bool(array_namespace(a).all(a == b))

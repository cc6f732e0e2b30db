"""Collections that compare their members by identity.

``==`` on tensors compares elementwise, so a dict or a set must not be asked whether two tensors are equal. All of these
collections keep the order of insertion.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class IdentityMap(Generic[K, V]):
    """A mapping whose keys are objects. It holds its keys, so that the id of a key is not reused."""

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        self._items = {id(key): (key, value) for key, value in items}

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K, default: V) -> V:
        """The value of ``key``, or ``default``."""
        item = self._items.get(id(key))
        return default if item is None else item[1]

    def setdefault(self, key: K, default: V) -> V:
        """The value of ``key``, which is first set to ``default`` if it has none."""
        return self._items.setdefault(id(key), (key, default))[1]


class IdentitySet(Generic[K]):
    """A set of objects. It holds its members, so that the id of a member is not reused."""

    def __init__(self, members: Iterable[K] = ()) -> None:
        self._members = {id(x): x for x in members}

    def __contains__(self, x: object) -> bool:
        return id(x) in self._members

    def __iter__(self) -> Iterator[K]:
        return iter(self._members.values())

    def add(self, x: K) -> None:
        """Make ``x`` a member."""
        self._members[id(x)] = x


class WeakIdentitySet(Generic[K]):
    """A set of objects that are not kept alive by it."""

    def __init__(self, members: Iterable[K] = ()) -> None:
        self._members = {id(x): weakref.ref(x) for x in members}

    def __contains__(self, x: object) -> bool:
        member = self._members.get(id(x))
        return member is not None and member() is x  # an object that is gone may have had this id

    def __iter__(self) -> Iterator[K]:
        return (x for member in list(self._members.values()) if (x := member()) is not None)

    def add(self, x: K) -> None:
        """Make ``x`` a member."""
        self._members[id(x)] = weakref.ref(x)

"""Collections of tensors by identity: equal tensors are different members, and an id is not mistaken for its object."""

import gc
import weakref
from typing import Any

import pytest
import torch

from implicit_core.adapters.torch.identity import IdentityMap, IdentitySet, WeakIdentitySet

SETS = [IdentitySet, WeakIdentitySet]


@pytest.mark.parametrize("kind", SETS)
def test_equal_tensors_are_different_members_in_the_order_of_insertion(kind: Any) -> None:
    tensors = [torch.ones(2) for _ in range(20)]
    members = kind(tensors[:10])
    for x in (*tensors[10:15], *tensors[:5]):
        members.add(x)
    assert [x is y for x, y in zip(members, tensors[:15], strict=True)] == [True] * 15
    assert [x in members for x in tensors] == [True] * 15 + [False] * 5


def test_a_map_of_equal_tensors() -> None:
    a, b, c = (torch.ones(2) for _ in range(3))
    numbers: IdentityMap[torch.Tensor, int] = IdentityMap([(a, 1), (b, 2)])
    assert (numbers.get(a, 0), numbers.get(b, 0), numbers.get(c, 0)) == (1, 2, 0)
    assert (numbers.setdefault(c, 3), numbers.setdefault(a, 4), len(numbers)) == (3, 1, 3)


def test_an_id_that_is_reused_is_another_member() -> None:
    weak: WeakIdentitySet[torch.Tensor] = WeakIdentitySet()
    strong: IdentitySet[torch.Tensor] = IdentitySet()
    x = torch.ones(2)
    weak.add(x)
    watched = weakref.ref(x)
    weak._members[id(strong)] = watched  # as if `strong` had the id of x, which is gone
    del x
    gc.collect()
    assert watched() is None, "a weak set does not keep its members"
    assert strong not in weak
    assert list(weak) == []
    kept = [torch.ones(2)]
    strong.add(kept[0])
    watched = weakref.ref(kept.pop())
    gc.collect()
    assert watched() is not None, "a set does"

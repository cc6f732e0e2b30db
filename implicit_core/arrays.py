"""Types. At run time arrays are the frameworks' own; these names tell readers and type checkers what an array holds.

Inside a solve a state is a tuple of arrays, one for each leaf of the user's pytree, each of shape (N, D): N samples
(the batch axes, flattened), D numbers of that leaf in each sample.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NewType, TypeVar

PyTree = Any
"""An array, or containers of arrays, as the user has them; see :meth:`implicit_core.Backend.flatten`."""
Array = Any
"""An array of any framework, of any shape."""

Real = float | Any
"""A setting: a number, or an array without axes, which a framework may trace or map."""
Count = int | Any
"""The same for an integer."""

H = TypeVar("H")
"""The user's state: an array or a pytree of arrays."""
Z = TypeVar("Z")
"""The user's inputs and parameters: any pytree."""

State = NewType("State", tuple[Any, ...])
"""(N, D) for each leaf."""
Row = NewType("Row", tuple[Any, ...])
"""One or a few states in the layout of a history: (N, r, D) for each leaf."""
History = NewType("History", tuple[Any, ...])
"""The last m states: (N, m, D) for each leaf."""
Operator = Callable[[State], State]
"""A linear map of states."""
Index = Any
"""A loop's counter: an int in a Python loop, an array without axes in a traced or captured one."""

if TYPE_CHECKING:
    from typing import Self

    class _Array:
        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def ndim(self) -> int: ...
        @property
        def dtype(self) -> Any: ...
        def __getitem__(self, key: Any) -> Any: ...

    class Mask(_Array):
        """Booleans, one for each sample: (N, 1)."""

        def __invert__(self) -> "Mask": ...
        def __and__(self, other: "Mask | bool") -> "Mask": ...
        def __rand__(self, other: "Mask | bool") -> "Mask": ...
        def __or__(self, other: "Mask | bool") -> "Mask": ...

    class _Real(_Array):
        def __neg__(self) -> Self: ...
        def __add__(self, other: Self | float) -> Self: ...
        def __radd__(self, other: Self | float) -> Self: ...
        def __sub__(self, other: Self | float) -> Self: ...
        def __rsub__(self, other: Self | float) -> Self: ...
        def __mul__(self, other: Self | float) -> Self: ...
        def __rmul__(self, other: Self | float) -> Self: ...
        def __truediv__(self, other: Self | float) -> Self: ...
        def __rtruediv__(self, other: Self | float) -> Self: ...
        def __pow__(self, other: Self | float) -> Self: ...

    class Numbers(_Real):
        """Numbers, one for each sample: (N, 1)."""

        def __lt__(self, other: "Numbers | float") -> "Mask": ...
        def __le__(self, other: "Numbers | float") -> "Mask": ...
        def __gt__(self, other: "Numbers | float") -> "Mask": ...
        def __ge__(self, other: "Numbers | float") -> "Mask": ...
        def __eq__(self, other: "Numbers | float") -> "Mask": ...  # type: ignore[override]  # as arrays do
        def __ne__(self, other: "Numbers | float") -> "Mask": ...  # type: ignore[override]

    class Matrices(_Real):
        """A small matrix for each sample: (N, m, n)."""

        def __matmul__(self, other: Any) -> "Matrices": ...

else:
    Mask = Numbers = Matrices = Any

"""A preconditioner of the linear systems at a fixed point, as the user gives it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import checks
from .arrays import PyTree, State
from .records import Data, Record
from .space import Space


class AtPoint(Record, ABC):
    """An approximate inverse of A = I - ∂F/∂h at a point, with what was computed there once."""

    @abstractmethod
    def solve(self, space: Space, x: State, *, transposed: bool = False) -> State:
        """M⁻¹ x, or M⁻ᵀ x; ``space`` is the one of x."""


@dataclass(frozen=True, repr=False)
class Preconditioner(Record):
    """M⁻¹, an approximate inverse of I - ∂F/∂h, for :class:`Implicit`; of ∂g/∂x, up to a factor, for a root.

    It saves products with ∂F/∂h, and changes no gradient beyond the tolerance of the linear solver, unless ``products``
    truncate it. Both functions are linear in v, act on each sample independently, and neither is differentiated. They
    may return the same array at every call.

    Parameters
    ----------
    apply
        ``apply(v, data) -> M⁻¹ v``, shaped as h: for pushforwards.
    transposed
        ``transposed(v, data) -> M⁻ᵀ v``, shaped as h: for pullbacks. None if M is symmetric.
    prepare
        ``prepare(h, z) -> data``, called once at the solver's point, such as a factorization. ``data`` is a pytree of
        arrays, and anything in NumPy and PyTorch. Without it, data is None.

    Raises
    ------
    TypeError
        If an argument is not callable.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> slopes = np.array([0.0, 0.5, 0.9, -8.0])
    >>> problem = ic.Problem(lambda h, z: slopes * h + z, vjp=lambda h, z, v: (slopes * v, v))
    >>> inverse = ic.Preconditioner(lambda v, data: v / data, prepare=lambda h, z: 1 - slopes)
    >>> value, pullback = ic.Implicit(preconditioner=inverse).vjp(problem, np.zeros(4), np.zeros(4))
    >>> pullback(np.ones(4)).round(3)  # 1 / (1 - slopes)
    array([ 1.   ,  2.   , 10.   ,  0.111])
    """

    apply: Callable[[Any, Any], Any]
    transposed: Callable[[Any, Any], Any] | None = None
    prepare: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("apply", "transposed", "prepare"):
            function = getattr(self, name)
            if function is not None or name == "apply":
                checks.function(name, function)

    def at(self, h: PyTree, z: PyTree) -> "PreparedPreconditioner":
        """The preconditioner at a point."""
        return PreparedPreconditioner(self, Data(None if self.prepare is None else self.prepare(h, z)))


@dataclass(frozen=True, repr=False)
class PreparedPreconditioner(AtPoint):
    """A preconditioner at a point.

    Attributes
    ----------
    functions
        The preconditioner.
    data
        What its ``prepare`` returned.
    """

    functions: Preconditioner
    data: Data

    def solve(self, space: Space, x: State, *, transposed: bool = False) -> State:
        """See :class:`AtPoint`."""
        functions = self.functions
        both = functions.transposed is None or not transposed
        function, name = (functions.apply, "apply") if both else (functions.transposed, "transposed")
        assert function is not None
        v = space.unpack(x)
        result = checks.numbers_as_arrays(space.backend, function(v, self.data.tree), v)
        name = f"the result of {name} of Preconditioner"
        result = checks.like(space.backend, name, result, v, "h")
        return space.copy(space.pack(result))  # a function may return the same array at every call

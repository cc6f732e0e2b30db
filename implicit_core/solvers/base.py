"""What a solver is: a frozen record of settings, and one step of its method."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks
from ..backend import Array
from ..space import State
from ..system import System


class Point(NamedTuple):
    """The last evaluation of F.

    Attributes
    ----------
    x, f, residual
        The point, F there, and F(x) - x; states.
    norm
        ‖F(x) - x‖₂, (N, 1).
    active
        Samples that are not finished, (N, 1).
    index
        How many evaluations came before this one.
    """

    x: State
    f: State
    residual: State
    norm: Array
    active: Array
    index: Any


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Base of the fixed-point solvers. The loop, the stop test and the statuses belong to :func:`solve`.

    To bring your own, derive a frozen dataclass and write two methods: ``init(system, x) -> memory``, a pytree of
    arrays of fixed shapes (or None), and ``step(system, memory, point) -> (x, memory)``, the next point to evaluate F
    at. Vectors are handled through ``system.space``; samples that are finished are frozen by the caller.

    Parameters
    ----------
    rtol, atol
        A sample is finished once ‖F(h) - h‖₂ ≤ atol + rtol ‖F(h)‖₂. atol is rtol / 1000 unless given, so that a fixed
        point at zero can be reached and asking for a smaller rtol gives one.
    max_steps
        Most evaluations of F.
    check_every
        Steps between two looks at whether all samples are finished: each look waits for the device.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Halfway(ic.Solver):
    ...     def init(self, system, x):
    ...         return None
    ...
    ...     def step(self, system, memory, point):
    ...         return system.space.axpy(0.5, point.residual, point.x), None
    >>> solution = ic.solve(lambda h, z: -0.9 * h + z, np.zeros(2), np.ones(2), solver=Halfway(rtol=1e-9))
    >>> solution.value.round(6)
    array([0.526316, 0.526316])
    """

    rtol: float = 1e-5
    atol: float | None = None
    max_steps: int = 100
    check_every: int = 1

    keeps_best: ClassVar[bool] = True
    """Whether to return the point of least residual where none meets the tolerance; False: the last one."""
    steps_anew: ClassVar[bool] = False
    """Whether ``step`` returns either F's result itself, ``point.f``, or memory that nothing else holds. Otherwise what
    it returns is copied: F may write its next result to where its last one lies."""
    uses_jacobian: ClassVar[bool] = False
    """Whether ``observe`` asks for the Jacobian at the point it is given."""
    retries_nonfinite: ClassVar[bool] = False
    """Whether ``step`` can go back from a point where F is not finite, and so wants to be asked."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "rtol", checks.real("rtol", self.rtol, 0.0))
        if self.atol is not None:
            set_field(self, "atol", checks.real("atol", self.atol, 0.0))
        set_field(self, "max_steps", checks.integer("max_steps", self.max_steps, 1))
        set_field(self, "check_every", checks.integer("check_every", self.check_every, 1))

    @property
    def absolute_tolerance(self) -> float:
        """``atol``, or what stands for it."""
        return 1e-3 * self.rtol if self.atol is None else self.atol

    @abstractmethod
    def init(self, system: System, x: State) -> Any:
        """What the method remembers, before the first step from ``x``."""

    def observe(self, system: System, memory: Any, point: Point) -> Any:
        """What is remembered once F was evaluated at a point: here, with ``uses_jacobian``, ask for its Jacobian."""
        return memory

    @abstractmethod
    def step(self, system: System, memory: Any, point: Point) -> tuple[State, Any]:
        """The next point, and what is remembered then."""

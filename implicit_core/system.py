"""A problem at one z, as the solvers see it: a residual, and its derivative."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from . import checks
from .arrays import Array, Numbers, Operator, PyTree, State
from .problem import BoundLinearization, Problem
from .root_problem import RootProblem
from .space import Space


class Evaluation(NamedTuple):
    """F at a point.

    Attributes
    ----------
    f, residual
        F(x), and F(x) - x, states.
    norm, f_norm
        ‖F(x) - x‖₂, and what a relative tolerance refers to, (N, 1).
    operator
        ``v -> (I - ∂F/∂h) v`` at x, if it was asked for.
    """

    f: State
    residual: State
    norm: Numbers
    f_norm: Numbers
    operator: Operator | None


class System:
    """F(·, z), with the space of its states.

    Parameters
    ----------
    problem, h0, z
        The problem, a pytree with the state's shapes, and the inputs and parameters.
    """

    is_root = False
    first: Numbers | None = None
    grows = False
    """Whether a solver's memory may change its shape from step to step."""
    endless = False
    """Whether there may be more steps than the solver's ``max_steps``."""
    parted = False
    """Whether it has some of the samples alone, see :meth:`part`."""

    def __init__(self, problem: Problem[Any, Any], h0: PyTree, z: PyTree) -> None:
        self.problem, self.z = problem, z
        self.space = problem.space(h0, problem.names.start)
        self.f = self.space.backend.protected(problem.f, *problem.names[:2])

    @property
    def records(self) -> bool:
        """Whether a program is being recorded or captured. No loop can stop on a data-dependent test then."""
        backend = self.space.backend
        return backend.recording() or backend.capturing(backend.flatten(self.space.like)[0][0])

    def evaluate(self, x: State, h: PyTree, *, copies: bool = False, linearizes: bool = False) -> Evaluation:
        """F at x, which is h in the user's form, in new memory with ``copies``: F may reuse its own."""
        space, operator = self.space, None
        if linearizes and self.problem.jacobian is not None:
            f, operator = self._accept(self.f(h, self.z)), self._given_jacobian(h)
        elif linearizes:  # Decision 21.
            at = self.problem.linearize(h, self.z).require("jvp_h")
            f, operator = self._accept(at.value), self._linearized(at)

        else:
            f = self._accept(self.f(h, self.z))
        f = space.copy(f) if copies else f
        residual = space.sub(f, x)
        return Evaluation(f, residual, space.norm(residual), space.norm(f), operator)

    def value(self, x: State) -> State:
        """F at x."""
        return self._accept(self.f(self.space.unpack(x), self.z))

    def _linearized(self, at: BoundLinearization[Any, Any]) -> Operator:
        from .solvers.jacobian import LinearizedOperator, complement_of

        space = self.space

        def matrix() -> Any:
            return None if (found := at.matrix_h()) is None else complement_of(found, space)

        return LinearizedOperator(lambda v: space.sub(v, space.pack(at.jvp_h(space.unpack(v)))), matrix)

    def _given_jacobian(self, h: PyTree) -> Operator:
        from .solvers.jacobian import MatrixOperator, complement  # which imports solvers, and these this module

        return MatrixOperator(self.space, lambda: complement(self.problem, self.space, h, self.z))

    def as_the_user_has_it(self, x: State, f: State, residual: State) -> tuple[PyTree, PyTree]:
        """The unknown and F there, of a root g there, as pytrees."""
        del residual
        return self.space.unpack(x), self.space.unpack(f)

    def in_units(self, units: Numbers) -> None:
        """From now on, measure residuals in ``units``, (N, 1)."""
        self.space = self.space.in_units(units)

    def part(self, samples: Array, take: Callable[[Any], Any], like: PyTree, z: PyTree) -> "System":
        """The system of some of the samples, with states shaped as ``like``; ``take`` takes them from an array."""
        part = copy.copy(self)
        part.space, part.z, part.parted = self.space.part(like, samples), z, True
        part._take(samples, take, like)
        return part

    def _take(self, samples: Array, take: Callable[[Any], Any], like: PyTree) -> None:
        """Take the part of what a subclass holds besides."""

    def _accept(self, value: PyTree) -> State:
        return self.space.accept(f"the result of {self.problem.names.function}", _constant(self.space, value))


class RootSystem(System):
    """g(·, z), as the F(x) = x - g(x) whose fixed points are its roots.

    The residual is computed from g alone, so that it is as accurate as g is, whatever the size of x. A relative
    tolerance refers to the residual at the start.

    Attributes
    ----------
    image
        The space of g, whose units are ``g_scale``.
    first
        The norm of the residual at the start, once it is known, (N, 1).
    """

    is_root = True

    def __init__(self, problem: RootProblem[Any, Any], h0: PyTree, z: PyTree, first: Numbers | None = None) -> None:
        super().__init__(problem, h0, z)
        self.image: Space = problem.image(h0, problem.names.start)
        self.first = self._given = first

    def evaluate(self, x: State, h: PyTree, *, copies: bool = False, linearizes: bool = False) -> Evaluation:
        """The residual -g(x). What is returned is always in new memory."""
        del copies
        operator = None
        if linearizes and self.problem.jacobian is not None:
            g, operator = self._accept(self.f(h, self.z)), self._given_jacobian(h)
        elif linearizes:
            at = self.problem.linearize(h, self.z).require("jvp_h")
            g, operator = self._accept(at.value), self._linearized(at)

        else:
            g = self._accept(self.f(h, self.z))
        residual = self.space.scale(-1.0, g)
        norm = self.space.norm(residual)
        if self.first is None:
            self.first = norm
        return Evaluation(self.space.add(x, residual), residual, norm, self.first, operator)

    def _linearized(self, at: BoundLinearization[Any, Any]) -> Operator:
        from .solvers.jacobian import LinearizedOperator, inverse_units, on_states

        space, image = self.space, self.image

        def matrix() -> Any:
            return None if (found := at.matrix_h()) is None else on_states(found, space, inverse_units(image))

        return LinearizedOperator(lambda v: image.pack(at.jvp_h(space.unpack(v))), matrix)

    def _given_jacobian(self, h: PyTree) -> Operator:
        from .solvers.jacobian import MatrixOperator, evaluated, inverse_units, on_states

        def matrix() -> Any:
            return on_states(evaluated(self.problem, self.space, h, self.z), self.space, inverse_units(self.image))

        return MatrixOperator(self.space, matrix)

    def as_the_user_has_it(self, x: State, f: State, residual: State) -> tuple[PyTree, PyTree]:
        """See :class:`System`."""
        del f
        return self.space.unpack(x), self.image.unpack(self.space.scale(-1.0, residual))

    def in_units(self, units: Numbers) -> None:
        """See :class:`System`."""
        self.image = self.image.in_units(units)
        if self._given is not None:
            self._given = self._given / units
        self.first = self._given

    def _take(self, samples: Array, take: Callable[[Any], Any], like: PyTree) -> None:
        self.image, self.first = self.image.part(like, samples), take(self.first)

    def _accept(self, value: PyTree) -> State:
        return self.image.accept(f"the result of {self.problem.names.function}", _constant(self.image, value))


def _constant(space: Space, value: PyTree) -> PyTree:
    tracing = space.backend.tracing
    return value if tracing is None else space.backend.map(tracing.constant, value)


def system_of(problem: Problem[Any, Any], h0: PyTree, z: PyTree, first: Numbers | None = None) -> System:
    """The system of a fixed-point problem, or of a root; ``first`` as in :class:`RootSystem`, if it is known."""
    checks.instance("problem", problem, Problem, "Problem(f), or call implicit_core.solve(f, h0, z)")
    return RootSystem(problem, h0, z, first) if isinstance(problem, RootProblem) else System(problem, h0, z)

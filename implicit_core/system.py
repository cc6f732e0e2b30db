"""A problem at one z, as the solvers see it: a map from states to states."""

from typing import Any

from .backend import PyTree
from .problem import BoundLinearization, Problem
from .registry import find_backend
from .space import Operator, Space, State


class System:
    """F(·, z) on states, with the space they live in.

    Parameters
    ----------
    problem, h0, z
        The problem, a pytree with the state's shapes, and the inputs and parameters.
    linearizing
        Whether the Jacobian will be asked for at the points F is evaluated at. Where the problem's ``linearize`` gives
        both, they are then computed together.
    """

    def __init__(self, problem: Problem, h0: PyTree, z: PyTree, *, linearizing: bool = False) -> None:
        self.problem = problem
        self.z = z
        self.space = Space(find_backend(h0), h0, problem.batch_ndim)
        self.extra_evaluations = 0
        self._f = self.space.backend.undifferentiated(problem.f)
        self._linearizing = linearizing and not problem.has_jvp
        self._last: tuple[State, BoundLinearization] | None = None
        self.pure: Any = None
        """Whether f at the start left it as it was, which an array says; True where that is certain."""
        self.writes_anew = True
        """Whether f gives every result memory of its own, as far as is known."""

    def evaluate(self, x: State) -> State:
        """F(x, z)."""
        h = self.space.unpack(x)
        if self._linearizing:
            linearization = self.problem.linearize(h, self.z).require("jvp_h")
            self._last = (x, linearization)
            value = linearization.value
        else:
            value = self._f(h, self.z)
        if self.pure is None:
            self.pure = self._left_alone(h)
        return self.space.accept("the result of f", value)

    def _left_alone(self, h: PyTree) -> Any:
        pure: Any = True
        for x, before in zip(self.space.pack(h), self.space.pack(self.space.like), strict=True):
            unchanged = self.space.backend.unchanged(x, before)
            pure = unchanged if pure is True else pure & unchanged
        return pure

    def jacobian(self, x: State) -> Operator:
        """``v -> (∂F/∂h) v`` at ``x``."""
        push: Operator
        if self._last is not None and self._last[0] is x:
            push = self._last[1].jvp_h
        else:
            push, evaluations = self.problem.pushforward_h(self.space.unpack(x), self.z)
            self.extra_evaluations += evaluations
        return lambda v: self.space.pack(push(self.space.unpack(v)))

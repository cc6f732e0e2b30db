"""A problem at one z, as the solvers see it."""

from typing import Any

from . import checks
from .arrays import Operator, PyTree, State
from .problem import Problem


class System:
    """F(·, z), with the space of its states.

    Parameters
    ----------
    problem, h0, z
        The problem, a pytree with the state's shapes, and the inputs and parameters.
    """

    def __init__(self, problem: Problem[Any, Any], h0: PyTree, z: PyTree) -> None:
        checks.instance("problem", problem, Problem, "Problem(f), or call implicit_core.solve(f, h0, z)")
        self.problem, self.z = problem, z
        self.space = problem.space(h0, "h0")
        self.f = self.space.backend.protected(problem.f)

    def evaluate(self, h: PyTree) -> State:
        """F(h, z)."""
        return self._accept(self.f(h, self.z))

    def linearize(self, h: PyTree) -> tuple[State, Operator]:
        """F(h, z) and ``v -> (∂F/∂h) v`` there, for one evaluation of F."""
        at = self.problem.linearize(h, self.z).require("jvp_h")
        return self._accept(at.value), lambda v: self.space.pack(at.jvp_h(self.space.unpack(v)))

    def _accept(self, value: PyTree) -> State:
        tracing = self.space.backend.tracing
        if tracing is not None:
            value = self.space.backend.map(tracing.constant, value)
        return self.space.accept("the result of f", value)

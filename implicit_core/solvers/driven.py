"""Solvers that are not run by the core's loop."""

from abc import ABC, abstractmethod

from ..backend import PyTree
from ..problem import Problem
from ..solution import Solution


class DrivenSolver(ABC):
    """A solver with a driver of its own, as one that records the steps of another and replays them.

    It is taken wherever a :class:`Solver` is.
    """

    @abstractmethod
    def solve(self, problem: Problem, h0: PyTree, z: PyTree, *, trace: bool = False) -> Solution:
        """What :func:`implicit_core.solve` returns, to which ``throw`` is left."""

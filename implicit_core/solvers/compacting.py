"""A solver that goes on with the unfinished samples alone."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import optree

from .. import checks, settings
from ..arrays import Array, H, Mask, PyTree, Real, Z
from ..carry import Carry
from ..finished import MOVED
from ..iteration import Iteration
from ..problem import Problem
from ..progress import Start
from ..records import Record
from ..registry import find_backend
from ..solution import Solution
from .base import Solver

OTHER_VALUES = (
    "F of all rows has other residuals than F of parts of them had. Either batched= is wrong (True is for arrays of z "
    "with a row for each row of h), or F couples samples or takes the first rows of what it closes over, or it is "
    "random, as with dropout: use the solver without Compacting"
)
PART = "F was called with {part} of {rows} rows of h, and of the arrays of z that batched= names, by Compacting"


def without_compacting(solver: Any) -> Any:
    """The solver that a :class:`Compacting` contains; any other as it is. For programs whose shapes are fixed."""
    return solver.solver if isinstance(solver, Compacting) else solver


@dataclass(frozen=True, repr=False)
class Compacting(Record):
    """Another solver, which evaluates F for the unfinished samples alone once half of the batch is finished.

    Where few samples take many steps, most of the work of F is for samples that are finished. Each time that at most
    half of the rows hold an unfinished sample, the others leave the batch. The steps are those of the solver alone, up
    to rounding, which depends on the size of a product.

    What the solver holds is copied then, at most log₂ N times. At the end F is evaluated once more, for all rows, to
    see that their residuals are those that the parts had. Masks of a dropout that have a row for each sample are no
    part of z, so such an F is refused. Shapes depend on numbers here, so where they are fixed the solve is that of the
    solver alone: in a traced or captured program, in layers of JAX, and within ``torch.func``.

    Parameters
    ----------
    solver
        A :class:`Solver` with ``freeze=True``. Its ``stop`` sees the rows that are left.
    batched
        Which arrays of z have a row for each row of h, as their first axis: True for all, or a pytree of booleans that
        is a prefix of z, as ``in_axes`` of ``jax.vmap``: ``(True, False)`` for z = (inputs, parameters). What F closes
        over is shared.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type. In a solve, if ``batched`` does not fit z, h has no batch axis, or the batch has
        other residuals than its parts.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> rows = []
    >>> def f(h, z):
    ...     slope, shift = z
    ...     rows.append(len(h))
    ...     return slope * np.sin(h) + shift
    >>> slopes = np.array([[0.1], [0.1], [0.1], [0.5]])
    >>> solver = ic.Compacting(ic.FixedPointIteration(), batched=(True, False))
    >>> solution = ic.solve(f, np.zeros((4, 1)), (slopes, 1.0), solver=solver, batch_ndim=1)
    >>> solution.stats.steps, rows
    (array([5, 5, 5, 6], dtype=int32), [4, 4, 4, 4, 4, 1, 4])
    """

    solver: Solver
    batched: PyTree = field(default=True, hash=False)

    runs_user_code: ClassVar[bool] = True
    """It divides z, which has to be as the user made it."""

    def __post_init__(self) -> None:
        checks.instance("solver", self.solver, Solver, "Anderson()")
        if type(self.solver).solve is not Solver.solve:
            raise TypeError(f"Compacting needs the loop of Solver.solve, which {type(self.solver).__name__} replaces")
        if not self.solver.freeze:
            raise ValueError("with freeze=False finished samples go on, so none may leave the batch: use freeze=True")
        for flag in optree.tree_leaves(self.batched, none_is_leaf=True):
            checks.instance("batched", flag, bool, "True, or a pytree of booleans such as (True, False)")

    # A layer asks which tolerances its value is held against.

    @property
    def rtol(self) -> Real:
        """The solver's."""
        return self.solver.rtol

    @property
    def atol(self) -> Real | None:
        """The solver's."""
        return self.solver.atol

    @property
    def absolute_tolerance(self) -> Real:
        """The solver's."""
        return self.solver.absolute_tolerance

    def solve(self, problem: Problem[H, Z], h0: H, z: Z, *, trace: bool = False) -> Solution[H]:
        """See :class:`FixedPointSolver`."""
        iteration = _Compacting(problem, h0, z, self.solver, self.batched, trace=trace)
        space = iteration.space
        arrays = [("h0", space.full(0.0)), *settings.arrays_in(self.solver)]
        # h0 may be a constant of a traced program.
        if not all(find_backend(array, name).readable(array) for name, array in arrays):
            return self.solver.solve(problem, h0, z, trace=trace)
        return iteration.run()


class _FewRowsError(Exception):
    """At most half of the rows are unfinished."""

    def __init__(self, carry: Carry) -> None:
        super().__init__()
        self.carry = carry


class _Compacting(Iteration):
    """One solve, which ends when few rows are left, and is carried on by another one of these rows."""

    memory_may_grow = False

    def __init__(self, problem: Problem[H, Z], h0: H, z: Z, solver: Solver, batched: PyTree, *, trace: bool) -> None:
        super().__init__(problem, h0, z, solver, trace=trace)
        self.parted = False
        self.batched = batched
        if not problem.batch_ndim:
            raise ValueError(
                "Compacting is for a batch of samples: pass batch_ndim=1, or the solver without Compacting"
            )
        self._of_rows(lambda a: a)

    @property
    def rows(self) -> int:
        """The length of the first axis of the batch."""
        return self.space.batch_shape[0]

    def _run(self) -> Solution[Any]:
        solution = self.carried_on(self.begin, self.left)
        return self.with_nan(self._tested(solution) if self.parted else solution)._replace(aux=None)

    def carried_on(self, begin: Callable[[], Carry], steps: int) -> Solution[Any]:
        """The solution of all rows, those that are left by another iteration."""
        try:
            return self.finish(self.loop(begin, steps))
        except _FewRowsError as few:
            carry = few.carry
        self.parted = True
        left = self._unfinished(carry)
        part, of_part = self._part(carry, self.space.xp.nonzero(left)[0])
        solution = self.finish(carry)
        steps, begin = self.solver.max_steps - 1 - carry.point.index, [of_part].pop
        del carry, of_part  # memory
        try:
            rest = part.carried_on(begin, steps)
        except Exception as error:
            error.add_note(PART.format(part=part.rows, rows=self.rows))
            raise
        return self._merged(solution, left, rest)

    def finish(self, carry: Carry) -> Solution[Any]:
        """The solution; if a step follows the last evaluation, ``aux`` holds the points of the evaluations."""
        solution = super().finish(carry)
        return solution._replace(aux=self.space.unpack(carry.point.x)) if self._moves_on else solution

    def _tested(self, solution: Solution[Any]) -> Solution[Any]:
        """The solution, if F of all rows has the residuals that are told."""
        space, stats = self.space, solution.stats
        x = space.pack(solution.value if solution.aux is None else solution.aux)
        evaluation = self.system.evaluate(x, space.unpack(space.copy(x)))
        norm, f_norm = evaluation.norm, evaluation.f_norm
        if self._moves_anyway:
            norm, f_norm = (space.norm_of_any_size(x) for x in (evaluation.residual, evaluation.f))
        told, tolerance = (
            space.xp.reshape(numbers, (-1, 1))
            if self.units is None
            else space.xp.reshape(numbers, (-1, 1)) / self.units
            for numbers in (stats.residual, stats.tolerance)
        )
        # What rounding of products of another size may do, beside a tolerance that is met.
        apart = norm - told > MOVED * space.coarsest_eps * f_norm + tolerance
        if bool(space.xp.any(apart)):
            raise ValueError(OTHER_VALUES)
        return solution._replace(stats=stats._replace(evaluations=stats.evaluations + 1))

    def _unfinished(self, carry: Carry) -> Array:
        """The rows that hold a sample that is active, (rows,)."""
        return self.space.xp.any(self.space.xp.reshape(carry.point.active, (self.rows, -1)), axis=1)

    # Looked at beside each read of the loop.

    def _watched(self, carry: Carry) -> Mask | None:
        moved = super()._watched(carry)
        if carry.point.index == 0 or not self._ends_samples:
            return moved
        few = carry.point.active & self._are_few(carry)
        watched: Mask = few if moved is None else few | moved
        return watched

    @property
    def _ends_samples(self) -> bool:
        """Whether samples end before others, also where F is finite."""
        return not self.forced or self.solver.stop is not None or self.most is not None

    def _are_few(self, carry: Carry) -> Any:
        return 2 * self.space.xp.sum(self.space.xp.astype(self._unfinished(carry), self.space.xp.int32)) <= self.rows

    def _note(self, carry: Carry) -> None:
        moved = super()._watched(carry)
        if moved is not None and bool(self.space.xp.any(moved)):
            super()._note(carry)
        if carry.point.index > 0 and self._ends_samples and bool(self._are_few(carry)):
            raise _FewRowsError(carry)

    # From all rows to a part of them.

    def _part(self, carry: Carry, rows: Array) -> tuple["_Compacting", Carry]:
        xp, backend, n = self.space.xp, self.space.backend, self.space.samples
        samples = xp.reshape(
            rows[:, None] * (n // self.rows) + xp.arange(n // self.rows, device=self.space.device)[None, :], (-1,)
        )

        def take(x: Any) -> Any:
            of_samples = backend.is_array(x) and x.shape[:1] == (n,)
            return xp.take(x, samples, axis=0) if of_samples else x

        part = copy.copy(self)
        like = backend.map(lambda a: backend.rows(a, rows), self.space.like)
        part.system = self.system.part(samples, take, like, self._of_rows(lambda a: backend.rows(a, rows)))
        part.space = part.system.space
        part.atol, part.units, part.unread, part.most = take(self.atol), take(self.units), None, take(self.most)
        part.solver, part.rtol, part.absolute = settings.taken(self.solver, take), take(self.rtol), take(self.absolute)
        if not self.forced:
            part.start = Start(*map(take, self.start))
        memory = carry.memory
        nested: Any = carry._replace(memory=None)
        of_part: Any = optree.tree_map(take, nested)
        part.space.shard_as(of_part.point.f)

        # A solver's memory also holds constants, some of them as long as the batch. An axis of samples is one that is
        # shorter for fewer samples.
        def take_memory(x: Any, new: Any) -> Any:
            if not backend.is_array(x):
                return x if isinstance(x, (bool, int, float)) else new
            axes = [i for i, (a, b) in enumerate(zip(x.shape, new.shape, strict=True)) if a != b]
            taken = xp.take(x, samples, axis=axes[0]) if axes else x
            if taken.shape != new.shape:
                raise TypeError(
                    f"Compacting cannot divide an array of shape {tuple(x.shape)} in the memory of "
                    f"{type(self.solver).__name__} among {n} samples: give it an axis of samples"
                )
            return taken

        new = self.solver.init(part.system, of_part.point.x)
        return part, of_part._replace(memory=backend.map(take_memory, memory, new))

    def _of_rows(self, take: Callable[[Array], Array]) -> PyTree:
        """Apply ``take`` to the batched arrays of z."""
        backend = self.space.backend

        def taken(a: Any) -> Any:
            if not backend.is_array(a) or a.shape == ():
                return a
            if a.shape[:1] != (self.rows,):
                raise ValueError(
                    f"an array of shape {tuple(a.shape)} in z is taken for one with the {self.rows} rows of h: tell "
                    "Compacting which arrays are, as in batched=(True, False)"
                )
            return take(a)

        try:
            parts = optree.tree_structure(self.batched).flatten_up_to(self.system.z)
        except ValueError as error:
            reason = "it has to be a prefix of z, with the same tuples, lists and keys"
            raise ValueError(f"batched={self.batched!r} does not fit z: {reason}") from error
        flags, structure = optree.tree_flatten(self.batched)
        of_rows = [backend.map(taken, part) if batched else part for batched, part in zip(flags, parts, strict=True)]
        return optree.tree_unflatten(structure, of_rows)

    def _merged(self, whole: Solution[Any], left: Array, part: Solution[Any]) -> Solution[Any]:
        """The solution of all rows, with that of the rows that were left in their place."""
        xp, backend = self.space.xp, self.space.backend
        ones = xp.astype(left, xp.int32)
        place = ones * (xp.cumulative_sum(ones, dtype=ones.dtype) - 1)

        def merge(a: Any, b: Any, axis: int = 0) -> Any:
            if a is None:
                return None
            mask = xp.reshape(left, (1,) * axis + (self.rows,) + (1,) * (a.ndim - axis - 1))
            return xp.where(mask, xp.take(b, place, axis=axis) if axis else backend.rows(b, place), a)

        stats = whole.stats._replace(
            **{
                name: merge(getattr(whole.stats, name), getattr(part.stats, name))
                for name in ("steps", "residual", "relative", "tolerance")
            },
            trace=merge(whole.stats.trace, part.stats.trace, axis=1),
            evaluations=part.stats.evaluations,
        )
        value, aux = (backend.map(merge, getattr(whole, name), getattr(part, name)) for name in ("value", "aux"))
        return Solution(value, merge(whole.status, part.status), stats, aux)

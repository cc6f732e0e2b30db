"""What a solve returns, for every solver."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, NamedTuple

from .arrays import Array, H, PyTree
from .registry import find_backend
from .samples import best
from .warnings_ import warn

CAPTURED = (
    "throw=True cannot read statuses while a program is recorded (a CUDA graph, torch.export, torch.jit.trace): use "
    "throw=False there, and read solution.status after a replay"
)


class Status(IntEnum):
    """How the solve of one sample ended.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: h + z, np.zeros(2), np.ones(2), solver=ic.FixedPointIteration(max_steps=9))
    >>> ic.Status(int(solution.status)).name
    'MAX_STEPS'
    """

    CONVERGED = 0
    """The residual at the returned point is within the tolerance."""
    MAX_STEPS = 1
    """The steps ran out."""
    NONFINITE = 2
    """F, the residual or the solver's step became infinite or NaN; the best point, or the last one, is returned."""
    STAGNATED = 3
    """The residual has stopped falling, see :class:`Solver`. Or a callable solver missed the tolerance."""
    DIVERGED = 4
    """The state or the residual grew far beyond the start, or the steps of an estimator moved away from the root."""
    UNBRACKETED = 5
    """g has the same sign at both ends of the bracket of :class:`Bisection` or :class:`Brent`."""


ADVICE = {
    Status.MAX_STEPS: "MAX_STEPS: raise max_steps, or loosen rtol.",
    Status.NONFINITE: "NONFINITE: look for NaN or overflow in the function and its inputs, or take another solver.",
    Status.STAGNATED: (
        "STAGNATED: the equation has no solution there, or its function is random, jumps, or rounds coarser than rtol."
    ),
    Status.UNBRACKETED: "UNBRACKETED: g has the same sign at lower and at upper; give these samples other ends.",
    Status.DIVERGED: "DIVERGED: start closer, try NewtonKrylov, or, where a cell is trained, regularize it.",
}
"""What to do about a failure."""
CONVERGED = Status.CONVERGED
MAX_STEPS = Status.MAX_STEPS
NONFINITE = Status.NONFINITE
STAGNATED = Status.STAGNATED
DIVERGED = Status.DIVERGED
UNBRACKETED = Status.UNBRACKETED


class Stats(NamedTuple):
    """Counts and residuals of a solve.

    Attributes
    ----------
    steps
        Evaluations of F until each sample was finished, integers of the batch's shape.
    evaluations
        Evaluations of F, each for the whole batch. The evaluations of a callable solver that JAX traced are not known:
        then it is 2, the evaluations that measure its start and its result. Zero for :class:`BPTT`, which replaces the
        solve.
    residual
        ‖F(h) - h‖₂ at each sample's returned point h, of the batch's shape. :func:`fixed_point` with an estimator that
        takes steps of its own, :class:`Unroll` or :class:`BPTT`, returns h_k, and the residual is that of h_{k-1},
        which the last step knows. So does :class:`FixedPointIteration` with both tolerances zero.
    trace
        The residual at every evaluation, (max_steps, batch...), NaN once a sample is finished; None unless asked for.
        JAX's ``jax_debug_nans`` raises where a compiled program returns it.
    relative
        The residual as a fraction of ‖F(h)‖₂; None if the solver is somebody else's and does not tell.
    tolerance
        What the residual was held against: a sample converged if it is no larger. None as for ``relative``.
    solver
        Which of the solvers of a :class:`Polyalgorithm` each sample ended with, integers; None for other solvers.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: 0.5 * h + z, np.zeros((2, 1)), np.array([[0.0], [1.0]]), batch_ndim=1)
    >>> solution.stats.steps, solution.stats.evaluations  # the first starts at its root
    (array([1, 3], dtype=int32), 3)
    """

    steps: Array
    evaluations: Any
    residual: Array
    trace: Array | None = None
    relative: Array | None = None
    tolerance: Array | None = None
    solver: Array | None = None


class Solution(NamedTuple, Generic[H]):
    """A fixed point and how it was found.

    Attributes
    ----------
    value
        The solver's point, shaped as ``h0``.
    status
        A :class:`Status` for each sample, integers of the batch's shape.
    stats
        Steps, evaluations and residuals.
    aux
        The auxiliary result of F, evaluated once more at ``value``; None without ``has_aux``.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: 0.5 * h + z, np.zeros(2), np.ones(2))
    >>> bool(solution.converged), solution.value.round(4)
    (True, array([2., 2.]))
    """

    value: H
    status: Array
    stats: Stats
    aux: PyTree = None

    def __repr__(self) -> str:
        """How many samples ended how, and the shapes of the arrays."""
        backend = find_backend(self.status, "status")
        readable = backend.readable(self.status)
        told = counts(self.status, self.stats.residual, self.stats.relative) if readable else "not known yet"
        value = backend.map(lambda x: f"{x.dtype} {tuple(x.shape)}", self.value)
        aux = "" if self.aux is None else ", with aux"
        return f"<Solution: {told}; {self.stats.evaluations} evaluations; value {value}{aux}>"

    @property
    def converged(self) -> Array:
        """Whether each sample converged, booleans of the batch's shape."""
        return self.status == Status.CONVERGED.value

    def raise_for_status(self) -> "Solution[H]":
        """Return this solution if every sample converged.

        Statuses cannot be read within ``jax.jit``. There this is a check for ``jax.experimental.checkify``.

        Raises
        ------
        SolveError
            If one did not; names the samples, why, and their residuals.
        """
        check_statuses("the solve", self.status, self.stats.residual)
        return self

    def best(self, axis: int = 0) -> "Solution[H]":
        """The samples of least residual along an axis of the batch, such as restarts of the same samples.

        To start each sample R times, give the batch one more axis, ``h0`` of shape (R, batch..., state...), to which F
        broadcasts z, and take the best: ``fixed_point(..., batch_ndim=2).best()``. A residual that is not
        finite is never the least, unless all are. Nothing is read from the device, and the value keeps its derivatives.
        ``evaluations`` and ``aux`` stay as they are.

        Parameters
        ----------
        axis
            The axis of the batch, at least 0.

        Returns
        -------
        Solution
            Without this axis, in the value, the status and the stats of each sample.

        Raises
        ------
        TypeError, ValueError
            If ``axis`` is no axis of the batch.

        Examples
        --------
        >>> import numpy as np
        >>> import implicit_core as ic
        >>> starts = np.array([[[3.0], [0.1]], [[0.5], [2.0]]])  # two restarts of two samples
        >>> solution = ic.solve(lambda h, z: h * h, starts, None, solver=ic.steps(3), batch_ndim=2)
        >>> solution.best().value.round(4)
        array([[0.0039],
               [0.    ]])
        """
        return best(self, axis)


@dataclass(frozen=True)
class Failure:
    """Samples of one batch that ended the same way."""

    status: Status
    samples: tuple[tuple[int, ...], ...]
    residual: float


class CoupledSamplesError(ValueError):
    """F couples what ``batch_ndim`` takes for independent samples.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> def mean_of_all(h, z):
    ...     return 0.9 * h.mean() * np.array([[0.1], [1.0]]) + z
    >>> try:
    ...     ic.solve(mean_of_all, np.zeros((2, 1)), np.array([[0.0], [1.0]]), batch_ndim=1, solver=ic.Broyden())
    ... except ic.CoupledSamplesError as error:
    ...     print("batch_ndim=0" in str(error))
    True
    """


class ConvergenceWarning(RuntimeWarning):
    """Samples of a layer did not converge, so their values and gradients are those of another point.

    Shown once for each line that calls the layer. ``warnings.simplefilter("ignore", implicit_core.ConvergenceWarning)``
    switches it off.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     solution = ic.fixed_point(lambda h, z: h + 1.0, np.zeros(2), None, solver=ic.Anderson(max_steps=3))
    >>> caught[0].category.__name__
    'ConvergenceWarning'
    """


class SolveError(RuntimeError):
    """A solve failed for some samples.

    Attributes
    ----------
    failures
        The samples, by how they failed.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> try:
    ...     ic.solve(lambda h, z: h + 1.0, np.zeros(2), None, solver=ic.FixedPointIteration(max_steps=3), throw=True)
    ... except ic.SolveError as error:
    ...     print(error)
    the solve did not converge: MAX_STEPS, largest residual 1.41. MAX_STEPS: raise max_steps, or loosen rtol.
    """

    def __init__(self, message: str, failures: tuple[Failure, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures


def check_statuses(what: str, status: Array, residual: Array) -> None:
    """Raise :class:`SolveError` unless every status is CONVERGED."""
    if 0 in status.shape:
        return
    backend = find_backend(status, "status")
    if not backend.readable(status):
        failed = status != Status.CONVERGED.value
        xp = backend.xp
        samples = math.prod(status.shape)
        if backend.tracing is None:
            raise NotImplementedError(CAPTURED)
        backend.tracing.check(
            ~xp.any(failed),
            f"{what} did not converge: {{failed}} of {samples} samples, largest residual {{residual}}",
            failed=xp.sum(xp.astype(failed, xp.int32)),
            residual=_largest(xp, xp.where(failed, residual, xp.zeros_like(residual))),
        )
        return
    failures = find_failures(status, residual)
    if failures:
        raise SolveError(
            f"{what} did not converge: {describe(failures, math.prod(status.shape))}. {advice(failures)}", failures
        )


def _largest(xp: Any, numbers: Array) -> Array:
    """The largest number; NaN if there is one, which XLA's maximum on a CPU may pass over."""
    largest: Array = xp.where(xp.any(xp.isnan(numbers)), xp.nan, xp.max(numbers))
    return largest


def advice(failures: tuple[Failure, ...]) -> str:
    """What to do about the failures of a solve."""
    return " ".join(ADVICE[status] for status in sorted({failure.status for failure in failures}))


def counts(status: Array, residual: Array, relative: Array | None) -> str:
    """How many samples ended how, in words; reads from the device."""
    backend = find_backend(status, "status")
    if 0 in status.shape:
        return "an empty batch"
    codes = [int(code) for code in backend.numbers(backend.xp.astype(status, residual.dtype))]
    numbers = backend.numbers(residual if relative is None else relative)
    found = [f"{codes.count(code)} {code.name}" for code in Status if code in codes]
    if len(codes) == 1:
        found = [Status(codes[0]).name]
    elif len(found) > 1 or codes[0] != Status.CONVERGED:
        found[0] = found[0].replace(" ", f" of {len(codes)} ", 1)
    else:
        found = [f"all {len(codes)} CONVERGED"]
    what = "residual" if relative is None else "relative residual"
    largest = math.nan if any(x != x for x in numbers) else max(numbers)
    return f"{', '.join(found)}, {'' if len(codes) == 1 else 'largest '}{what} {largest:.2g}"


def warn_of_failures(status: Array, residual: Array) -> None:
    """Warn, once at a line, if samples of a layer did not converge. Both arguments may be arrays of NumPy."""
    if failures := find_failures(status, residual):
        _warn_of("the solve did not converge", failures, status)


def warn_of_nonfinite(status: Array, residual: Array) -> None:
    """The same behind a forced number of steps, after which no sample need have converged, but all must be finite."""
    if bool(find_backend(status, "status").xp.any(status == Status.NONFINITE.value)):
        failures = tuple(x for x in find_failures(status, residual) if x.status == Status.NONFINITE)
        _warn_of("the steps led to numbers that are not finite", failures, status)


def _warn_of(what: str, failures: tuple[Failure, ...], status: Array) -> None:
    warn(
        f"{what}: {describe(failures, math.prod(status.shape))}. {advice(failures)} The values and gradients of these "
        "samples are those of another point; layers keep the statuses, throw=True raises. See the page 'When training "
        "misbehaves'. Shown once for this line",
        ConvergenceWarning,
        once=True,
    )


def find_failures(status: Array, residual: Array) -> tuple[Failure, ...]:
    """The samples that did not converge, grouped by status. It reads from the device once, twice if some failed."""
    backend = find_backend(status, "status")
    if bool(backend.xp.all(status == Status.CONVERGED.value)):
        return ()
    numbers = backend.numbers(backend.xp.stack([backend.xp.astype(status, residual.dtype), residual]))
    samples, by_status = len(numbers) // 2, dict[Status, list[tuple[tuple[int, ...], float]]]()
    for index, code, norm in zip(_indices(tuple(status.shape)), numbers[:samples], numbers[samples:], strict=True):
        if code != Status.CONVERGED.value:
            by_status.setdefault(Status(int(code)), []).append((index, float(norm)))
    return tuple(
        Failure(code, tuple(index for index, _ in found), max(value for _, value in found))
        for code, found in by_status.items()
    )


def describe(failures: tuple[Failure, ...], samples: int) -> str:
    """Failures in words."""
    parts = []
    for failure in failures:
        which = _names(failure.samples, samples)
        parts.append(f"{failure.status.name}{which}, largest residual {failure.residual:.3g}")
    return "; ".join(parts)


def sample_names(samples: Sequence[int], batch_shape: tuple[int, ...]) -> str:
    """The samples of a flat batch in words, as in :func:`describe`."""
    indices = _indices(batch_shape)
    return _names(tuple(indices[i] for i in samples), len(indices))


def _names(indices: tuple[tuple[int, ...], ...], samples: int) -> str:
    """`` in 2 of 8 samples (0, 3)``, and nothing if there is one sample without an index."""
    if indices[0] == ():
        return ""
    names = [str(index[0]) if len(index) == 1 else str(index) for index in indices[:8]]
    more = ", ..." if len(indices) > 8 else ""
    return f" in {len(indices)} of {samples} samples ({', '.join(names)}{more})"


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices

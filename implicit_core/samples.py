"""Samples of a batch chosen: set back to a start, and the best of several solves."""

import math
from typing import TYPE_CHECKING, Any

from . import checks
from .arrays import Array, H, Mask, PyTree
from .backend import Backend
from .registry import find_backend

if TYPE_CHECKING:
    from .solution import Solution


def reset(state: H, start: PyTree, *, where: Mask | Array) -> H:
    """The state, with the start in the samples of a mask: what a loop carries on after some samples are finished.

    Recursive models carry the state of a batch from call to call, and give the place of a puzzle that is solved to a
    new one. Nothing is read from the device, and nothing is written to.

    Parameters
    ----------
    state
        An array or a pytree of arrays, (batch..., state...).
    start
        Where new samples start: a pytree of the same structure whose leaves broadcast to those of ``state``, or one
        number or array for all leaves. It takes the dtype of ``state``.
    where
        Booleans of the batch's shape: the samples that start anew.

    Returns
    -------
    state
        Shaped as ``state``.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong structure, shape or dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> answer, latent = ic.reset((np.ones((3, 2)), np.ones((3, 1))), 0.0, where=np.array([False, True, False]))
    >>> answer[:, 0], latent[:, 0]
    (array([1., 0., 1.]), array([1., 0., 1.]))
    """
    backend = find_backend(state, "state")
    leaves, structure = backend.flatten(state)
    starts, structure_of_start = backend.flatten(start)
    if structure_of_start != structure and len(starts) == 1 and starts[0] is start:
        starts = starts * len(leaves)
    elif structure_of_start != structure:
        raise TypeError(
            f"start must have the structure of state, {checks.shown(structure)}, or be one array; got "
            f"{checks.shown(structure_of_start)}"
        )
    with backend.on_device_of(state):
        mask = _mask_of_samples(backend, where, leaves)
        changed = [_set_back(backend, leaf, new, mask) for leaf, new in zip(leaves, starts, strict=True)]
    restarted: H = backend.unflatten(structure, changed)
    return restarted


def _mask_of_samples(backend: Backend, where: Any, leaves: list[Any]) -> Any:
    mask = where if backend.is_array(where) else backend.xp.asarray(where, device=backend.device(leaves[0]))
    if not backend.isdtype(mask.dtype, "bool"):
        raise TypeError(f"where must hold booleans, one for each sample, got an array of dtype {mask.dtype}")
    for leaf in leaves:
        if tuple(leaf.shape[: mask.ndim]) != tuple(mask.shape):
            raise ValueError(
                f"where must have the shape of the batch, so the first axes of each leaf of state; got shape "
                f"{tuple(mask.shape)} for a leaf of shape {tuple(leaf.shape)}"
            )
    return mask


def _set_back(backend: Backend, leaf: Any, start: Any, mask: Any) -> Any:
    xp = backend.xp
    new = start
    if not backend.is_array(start):
        # At once in the dtype of the leaf: a float through float32 would be rounded.
        fits = isinstance(start, int) or (isinstance(start, float) and backend.isdtype(leaf.dtype, "real floating"))
        new = xp.asarray(start, dtype=leaf.dtype if fits else None, device=backend.device(leaf))
    if backend.isdtype(new.dtype, "real floating") and not backend.isdtype(leaf.dtype, "real floating"):
        raise TypeError(
            f"start has a leaf of dtype {new.dtype}, which does not fit into one of dtype {leaf.dtype}: give an "
            "integer, as 0 for 0.0, or a pytree with a start for each leaf"
        )
    new = new if new.dtype == leaf.dtype else xp.astype(new, leaf.dtype)
    try:
        new = xp.broadcast_to(new, leaf.shape)
    except (ValueError, RuntimeError, TypeError):
        raise ValueError(
            f"start has a leaf of shape {tuple(new.shape)}, which does not broadcast to {tuple(leaf.shape)}"
        ) from None
    return xp.where(xp.reshape(mask, (*mask.shape, *(1,) * (leaf.ndim - mask.ndim))), new, leaf)


def best(solution: "Solution[H]", axis: int) -> "Solution[H]":
    """See :meth:`Solution.best`."""
    status, stats = solution.status, solution.stats
    backend = find_backend(status, "status")
    xp, shape = backend.xp, tuple(status.shape)
    checks.integer("axis", axis, 0)
    if axis >= len(shape):
        raise ValueError(f"axis must be one of the {len(shape)} axes of the batch, of shape {shape}; got {axis}")
    if not shape[axis]:
        raise ValueError(f"there is nothing to choose from: axis {axis} of the batch, of shape {shape}, is empty")
    with backend.on_device_of(status):
        residual = stats.residual
        # Neither NaN nor infinity is least, and not every library compares them.
        largest = xp.full_like(residual, float(backend.finfo(residual.dtype).max))
        chosen = xp.argmin(xp.where(xp.isfinite(residual), residual, largest), axis=axis, keepdims=True)
        row = xp.reshape(xp.moveaxis(chosen, axis, 0), (-1,))
        n = row.shape[0]

        def taken(a: Any) -> Any:
            """The chosen samples of an array (batch..., rest...)."""
            rows = xp.moveaxis(a, axis, 0)
            flat = xp.reshape(rows, (shape[axis] * n, math.prod(a.shape[len(shape) :])))
            samples = xp.take(flat, row * n + xp.arange(n, device=backend.device(a)), axis=0)
            return xp.reshape(samples, tuple(rows.shape[1:]))

        changed = {
            name: taken(value)
            for name, value in stats._asdict().items()
            if value is not None and name not in ("evaluations", "trace")
        }
        if stats.trace is not None:  # (steps, batch...)
            changed["trace"] = xp.moveaxis(taken(xp.moveaxis(stats.trace, 0, -1)), -1, 0)
        value = backend.map(taken, solution.value)
        return solution._replace(value=value, status=taken(status), stats=stats._replace(**changed))

"""Settings that are arrays, where a computation needs them: of its dtype, or as numbers (Decision 110)."""

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

from array_api_compat import to_device

from .arrays import Array, Count, Real, State
from .backend import Backend
from .records import PLAIN, Record, is_array
from .registry import find_backend
from .space import Space

R = TypeVar("R")
"""A record, or a solver that is none."""

NUMBER = (Real, Real | None, float, float | None, "Real", "Real | None", "float", "float | None")
MAPPED = "One layer for each number of an array is jax.vmap(lambda settings: ...) over the record"
INTEGER = (Count, Count | None, int, "Count", "Count | None", "int")
"""How a dataclass annotates a setting that is one number. Arrays in other fields are for the class that has them."""


def arrays_in(record: object) -> Iterator[tuple[str, Array]]:
    """The arrays in a record, and in the records in it, with the names of their fields; none in other objects."""
    if not isinstance(record, Record):
        return
    for name, value in vars(record).items():
        if type(value) in PLAIN:
            continue
        if is_array(value):
            yield name, value
        else:
            yield from arrays_in(value)


def bound(record: R, space: Space, *, constant: bool = False) -> R:
    """The record, whose arrays have the dtype and the device of a space. A record of numbers is returned as it is.

    A setting that each sample may have for itself, see :attr:`Record.of_samples`, is then of shape (N, 1).

    Parameters
    ----------
    record
        A record, or another object, which has no such settings.
    space
        The space that it computes in.
    constant
        Cut the settings off from derivatives.

    Raises
    ------
    TypeError, ValueError
        If a setting is an array of another framework, or has axes.
    """
    if not isinstance(record, Record):
        return record
    changed: dict[str, Any] = {}
    for name, value in vars(record).items():
        if type(value) in PLAIN:
            continue
        if isinstance(value, Record):
            inner = bound(value, space, constant=constant)
            if inner is not value:
                changed[name] = inner
        elif is_array(value) and _kind(record, name) is not None:
            binds = _of_each_sample if tuple(value.shape) != () and name in record.of_samples else _one_number
            changed[name] = binds(record, name, value, space, constant=constant)
    return _with(record, changed) if changed else record


def steps_of_samples(record: R, space: Space) -> tuple[R, Any]:
    """A solver with one ``max_steps``, the largest, and that of each sample, (N, 1); None if it has one for all.

    Raises
    ------
    ValueError
        If an array of them does not fit to the batch.
    """
    steps: Any = getattr(record, "max_steps", None)
    if not is_array(steps) or tuple(steps.shape) == ():
        return record, None
    xp, backend = space.xp, space.backend
    if backend.recording():
        raise TypeError(
            f"max_steps of {type(record).__name__} is an array, and a program that is exported needs to know how many "
            "steps it makes: write one number"
        )
    steps = _of_each_sample(record, "max_steps", steps, space, constant=True)
    largest = xp.max(steps) if space.samples else xp.asarray(1)
    largest = xp.maximum(largest, xp.ones_like(largest))  # F is evaluated at the start of all samples, or of none
    return _with(record, {"max_steps": int(largest) if backend.readable(steps) else largest}), steps


def numbers(name: str, record: R) -> R:
    """The record, whose arrays became numbers, for what is computed with numbers alone.

    Raises
    ------
    TypeError
        If an array cannot be read, or has axes. The error calls the record ``name``.
    """
    if not isinstance(record, Record):
        return record
    changed: dict[str, Any] = {}
    for field, value in vars(record).items():
        if isinstance(value, Record):
            changed[field] = numbers(name, value)
        elif is_array(value) and (kind := _kind(record, field)) is not None:
            backend = find_backend(value, field)
            if tuple(value.shape) != () or not backend.readable(value) or backend.is_wrapped(value):
                raise TypeError(
                    f"{name} must have settings that are numbers here, but {field} of {type(record).__name__} is an "
                    f"array of shape {tuple(value.shape)} whose number is not known: write {field}=float(...)"
                )
            changed[field] = kind(value)
    return _with(record, changed) if changed else record


def with_settings(space: Space, record: object, x: State) -> State:
    """``x``, which is traced if a setting is: a loop reads no numbers then, whatever it starts from."""
    for name, array in arrays_in(record):
        if space.backend.readable(x[0]) and not find_backend(array, name).readable(array):
            known = space.xp.all(array == array)
            x = State(tuple(space.xp.where(known, a, a) for a in x))
    return x


# Decisions on settings that Python makes for numbers.


def is_zero(setting: Any) -> bool:
    """Whether a setting is the number zero, and no array."""
    return isinstance(setting, (int, float)) and setting == 0


def is_one(setting: Any) -> bool:
    """Whether a setting is the number one, and no array."""
    return isinstance(setting, (int, float)) and setting == 1


def absolute(space: Space, atol: Any) -> Any:
    """An absolute tolerance; zero if it is an array that holds NaN, which no residual would be above."""
    return space.xp.where(atol >= 0, atol, space.xp.zeros_like(atol)) if is_array(atol) else atol


def at_least(space: Space, setting: Any, least: float) -> Any:
    """The larger of a setting and a number; the number if the setting is NaN."""
    if not is_array(setting):
        return max(setting, least)
    return space.xp.where(setting >= least, setting, space.xp.full_like(setting, least))


def zero_where_zero(space: Space, setting: Any, other: Any) -> Any:
    """``other``, zero where a setting is zero."""
    if not is_array(setting):
        return other if setting else 0.0
    return space.xp.where(setting == 0, space.xp.zeros_like(other), other)


def if_positive(space: Space, setting: Any, other: Any) -> Any:
    """``other``, an integer, if a setting is positive; else zero."""
    if not is_array(setting):
        return other if setting else 0
    return space.xp.where(setting > 0, other, space.xp.zeros_like(other))


def within(space: Space, setting: Any, low: float, high: float) -> Any:
    """The number in [low, high] that is closest to a setting."""
    return space.xp.clip(setting, low, high) if is_array(setting) else max(low, min(high, setting))


def quotient(space: Space, numerator: Any, setting: Any) -> Any:
    """``numerator / setting``; the numerator where the setting is zero."""
    if not is_array(setting):
        return numerator / setting if setting else numerator
    positive = setting > 0
    return space.xp.where(positive, numerator / space.xp.where(positive, setting, 1.0), numerator)


def like(backend: Backend, setting: Any, x: Array) -> Any:
    """A setting in the dtype of ``x``, to be multiplied by it."""
    return backend.xp.astype(setting, x.dtype) if is_array(setting) else setting


def _kind(record: Record, name: str) -> type[float] | type[int] | None:
    """The type of a setting that is one number; None of any other."""
    of_record: Any = record
    annotation = next(field.type for field in fields(of_record) if field.name == name)
    return float if annotation in NUMBER else int if annotation in INTEGER else None


def taken(record: R, take: Any) -> R:
    """A record that :func:`bound` returned, with the settings of some of the samples: ``take(array)``."""
    if not isinstance(record, Record):
        return record
    changed: dict[str, Any] = {
        name: take(value) for name, value in vars(record).items() if name in record.of_samples and is_array(value)
    }
    return _with(record, changed) if changed else record


def _remedy(space: Space, backend: Backend) -> str:
    if not space.batch_shape:
        return "With batch_ndim=0 there is one system: with batch_ndim=1 the first axis of h counts samples"
    return MAPPED if backend.name == "jax" else "The batch is the first axes of every leaf of h"


def of_leaf(space: Space, setting: Any, leaf: Array) -> Any:
    """A setting (N, 1), or a number, as it broadcasts to a leaf of the user's, (batch..., state...)."""
    if not is_array(setting) or tuple(setting.shape) == ():
        return setting
    batch = space.batch_shape
    return space.xp.reshape(setting, (*batch, *(1,) * (len(leaf.shape) - len(batch))))


def _of_each_sample(record: Any, name: str, value: Array, space: Space, *, constant: bool) -> Any:
    """A setting of each sample, (N, 1)."""
    owner, xp, backend = type(record).__name__, space.xp, find_backend(value, name)
    if backend is not space.backend:
        if backend.has_autodiff:
            raise TypeError(
                f"{name} of {owner} is an array of {backend.name}, and the state one of {space.backend.name}: make it "
                f"one of {space.backend.name}"
            )
        value = xp.asarray(value, device=space.device)
    try:
        value = xp.broadcast_to(value, space.batch_shape)
    except (ValueError, RuntimeError, TypeError):
        if name == "max_steps" and is_zero(record.rtol) and is_zero(record.absolute_tolerance):
            owner = f"{owner}, the n of ic.steps(n),"
        raise ValueError(
            f"{name} of {owner} must be one number, or one for each sample, of shape {space.batch_shape}; got an array "
            f"of shape {tuple(value.shape)}. {_remedy(space, backend)}"
        ) from None
    value = space.backend.stop_gradient(value) if constant else value
    value = value if space.backend.device(value) == space.device else to_device(value, space.device)
    return xp.reshape(xp.astype(value, space.dtype if _kind(record, name) is float else xp.int32), (-1, 1))


def _one_number(record: Record, name: str, value: Array, space: Space, *, constant: bool) -> Any:
    """A setting to compute with: an array without axes; an integer is a number if it can be read."""
    kind, owner = _kind(record, name), type(record).__name__
    if tuple(value.shape) != ():
        raise ValueError(
            f"{name} of {owner} must be one number where it is used, got an array of shape {tuple(value.shape)}. "
            f"{MAPPED if find_backend(value, name).name == 'jax' else ''}"
        )
    backend = find_backend(value, name)
    if not backend.has_autodiff:
        return float(value) if kind is float else int(value)
    if backend is not space.backend:
        raise TypeError(
            f"{name} of {owner} is an array of {backend.name}, and the state one of {space.backend.name}: write "
            f"{name}=float(...)"
        )
    if kind is int and backend.readable(value) and not backend.is_wrapped(value):
        return int(value)
    value = backend.stop_gradient(value) if constant else value
    if kind is float:
        value = space.xp.astype(value, space.dtype)
    return value if backend.device(value) == space.device else to_device(value, space.device)


def _with(record: R, changed: dict[str, Any]) -> R:
    """The record with other settings, which are checked again if a framework made the record without a check."""
    new: Any = copy.copy(record)
    made_by_framework = vars(new).pop("_leaves", None) is not None
    vars(new).update(changed)
    if made_by_framework and hasattr(new, "__post_init__"):
        new.__post_init__()
    result: R = new
    return result

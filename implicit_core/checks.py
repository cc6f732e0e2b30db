"""Argument checks: each error names the argument, what came, and what was expected."""

import operator
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from .arrays import PyTree, State
from .records import is_array

if TYPE_CHECKING:
    from .backend import Backend

STATIC = (
    "{name} must be known when a program is traced, since it decides which program that is, but it is an array of type "
    "{kind}: make it a static argument, jax.jit(..., static_argnames=...), or write a constant"
)


def with_aux(value: Any, function: str = "f", unknown: str = "h") -> tuple[Any, Any]:
    """What a function, f or g, returns with ``has_aux=True``."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"with has_aux=True {function} must return a pair ({unknown}, aux), got {type(value).__name__}")
    return value


class ForeignArrayError(TypeError):
    """A leaf is no array of the framework that the others belong to: ``leaf``."""

    def __init__(self, message: str, leaf: object) -> None:
        super().__init__(message)
        self.leaf = leaf


def integer(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        if is_array(value) and not is_known(name, value):
            raise TypeError(STATIC.format(name=name, kind=type(value).__name__)) from None
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def count(name: str, value: Any, minimum: int) -> Any:
    """The same, or an array of integers as it is: of at least ``minimum``, where they can be read."""
    if isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be an integer, or an array of integers with one for each sample; got {value!r}: make it an "
            "array"
        )
    if not _is_setting(name, value):
        return integer(name, value, minimum)
    backend = find_backend_of(value, name)
    if not backend.isdtype(value.dtype, "integral"):
        raise TypeError(f"{name} must be an integer, got an array of dtype {value.dtype}")
    if is_known(name, value):
        with backend.known():
            if not bool(backend.xp.all(value >= minimum)):
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def real(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> Any:
    """``value`` as a float in [low, high], without an end that is open.

    An array of a framework with autodiff, or with axes, stays one. Where its numbers can't be read, those outside of
    the interval become NaN.
    """
    if _is_setting(name, value):
        return _real_array(name, value, low, high, low_open, high_open or high == float("inf"))
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}") from None
    high_open = high_open or high == float("inf")
    above = low < number if low_open else low <= number
    below = number < high if high_open else number <= high
    if not above or not below:
        raise ValueError(f"{name} must lie in {_interval(low, high, low_open, high_open)}, got {number!r}")
    return number


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    return f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"


def _real_array(name: str, value: Any, low: float, high: float, low_open: bool, high_open: bool) -> Any:
    backend = find_backend_of(value, name)
    if not backend.isdtype(value.dtype, ("real floating", "integral")):
        raise TypeError(f"{name} must be a real number, got an array of dtype {value.dtype}")

    def inside() -> Any:
        above = value > low if low_open else value >= low
        return above & (value < high if high_open else value <= high)

    if is_known(name, value):
        with backend.known():
            if not bool(backend.xp.all(inside())):
                raise ValueError(f"{name} must lie in {_interval(low, high, low_open, high_open)}, got {value}")
        return value
    number = value if backend.isdtype(value.dtype, "real floating") else value * 1.0
    return backend.xp.where(inside(), number, backend.xp.full_like(number, float("nan")))


def find_backend_of(value: Any, name: str) -> "Backend":
    """The backend of an array."""
    from .registry import find_backend  # which imports this module

    return find_backend(value, name)


def _is_setting(name: str, value: Any) -> bool:
    """Whether a setting stays an array. One without axes is a number, where nothing traces or differentiates it."""
    return is_array(value) and (value.shape != () or find_backend_of(value, name).has_autodiff)


def largest(value: Any) -> int:
    """The largest of one or more integers that can be read; 1 of none."""
    if isinstance(value, int):
        return value
    backend = find_backend_of(value, "k")
    with backend.known():
        return int(backend.xp.max(value)) if 0 not in value.shape else 1


def is_known(name: str, value: Any) -> bool:
    """Whether the numbers of an array can be read."""
    backend = find_backend_of(value, name)
    return not backend.recording() and backend.readable(value) and not backend.is_wrapped(value)


def mask_of_samples(name: str, space: Any, value: Any) -> Any:
    """What a user's test says of each sample, with the batch's shape. One boolean speaks for the whole batch."""
    xp, shape = space.xp, tuple(space.batch_shape)
    mask = value if space.backend.is_array(value) else xp.asarray(value, device=space.device)
    if not space.backend.isdtype(mask.dtype, "bool") or tuple(mask.shape) not in (shape, ()):
        raise TypeError(
            f"{name} must return an array of booleans of the batch's shape {shape}, or one boolean for the whole "
            f"batch; got {type(value).__name__} of shape {tuple(mask.shape)} and dtype {mask.dtype}"
        )
    return xp.broadcast_to(mask, shape)


def function(name: str, value: Any) -> None:
    """``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r} of type {type(value).__name__}")


def instance(name: str, value: Any, kind: type, example: str) -> None:
    """``value`` is a ``kind``."""
    if not isinstance(value, kind):
        if kind is bool and is_array(value):
            raise TypeError(STATIC.format(name=name, kind=type(value).__name__))
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        hint = f": did you mean {value.__name__}()?" if isinstance(value, type) and issubclass(value, kind) else ""
        raise TypeError(f"{name} must be {article} {kind.__name__}, such as {example}; got {value!r}{hint}")


def scale(value: PyTree, name: str = "scale", *, all_parts: bool = False) -> PyTree:
    """``value``, called ``name``, whose numbers are positive, and finite but for some parts, unless ``all_parts``.

    Numbers in arrays are finite, which is checked where they can be read.
    """
    from .registry import find_backend, leaves_of  # which import this module

    if value is None:
        return None
    no_masks(name, value)
    leaves = leaves_of(value)
    all_parts = all_parts or all(map(_is_infinite, leaves))
    for leaf in leaves:
        if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            backend = find_backend(leaf, name)
            if backend.recording():
                continue
            if not backend.readable(leaf):
                raise TypeError(
                    f"{name} must be known when the program is traced: give numbers, or arrays from outside of jit, "
                    "vmap and grad"
                )
            xp = backend.xp
            with backend.known():
                positive = bool(xp.all((leaf > 0) & (leaf < float("inf"))))
            if not positive:
                raise ValueError(f"{name} must be positive and finite, but an array in it is not")
        elif all_parts or not _is_infinite(leaf):
            real(name, leaf, 0.0, low_open=True)
    return value


def _is_infinite(leaf: object) -> bool:
    return isinstance(leaf, float) and leaf == float("inf")


def state(backend: "Backend", name: str, value: PyTree, batch_ndim: int) -> tuple[int, ...]:
    """``value`` can be iterated on: real floating arrays that share their ``batch_ndim`` first axes, returned."""
    leaves, _ = backend.flatten(value)
    if not leaves:
        raise TypeError(f"{name} must hold arrays of {backend.name}, got {value!r}")
    for leaf in leaves:
        if not backend.is_array(leaf):
            raise TypeError(f"{name} must hold arrays of {backend.name} only, got a leaf {_kind(leaf)}")
        supported_leaf(backend, name, leaf)
        if not backend.isdtype(leaf.dtype, "real floating"):
            advice = "cast an integer one to float"
            if backend.isdtype(leaf.dtype, "complex floating"):
                advice = (
                    "solve for the real and imaginary parts: implicit_core.as_real(f), with "
                    f"implicit_core.to_real({name if name.isidentifier() else 'h'})"
                )
            raise TypeError(f"{name} must hold real floating-point arrays, got dtype {leaf.dtype}; {advice}")
        if leaf.ndim < batch_ndim:
            raise ValueError(
                f"{name} has a leaf of shape {tuple(leaf.shape)}, too few axes for batch_ndim={batch_ndim}"
            )
    batches = [tuple(leaf.shape[:batch_ndim]) for leaf in leaves]  # no set: a size that is exported has no hash
    batch = batches[0]
    if any(other != batch for other in batches):
        raise ValueError(
            f"the first batch_ndim={batch_ndim} axes of all leaves of {name} must agree, got {sorted(set(batches))}"
        )
    devices = {str(backend.device(leaf)) for leaf in leaves}
    if len(devices) != 1:
        raise ValueError(f"all leaves of {name} must be on one device, got {sorted(devices)}")
    return batch


def samples(name: str, batch_shape: tuple[int, ...]) -> None:
    """A batch has samples, for what measures numbers of samples. A layer of an empty batch is empty."""
    if 0 in batch_shape:
        raise ValueError(f"{name} holds an empty batch, of batch shape {batch_shape}: there is no sample to measure")


def state_like(name: str, got: Any, expected: State) -> None:
    """``got`` is a state with the arrays' shapes and dtypes of ``expected``."""
    wanted = [(tuple(a.shape), a.dtype) for a in expected]
    if isinstance(got, (tuple, list)) and all(hasattr(a, "shape") and hasattr(a, "dtype") for a in got):
        came = [(tuple(a.shape), a.dtype) for a in got]
        if came == wanted:
            return
        found = _shapes_and_dtypes(came)
    else:
        found = f"{got!r} of type {type(got).__name__}"
    raise TypeError(
        f"{name} must return a state, a tuple with an array for each leaf of h, {_shapes_and_dtypes(wanted)}; "
        f"got {found}"
    )


def _shapes_and_dtypes(arrays: list[tuple[tuple[int, ...], Any]]) -> str:
    return "(" + ", ".join(f"{dtype} {shape}" for shape, dtype in arrays) + ("," if len(arrays) == 1 else "") + ")"


def like(backend: "Backend", name: str, got: PyTree, expected: PyTree, expected_name: str) -> PyTree:
    """``got``, which has the shapes, dtypes and devices of ``expected``, in its structure, see :func:`structured`."""
    leaves, structure = backend.flatten(got)
    expected_leaves, expected_structure = backend.flatten(expected)
    if structure != expected_structure:
        got = structured(backend, got, expected)
        leaves, structure = backend.flatten(got)
    if structure != expected_structure:
        raise TypeError(
            f"{name} must have the structure of {expected_name}, {shown(expected_structure)}, got {shown(structure)}"
            f"{', where * is an array' if '*' in str(structure) else ''}{unregistered(leaves)}"
        )
    for leaf, reference in zip(leaves, expected_leaves, strict=True):
        if not backend.is_array(leaf):
            raise ForeignArrayError(f"{name} must hold arrays of {backend.name}, got a leaf {_kind(leaf)}", leaf)
        supported_leaf(backend, name, leaf)
        if difference := _difference(backend, leaf, reference):
            error, must, wanted, came = difference
            remedy = f"; cast it, or give {expected_name} in that dtype" if "dtype" in must else ""
            raise error(f"{name} must {must} of {expected_name}, {wanted}, got {came}{remedy}")
    return got


def shown(structure: object) -> str:
    """The structure of a pytree in a sentence, without the name of its class; an array is ``*``."""
    text = re.sub(r"^PyTree(Spec|Def)\((.*)\)$", r"\2", str(structure))
    return re.sub(r"(, NoneIsLeaf)?(, namespace='[^']*')?$", "", text)


def structured(backend: "Backend", got: PyTree, expected: PyTree) -> PyTree:
    """``got`` in the structure of ``expected``, if it differs in lists, tuples and named tuples alone; else unchanged.

    Their leaves are in the same order. Two different named tuples are a difference.
    """
    if backend.is_array(got) or backend.flatten(got)[1] == backend.flatten(expected)[1]:
        return got
    made = _with_sequences_of(expected, got)
    return made if backend.flatten(made)[1] == backend.flatten(expected)[1] else got


def _with_sequences_of(expected: Any, got: Any) -> Any:
    if type(expected) is dict and type(got) is dict and expected.keys() == got.keys():
        return {key: _with_sequences_of(expected[key], part) for key, part in got.items()}
    kinds = type(expected), type(got)
    if not all(map(_is_sequence, kinds)) or len(expected) != len(got):
        return got
    if kinds[0] is not kinds[1] and not {list, tuple} & set(kinds):
        return got
    parts = list(map(_with_sequences_of, expected, got))
    return parts if kinds[0] is list else tuple(parts) if kinds[0] is tuple else kinds[0](*parts)


def _is_sequence(kind: type) -> bool:
    return kind in (list, tuple) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def like_z(backend: "Backend", name: str, got: PyTree, z: PyTree) -> None:
    """``got`` has the structure of ``z``, and its floating arrays its shapes, dtypes and devices.

    None stands for a leaf of ``z`` without a derivative.
    """
    leaves, structure = backend.flatten(got, none_is_leaf=True)
    expected_leaves, expected = backend.flatten(z, none_is_leaf=True)
    if structure != expected:
        raise TypeError(f"{name} must have the structure of z, {shown(expected)}, got {shown(structure)}")
    for leaf, reference in zip(leaves, expected_leaves, strict=True):
        if leaf is None or not backend.is_array(reference):
            continue
        if not backend.isdtype(reference.dtype, ("real floating", "complex floating")):
            continue
        if not backend.is_array(leaf):
            raise TypeError(f"{name} must hold arrays of {backend.name}, or None; got a leaf {_kind(leaf)}")
        if is_masked(leaf):
            supported_leaf(backend, name, leaf)
        if difference := _difference(backend, leaf, reference):
            error, must, wanted, came = difference
            raise error(f"{name} must {must}s of z: expected {wanted}, got {came}")


def no_masks(name: str, tree: PyTree) -> None:
    """No leaf of a pytree is a masked array, whose masked cells a solve would compute with (Decision 79)."""
    from .registry import leaves_of  # which imports this module

    if any(map(is_masked, leaves_of(tree))):
        raise TypeError(
            f"{name} must not hold masked arrays, whose mask a solve would lose: "
            f"write {name}.filled(...) with a number to compute with"
        )


def supported(name: str, tree: PyTree) -> None:
    """No leaf of a pytree is an array that a solve would misread, such as one of longdouble (Decision 79)."""
    from .registry import find_backend, leaves_of  # which import this module

    no_masks(name, tree)
    for leaf in leaves_of(tree):
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if is_array and (reason := find_backend(leaf, name).unsupported(leaf, name)):
            raise TypeError(f"{name} must hold plain arrays, got one {reason}")


def is_masked(leaf: object) -> bool:
    """Whether a leaf is a masked array, as NumPy and Dask have them."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "mask") and hasattr(leaf, "filled")


def numbers_as_arrays(backend: "Backend", got: PyTree, expected: PyTree) -> PyTree:
    """``got``, with an array without axes for each Python float where ``expected`` has one (Decision 80)."""
    leaves, structure = backend.flatten(got)
    if not any(_is_number(backend, leaf) for leaf in leaves):
        return got
    got = structured(backend, got, expected)
    structure = backend.flatten(got)[1]
    references, expected_structure = backend.flatten(expected)
    if structure != expected_structure:
        return got
    return backend.unflatten(
        structure,
        [
            backend.xp.full((), float(leaf), dtype=reference.dtype, device=backend.device(reference))
            if _is_number(backend, leaf) and tuple(reference.shape) == ()
            else leaf
            for leaf, reference in zip(leaves, references, strict=True)
        ],
    )


def _is_number(backend: "Backend", leaf: object) -> bool:
    return isinstance(leaf, float) and not backend.is_array(leaf)


def supported_leaf(backend: "Backend", name: str, leaf: Any) -> None:
    """A solve can compute with one array; ``name`` may be words."""
    if reason := backend.unsupported(leaf, name if name.isidentifier() else "x"):
        raise TypeError(f"{name} must not be or hold an array that is {reason}")


def _difference(backend: "Backend", leaf: Any, reference: Any) -> tuple[type[Exception], str, Any, Any] | None:
    """In what two arrays differ first: the error that is, what one must do, what was expected and what came."""
    if leaf.shape != reference.shape:
        return ValueError, "have the shape", tuple(reference.shape), tuple(leaf.shape)
    if not backend.same_dtype(leaf.dtype, reference.dtype):
        return TypeError, "have the dtype", reference.dtype, leaf.dtype
    if backend.device(leaf) != backend.device(reference):
        return ValueError, "be on the device", backend.device(reference), backend.device(leaf)
    return None


def _kind(leaf: Any) -> str:
    kind = f"{leaf!r} of type {type(leaf).__name__}" if not hasattr(leaf, "shape") else f"of type {type(leaf)}"
    return kind + unregistered([leaf])


def unregistered(leaves: Iterable[object]) -> str:
    """What to do about a leaf that is a dataclass, as the end of a sentence; nothing if there is none."""
    name = next((type(leaf).__name__ for leaf in leaves if is_dataclass(leaf) and not isinstance(leaf, type)), None)
    if name is None:
        return ""
    return (
        f"; register the dataclass {name} as a pytree: torch.export.register_dataclass({name}), or for JAX "
        f"jax.tree_util.register_dataclass({name})"
    )

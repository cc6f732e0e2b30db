"""What the core needs of an array framework beyond the array API standard: arrays, pytrees, devices and loops.

Decision 33.

:class:`Backend` spells all of it portably, so that a framework that follows the standard needs no code. A module in
``backends/`` overrides only what its framework spells differently. The arithmetic of the solvers is in
:class:`~implicit_core.space.Space`, which a framework may subclass where it has faster spellings.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import optree
from array_api_compat import device as device_of

from .arrays import Array, Count, Mask, PyTree
from .space import Space

Carry = TypeVar("Carry")
Function = TypeVar("Function", bound=Callable[..., Any])
IsLeaf = Callable[[Any], bool]
Loop = Callable[[Callable[[Any], Array], Callable[[Any], Any], Any, int, int], Any]
"""``(cond, body, carry, max_steps, check_every) -> carry``."""
Known = Mask | bool
"""A mask; True or False where it was read, and holds in all samples or in none."""


class WrittenArgumentError(ValueError):
    """A function of the user's wrote to an array that it was handed."""

    def __init__(self, name: str, *arguments: str) -> None:
        super().__init__(
            f"{name} wrote to its argument {' or '.join(arguments)}; it must return a new array: "
            f"`0.5 * {arguments[0]}`, not `{arguments[0]} *= 0.5`"
        )


class Watch(NamedTuple):
    """A mask that an eager loop reads beside its own, for nothing.

    Attributes
    ----------
    mask
        Computes the mask from what the loop carries. It returns None while there is nothing to look for.
    held
        Called with what the loop carries, when the mask held in some sample.
    """

    mask: Callable[[Any], Mask | None]
    held: Callable[[Any], None]


class Stream(NamedTuple):
    """A CUDA stream: the number of its device, and its address."""

    device: int
    address: int


class Streams(Protocol):
    """For frameworks with streams: the order of work when arrays are exchanged with another framework."""

    def current(self, tree: PyTree) -> Stream | None:
        """The stream that work with the arrays of ``tree`` is queued on; None if they are not on a CUDA device."""

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Queue work on a stream of another framework within this context."""


class Tracing(Protocol):
    """For frameworks whose arrays may be traced, so that no number in them can be read."""

    def check(self, ok: Array, message: str, **numbers: Array) -> None:
        """Raise when the program runs, unless ``ok``. The message may name the numbers."""

    def told(
        self, x: tuple[Array, ...], untold: tuple[Array, ...], function: Callable[..., None], *arrays: Array
    ) -> tuple[Array, ...]:
        """``x``, after ``function(*arrays)`` was called when the program runs; ``untold`` in one that cannot call it.

        The first axes of all arrays are those of a batch, and may be more when the function is called.
        """

    def constant(self, x: Array) -> Array:
        """``x`` without derivatives, for a framework where :meth:`Backend.solving` cannot switch autodiff off."""


class Backend:
    """One array framework, as the core sees it.

    Parameters
    ----------
    name
        Name of the framework's root module, e.g. ``"torch"``.
    xp
        Its array-API namespace (from array-api-compat where the framework needs it).
    array_types
        Classes whose instances are this framework's arrays.
    space
        The class of its vector spaces: :class:`~implicit_core.space.Space`, or a subclass with faster spellings.

    Examples
    --------
    >>> import numpy as np
    >>> from implicit_core.registry import find_backend
    >>> find_backend(np.zeros(3))
    <backend numpy>
    """

    immutable: bool = False
    """Whether arrays cannot be written to."""
    has_autodiff: bool = False
    """Whether the framework differentiates functions of its arrays. They return new arrays then."""
    compiles: bool = False
    """Whether the adapter compiles solves. Its ``solve_compiled(problem, h0, z, solver, trace=...)`` returns a
    solution, or None where a solve is to be run as it is."""
    sees_writes: bool = False
    """Whether :meth:`protected` keeps F from writing to its argument. Otherwise the first evaluations are checked."""
    streams: Streams | None = None
    tracing: Tracing | None = None
    recorder: Loop | None = None
    """Carries out a loop instead of :meth:`while_loop`, in a framework that records loops to replay them."""

    def __init__(self, name: str, xp: ModuleType, array_types: tuple[type, ...], *, space: type[Space] = Space) -> None:
        self.name = name
        self.xp = xp
        self.array_types = array_types
        self._space = space

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    def space(self, like: PyTree, batch_ndim: int, name: str = "h0", scale: PyTree = None) -> Space:
        """The vector space of states shaped as ``like``, which errors call ``name``, in units of ``scale``."""
        return self._space(self, like, batch_ndim, name, scale)

    def space_of_leaves(self, leaves: Sequence[Array], batch_ndim: int, name: str, scale: PyTree) -> Space:
        """The same of the leaves of a state in a list, where ``scale`` is a number or has the state's structure."""
        number = scale is None or isinstance(scale, (int, float))
        return self.space(list(leaves), batch_ndim, name, scale if number else self.flatten(scale)[0])

    # Arrays.

    def is_array(self, x: object) -> bool:
        """Whether ``x`` is one of this framework's arrays."""
        return isinstance(x, self.array_types)

    def unsupported(self, x: Array, name: str) -> str | None:
        """Why a solve cannot compute with an array of this framework, called ``name``, and what to write; else None."""
        return None

    def complex(self, real: Array, imag: Array) -> Array:
        """A complex array from its parts. Here, where a part is not finite, the other may become NaN."""
        xp = self.xp
        dtype = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        return xp.astype(real, dtype) + 1j * xp.astype(imag, dtype)

    def same_dtype(self, a: Any, b: Any) -> bool:
        """Whether two dtypes hold the same numbers."""
        return bool(a == b)

    def numbers(self, x: Array) -> list[Any]:
        """The numbers of an array in C order, read from the device at once."""
        flat = self.xp.reshape(x, (-1,))
        # The array API standard has no such method. A library without it, as array-api-strict, is not on a device.
        return list(flat.tolist()) if hasattr(flat, "tolist") else [flat[i].__float__() for i in range(flat.shape[0])]

    def recording(self) -> bool:
        """Whether a program is recorded to be run elsewhere, in which no number can be read, not even a constant."""
        return False

    def known(self) -> AbstractContextManager[Any]:
        """The context of operations on arrays whose numbers are known, also while a program is traced around them."""
        return nullcontext()

    def axis_order(self, x: Array, batch_ndim: int) -> tuple[int, ...] | None:
        """The axes of ``x``, the one with the largest stride first, where the user's function must see this order.

        The first ``batch_ndim`` axes come first. None for C order, which states of all other layouts are brought into.
        """
        return None

    def in_axis_order(self, x: Array, order: tuple[int, ...] | None, batch_ndim: int) -> Array:
        """``x``, copied if its :meth:`axis_order` is another one."""
        return x

    def rows(self, x: Array, indices: Array) -> Array:
        """The entries of ``x`` along its first axis, in an order of its axes in memory as ``x`` has."""
        return self.xp.take(x, indices, axis=0)

    def finfo(self, dtype: Any) -> Any:
        """Limits of a floating dtype, as in the array API."""
        return self.xp.finfo(dtype)

    def isdtype(self, dtype: Any, kind: str | tuple[str, ...]) -> bool:
        """Whether a dtype is of a kind, as in the array API."""
        return bool(self.xp.isdtype(dtype, kind))

    def stop_gradient(self, x: Array) -> Array:
        """``x``, detached from any autodiff graph."""
        return x

    def from_dlpack(self, x: Any) -> Array:
        """An array of another framework as one of this framework, in the same memory.

        Raises
        ------
        TypeError, BufferError
            If this framework does not have its device or dtype.
        """
        return self.xp.from_dlpack(x)

    # Devices.

    def device(self, x: Array) -> Any:
        """The device of ``x``; None if it is not known (a traced array)."""
        return device_of(x)

    def devices(self) -> list[str]:
        """Devices of this machine, in words."""
        return ["cpu"]

    def on_device_of(self, tree: PyTree) -> AbstractContextManager[Any]:
        """Make the device of the arrays in ``tree`` the current one within this context.

        For frameworks with a current device: the core, and the user's functions, make new arrays there.
        """
        return nullcontext()

    # Pytrees.

    def flatten(
        self, tree: PyTree, *, none_is_leaf: bool = False, is_leaf: IsLeaf | None = None
    ) -> tuple[list[Any], Hashable]:
        """Leaves and structure of a pytree; ``None`` is an empty node, or a leaf if ``none_is_leaf``.

        Nodes for which ``is_leaf`` holds are leaves too.
        """
        return optree.tree_flatten(tree, is_leaf, none_is_leaf=none_is_leaf)

    def unflatten(self, structure: Any, leaves: list[Any]) -> PyTree:
        """The inverse of :meth:`flatten`."""
        return optree.tree_unflatten(structure, leaves)

    def map(self, fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        """Apply ``fn`` to the leaves of pytrees of one structure."""
        return optree.tree_map(fn, tree, *rest)

    # Loops. A body is a function of its carry with fixed shapes and dtypes, so that a framework may trace it.

    def while_loop(
        self,
        masks: Callable[[Carry], tuple[Mask, ...]],
        body: Callable[[Carry, tuple[Known, ...]], Carry],
        carry: Carry,
        max_steps: int,
        check_every: int = 1,
        watch: Watch | None = None,
    ) -> Carry:
        """``carry = body(carry, masks(carry))`` until the first mask holds in no sample, at most ``max_steps`` times.

        Reading the masks is the loop's one host synchronization, made once in ``check_every`` steps. A mask that was
        read, and holds in all samples or in none, is passed to the body as True or False. ``watch`` adds a mask to
        every read. While a graph is captured nothing can be read, and ``max_steps`` are made.
        """

        def masked(carry: Carry) -> Carry:
            return body(carry, masks(carry))

        if self.recorder is not None:
            recorded: Carry = self.recorder(lambda c: self.xp.any(masks(c)[0]), masked, carry, max_steps, check_every)
            return recorded
        steps = 0
        while steps < max_steps:
            found = masks(carry)
            if self.capturing(found[0]):  # nothing can be read, and samples that are done are frozen. Decision 60.
                return self.repeat(masked, carry, max_steps)
            extra = None if watch is None else watch.mask(carry)
            counts, samples = self.count(found if extra is None else (*found, extra)), found[0].shape[0]
            if watch is not None and extra is not None and counts.pop():
                watch.held(carry)
            if counts[0] == 0:
                break
            # Decisions 9 and 10.
            known = tuple(n > 0 if n in (0, samples) else mask for mask, n in zip(found, counts, strict=True))
            carry = body(carry, known)
            chunk = min(check_every, max_steps - steps)
            if chunk > 1:
                carry = self.repeat(masked, carry, chunk - 1)
            steps += chunk
        return carry

    def repeat(self, body: Callable[[Carry], Carry], carry: Carry, times: Count) -> Carry:
        """Apply ``body`` a fixed number of times, which may be traced."""
        for _ in range(times):
            carry = body(carry)
        return carry

    def count(self, masks: Sequence[Mask]) -> list[int]:
        """The number of samples in which each mask holds, read from the device at once."""
        xp, base = self.xp, 1 + masks[0].shape[0]
        digits = [xp.sum(xp.astype(mask, xp.int64)) * base**i for i, mask in enumerate(masks)]
        number = int(sum(digits[1:], digits[0]))
        return [number // base**i % base for i in range(len(masks))]

    def noticed(self) -> list[Mask] | None:
        """Where a solve that cannot read its numbers leaves masks that should hold nowhere; None if nobody asks.

        Whoever asks repeats such a solve where numbers can be read.
        """
        return None

    def protected(
        self, f: Callable[[Any, Any], Any], name: str = "f", argument: str = "h"
    ) -> Callable[[Any, Any], Any]:
        """F, which cannot change the arrays that the solve hands it, in a framework that sees writes."""
        return self.guarded(f, name, argument)

    def guarded(self, function: Function, name: str, *arguments: str) -> Function:
        """A function of the user's that cannot write to its first arguments, or raises an error, in some frameworks.

        ``name`` and ``arguments``, one for each of these, are what an error calls them.
        """
        return function

    def solving(self) -> AbstractContextManager[Any]:
        """The context of a solve: no autodiff graph, and no warnings for what a status reports."""
        return nullcontext()

    def capturing(self, x: Array) -> bool:
        """Whether operations on ``x`` are being captured for a replay (a CUDA graph) instead of carried out."""
        return False

    def readable(self, x: Array) -> bool:
        """Whether the numbers in ``x`` can be read now. Traced and captured arrays cannot be read."""
        return not self.capturing(x)

    def is_wrapped(self, x: Array) -> bool:
        """Whether a transform of the framework hides the numbers in ``x``, although it is :meth:`readable`."""
        return False

    def tell(self, function: Callable[..., None], *numbers: Array) -> None:
        """Call ``function(*numbers)`` if they can be read.

        A framework may give it the same numbers as arrays of NumPy, and later, to avoid waiting for the device.
        """
        # Decision 77.
        if self.readable(numbers[0]):
            function(*numbers)

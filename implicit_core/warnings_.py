"""Warnings that point at the user's line."""

import sys
import warnings
from types import FrameType

_OWN = __name__.partition(".")[0]
_INTERNAL = frozenset({_OWN, "torch", "jax", "jaxlib", "functools", "contextlib", "threading", "concurrent"})
"""Root modules whose frames are not the user's code: this package, the frameworks, and what they call through."""


def warn(message: str, category: type[Warning], *, once: bool = False) -> None:
    """Warn at the innermost line of the user's code, however deep the calls of this package and a framework are.

    Where no user's frame is on the stack, as in a thread of PyTorch's backward or of a callback of JAX, the warning
    points at the outermost frame.

    Parameters
    ----------
    message
        The text of the warning.
    category
        Its class.
    once
        Warn only once at each line, whatever the text, until the filters of ``warnings`` change.

    Examples
    --------
    >>> import warnings
    >>> from implicit_core.warnings_ import warn
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("the terms grow", RuntimeWarning)
    >>> str(caught[0].message)
    'the terms grow'
    """
    frame = sys._getframe(1)
    while _is_internal(frame) and frame.f_back is not None:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    if once:
        key = category.__qualname__, frame.f_lineno, repr(warnings.filters)
        if key in registry:
            return
    # Not `warnings.warn`: its `skip_file_prefixes` needs Python 3.12, and it counts levels differently from the stack.
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=registry,
    )
    if once:  # Python empties a registry from before the filters changed, so not earlier
        registry[key] = True


def _is_internal(frame: FrameType) -> bool:
    """Whether a frame belongs to this package, a framework, or what they call through.

    The examples of this package are written as a user would write them.
    """
    name = frame.f_globals.get("__name__", "")
    root = name.partition(".")[0]
    return root in _INTERNAL and not name.startswith(f"{_OWN}.examples.")

"""Units for a state, from its numbers."""

import math

from . import checks
from .arrays import PyTree
from .registry import find_backend


def magnitudes(tree: PyTree) -> PyTree:
    """The root mean square of each leaf of a pytree, as a ``scale`` for :class:`Problem`.

    ``scale=magnitudes(f(h0, z))`` takes the units of the unknown from the first evaluation, for one evaluation more.

    Parameters
    ----------
    tree
        An array, or a pytree of arrays.

    Returns
    -------
    pytree of floats
        Of the same structure; 1.0 for a leaf that is zero, empty or not finite.

    Raises
    ------
    TypeError
        If the numbers cannot be read, as within ``jax.jit``: call it outside.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> units = ic.magnitudes({"T": np.array([290.0, 310.0]), "c": np.array([1e-6, -1e-6])})
    >>> print({name: f"{unit:.3g}" for name, unit in units.items()})
    {'T': '300', 'c': '1e-06'}
    """
    checks.supported("tree", tree)
    backend = find_backend(tree, "tree")
    xp = backend.xp
    leaves, structure = backend.flatten(tree)
    if not all(map(backend.readable, leaves)):
        raise TypeError("magnitudes reads numbers, which are not known while a program is traced: call it outside")

    def magnitude(x: PyTree) -> float:
        if not math.prod(x.shape) or not bool(xp.all(xp.isfinite(x))):
            return 1.0
        if not (largest := float(xp.max(xp.abs(x)))):
            return 1.0
        y = x / largest  # squares of large and small numbers leave the range
        return largest * math.sqrt(float(xp.mean(y * y)))

    with backend.on_device_of(tree):
        return backend.unflatten(structure, [magnitude(backend.stop_gradient(leaf)) for leaf in leaves])

"""The classifier in CuPy: NumPy's model on a GPU, with F and its pullback fused into a kernel each."""

from typing import Any

import cupy

import implicit_core as ic
from implicit_core.adapters import cupy as icc

from .model import Array, Parameters
from .model_numpy import NumPyModel

PHI = icc.Pointwise("a, u, b", "tanh(a + u + b)", slopes="1 - y * y")
"""The elementwise part of F, and its derivative: two kernels."""


def products(h: Array, z: Parameters) -> tuple[Array, Array, Array]:
    """The arguments of PHI: W h, U x and b."""
    return h @ z["W"].T, z["x"] @ z["U"].T, z["b"]


def f(h: Array, z: Parameters) -> Array:
    """The equilibrium map tanh(W h + U x + b) for a batch of states (n, width)."""
    y: Array = PHI(*products(h, z))
    return y


def linearize(h: Array, z: Parameters) -> ic.Linearization[Array, Any]:
    """F and its pullbacks at (h, z); images need no gradient."""
    arguments = products(h, z)
    y = PHI(*arguments)

    def vjp(v: Array) -> tuple[Array, dict[str, Array | None]]:
        g, _, b = PHI.vjp(v, y, *arguments)
        return g @ z["W"], {"W": g.T @ h, "U": g.T @ z["x"], "b": b, "x": None}

    return ic.Linearization(y, vjp=vjp, vjp_h=lambda v: PHI.vjp(v, y, *arguments)[0] @ z["W"])


class CuPyModel(NumPyModel):
    """The classifier, trained with one estimator.

    Parameters
    ----------
    parameters
        Initial values; not changed.
    estimator
        How cotangents of the fixed point reach W, U and b.
    """

    def __init__(self, parameters: Parameters, estimator: ic.Estimator) -> None:
        super().__init__({name: cupy.asarray(value) for name, value in parameters.items()}, estimator)

    def problem(self) -> ic.Problem[Array, Any]:
        """F and its derivatives, in two kernels."""
        return icc.problem(f, linearize=linearize, batch_ndim=1)

    def parameters(self) -> Parameters:
        """See :class:`Model`."""
        return {name: cupy.asnumpy(value) for name, value in super().parameters().items()}

    def train_step(self, images: Array, labels: Array) -> float:
        """See :class:`Model`."""
        return super().train_step(cupy.asarray(images), cupy.asarray(labels))

    def gradient(self, images: Array, labels: Array) -> Parameters:
        """See :class:`Model`."""
        found = super().gradient(cupy.asarray(images), cupy.asarray(labels))
        return {name: cupy.asnumpy(value) for name, value in found.items()}

    def predict(self, images: Array) -> Array:
        """See :class:`Model`."""
        labels: Array = cupy.asnumpy(super().predict(cupy.asarray(images)))
        return labels

"""The classifier in CuPy: NumPy's model on a GPU, with F and its pullback fused into a kernel each."""

import cupy

import implicit_core as ic
from implicit_core.adapters import cupy as icc
from implicit_core.backend import PyTree

from .model import Array, Parameters
from .model_numpy import NumPyModel

PHI = icc.Pointwise("a, u, b", "tanh(a + u + b)", slopes="1 - y * y")
"""What is between the products of F, and its derivative: two kernels."""


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
        self._counting = icc.problem(self._f, linearize=self._linearize, batch_ndim=1)

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

    def _f(self, h: Array, z: Parameters) -> Array:
        self.counts.evaluations += 1
        value: Array = PHI(h @ z["W"].T, z["x"] @ z["U"].T, z["b"])
        return value

    def _linearize(self, h: Array, z: Parameters) -> ic.Linearization:
        self.counts.evaluations += 1
        arguments = h @ z["W"].T, z["x"] @ z["U"].T, z["b"]
        y = PHI(*arguments)

        def pull(v: Array) -> tuple[Array, ...]:
            self.counts.vjps += 1
            return PHI.vjp(v, y, *arguments)

        def to_z(g: Array, b: Array) -> PyTree:
            return {"W": g.T @ h, "U": g.T @ z["x"], "b": b, "x": None}

        def vjp(v: Array) -> tuple[Array, PyTree]:
            g, _, b = pull(v)
            return g @ z["W"], to_z(g, b)

        def vjp_z(v: Array) -> PyTree:
            g, _, b = pull(v)
            return to_z(g, b)

        return ic.Linearization(y, vjp=vjp, vjp_h=lambda v: pull(v)[0] @ z["W"], vjp_z=vjp_z)

"""Four gradient estimators train a deep-equilibrium classifier of handwritten digits, side by side.

The layer is h = tanh(W h + U x + b), the output softmax(V h + c). Every estimator starts from the same parameters and
sees the same batches; what differs is how a cotangent of h reaches W, U and b. NumPy, PyTorch and JAX, and CuPy where
there is a GPU, train side by side, and end with the same parameters up to rounding. Run it with
``python -m implicit_core demo``, or from Python with :func:`run`.
"""

from .picture import picture_path
from .result import Result, failures
from .train import NoGPUError, run

__all__ = ["NoGPUError", "Result", "failures", "picture_path", "run"]

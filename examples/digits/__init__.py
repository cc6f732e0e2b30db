"""Four gradient estimators train a deep-equilibrium classifier of handwritten digits, for comparison.

The layer is h = tanh(W h + U x + b), the output softmax(V h + c). Every estimator starts from the same parameters and
sees the same batches; only the way in which a cotangent of h reaches W, U and b differs. NumPy, PyTorch and JAX, and
CuPy on a machine with a GPU, take the same steps, and end with the same parameters up to rounding. Run it with
``python -m implicit_core demo``, or from Python with :func:`run`.
"""

from .picture import picture_path
from .result import Result, failures
from .train import NoGPUError, run

__all__ = ["NoGPUError", "Result", "failures", "picture_path", "run"]

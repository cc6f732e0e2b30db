"""The settings of a run."""

from dataclasses import asdict, dataclass

import implicit_core as ic
from implicit_core import checks

from ..program import flag

PHANTOM = ("unroll", "neumann")
GRADIENTS = (*PHANTOM, "one-step", "implicit")
GROUPS = 8
"""Number of groups of the group norms; it divides the number of channels."""

RTOL = 1e-3
"""Relative tolerance of the solves, forward and adjoint; within reach of float32."""


@dataclass(frozen=True)
class Settings:
    """What determines a run; equal settings give equal parameters, to the bit.

    Attributes
    ----------
    gradient
        One of GRADIENTS.
    k, lam
        Those of ``unroll`` and ``neumann``.
    epochs
        Passes over the training samples.
    batch_size
        Samples a step.
    lr
        The highest learning rate of the schedule.
    channels
        Of the encoding and of the fixed point.
    seed
        Of the initial parameters, of the samples held out and of the order of the others.
    """

    gradient: str = "unroll"
    k: int = 5
    lam: float = 0.5
    epochs: int = 30
    batch_size: int = 100
    lr: float = 4e-3
    channels: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        self.estimator()
        for name, minimum in {"epochs": 1, "batch_size": 1, "channels": GROUPS, "seed": 0}.items():
            checks.integer(name, getattr(self, name), minimum)
        checks.real("lr", self.lr, 0.0, low_open=True)
        if self.channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {self.channels}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")

    def estimator(self) -> ic.Estimator:
        """The gradient estimator."""
        match self.gradient:
            case "unroll":
                return ic.Unroll(self.k, self.lam)
            case "neumann":
                return ic.Neumann(self.k, self.lam)
            case "one-step":
                return ic.OneStep()
            case "implicit":
                return ic.Implicit(ic.GMRES(rtol=RTOL))
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {self.gradient!r}")

    def __str__(self) -> str:
        return f"{self.gradient}{f' with k {self.k}, lam {self.lam:g}' * (self.gradient in PHANTOM)}, seed {self.seed}"

    def flags(self) -> dict[str, str]:
        """The settings that matter, as the command line spells them."""
        ignored = () if self.gradient in PHANTOM else ("k", "lam")
        return {flag(name): str(value) for name, value in asdict(self).items() if name not in ignored}

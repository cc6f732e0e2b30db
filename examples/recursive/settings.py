"""The settings of a run."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from implicit_core import checks

from ..program import flag
from .loops import PHANTOM, Loop, loop

FRAMEWORKS = ("torch", "jax")


@dataclass(frozen=True)
class Settings:
    """What determines a run; equal settings give equal parameters, to the bit.

    Attributes
    ----------
    framework
        One of :data:`FRAMEWORKS`.
    gradient, k, lam
        Which recursions the gradient passes through, see :func:`.loops.loop`.
    recursions, latent_steps
        Recursions of a training step, and updates of the latent in each.
    supervisions
        Training steps that a puzzle stays in the batch, with its state.
    width
        Channels of a cell.
    batch
        Puzzles a step.
    steps
        Of training.
    rate
        The highest learning rate of the schedule.
    seed
        Of the initial parameters and of the order of the puzzles.
    decay, warm_up, average
        Weight decay and first steps of AdamW, and decay of the averaged weights.
    train, test, clues
        Numbers of puzzles, and their least number of clues.
    """

    framework: str = "torch"
    gradient: str = "trm"
    k: int = 2
    lam: float = 1.0
    recursions: int = 3
    latent_steps: int = 3
    supervisions: int = 8
    width: int = 48
    batch: int = 48
    steps: int = 900
    rate: float = 3e-3
    seed: int = 0

    decay: ClassVar[float] = 0.1
    warm_up: ClassVar[int] = 50
    average: ClassVar[float] = 0.98
    train: ClassVar[int] = 5000
    test: ClassVar[int] = 1000
    clues: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, got {self.framework!r}")
        for name in ("k", "recursions", "latent_steps", "supervisions", "width", "batch", "steps"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("seed", self.seed, 0)
        checks.real("rate", self.rate, 0.0, low_open=True)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        self.loop()

    def loop(self) -> Loop:
        """The recursions of a training step, and their derivative."""
        return loop(self.gradient, self.recursions, self.k, self.lam)

    def __str__(self) -> str:
        of_gradient = f"({self.k}, {self.lam:g})" if self.gradient in PHANTOM else ""
        return f"{self.framework}, {self.gradient}{of_gradient}, seed {self.seed}"

    def flags(self) -> dict[str, str]:
        """The settings that matter, as the command line spells them."""
        ignored = () if self.gradient in PHANTOM else ("k", "lam")
        return {flag(name): str(value) for name, value in asdict(self).items() if name not in ignored}

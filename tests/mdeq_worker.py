"""One of the processes of ``torchrun`` that train the MDEQ example on few digits, and save how they end.

They train twice: at one go, and stopped after a step and resumed.

Run by test_mdeq_training.py: ``torchrun --nproc-per-node 2 mdeq_worker.py FOLDER``.
"""

import os
import signal
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import torch

from implicit_core.examples.mdeq import run
from implicit_core.examples.mdeq.settings import Settings
from implicit_core.examples.mdeq.training import Training

SETTINGS = Settings(train=48, test=21, epochs=1, solver_steps=4, k=2, dropout=0.25, augment=1)
"""Three steps."""


class Stopped(Training):
    """A training that a signal stops in its second process."""

    def step(self) -> None:
        """The first step, which ends with the signal."""
        super().step()
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def save(training: Training, path: Path) -> None:
    """Save how a training ended."""
    epochs = [{name: value for name, value in epoch.items() if "seconds" not in name} for epoch in training.epochs]
    torch.save({"model": training.model.state_dict(), "epochs": epochs}, path)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    checkpoint = folder / "run.pt"
    with run.processes("cpu") as found:
        run.processes = lambda _: nullcontext(found)  # they meet once: a second time they may find the first group
        save(run.run(SETTINGS), folder / f"{rank}.pt")
        with patch.object(run, "Training", Stopped), suppress(KeyboardInterrupt):
            run.run(SETTINGS, checkpoint=checkpoint)
        save(run.run(SETTINGS, checkpoint=checkpoint, resume=True), folder / f"resumed-{rank}.pt")

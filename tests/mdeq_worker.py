"""One of the processes of ``torchrun`` that train the MDEQ example on few digits, and save how they end.

Run by test_mdeq.py: ``torchrun --nproc-per-node 2 mdeq_worker.py FOLDER``.
"""

import os
import sys
from pathlib import Path

import torch

from implicit_core.examples.mdeq.run import run
from implicit_core.examples.mdeq.settings import Settings

SETTINGS = Settings(train=48, test=21, epochs=1, solver_steps=4, k=2, dropout=0.25, augment=1)
"""Three steps."""

if __name__ == "__main__":
    rank = os.environ["RANK"]
    training = run(SETTINGS, device="cpu")
    epochs = [{name: value for name, value in epoch.items() if "seconds" not in name} for epoch in training.epochs]
    state = {"model": training.model.state_dict(), "epochs": epochs}
    torch.save(state, Path(sys.argv[1]) / f"{rank}.pt")

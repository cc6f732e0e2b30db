"""A training of the ladder."""

from implicit_core.examples.recursive import training
from implicit_core.examples.recursive.batches import Totals

from .rungs import Rung
from .tasks import Examples, Settings, Task


class Training(training.Training):
    """A run of a task with a rung; see the base class."""

    def __init__(self, task: Task, settings: Settings, rung: Rung, seed: int, train: Examples) -> None:
        super().__init__(lambda: task.model(settings, rung), settings, rung, seed, train)
        self.rung = rung

    def mean_loss(self) -> float:
        """The mean of the losses since the last call."""
        mean, self.totals = self.totals.means()["loss"], Totals()
        return mean

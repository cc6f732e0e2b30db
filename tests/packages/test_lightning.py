"""Training, checkpoints, logging and mixed precision by Lightning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packages.models import Model, close, gradients, inputs, plain, squares
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import implicit_core as ic

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
from lightning.pytorch.loggers import CSVLogger  # noqa: E402  # after the skip


class Module(lightning.LightningModule):
    """Regression by a model with a layer, which logs the statistics of the layer."""

    def __init__(self, gradient: ic.Estimator, dtype: torch.dtype = torch.float64, rtol: float = 1e-12) -> None:
        super().__init__()
        solver = ic.Anderson(rtol=rtol, max_steps=200)
        self.model = Model(gradient, solver=solver, eval_solver=solver).to(dtype)
        self.losses: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Any, _index: int) -> Tensor:
        x, y = batch
        output = self.model(x)
        self.dtypes.add(output.dtype)
        loss = squares(output, y) / len(x)
        layer = self.model.layer
        self.log("steps", layer.stats.steps.float().mean(), on_epoch=True, on_step=False)
        self.log("failed", (layer.status != ic.CONVERGED).float().mean(), on_epoch=True, on_step=False)
        self.log("residual", layer.stats.residual.max(), on_epoch=True, on_step=False, reduce_fx="max")
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        x, y = batch
        self.log("val", squares(self.model(x), y) / len(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def loader(dtype: torch.dtype = torch.float64, batch: int = 4) -> DataLoader:
    """Three batches, always in this order."""
    return DataLoader(TensorDataset(*(t.to(dtype) for t in inputs(12))), batch_size=batch)


def trainer(folder: Path, epochs: int, **options: Any) -> Any:
    """A trainer on the CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = quiet | {"logger": False, "enable_checkpointing": False} | options
    return lightning.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=folder, **options)


def parameters(module: Module) -> dict[str, Tensor]:
    """Copies of the parameters of the model."""
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Implicit(ic.GMRES(rtol=1e-12))], ids=["Unroll", "Implicit"])
def test_two_epochs_are_those_of_a_plain_loop(gradient: ic.Estimator, tmp_path: Path) -> None:
    module = Module(gradient)
    reference = Model(gradient)
    trainer(tmp_path, 2).fit(module, loader())
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.02)
    for _ in range(2):
        for x, y in loader():
            found = gradients(squares(plain(reference, x), y) / len(x), reference)
            for name, p in reference.named_parameters():
                p.grad = found[name]
            optimizer.step()
    close(parameters(module), dict(reference.named_parameters()), atol=1e-7)


def test_a_resumed_run_has_the_same_numbers(tmp_path: Path) -> None:
    whole = Module(ic.Unroll(3, 0.5))
    trainer(tmp_path, 2).fit(whole, loader(), loader())
    first = Module(ic.Unroll(3, 0.5))
    begun = trainer(tmp_path, 1)
    begun.fit(first, loader(), loader())
    path = tmp_path / "epoch.ckpt"
    begun.save_checkpoint(path)
    resumed = Module(ic.Unroll(3, 0.5))
    trainer(tmp_path, 2).fit(resumed, loader(), loader(), ckpt_path=path)
    assert first.losses + resumed.losses == whole.losses
    close(parameters(resumed), parameters(whole), atol=0.0)
    loaded = Module.load_from_checkpoint(path, gradient=ic.Unroll(3, 0.5))
    close(parameters(loaded), parameters(first), atol=0.0)


def test_a_logger_reads_the_statistics_of_the_layer(tmp_path: Path) -> None:
    module = Module(ic.Unroll(3, 0.5))
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, 2, logger=logger).fit(module, loader(), loader())
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    values = [dict(zip(columns, row.split(","), strict=True)) for row in rows]
    logged = [row for row in values if row["steps"]]
    assert len(logged) == 2
    for row in logged:
        assert 5 < float(row["steps"]) < 30
        assert float(row["failed"]) == 0
        assert 0 < float(row["residual"]) < 1e-10


def test_mixed_precision(tmp_path: Path) -> None:
    def trained(precision: str) -> Module:
        module = Module(ic.Unroll(3, 0.5), torch.float32, rtol=1e-2)
        trainer(tmp_path, 20, precision=precision).fit(module, loader(torch.float32))
        return module

    half, full = trained("bf16-mixed"), trained("32-true")
    assert half.dtypes == {torch.bfloat16}
    assert full.dtypes == {torch.float32}
    assert torch.all(half.model.layer.status == ic.CONVERGED)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    ours, expected = torch.tensor(half.losses), torch.tensor(full.losses)
    torch.testing.assert_close(ours[:3], expected[:3], atol=5e-3, rtol=0)  # two steps later they drift apart
    torch.testing.assert_close(ours, expected, atol=0.03, rtol=0)
    assert ours[-3:].sum() < 0.4 * ours[:3].sum()
    assert not torch.equal(ours, expected)


def test_double_precision_of_the_trainer(tmp_path: Path) -> None:
    module = Module(ic.Unroll(3, 0.5), torch.float32)
    trainer(tmp_path, 2, precision="64-true").fit(module, loader())
    expected = Module(ic.Unroll(3, 0.5), torch.float32).double()
    trainer(tmp_path, 2).fit(expected, loader())
    assert module.losses == expected.losses

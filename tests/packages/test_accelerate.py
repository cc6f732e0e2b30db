"""Training by accelerate: mixed precision, accumulation, states on disk, and weights that are elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packages.models import ESTIMATORS, Model, close, gradients, inputs, name, plain, squares
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import implicit_core as ic

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402  # after the skip


@pytest.fixture(autouse=True)
def _new_accelerators() -> Iterator[None]:
    """Settings of an accelerator hold for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **options)


def prepared(model: Model, batch: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, ...]:
    """An accelerator, the model, an optimizer of rate 0.1 and three batches."""
    by = accelerator(**options)
    loader = DataLoader(TensorDataset(*(t.to(dtype) for t in inputs(12))), batch_size=batch)
    return by, *by.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader)


def epoch(by: Any, model: nn.Module, optimizer: Any, loader: Any) -> list[float]:
    """The losses of one epoch of training."""
    losses = []
    for x, y in loader:
        with by.accumulate(model):
            loss = squares(model(x), y) / 12
            by.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=name)
def test_accumulated_gradients_are_those_of_the_whole_batch(gradient: ic.Estimator) -> None:
    model, reference = Model(gradient), Model(gradient)
    by, wrapped, optimizer, loader = prepared(model, gradient_accumulation_steps=3)
    epoch(by, wrapped, optimizer, loader)
    x, y = inputs(12)
    found = gradients(squares(plain(reference, x), y) / 12 / 3, reference)
    close(dict(model.named_parameters()), {key: p - 0.1 * found[key] for key, p in reference.named_parameters()})


def test_a_loaded_state_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    run = prepared(Model(ic.Unroll(3, 0.5)))
    epoch(*run)
    run[0].save_state(str(tmp_path))
    expected = epoch(*run)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    again = prepared(Model(ic.Unroll(3, 0.5)))
    again[0].load_state(str(tmp_path))
    assert epoch(*again) == expected
    close(dict(again[1].named_parameters()), dict(run[1].named_parameters()), atol=0.0)


def test_mixed_precision() -> None:
    def trained(**options: Any) -> tuple[Model, list[float], Tensor]:
        model = Model(ic.Unroll(3, 0.5), solver=ic.Anderson(rtol=2e-2)).float()
        run = prepared(model, dtype=torch.float32, **options)
        losses = [loss for _ in range(10) for loss in epoch(*run)]
        output = run[1](inputs(12)[0].float())
        AcceleratorState._reset_state(reset_partial_state=True)
        return model, losses, output

    model, ours, output = trained(mixed_precision="bf16")
    _, expected, full = trained()
    assert output.dtype == torch.float32  # accelerate converts the outputs of the model
    assert torch.all(model.layer.status == ic.CONVERGED)
    difference = (torch.tensor(ours) - torch.tensor(expected)).abs().max().item()
    assert 0 < difference < 0.02
    torch.testing.assert_close(output, full, atol=0.1, rtol=0)  # thirty steps later
    assert sum(ours[-3:]) < 0.5 * sum(ours[:3])


def offloaded(where: str, model: Model, folder: Path) -> Model:
    """A model whose weights are elsewhere, and are loaded before each call of the module that has them."""
    if where == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if where == "disk":
        return accelerate.disk_offload(model, str(folder), torch.device("cpu"))
    places = {"encoder": "cpu", "layer.cell.hidden": "disk", "layer.cell.input": "cpu", "head": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk", "dispatched"])
@pytest.mark.parametrize("gradient", ESTIMATORS, ids=name)
def test_offloaded_weights(where: str, gradient: ic.Estimator, tmp_path: Path) -> None:
    x, _ = inputs()
    expected = plain(Model(gradient), x)
    model = offloaded(where, Model(gradient), tmp_path)
    assert model.layer.cell.hidden.weight.is_meta
    torch.testing.assert_close(model(x), expected, atol=1e-11, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.detach(), atol=1e-11, rtol=0)


def test_weights_loaded_into_an_empty_model(tmp_path: Path) -> None:
    x, _ = inputs()
    saved = Model(ic.Unroll(3, 0.5))
    torch.save(saved.state_dict(), tmp_path / "model.bin")
    with accelerate.init_empty_weights():
        model = Model(ic.Unroll(3, 0.5))
    assert all(p.is_meta for p in model.parameters())
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.bin"), device_map={"": "cpu"})
    squares(model(x), torch.zeros(5, 2)).backward()
    expected = gradients(squares(plain(saved, x), torch.zeros(5, 2)), saved)
    close({key: p.grad for key, p in model.named_parameters()}, expected)

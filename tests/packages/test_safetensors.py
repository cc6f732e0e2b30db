"""Weights of models with layers, saved and loaded by safetensors."""

from pathlib import Path

import pytest
import torch
from cells import Dense
from packages.models import Model, inputs
from torch import nn
from torch.nn.utils import parametrizations

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def normalized() -> nn.Module:
    """A cell whose weight is computed by two parametrizations."""
    cell = Dense(4)
    parametrizations.spectral_norm(cell.hidden)
    parametrizations.weight_norm(cell.input)
    return cell


@pytest.mark.parametrize("make", [Dense, normalized], ids=["plain", "parametrized"])
def test_a_saved_and_loaded_model_has_the_same_outputs(make: type, tmp_path: Path) -> None:
    cells = [make(4) if make is Dense else make() for _ in range(2)]
    x, _ = inputs()
    saved, loaded = (Model(cell=cell) for cell in cells)
    with torch.no_grad():
        saved(x)  # a power iteration changes the buffers of spectral_norm
        for p in saved.parameters():
            p.mul_(0.9).add_(0.01)
    saved.eval(), loaded.eval()
    expected = saved(x)
    assert not torch.allclose(loaded(x), expected, atol=1e-3)
    path = str(tmp_path / "model.safetensors")
    safetensors.save_model(saved, path)
    assert sorted(safetensors.load_file(path)) == sorted(saved.state_dict())
    assert safetensors.load_model(loaded, path) == (set(), [])
    assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(loaded.layer.stats.residual, saved.layer.stats.residual, rtol=0, atol=0)


def test_a_weight_shared_by_two_cells_is_saved_once(tmp_path: Path) -> None:
    def shared(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        first, second = Model(), Model()
        second.layer.cell.hidden = first.layer.cell.hidden
        return nn.ModuleList([first, second])

    saved, loaded = shared(0), shared(1)
    with torch.no_grad():
        for p in saved.parameters():
            p.mul_(0.9)
    path, (x, _) = str(tmp_path / "model.safetensors"), inputs()
    safetensors.save_model(saved, path)
    assert len(safetensors.load_file(path)) == len(saved.state_dict()) - 2
    safetensors.load_model(loaded, path)
    for a, b in zip(saved, loaded, strict=True):
        assert torch.equal(a(x), b(x))
    assert loaded[0].layer.cell.hidden.weight is loaded[1].layer.cell.hidden.weight

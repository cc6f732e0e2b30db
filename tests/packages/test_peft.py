"""Low-rank adapters of PEFT on the linear layers of a cell."""

from typing import Any

import pytest
import torch
from packages.models import ESTIMATORS, Model, close, gradients, inputs, name, plain, squares
from torch import Tensor

import implicit_core as ic
from implicit_core.adapters import torch as ict

peft = pytest.importorskip("peft", reason="peft is not installed")

ADAPTERS = {f"layer.cell.{part}.lora_{letter}.default.weight" for part in ("hidden", "input") for letter in "AB"}


def adapted(model: Model, **options: Any) -> Any:
    """The model with adapters that change it, small enough to keep the cell a contraction."""
    settings = {"r": 2, "lora_alpha": 0.3, "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["hidden", "input"], **settings))


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=name)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_adapters_alone_get_gradients_and_the_right_ones(gradient: ic.Estimator, dora: bool) -> None:
    x, y = inputs()
    before = Model(gradient)(x)
    model = Model(gradient)
    wrapped = adapted(model, use_dora=dora)
    assert not torch.allclose(wrapped(x), before, atol=1e-3)
    magnitudes = {f"layer.cell.{part}.lora_magnitude_vector.default.weight" for part in ("hidden", "input")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == (ADAPTERS | magnitudes if dora else ADAPTERS)
    squares(wrapped(x), y).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    close(ours, gradients(squares(plain(model, x), y), model))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_exact_gradient_of_the_adapters_is_that_of_finite_differences(dropout: float) -> None:
    model, (x, y), step = Model(), inputs(), 1e-5
    wrapped = ict.replace_dropout(adapted(model, lora_dropout=dropout))

    def loss() -> Tensor:
        torch.manual_seed(3)  # the same masks
        return squares(wrapped(x), y)

    ours = gradients(loss(), model)
    torch.manual_seed(4)
    assert (abs(squares(wrapped(x), y) - loss()) > 1e-3) == bool(dropout)
    with torch.no_grad():
        for key, p in model.named_parameters():
            for i in range(p.numel()) if p.requires_grad else ():
                ends = []
                for change in (step, -2 * step):
                    p.view(-1)[i] += change
                    ends.append(loss())
                p.view(-1)[i] += step
                difference = (ends[0] - ends[1]) / (2 * step)
                torch.testing.assert_close(ours[key].view(-1)[i], difference, atol=1e-7, rtol=1e-6)


def test_merged_and_disabled_adapters() -> None:
    x, _ = inputs()
    model = Model()
    before = model(x)
    wrapped = adapted(model)
    expected = wrapped(x)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(x), before, atol=0, rtol=0)
    merged = wrapped.merge_and_unload()
    assert type(merged.layer.cell.hidden) is torch.nn.Linear
    torch.testing.assert_close(merged(x), expected, atol=1e-11, rtol=0)


def test_dropout_of_the_adapters_is_noticed_in_train_mode() -> None:
    model, (x, _) = Model(solver=ic.Anderson(max_steps=20)), inputs()
    wrapped = adapted(model, lora_dropout=0.5)
    wrapped.eval()
    wrapped(x)  # no warning: the dropout is the identity
    wrapped.train()
    with pytest.warns(ic.ChangingFunctionWarning, match=r"the cell has Dropout in train mode.*VariationalDropout"):
        wrapped(x)
    assert model.layer.unconverged > 0


def test_saved_adapters_are_loaded_into_a_new_model(tmp_path: Any) -> None:
    x, _ = inputs()
    wrapped = adapted(Model())
    expected = wrapped(x)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, atol=1e-12, rtol=0)

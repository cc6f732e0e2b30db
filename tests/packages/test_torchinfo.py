"""Summaries of models with layers by torchinfo."""

import pytest
import torch
from packages.models import Model, inputs

torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")


@pytest.mark.parametrize("given", ["data", "size", "nothing"])
def test_the_summary_shows_the_cell_and_counts_its_parameters_once(given: str) -> None:
    model, (x, _) = Model(), inputs()
    options = {"data": {"input_data": x}, "size": {"input_size": x.shape, "dtypes": [torch.float64]}, "nothing": {}}
    summary = torchinfo.summary(model, **options[given], depth=4, verbose=0)
    rows = [(info.depth, info.var_name, info.class_name) for info in summary.summary_list]
    for expected in [(1, "layer", "ImplicitLayer"), (2, "cell", "Dense"), (3, "hidden", "Linear")]:
        assert expected in rows
    assert summary.total_params == summary.trainable_params == sum(p.numel() for p in model.parameters())
    with pytest.raises(StopIteration):  # the hooks are gone
        next(hook for module in model.modules() for hook in module._forward_hooks)


def test_with_data_each_evaluation_of_the_cell_is_a_row_and_its_operations_count() -> None:
    model, (x, _) = Model(), inputs()
    summary = torchinfo.summary(model, input_data=x, depth=4, verbose=0)
    layer = next(info for info in summary.summary_list if info.var_name == "layer")
    assert layer.output_size == [5, 4]
    evaluations = int(model.layer.stats.evaluations)
    cells = [info for info in summary.summary_list if info.var_name == "cell"]
    assert [info.is_recursive for info in cells] == [False] + [True] * (evaluations - 1)
    cell = sum(p.numel() for p in model.layer.cell.parameters())
    outside = sum(p.numel() for part in (model.encoder, model.head) for p in part.parameters())
    assert summary.total_mult_adds == 5 * (outside + evaluations * cell)


def test_the_depth_hides_the_cell() -> None:
    summary = torchinfo.summary(Model(), input_data=inputs()[0], depth=1, verbose=0)
    assert [info.var_name for info in summary.summary_list if info.depth <= 1][1:] == ["encoder", "layer", "head"]
    assert "ImplicitLayer" in str(summary)
    assert "Dense" not in str(summary)

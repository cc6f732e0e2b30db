"""Run with ``make test-packages``, without the fixtures of the folder above: they need JAX and hypothesis."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Only this library's own warnings are errors: the packages have many."""
    torch.set_num_threads(1)
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}")

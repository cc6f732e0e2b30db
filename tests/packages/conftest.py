"""Run with ``make test-packages``, without the fixtures of the folder above: they need JAX and hypothesis."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Only this library's own warnings are errors: the packages have many."""
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}")

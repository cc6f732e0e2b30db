"""Fixtures: every test over every array library, and hypothesis derandomized in CI."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from libraries import LIBRARIES, Library

settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> Library:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """PyTorch's initial parameters are the same in every run, and in every order of the tests."""
    torch.manual_seed(0)

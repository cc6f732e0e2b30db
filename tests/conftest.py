"""Fixtures: every test over every array library, and hypothesis derandomized in CI."""

import os

import pytest
import torch
from gpus import CUPY as ON_CUPY
from gpus import WITHOUT_CUPY
from hypothesis import HealthCheck, settings
from libraries import LIBRARIES, Library

settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


PARAMS = [pytest.param(library, id=library.name) for library in LIBRARIES]
if not WITHOUT_CUPY:
    from libraries import CUPY

    PARAMS.append(pytest.param(CUPY, id="cupy", marks=ON_CUPY))


@pytest.fixture(params=PARAMS)
def library(request: pytest.FixtureRequest) -> Library:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """PyTorch's initial parameters are the same in every run, and in every order of the tests."""
    torch.manual_seed(0)

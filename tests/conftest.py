"""Fixtures: every test over every array library, and hypothesis derandomized in CI. What JAX compiles is kept."""

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import jax
import pytest
import torch
from gpus import CUPY as ON_CUPY
from gpus import WITHOUT_CUPY
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import none
from libraries import JAX, LIBRARIES, STRICT, Library, promoting
from problems import Case

settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config: pytest.Config) -> None:
    """The workers share the programs that XLA compiles, in a folder that is new in each run."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="jax-cache-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker has one core: threads would wait for each other
    torch.set_num_threads(1)
    for name, value in (
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0),
        ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", -1),
        *STRICT.items(),
    ):
        os.environ[name] = str(value)  # for the processes that tests start
        jax.config.update(name.lower(), value)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_finish() -> None:
    """The frameworks' millions of objects stay: the garbage collector need not visit them, nor run as often."""
    given(none())(lambda _: None)()  # older versions of hypothesis look their generator up among the objects, once
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


IN_JAX = ("layer", "pytree", "scalar(0.5)")
"""The cases that run in eager JAX, where each operation is compiled for each shape; test_jax_jit.py runs more."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """If a test runs every case in every library, JAX runs three: a batch, a pytree and a number."""

    def runs(item: pytest.Item) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        both = params.get("library") is JAX and isinstance(params.get("case"), Case)
        return not both or params["case"].name in IN_JAX

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


PARAMS = [pytest.param(library, id=library.name) for library in LIBRARIES]
if not WITHOUT_CUPY:
    from libraries import CUPY

    PARAMS.append(pytest.param(CUPY, id="cupy", marks=ON_CUPY))


@pytest.fixture(params=PARAMS)
def library(request: pytest.FixtureRequest) -> Library:
    return request.param


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """JAX promotes in tests that are marked as running a package which needs it."""
    marker = request.node.get_closest_marker("promotes")
    with nullcontext() if marker is None else promoting(*marker.args):
        yield


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """Grows by the seconds of each compilation of JAX."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(autouse=True)
def seed() -> None:
    """PyTorch's initial parameters are the same in every run, and in every order of the tests."""
    torch.manual_seed(0)

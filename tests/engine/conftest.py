"""A Ray cluster for the tests of the engine that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """A cluster of two workers on this machine, for all tests of this folder: they run one after the other."""
    ray = pytest.importorskip("ray")
    ray.init(
        "local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000,
        log_to_driver=False, configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()

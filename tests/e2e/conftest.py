"""One cluster of real vLLM workers for all end-to-end tests: its start costs more than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests on real engines the time that slow machines need."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(420))


@pytest.fixture(scope="session")
def vllm_cluster() -> Iterator[Cluster]:
    with Cluster.start(engine="vllm", options=["--dtype", "float32"]) as cluster:
        yield cluster

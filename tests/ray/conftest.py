"""One Ray cluster of two nodes for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ray_nodes import RayCluster, ray_cluster


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayCluster]:
    """Its address; the environment has its token."""
    with ray_cluster(num_nodes=2) as cluster, pytest.MonkeyPatch.context() as environ:
        for name, value in cluster.environ.items():
            environ.setenv(name, value)
        yield cluster

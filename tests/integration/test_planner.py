"""The planner at work on a real cluster: its supervisor starts and retires workers, and nobody who asks notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from inferflux.cli.failure import Exit
from tests.support.asking import asking
from tests.support.cluster import Cluster, poll

POOLS = "/v1/admin/pools"
CHAT = "/v1/chat/completions"
ENV = {
    "INFERFLUX_PLANNER_PERIOD_S": "0.5",
    "INFERFLUX_WORKER_DEAD_S": "20",
    "INFERFLUX_WEDGE_S": "30",
}
DECODE = {
    "model": "sim",
    "role": "decode",
    "mode": "act",
    "max_replicas": 2,
    "max_sequences": 4,
    "warm_up_s": 1,
    "hold_s": 3,
    "drain_s": 30,
}
NUM_CLIENTS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(prefill=1, decode=1, env=ENV) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=60, trust_env=False) as client:
        yield client


def pools(client: httpx.Client) -> dict[str, Any]:
    return {pool["id"]: pool for pool in client.get(POOLS).raise_for_status().json()["data"]}


def put(client: httpx.Client, *specs: dict[str, Any], expected: int = 0) -> httpx.Response:
    return client.put(POOLS, json={"pools": list(specs), "expected_revision": expected})


def decode_workers(cluster: Cluster) -> list[str]:
    return [p["id"] for p in cluster.processes if p["role"] == "decode" and p["ready"]]


def all_decode(cluster: Cluster) -> list[str]:
    return [p["id"] for p in cluster.processes if p["role"] == "decode"]


def load(client: httpx.Client, num_clients: int) -> AbstractContextManager[list[Future[int]]]:
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 200, "temperature": 0}
    return asking(client, CHAT, body, num_clients)


def test_pools_without_a_spec_are_seen_and_not_planned(cluster: Cluster, client: httpx.Client) -> None:
    seen = pools(client)

    assert set(seen) == {"decode/sim", "prefill/sim"}
    assert seen["decode/sim"]["workers"] == {"ready": 1}
    assert (seen["decode/sim"]["spec"], seen["decode/sim"]["plan"]) == (None, None)


def test_load_adds_a_worker_and_its_end_drains_and_removes_one(cluster: Cluster, client: httpx.Client) -> None:
    """A little traffic goes on while the victim leaves; no request fails in all that time."""
    put(client, DECODE).raise_for_status()

    with load(client, NUM_CLIENTS) as busy:
        poll(lambda: len(decode_workers(cluster)) == 2, 30, "no decode worker was added")
        plan = pools(client)["decode/sim"]["plan"]
    with load(client, 1) as idle:
        poll(lambda: len(decode_workers(cluster)) == 1, 60, "no decode worker was removed")
        poll(lambda: len(all_decode(cluster)) == 1, 30, "the victim is still listed")

    assert min(each.result() for each in (*busy, *idle)) > 0
    assert plan["terms"][0]["name"] in {"rate", "sequences"}
    assert "victim drains" in cluster.log("registry")


def test_whoever_only_advises_changes_nothing(cluster: Cluster, client: httpx.Client) -> None:
    put(client, DECODE | {"mode": "advise", "min_replicas": 2}).raise_for_status()

    plan = poll(lambda: (pools(client)["decode/sim"]["plan"] or {}).get("target") == 2, 20, "no advice")

    assert plan
    assert len(decode_workers(cluster)) == 1


def test_scale_and_explain_from_the_command_line(cluster: Cluster, client: httpx.Client) -> None:
    """A size is asked for, had, explained and given back."""
    put(client).raise_for_status()

    scaled = cluster.inferctl("pools", "scale", "prefill", "2", "--mode", "act", "--set", "drain_s=5")
    ready = poll(lambda: sum(p["role"] == "prefill" and p["ready"] for p in cluster.processes) == 2, 30, "not two")
    poll(lambda: (pools(client)["prefill/sim"]["plan"] or {}).get("load", {}).get("ready") == 2, 20, "not seen")
    explained = cluster.inferctl("pools", "explain", "prefill")
    shown = json.loads(cluster.inferctl("pools", "get", "prefill", "-o", "json").stdout)
    back = cluster.inferctl("pools", "scale", "prefill/sim", "1")
    poll(lambda: sum(p["role"] == "prefill" for p in cluster.processes) == 1, 60, "still two")

    assert ready
    assert (scaled.returncode, back.returncode) == (Exit.OK, Exit.OK), scaled.stderr + back.stderr
    assert "it has 2 workers and should have 2" in explained.stderr
    assert shown["data"][0]["spec"]["drain_s"] == 5


def test_a_spec_that_makes_no_sense_is_refused_whole(cluster: Cluster, client: httpx.Client) -> None:
    """With every mistake named, and nothing changed."""
    revision = client.get(POOLS).json()["revision"]

    refused = put(client, {"model": "sim", "role": "decode", "min_replicas": "2", "colour": "red"})
    outdated = put(client, DECODE, expected=revision - 1)

    assert refused.status_code == 400
    assert all(word in refused.json()["error"]["message"] for word in ("min_replicas", "colour"))
    assert outdated.status_code == 409
    assert client.get(POOLS).json()["revision"] == revision


def test_the_leader_exports_what_an_autoscaler_follows(cluster: Cluster, client: httpx.Client) -> None:
    put(client, DECODE | {"mode": "advise"}).raise_for_status()

    line = 'inferflux_pool_target_replicas{model="sim",role="decode"} 1.0'
    poll(lambda: line in cluster.metrics("registry"), 20, "no such metric")

    assert "inferflux_planner_leads 1.0" in cluster.metrics("registry")

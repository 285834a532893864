"""Prefix caches through the gateway and inferctl, on a cluster with two simulated prefill workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.cluster import Cluster, poll

PATH = "/v1/admin/cache"
TEXT = "You are a helpful assistant that answers in one word. " * 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(prefill=2) as cluster:
        poll(lambda: [store["peers"] for store in stores(cluster)] == [1, 1], 10, "the workers do not see each other")
        yield cluster


def stores(cluster: Cluster) -> list[dict[str, Any]]:
    return httpx.get(cluster.url + PATH, headers=cluster.headers).raise_for_status().json()["data"]


def post(cluster: Cluster, path: str, **body: Any) -> httpx.Response:
    return httpx.post(cluster.url + path, headers=cluster.headers, json=body, timeout=30)


def test_a_warmed_prefix_is_computed_once_and_read_everywhere(cluster: Cluster) -> None:
    before = stores(cluster)
    answer = post(cluster, f"{PATH}/warm", prompt=TEXT + "warm").raise_for_status().json()
    after = stores(cluster)
    computed, peer = (
        [b["tokens"][source] - a["tokens"][source] for a, b in zip(before, after, strict=True)]
        for source in ("computed", "peer")
    )

    assert [worker["worker"] for worker in answer["workers"]] == ["prefill-0", "prefill-1"]
    assert len({worker["num_tokens"] for worker in answer["workers"]}) == 1
    assert computed[0] > 10 * computed[1]
    assert peer[0] == 0 < peer[1]

    reply = post(cluster, "/v1/completions", prompt=TEXT + "warm, and then", max_tokens=3).raise_for_status()
    assert reply.json()["choices"][0]["text"]
    assert sum(store["requests"]["hit"] + store["requests"]["partial"] for store in stores(cluster)) > sum(
        store["requests"]["hit"] + store["requests"]["partial"] for store in after
    )


def test_a_prefix_of_another_tenant_is_its_own(cluster: Cluster) -> None:
    post(cluster, f"{PATH}/warm", prompt=TEXT + "whose").raise_for_status()
    before = stores(cluster)
    post(cluster, f"{PATH}/warm", prompt=TEXT + "whose", tenant="another").raise_for_status()

    assert stores(cluster)[0]["tokens"]["computed"] - before[0]["tokens"]["computed"] >= len(TEXT)


def test_pins_come_and_go_on_all_workers(cluster: Cluster) -> None:
    pinned = post(cluster, f"{PATH}/pins", name="system", messages=[{"role": "system", "content": TEXT}])
    shown = stores(cluster)
    gone = httpx.delete(f"{cluster.url}{PATH}/pins/system", headers=cluster.headers)
    missing = httpx.delete(f"{cluster.url}{PATH}/pins/system", headers=cluster.headers)

    assert (pinned.status_code, gone.status_code, missing.status_code) == (201, 200, 404)
    num_tokens = pinned.json()["workers"][0]["num_tokens"]
    assert [store["pins"] for store in shown] == [[{"name": "system", "num_tokens": num_tokens}]] * 2
    assert [store["slots"]["pinned"] for store in stores(cluster)] == [0, 0]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("warm", {}, 400),
        ("warm", {"prompt": "a", "model": 7}, 400),
        ("warm", {"prompt": "a", "model": "another"}, 404),
        ("warm", {"prompt": "a", "max_tokens": "many"}, 400),
        ("pins", {"prompt": TEXT}, 400),
        ("pins", {"prompt": TEXT, "name": "no spaces"}, 400),
        ("pins", {"prompt": "too short", "name": "short"}, 400),
    ],
)
def test_bad_bodies_are_refused(cluster: Cluster, path: str, body: dict[str, Any], status: int) -> None:
    answer = post(cluster, f"{PATH}/{path}", **body)

    assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True)
    assert all(not store["pins"] for store in stores(cluster))


def test_a_key_that_is_no_administrators_may_not(cluster: Cluster) -> None:
    key = post(cluster, "/v1/admin/api_keys", name="user", scopes=["generate", "read"]).json()["secret"]
    headers = {"authorization": f"Bearer {key}"}

    assert httpx.get(cluster.url + PATH, headers=headers).status_code == 403
    assert httpx.post(f"{cluster.url}{PATH}/warm", headers=headers, json={"prompt": "a"}).status_code == 403


def test_inferctl_shows_warms_and_pins(cluster: Cluster, tmp_path: Any) -> None:
    file = tmp_path / "prefix.json"
    file.write_text(json.dumps({"messages": [{"role": "system", "content": TEXT + "inferctl"}]}))
    warmed = cluster.inferctl("admin", "cache", "--warm", str(file), "-o", "json")
    pinned = cluster.inferctl("admin", "cache", "--pin", "greeting", "--warm", TEXT)
    shown = cluster.inferctl("admin", "cache")
    unpinned = cluster.inferctl("admin", "cache", "--unpin", "greeting")
    again = cluster.inferctl("admin", "cache", "--unpin", "greeting")
    both = cluster.inferctl("admin", "cache", "--status", "--warm", "x")
    status = json.loads(cluster.inferctl("admin", "cache", "--status", "-o", "json").stdout)

    assert json.loads(warmed.stdout)["workers"][0]["num_tokens"] > 0
    assert "greeting (" in shown.stdout
    assert [run.returncode for run in (warmed, pinned, shown, unpinned, again, both)] == [0, 0, 0, 0, 1, 2]
    assert "no prefix is pinned" in again.stderr
    assert [store["worker"] for store in status["data"]] == ["prefill-0", "prefill-1"]

"""What administrators see of a real cluster and do to its workers: tickets, drains, rolling restarts."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferflux.cli.failure import Exit
from inferflux.paths import Home
from tests.support.cluster import Cluster, poll

CHAT = "/v1/chat/completions"
# Of the simulated engine, at 2 ms each: many seconds, so that something can happen meanwhile.
LONG = 6000
# A busy machine may starve a worker for a while; here that must not look like a fault.
PATIENCE = {"INFERFLUX_WORKER_DEAD_S": "20", "INFERFLUX_WEDGE_S": "30"}
PROMPT = "Tell me something that is long enough to fill some blocks. " * 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(prefill=1, decode=2, env=PATIENCE) as cluster:
        poll(lambda: len(ready(cluster)) == 3, 30, "not all workers are known")
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    """An administrator, with all workers there."""
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=60, trust_env=False) as client:
        poll(lambda: len(ready(cluster)) == 3, 30, "not all workers are ready")
        yield client


def ready(cluster: Cluster) -> list[str]:
    return [worker["id"] for worker in workers(cluster).values() if worker["state"] == "ready"]


def workers(cluster: Cluster) -> dict[str, dict[str, Any]]:
    response = httpx.get(f"{cluster.url}/v1/admin/workers", headers=cluster.headers, trust_env=False)
    return {worker["id"]: worker for worker in response.raise_for_status().json()["data"]}


def busy_one(cluster: Cluster, among: Container[str]) -> str | None:
    """A worker that has requests; pulses say so a moment later."""
    busy = (name for name, worker in workers(cluster).items() if name in among and worker["load"]["running"])
    return next(busy, None)


def ask(client: httpx.Client, max_tokens: int = 8) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": max_tokens, "temperature": 0}
    document: dict[str, Any] = client.post(CHAT, json=body).raise_for_status().json()
    return document


def operations(cluster: Cluster, worker_id: str, path: str) -> int:
    """Status of one of a worker's own health endpoints."""
    transport = httpx.HTTPTransport(uds=str(Home(cluster.home).run / f"{worker_id}.ops.sock"))
    with httpx.Client(transport=transport, base_url="http://ops") as client:
        return client.get(path).status_code


@contextmanager
def streaming(client: httpx.Client, num_streams: int) -> Iterator[list[Future[str]]]:
    """Long streams that have begun; the results are their bodies."""
    begun = threading.Semaphore(0)

    def read() -> str:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": LONG, "temperature": 0, "stream": True}
        with client.stream("POST", CHAT, json=body) as response:
            parts = response.iter_text()
            first = next(parts)
            begun.release()
            return first + "".join(parts)

    with ThreadPoolExecutor(num_streams) as pool:
        streams = [pool.submit(read) for _ in range(num_streams)]
        for _ in streams:
            assert begun.acquire(timeout=30), "a stream did not begin"
        yield streams


def test_the_fleet_is_listed_with_its_load(cluster: Cluster, client: httpx.Client) -> None:
    fleet = workers(cluster)

    assert [(worker["role"], worker["state"]) for worker in fleet.values()] == [
        ("decode", "ready"),
        ("decode", "ready"),
        ("prefill", "ready"),
    ]
    assert fleet["prefill-0"]["load"]["slots"] == fleet["prefill-0"]["load"]["free_slots"] > 0
    assert fleet["decode-0"]["load"]["blocks"] > 0


def test_tickets_add_up(cluster: Cluster, client: httpx.Client) -> None:
    """Over HTTP and for people, with nothing live or leaked once all is quiet."""
    for _ in range(3):
        ask(client)
    poll(lambda: client.get("/v1/admin/tickets").json()["total"]["live"] == 0, 10, "tickets are live")

    document = client.get("/v1/admin/tickets", params={"worker": "prefill-0", "limit": 3}).json()
    shown = cluster.inferctl("tickets")
    leaked = cluster.inferctl("tickets", "--leaked", "-o", "json")
    live = cluster.inferctl("tickets", "--live", "-o", "json")

    (book,) = document["workers"]
    assert document["balanced"] is book["balanced"] is True
    assert (book["id"], book["incarnation"]) == ("prefill-0", workers(cluster)["prefill-0"]["incarnation"])
    assert book["issued"] >= 3
    assert book["issued"] == book["released"] + book["expired"] + book["revoked"]
    assert [(ticket["state"], ticket["leaked"]) for ticket in document["data"]] == [("released", False)] * 3
    # A busy machine may answer a claim too late, but not each time.
    assert {"decode-0", "decode-1"} & {ticket["claimant"] for ticket in document["data"]}
    assert shown.returncode == leaked.returncode == live.returncode == Exit.OK, shown.stderr
    assert "prefill-0" in shown.stdout
    assert f"total: {book['issued']} issued =" in shown.stderr
    assert json.loads(leaked.stdout)["data"] == json.loads(live.stdout)["data"] == []


def test_tickets_of_a_worker_that_is_not_there(client: httpx.Client) -> None:
    assert client.get("/v1/admin/tickets", params={"worker": "prefill-7"}).status_code == 404


def test_what_cannot_be_asked_is_not_balanced(cluster: Cluster, client: httpx.Client) -> None:
    """A worker that hangs proves nothing; it is named, and the rest is shown."""
    pid = cluster.process("prefill")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        poll(lambda: process_state(pid) == "T", 5, "not stopped")
        document = client.get("/v1/admin/tickets").json()
        shown = cluster.inferctl("tickets")
    finally:
        os.kill(pid, signal.SIGCONT)
    poll(lambda: len(ready(cluster)) == 3, 30, "the worker is not back")

    (book,) = document["workers"]
    assert (document["balanced"], book["balanced"], bool(book["error"])) == (False, None, True)
    assert shown.returncode == Exit.FAILED
    assert client.get("/v1/admin/tickets").json()["balanced"]


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_estimate_drains_nothing(cluster: Cluster, client: httpx.Client) -> None:
    ask(client)
    with streaming(client, 2) as streams:
        asked = [client.get(f"/v1/admin/workers/decode-{i}").json() for i in range(2)]
        shown = json.loads(cluster.inferctl("drain", "decode-0", "--eta", "-o", "json").stdout)
        bodies = [stream.result() for stream in streams]

    assert sum(worker["requests"] for worker in asked) == 2
    for estimate in (*asked, shown):
        assert estimate["state"] == "ready"
        assert estimate["eta_s"] is None or estimate["eta_s"] >= 0
    assert all(body.rstrip().endswith("[DONE]") for body in bodies)
    assert len(ready(cluster)) == 3


def test_a_drained_decode_worker_finishes_and_comes_back_while_others_serve(
    cluster: Cluster, client: httpx.Client
) -> None:
    """Streams run to their end, new requests go elsewhere, and for its supervisor that was no failure."""
    before = {f"decode-{i}": cluster.process("decode", i) for i in range(2)}
    with streaming(client, 4) as streams:
        busy = poll(lambda: busy_one(cluster, before), 10, "no decode worker has a stream")
        begun = client.post(f"/v1/admin/workers/{busy}/drain", json={"drain_s": 60}).raise_for_status().json()
        assert (operations(cluster, busy, "/readyz"), operations(cluster, busy, "/livez")) == (503, 200)
        poll(lambda: busy not in ready(cluster), 5, "the gateway does not hear of the drain")
        for _ in range(3):
            ask(client)
        bodies = [stream.result() for stream in streams]
    back = cluster.wait_restarted(before[busy])

    assert begun["state"] == "draining"
    assert begun["requests"] >= 1
    assert 0 < begun["drain_s"] <= 60
    assert begun["incarnation"] == before[busy]["incarnation"]
    assert all(body.rstrip().endswith("[DONE]") for body in bodies)
    assert (back["last_exit"], back["restarts"]) == ("exited with status 0", before[busy]["restarts"])


def test_waiting_for_a_drained_prefill_worker(cluster: Cluster, client: httpx.Client) -> None:
    """It leaves when its tickets are over; meanwhile decode workers compute prompts themselves."""
    before = cluster.process("prefill")
    ask(client)

    drained = cluster.inferctl("drain", "prefill-0", "--wait", "-o", "json")
    ask(client)
    cluster.wait_restarted(before)

    document = json.loads(drained.stdout)
    assert (drained.returncode, document["state"]) == (Exit.OK, "gone"), drained.stderr
    assert workers(cluster)["prefill-0"]["incarnation"] != document["incarnation"]


def test_a_rolling_restart_under_load_loses_nothing(cluster: Cluster, client: httpx.Client) -> None:
    """Every worker is drained and comes back, one after the other, and no client notices."""
    is_over = threading.Event()

    def work() -> int:
        num_done = 0
        while not is_over.is_set():
            document = ask(client, 20)
            assert document["usage"]["completion_tokens"] == 20
            num_done += 1
        return num_done

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(work) for _ in range(3)]
        try:
            for role, number in (("decode", 0), ("prefill", 0), ("decode", 1)):
                before = cluster.process(role, number)
                drained = cluster.inferctl("drain", before["id"], "--wait")
                assert drained.returncode == Exit.OK, drained.stderr
                cluster.wait_restarted(before)
                poll(lambda: len(ready(cluster)) == 3, 30, "the worker is not back")
        finally:
            is_over.set()
        numbers = [each.result() for each in clients]

    assert min(numbers) > 3
    poll(lambda: client.get("/v1/admin/tickets").json()["total"]["live"] == 0, 10, "tickets are live")
    assert client.get("/v1/admin/tickets").json()["balanced"]


def test_a_drain_without_time_ends_at_once(cluster: Cluster, client: httpx.Client) -> None:
    """What runs is given up to whoever can take it."""
    before = cluster.process("decode", 1)

    drained = cluster.inferctl("drain", "decode-1", "--within", "0", "--wait")
    cluster.wait_restarted(before)

    assert drained.returncode == Exit.OK, drained.stderr
    assert "decode-1 is draining" in drained.stderr
    assert "decode-1 is gone after" in drained.stderr


def test_a_worker_that_is_not_there_is_not_drained(cluster: Cluster, client: httpx.Client) -> None:
    """And the answer says which ones there are."""
    for flags in ((), ("--eta",)):
        result = cluster.inferctl("drain", "decode-7", *flags)

        assert result.returncode == Exit.FAILED
        assert "decode-0, decode-1, prefill-0" in result.stderr


def test_only_administrators_see_and_drain(cluster: Cluster, client: httpx.Client) -> None:
    body = {"name": "reader", "scopes": ["read", "generate"]}
    key = client.post("/v1/admin/api_keys", json=body).raise_for_status().json()["secret"]

    for command in (("tickets",), ("drain", "decode-0"), ("drain", "decode-0", "--eta")):
        assert cluster.inferctl(*command, key=key).returncode == Exit.AUTH
    assert len(ready(cluster)) == 3

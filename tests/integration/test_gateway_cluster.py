"""The gateway in a real cluster: real processes, real signals, only the engines are simulated."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.support.cluster import Cluster, poll
from tests.support.scrapes import ISSUED, count, inflight, is_idle

CHAT = "/v1/chat/completions"
MAX_BODY_BYTES = 1 << 20
# Short enough to wait for, long enough for everything else.
SLOW_CLIENT_S = 1.0
# Of the simulated engine, at 2 ms each: many seconds, so that something can happen meanwhile.
LONG, MEDIUM = 4000, 1500
FREED_S = 2.0
PROMPT = "Tell me something that is long enough to fill some blocks. " * 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    env = {"INFERFLUX_MAX_BODY_BYTES": str(MAX_BODY_BYTES), "INFERFLUX_SLOW_CLIENT_S": str(SLOW_CLIENT_S)}
    with Cluster.start(prefill=1, decode=2, env=env) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    """A client with a good key."""
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def idle(cluster: Cluster) -> None:
    """All workers are up, and nothing of earlier requests is left."""
    poll(lambda: count(cluster, "gateway", "inferflux_worker_up") == 3, 30, "not all workers are up")
    poll(lambda: is_idle(cluster), 10, "the cluster is not idle")


def chat(max_tokens: int = 8, *, stream: bool = False, **fields) -> dict:
    messages = [{"role": "user", "content": PROMPT}]
    return {"messages": messages, "max_tokens": max_tokens, "stream": stream, "temperature": 0, **fields}


def contents(body: str) -> str:
    """Join what the chunks of a streamed chat say."""
    chunks = [json.loads(data) for data in re.findall(r"^data: (\{.*)$", body, re.MULTILINE)]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if "choices" in chunk)


def error_events(body: str) -> list[dict]:
    return [json.loads(data)["error"] for data in re.findall(r"^event: error\ndata: (.*)$", body, re.MULTILINE)]


class Streams:
    """Streamed chats that run at the same time, each in a thread."""

    def __init__(self, client: httpx.Client, num_streams: int, max_tokens: int) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._begun = threading.Semaphore(0)
        self._num_streams = num_streams
        self._pool = ThreadPoolExecutor(num_streams)
        self._results = [self._pool.submit(self._read) for _ in range(num_streams)]

    def wait_begun(self) -> None:
        """Wait until each client has its first bytes."""
        for _ in range(self._num_streams):
            assert self._begun.acquire(timeout=20), "a stream did not begin"

    def bodies(self) -> list[str]:
        """All that came, stream by stream, when all are over."""
        with self._pool:
            return [result.result(40) for result in self._results]

    def _read(self) -> str:
        parts: list[str] = []
        with self._client.stream("POST", CHAT, json=chat(self._max_tokens, stream=True)) as response:
            assert response.status_code == 200
            for text in response.iter_text():
                if not parts:
                    self._begun.release()
                parts.append(text)
        return "".join(parts)


@contextmanager
def load(client: httpx.Client, num_clients: int = 3) -> Iterator[list[int]]:
    """Keep requests running; the statuses of all of them, complete after the block."""
    is_over, statuses = threading.Event(), []

    def work(number: int) -> None:
        while not is_over.is_set():
            response = client.post(CHAT, json=chat(20, stream=bool(number % 2)))
            is_whole = "[DONE]" in response.text if number % 2 else "usage" in response.json()
            statuses.append(response.status_code if is_whole else 0)

    with ThreadPoolExecutor(num_clients) as pool:
        workers = [pool.submit(work, number) for number in range(num_clients)]
        try:
            yield statuses
        finally:
            is_over.set()
    for worker in workers:
        worker.result()


def wait_more(statuses: list[int], num_more: int = 10) -> None:
    """Wait until so many more requests are answered."""
    wanted = len(statuses) + num_more
    poll(lambda: len(statuses) >= wanted, 20, "requests hang")


@contextmanager
def raw(cluster: Cluster) -> Iterator[socket.socket]:
    url = httpx.URL(cluster.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the gateway closes; what was sent to a closed connection may cut its end."""
    data = b""
    try:
        while chunk := connection.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def trickle(connection: socket.socket, data: bytes, interval_s: float = 0.1) -> bytes:
    """Send the same again and again until there is an answer."""
    connection.settimeout(interval_s)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        connection.sendall(data)
        try:
            return connection.recv(1 << 16)
        except TimeoutError:
            continue
    raise AssertionError("no answer")


# --- answers


@pytest.mark.usefixtures("idle")
def test_a_chat_is_the_same_whole_and_streamed(cluster, client):
    """By way of a ticket each, which is given back."""
    issued = count(cluster, "prefill", ISSUED)
    whole = client.post(CHAT, json=chat())
    streamed = client.post(CHAT, json=chat(stream=True))

    assert (whole.status_code, streamed.status_code) == (200, 200)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert contents(streamed.text) == whole.json()["choices"][0]["message"]["content"] != ""
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert whole.json()["usage"]["completion_tokens"] == 8
    poll(lambda: is_idle(cluster), FREED_S, "something is left")
    assert count(cluster, "prefill", ISSUED) == issued + 2


@pytest.mark.parametrize(
    ("request_line", "fields", "expected"),
    [
        ("POST " + CHAT, {"json": chat(), "headers": {"authorization": "Bearer wrong-key"}}, (401, "unauthenticated")),
        ("POST " + CHAT, {"json": chat(), "headers": {"authorization": ""}}, (401, "unauthenticated")),
        ("GET /v1/models", {"headers": {"authorization": "Bearer wrong-key"}}, (401, "unauthenticated")),
        ("POST " + CHAT, {"json": chat(model="nobody")}, (404, "model_not_found")),
        ("GET /v1/models/nobody", {}, (404, "model_not_found")),
        ("GET " + CHAT, {}, (405, "method_not_allowed")),
        ("PUT " + CHAT, {"json": chat()}, (405, "method_not_allowed")),
        ("POST /v1/models", {}, (405, "method_not_allowed")),
        ("POST /v1/nothing", {"json": {}}, (404, "not_found")),
        ("GET /", {}, (404, "not_found")),
        ("POST " + CHAT, {"content": b"x" * (MAX_BODY_BYTES + 1)}, (413, "body_too_large")),
        ("POST " + CHAT, {"content": iter([b"x" * (1 << 16)] * 17)}, (413, "body_too_large")),
        ("POST " + CHAT, {"content": b'{"a":' + b"[" * 70 + b"]" * 70 + b"}"}, (400, "invalid_request")),
        ("POST " + CHAT, {"content": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"}, (400, "invalid_request")),
        ("POST " + CHAT, {"content": b"{oops"}, (400, "invalid_request")),
        ("POST " + CHAT, {"content": b""}, (400, "invalid_request")),
        ("POST " + CHAT, {"json": chat(), "headers": {"x-inferflux-timeout-ms": "soon"}}, (400, "invalid_request")),
        ("POST " + CHAT, {"json": chat(), "headers": {"content-encoding": "gzip"}}, (400, "invalid_request")),
    ],
)
def test_refusals(client, request_line, fields, expected):
    """Each with its status, its code and the headers of every response; and the client is welcome afterwards."""
    response = client.request(*request_line.split(), **fields)

    assert (response.status_code, response.json()["error"]["code"]) == expected
    assert re.fullmatch(r"req_[0-9a-f]{24}", response.headers["x-request-id"])
    assert int(response.headers["x-inferflux-policy-rev"]) > 0
    assert client.get("/v1/models").status_code == 200


def test_messages_are_answered_in_their_own_dialect(cluster):
    """With x-api-key, whole, streamed and refused."""
    body = {"model": cluster.model, "max_tokens": 4, "messages": [{"role": "user", "content": PROMPT}]}
    with httpx.Client(base_url=cluster.url, timeout=30, trust_env=False) as client:
        client.headers["x-api-key"] = cluster.api_key
        whole = client.post("/v1/messages", json=body)
        streamed = client.post("/v1/messages", json={**body, "stream": True})
        refused = client.post("/v1/messages", json=body, headers={"x-api-key": "wrong-key"})

    assert whole.json()["type"] == "message"
    assert "event: message_stop" in streamed.text
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.json()["request_id"] == refused.headers["x-request-id"]


def test_every_response_names_its_request_and_the_policy(client):
    """A new id each, the same revision; on good answers of both kinds as on health checks."""
    responses = [client.post(CHAT, json=chat(stream=s)) for s in (False, True)]
    responses += [client.get(path) for path in ("/v1/models", "/livez", "/readyz", "/healthz", "/metrics")]

    assert {response.status_code for response in responses} == {200}
    assert len({response.headers["x-request-id"] for response in responses}) == len(responses)
    assert len({response.headers["x-inferflux-policy-rev"] for response in responses}) == 1


@pytest.mark.usefixtures("idle")
def test_a_deadline_ends_a_request(cluster, client):
    """With 504 before the first byte, with an error event after it; and then nothing is left of it."""
    soon = {"x-inferflux-timeout-ms": "300"}
    whole = client.post(CHAT, json=chat(LONG), headers=soon)
    streamed = client.post(CHAT, json=chat(LONG, stream=True), headers=soon)

    assert whole.status_code == 504
    assert streamed.status_code == 200
    assert [error["code"] for error in error_events(streamed.text)] == ["deadline_exceeded"]
    assert "[DONE]" not in streamed.text
    poll(lambda: is_idle(cluster), FREED_S, "something is left")


# --- clients that behave badly


def test_oversized_headers_are_refused(cluster):
    """With 431."""
    with raw(cluster) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nx-big: " + b"a" * 40_000 + b"\r\n\r\n")
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"headers_too_large"' in answer


def test_headers_without_end_are_refused(cluster):
    """Before they are complete, which they never are."""
    with raw(cluster) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nx-big: ")
        assert trickle(connection, b"a" * 16_384).startswith(b"HTTP/1.1 431 ")


def test_too_many_headers_are_refused(cluster):
    """However small they are."""
    with raw(cluster) as connection:
        lines = b"".join(b"x-%d: 1\r\n" % i for i in range(200))
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 431 ")


def test_slow_headers_are_refused(cluster):
    """A trickle does not extend the time."""
    with raw(cluster) as connection:
        begun_at = time.monotonic()
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        answer = trickle(connection, b"x-more: 1\r\n")

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begun_at < SLOW_CLIENT_S + 1.5


def test_a_silent_connection_is_closed(cluster):
    """It never became a request, so there is nothing to answer."""
    with raw(cluster) as connection:
        assert read_all(connection) == b""


def test_a_slow_body_is_refused(cluster):
    """With 408, after the grace."""
    with raw(cluster) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {cluster.api_key}\r\ncontent-length: 100\r\n"
        connection.sendall(head.encode() + b'\r\n{"messages"')
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


def test_garbage_is_refused(cluster):
    """And does no harm."""
    with raw(cluster) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("rest", [b"zz\r\n", b'5\r\n{"a"'])
def test_a_body_that_breaks_off_or_breaks_the_rules_does_no_harm(cluster, rest):
    """Whether or not there is an answer, nothing is left of it."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {cluster.api_key}\r\n"
    with raw(cluster) as connection:
        connection.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + rest)
        connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_all(connection)

    poll(lambda: is_idle(cluster), FREED_S, "something is left")


@pytest.mark.usefixtures("idle")
def test_a_client_that_leaves_in_a_stream_frees_everything(cluster, client):
    """Several at once: no work, no slot and no ticket is left anywhere."""
    cancelled = count(cluster, "gateway", 'inferflux_cancelled_total{phase="stream"}')
    for _ in range(3):
        with client.stream("POST", CHAT, json=chat(LONG, stream=True)) as response:
            texts = response.iter_text()
            next(texts)  # kept: without its iterator, httpx would close the response here
            assert inflight(cluster, "decode-0") + inflight(cluster, "decode-1") > 0

    poll(lambda: is_idle(cluster), FREED_S, "something is left")
    assert count(cluster, "gateway", 'inferflux_cancelled_total{phase="stream"}') == cancelled + 3


@pytest.mark.usefixtures("idle")
def test_a_client_that_leaves_before_the_first_byte_frees_everything(cluster, client):
    """While decode works on a whole answer."""
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat(LONG), timeout=httpx.Timeout(10, read=0.3))

    poll(lambda: is_idle(cluster), FREED_S, "something is left")
    assert client.post(CHAT, json=chat()).status_code == 200


# --- keys


def test_a_new_key_works_and_a_revoked_one_stops_within_a_second(cluster, client):
    """At this gateway, over the admin API; and a key may do what its scopes say, no more."""
    keys = "/v1/admin/api_keys"
    created = client.post(keys, json={"name": "test", "scopes": ["generate"]})
    mine = {"authorization": f"Bearer {created.json()['secret']}"}

    def status() -> int:
        return client.post(CHAT, json=chat(1), headers=mine).status_code

    assert created.status_code == 201
    poll(lambda: status() == 200, 1.0, "the key does not work")
    assert client.get(keys, headers=mine).status_code == 403
    assert client.delete(f"{keys}/{created.json()['id']}").status_code == 200
    poll(lambda: status() == 401, 1.0, "the key still works")
    assert client.delete(f"{keys}/key_nobody").status_code == 404


# --- lost processes; last, since they leave young workers behind


@pytest.mark.usefixtures("idle")
def test_requests_succeed_while_the_prefill_worker_is_gone(cluster, client):
    """Decode computes the prompts; when the worker is back, tickets are used again."""
    local = 'inferflux_prefills_total{result="local"'
    before = count(cluster, "gateway", local)
    with load(client) as statuses:
        wait_more(statuses)
        killed = cluster.kill("prefill")
        poll(lambda: count(cluster, "gateway", local) > before, 10, "decode computes no prompt")
        cluster.wait_restarted(killed)
        poll(lambda: count(cluster, "prefill", ISSUED) > 3, 10, "no new tickets")

    assert set(statuses) == {200}


@pytest.mark.usefixtures("idle")
def test_a_lost_decode_worker_ends_nothing(cluster, client):
    """Its streams and its whole requests go on on the other one, and new ones succeed."""
    moved = count(cluster, "gateway", "inferflux_failover_total")
    streams = Streams(client, 4, MEDIUM)
    streams.wait_begun()
    with ThreadPoolExecutor(2) as pool:
        whole = [pool.submit(client.post, CHAT, json=chat(MEDIUM)) for _ in range(2)]
        poll(lambda: inflight(cluster, "decode-1") >= 2, 5, "the load is not shared")
        killed = cluster.kill("decode", 1)
        after = [client.post(CHAT, json=chat(stream=True)) for _ in range(5)]
        taken_over = [result.result(60) for result in whole]
    bodies = streams.bodies()

    assert [response.status_code for response in (*after, *taken_over)] == [200] * 7
    assert all(contents(response.text) and "[DONE]" in response.text for response in after)
    assert [response.json()["usage"]["completion_tokens"] for response in taken_over] == [MEDIUM] * 2
    assert {contents(body) for body in bodies} == {taken_over[0].json()["choices"][0]["message"]["content"]}
    assert not any(error_events(body) for body in bodies)
    assert count(cluster, "gateway", "inferflux_failover_total") > moved
    cluster.wait_restarted(killed)


@pytest.mark.usefixtures("idle")
def test_nothing_fails_while_the_control_plane_is_gone(cluster, client):
    """Policy, registry and their store at once, under load; a new key can be made when they are back."""
    with load(client) as statuses:
        wait_more(statuses)
        killed = [cluster.kill(role) for role in ("redis", "policy", "registry")]
        wait_more(statuses, 30)
        for before in killed:
            cluster.wait_restarted(before)
        wait_more(statuses)

    assert set(statuses) == {200}

    def can_list() -> bool:
        return client.get("/v1/admin/api_keys").status_code == 200

    poll(can_list, 10, "the policy service is not back")

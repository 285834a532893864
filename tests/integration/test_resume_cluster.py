"""Streams that outlive their workers: real processes, real signals, simulated engines.

A simulated engine computes its tokens from the KV bytes that it reads, so an answer that is the same as undisturbed
proves that nothing was lost, doubled or mixed up on the way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cluster import Cluster, poll
from tests.support.scrapes import count, is_idle, samples

NUM_DECODES = 3
STEP_MS = 20
NUM_TOKENS = 150
DRAIN_S = 1.0
PROMPT = "Tell me something that is long enough to fill some blocks. " * 10
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": NUM_TOKENS, "stream": True, "seed": 7}
USAGE = {"stream_options": {"include_usage": True}}
TEXT = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "stream": True, "seed": 7, "ignore_eos": True}
CALLS = {
    "greedy": ("/v1/chat/completions", CHAT | {"temperature": 0} | USAGE),
    "seeded": ("/v1/chat/completions", CHAT | {"temperature": 1.0} | USAGE),
    "choices": ("/v1/chat/completions", CHAT | {"n": 3, "temperature": 1.0} | USAGE),
    "completion": ("/v1/completions", TEXT | {"temperature": 0.8} | USAGE),
    "responses": ("/v1/responses", {"input": PROMPT, "max_output_tokens": NUM_TOKENS, "stream": True}),
    "messages": ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": NUM_TOKENS, "stream": True}),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    profile = tmp_path_factory.mktemp("sim") / "profile.json"
    profile.write_text(json.dumps({"step_ms": STEP_MS, "prefill_ms_per_token": 0.01}))
    env = {"INFERFLUX_SIM_PROFILE": str(profile), "INFERFLUX_DRAIN_BUDGET_S": str(DRAIN_S)}
    with Cluster.start(prefill=1, decode=NUM_DECODES, env=env) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def calm(cluster: Cluster) -> Iterator[None]:
    """All workers are up before a test, and nothing of any request is left after it."""
    poll(lambda: count(cluster, "gateway", "inferflux_worker_up") == NUM_DECODES + 1, 60, "not all workers are up")
    poll(lambda: is_idle(cluster, NUM_DECODES), 15, "the cluster is not idle")
    yield
    cluster.wait_ready(60)
    poll(lambda: is_idle(cluster, NUM_DECODES), 15, "something is left")


class Stream:
    """One streamed request, read event by event in a thread."""

    def __init__(self, cluster: Cluster, path: str, body: dict[str, Any]) -> None:
        self._cluster = cluster
        self._call = (path, {"model": cluster.model} | body)
        self._events: list[str] = []
        self._news = threading.Condition()
        self._started = starts(cluster)
        self._pool = ThreadPoolExecutor(1)
        self._result: Future[str] = self._pool.submit(self._read)

    def wait_events(self, num_events: int) -> None:
        """Wait until the client has so many events, or all."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._events) >= num_events or self._result.done(), 20)

    def worker(self) -> int:
        """Find the decode worker that has taken it last; start nothing else beside it."""
        number = started_since(self._cluster, self._started)
        self._started[number] += 1
        return number

    def text(self) -> str:
        """All that came, without what differs between requests: ids, times and what was cached."""
        with self._pool:
            return self._result.result(60)

    def _read(self) -> str:
        path, body = self._call
        headers, text = self._cluster.headers, ""
        with (
            httpx.Client(base_url=self._cluster.url, headers=headers, timeout=60, trust_env=False) as client,
            client.stream("POST", path, json=body) as response,
        ):
            for part in response.iter_text():
                text += part
                with self._news:
                    self._events = text.split("\n\n")[:-1]
                    self._news.notify_all()
            text = text.replace(response.headers["x-request-id"], "ID")
        # Caches are another matter.
        text = re.sub(r'"(prompt_tokens_details|input_tokens_details)": ?(null|\{[^}]*\})', r'"\1":null', text)
        text = re.sub(r'"(cache_read_input_tokens|cache_creation_input_tokens)": ?(null|[0-9]+)', r'"\1":null', text)
        return re.sub(r'"(created|created_at|completed_at)": ?[0-9.]+', r'"\1": 0', text)


def starts(cluster: Cluster) -> list[float]:
    """How many requests the gateway has given to each decode worker."""
    found, name = (
        dict(samples(cluster, "gateway")),
        'inferflux_phases_total{phase="decode",role="decode",worker="decode-',
    )
    return [found.get(f'{name}{number}"}}', 0) for number in range(NUM_DECODES)]


def started_since(cluster: Cluster, before: list[float]) -> int:
    """Wait until a decode worker has been given a request; returns its number."""

    def find() -> list[int]:
        return [number for number, (old, new) in enumerate(zip(before, starts(cluster), strict=True)) if new > old]

    return poll(find, 10, "no decode worker has it")[0]


def num_moved(cluster: Cluster) -> float:
    return count(cluster, "gateway", "inferflux_failover_total")


def refused(cluster: Cluster) -> float:
    return count(cluster, "gateway", "inferflux_resume_refused_total")


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Stop processes inside the block, and prove that they are."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat")
            poll(lambda stat=stat: stat.read_text().rpartition(")")[2].split()[0] == "T", 1, "not stopped")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def pause(seconds: float) -> None:
    """Let a fault last: this is its length, nothing is waited for."""
    threading.Event().wait(seconds)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Callable[[str], str]:
    """The answer of each call when nothing happens."""
    known: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in known:
            known[name] = Stream(cluster, *CALLS[name]).text()
            assert not re.search(r'"type": ?"error"', known[name])
        return known[name]

    return of


# --- death


@pytest.mark.parametrize("name", CALLS)
def test_a_stream_survives_the_death_of_its_worker(cluster, undisturbed, name):
    """In every API, greedy, seeded and with several choices: the same bytes as undisturbed."""
    expected, moved, before = undisturbed(name), num_moved(cluster), refused(cluster)
    stream = Stream(cluster, *CALLS[name])
    stream.wait_events(8)
    killed = cluster.kill("decode", stream.worker())

    assert stream.text() == expected
    assert (num_moved(cluster), refused(cluster)) == (moved + 1, before)
    cluster.wait_restarted(killed)


@pytest.mark.parametrize("num_events", [0, 1, 2, NUM_TOKENS - 2, NUM_TOKENS + 2])
def test_it_does_not_matter_when_the_worker_dies(cluster, undisturbed, num_events):
    """Before the first event, after the first, the second, and about the last."""
    expected = undisturbed("greedy")
    stream = Stream(cluster, *CALLS["greedy"])
    number = stream.worker()
    stream.wait_events(num_events)
    killed = cluster.kill("decode", number)

    assert stream.text() == expected
    cluster.wait_restarted(killed)


def test_two_deaths_in_one_stream(cluster, undisturbed):
    """As long as it gets further in between."""
    expected, moved = undisturbed("seeded"), num_moved(cluster)
    stream = Stream(cluster, *CALLS["seeded"])
    stream.wait_events(5)
    killed = [cluster.kill("decode", stream.worker())]
    stream.wait_events(12)
    killed.append(cluster.kill("decode", stream.worker()))

    assert stream.text() == expected
    assert num_moved(cluster) == moved + 2
    for before in killed:
        cluster.wait_restarted(before)


def test_a_whole_answer_survives_too(cluster):
    """It is begun again."""
    path, body = CALLS["greedy"]
    body = {k: v for k, v in body.items() if k not in ("stream", "stream_options")} | {"model": cluster.model}
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=60, trust_env=False) as client:
        expected = client.post(path, json=body).json()
        before = starts(cluster)
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(client.post, path, json=body)
            killed = cluster.kill("decode", started_since(cluster, before))
            answer = result.result(60).json()

    assert answer["choices"] == expected["choices"]
    assert answer["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"] == NUM_TOKENS
    cluster.wait_restarted(killed)


def test_a_crash_is_noticed_at_once(cluster, undisturbed):
    """A resumed stream has a gap, but a short one."""
    undisturbed("greedy")
    before = dict(samples(cluster, "gateway"))
    stream = Stream(cluster, *CALLS["greedy"])
    stream.wait_events(5)
    killed = cluster.kill("decode", stream.worker())
    stream.text()
    after = dict(samples(cluster, "gateway"))

    num, total = (
        after[n] - before.get(n, 0) for n in ("inferflux_resume_seconds_count", "inferflux_resume_seconds_sum")
    )
    assert num == 1
    assert total < 1.0  # of a loaded machine
    cluster.wait_restarted(killed)


# --- hangs


def test_a_worker_that_hangs_loses_its_streams_and_wakes_up_to_nothing(cluster, undisturbed):
    """They go on elsewhere within three seconds; what the zombie computed in its sleep is not heard."""
    expected, moved = undisturbed("seeded"), num_moved(cluster)
    stream = Stream(cluster, *CALLS["seeded"])
    stream.wait_events(5)
    with stopped(cluster.pids[f"decode-{stream.worker()}"]):
        text = stream.text()

    assert text == expected
    assert num_moved(cluster) == moved + 1
    poll(lambda: count(cluster, "gateway", "inferflux_fenced_writes_total"), 10, "the zombie said nothing")


def test_short_stalls_of_any_process_abort_nothing(cluster, undisturbed):
    """0.9 seconds of worker, prefill worker and gateway, one after the other."""
    expected = undisturbed("seeded")
    moved = num_moved(cluster)
    pids = cluster.pids
    for process in ("decode-0", "decode-1", "decode-2", "prefill-0", "gateway-0"):
        streams = [Stream(cluster, *CALLS["seeded"]) for _ in range(NUM_DECODES)]
        for stream in streams:
            stream.wait_events(3)
        with stopped(pids[process]):
            pause(0.9)
        assert [stream.text() for stream in streams] == [expected] * NUM_DECODES

    assert num_moved(cluster) == moved


# --- drains, and nobody left


def test_a_drained_worker_hands_its_streams_over(cluster):
    """When its budget is used up before they are done."""
    path, body = CALLS["greedy"]
    body = body | {"max_tokens": 2 * NUM_TOKENS}
    expected = Stream(cluster, path, body).text()
    stream = Stream(cluster, path, body)
    stream.wait_events(3)
    drained = cluster.kill("decode", stream.worker(), signal.SIGTERM)

    assert stream.text() == expected
    assert count(cluster, "gateway", 'inferflux_failover_total{reason="DRAINING"') >= 1
    cluster.wait_restarted(drained)


def test_a_stream_outlives_the_whole_pool(cluster, undisturbed):
    """It waits for the first worker that is back; new requests are told to come later."""
    expected = undisturbed("greedy")
    stream = Stream(cluster, *CALLS["greedy"])
    stream.wait_events(5)
    killed = [cluster.kill("decode", i) for i in range(NUM_DECODES)]
    path, body = CALLS["greedy"]

    def refusal() -> httpx.Response | None:
        response = httpx.post(cluster.url + path, json=body, headers=cluster.headers, timeout=60, trust_env=False)
        return response if response.status_code == 503 else None

    response = refusal()
    assert stream.text() == expected
    if response is not None:  # else the first worker was faster than we
        assert response.json()["error"]["code"] == "no_worker"
        assert int(response.headers["retry-after"]) >= 1
    for before in killed:
        cluster.wait_restarted(before)


# --- poison; last, since nobody may send this again


def test_a_request_under_which_two_workers_die_is_refused(cluster):
    """At its start each time: here it is the test that kills, but how should the gateway know."""
    path, body = CALLS["greedy"]
    body = body | {"messages": [{"role": "user", "content": "die"}], "stream": False, "max_tokens": 2000}
    del body["stream_options"]
    before, killed = starts(cluster), []
    with (
        httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        result = pool.submit(client.post, path, json=body)
        for _ in range(2):
            number = started_since(cluster, before)
            before[number] += 1
            killed.append(cluster.kill("decode", number))
        responses = [result.result(60), client.post(path, json=body)]

        assert [r.status_code for r in responses] == [500] * 2
        assert [r.json()["error"]["code"] for r in responses] == ["poison_request"] * 2
        assert client.post(path, json=CALLS["greedy"][1] | {"stream": False, "stream_options": None}).status_code == 200
    for died in killed:
        cluster.wait_restarted(died)

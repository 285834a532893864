"""Guardrails over a real cluster with the simulated engine: streams that are resumed, and workers that are lost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.support.cluster import Cluster

CHAT = "/v1/chat/completions"
NUM_TOKENS = 300
Event = tuple[int, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(prefill=1, decode=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def words(client: httpx.Client) -> list[str]:
    """Words that the simulated engine says without rules, in their order."""
    text = content(parse(client.post(CHAT, json=body()).text))
    return [word for word in re.findall(r"[A-Za-z]{3,}", text) if text.count(word) == 1]


def body(**fields) -> dict:
    messages = [{"role": "user", "content": "Tell me something. " * 10}]
    return {"messages": messages, "max_tokens": NUM_TOKENS, "temperature": 1, "seed": 5, "stream": True, **fields}


def enact(client: httpx.Client, *rules: dict) -> None:
    response = client.put("/v1/admin/policy", json={"document": {"guardrails": {"rules": rules}}})
    assert response.status_code == 200, response.text


def redact(*phrases: str, action: str = "redact") -> dict:
    return {"name": "words", "kind": "blocklist", "phrases": phrases, "action": action, "is_whole_words": False}


def parse(text: str) -> list[Event]:
    return [(int(number), data) for number, data in re.findall(r"id: (\d+)\n(?:event: \S+\n)?data: (.*)\n\n", text)]


def content(events: list[Event]) -> str:
    documents = [json.loads(data) for _, data in events if data.startswith("{")]
    return "".join(c["delta"].get("content") or "" for d in documents for c in d["choices"])


def without_ids(data: str) -> str:
    return re.sub(r'req_[0-9a-f]{24}|"created(_at)?":\d+', "", data)


def begin(client: httpx.Client, num_events: int) -> tuple[str, list[Event]]:
    text = ""
    with client.stream("POST", CHAT, json=body()) as response:
        for part in response.iter_text():
            text += part
            if len(parse(text)) >= num_events:
                break
    return response.headers["x-request-id"], parse(text)


def assert_one_stream(whole: list[Event], events: list[Event]) -> None:
    assert [number for number, _ in events] == [number for number, _ in whole]
    assert [without_ids(data) for _, data in events] == [without_ids(data) for _, data in whole]


def test_a_guarded_stream_is_redacted_event_by_event(client: httpx.Client, words: list[str]):
    """Ids and number of events are those of the stream without rules."""
    bare = parse(client.post(CHAT, json=body()).text)
    enact(client, redact(words[3], words[10]))
    guarded = parse(client.post(CHAT, json=body()).text)

    assert [number for number, _ in guarded] == [number for number, _ in bare]
    expected = content(bare).replace(words[3], "[REDACTED]").replace(words[10], "[REDACTED]")
    assert content(guarded) == expected


@pytest.mark.parametrize("num_events", [2, 40])
def test_a_guarded_stream_may_be_resumed(client: httpx.Client, words: list[str], num_events: int):
    """What comes after Last-Event-ID is what would have come without the break, also around a redaction."""
    enact(client, redact(words[1], words[8], words[-1]))
    whole = parse(client.post(CHAT, json=body()).text)
    request_id, events = begin(client, num_events)
    response = client.get(f"/v1/streams/{request_id}", headers={"last-event-id": str(events[-1][0])})

    assert response.status_code == 200
    assert_one_stream(whole, events + parse(response.text))
    assert "[REDACTED]" in content(whole)


def test_a_guarded_stream_outlives_its_worker(cluster: Cluster, client: httpx.Client, words: list[str]):
    """Nothing of what was held back is lost, and nothing is said twice."""
    enact(client, redact(words[2], words[-2]))
    whole = parse(client.post(CHAT, json=body()).text)
    text, killed = "", None
    with client.stream("POST", CHAT, json=body()) as response:
        for part in response.iter_text():
            text += part
            if killed is None and len(parse(text)) >= 20:
                workers = client.get("/v1/admin/workers").json()["data"]
                busy = max((w for w in workers if w["role"] == "decode"), key=lambda w: w["load"]["running"])
                killed = cluster.kill("decode", int(busy["id"].rpartition("-")[2]))

    assert killed is not None
    assert_one_stream(whole, parse(text))
    cluster.wait_restarted(killed)


def test_a_block_is_a_block_for_those_who_come_back_too(client: httpx.Client, words: list[str]):
    """The rest of a stream that was ended is its end again."""
    enact(client, redact(words[5], action="block"))
    response = client.post(CHAT, json=body())
    events = parse(response.text)
    assert words[5] not in content(events)
    assert response.text.endswith('"finish_reason":"content_filter"}]}\n\ndata: [DONE]\n\n')

    again = client.get(f"/v1/streams/{response.headers['x-request-id']}", headers={"last-event-id": "1"})
    assert parse(again.text) == events[2:]
    assert again.text.endswith('"finish_reason":"content_filter"}]}\n\ndata: [DONE]\n\n')


def test_rules_are_tried_before_they_are_enacted(client: httpx.Client):
    """A dry run shows what would happen, of the rules in force and of others."""
    enact(client, {"name": "cards", "kind": "pii", "types": ["credit_card"], "action": "redact"})
    trial = client.post("/v1/admin/guardrails/test", json={"text": "card 4111 1111 1111 1111"}).json()
    assert (trial["action"], trial["text"]) == ("redact", "card [CREDIT_CARD]")
    assert trial["verdicts"][0]["rule"] == "cards"

    other = {"rules": [redact("card", action="block")]}
    trial = client.post("/v1/admin/guardrails/test", json={"text": "card", "guardrails": other}).json()
    assert (trial["action"], trial["text"]) == ("block", None)
    wrong = {"rules": [{"name": "x", "kind": "pattern", "patterns": ["a.*"], "action": "block"}, {"kind": "no"}]}
    refused = client.post("/v1/admin/guardrails/test", json={"text": "", "guardrails": wrong})
    assert refused.status_code == 400
    assert "bound it" in refused.json()["error"]["message"]


def test_inferctl_tries_them_too(cluster: Cluster):
    """The command line says which rule matched."""
    done = cluster.inferctl("admin", "guardrails", "test", "--text", "4111111111111111", "-o", "json")

    assert json.loads(done.stdout)["text"] == "[CREDIT_CARD]"

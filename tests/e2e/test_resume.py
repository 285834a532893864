"""Streams that outlive their decode worker, with a real engine: killed in the middle, the client's text is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.cluster import Cluster, poll

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "inhabitants": {"type": "integer"}},
    "required": ["city", "inhabitants"],
}
TOOL = {"type": "function", "function": {"name": "count", "parameters": SCHEMA}}
MODES: dict[str, dict[str, Any]] = {
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA}}},
    "tool call": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "count"}}},
    "seeded": {"temperature": 0.9, "seed": 11},
}
RESTART_S = 180.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(engine="vllm", decode=2, options=["--dtype", "float32"]) as cluster:
        yield cluster


def answer(cluster: Cluster, on_event: Callable[[int], None] = lambda _: None, **fields: Any) -> dict[str, Any]:
    """What a streamed chat says in the end; `on_event` gets the number of events so far."""
    messages = [{"role": "user", "content": "Tell me about a town that you like, in one long sentence."}]
    body = {"messages": messages, "max_tokens": 48, "temperature": 0, "stream": True, **fields}
    body["stream_options"] = {"include_usage": True}
    said: dict[str, Any] = {"content": "", "arguments": "", "is_done": False}
    num_events = 0
    url = f"{cluster.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=cluster.headers, timeout=120, trust_env=False) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            num_events += 1
            on_event(num_events)
            take(said, line.removeprefix("data: "))
    return said


def take(said: dict[str, Any], data: str) -> None:
    """Add one event to what was said."""
    if data == "[DONE]":
        said["is_done"] = True
        return
    event = json.loads(data)
    assert "error" not in event, event
    said["usage"] = event.get("usage") and event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        said["content"] += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls") or ():
            said["arguments"] += call["function"].get("arguments") or ""
        said["finish_reason"] = choice["finish_reason"] or said.get("finish_reason")


def busy(cluster: Cluster) -> int | None:
    """The number of the decode worker that has a request."""
    running = (number for number in (0, 1) if 'inflight{role="decode"} 1.0' in cluster.metrics("decode", number))
    return next(running, None)


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_decode_worker_changes_nothing(cluster: Cluster, mode: str) -> None:
    whole = answer(cluster, **MODES[mode])
    killed: list[dict[str, Any]] = []

    def kill(num_events: int) -> None:
        if num_events == 6:
            number = poll(lambda: (found := busy(cluster)) is not None and (found,), 5, "no decode worker is busy")[0]
            killed.append(cluster.kill("decode", number))

    disturbed = answer(cluster, kill, **MODES[mode])

    assert len(killed) == 1
    assert whole["is_done"]
    assert whole["content"] or whole["arguments"]
    assert disturbed == whole
    cluster.wait_restarted(killed[0], RESTART_S)

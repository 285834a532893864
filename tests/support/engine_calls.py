"""Calls of the engine contract and their checked responses. No two calls ask the same, so no engine has any cached."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from inferflux.engine.base import KvSource, Prefilled
from inferflux.types import Frame, HttpCall, KvReport, RequestContext
from tests.support.engine_host import HostedEngine

TOPICS = count(1)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Engines:
    """Two engines of one model."""

    name: str
    model: str
    prefill: HostedEngine
    decode: HostedEngine


async def settle(engine: HostedEngine) -> None:
    """Wait until an engine is idle and holds no blocks."""
    deadline = time.monotonic() + DEADLINE_S
    load = await engine.load()
    while load.num_running + load.num_waiting > 0 or load.num_free_blocks < load.num_blocks:
        assert time.monotonic() < deadline, load
        await asyncio.sleep(0.01)
        load = await engine.load()
    assert load.is_alive


def context() -> RequestContext:
    return RequestContext(f"request-{next(TOPICS)}", tenant="acme", cache_salt="5a17")


def question() -> str:
    """A prompt of several blocks that no test has asked yet."""
    return f"Item {next(TOPICS)}: " + " ".join(f"the number after {i} is {i + 1}," for i in range(20)) + " and so"


def completion(prompt: str | list[str] | list[int] | list[list[int]] | None = None, **fields: Any) -> HttpCall:
    body = {"model": "m", "prompt": prompt or question(), "max_tokens": 6, "temperature": 0, **fields}
    return HttpCall("POST", COMPLETIONS, json.dumps(body).encode(), headers=(("content-type", "application/json"),))


def chat(prompt: str | None = None, **fields: Any) -> HttpCall:
    messages = [{"role": "user", "content": prompt or question()}]
    body = {"model": "m", "messages": messages, "max_tokens": 6, "temperature": 0, **fields}
    return HttpCall("POST", CHAT, json.dumps(body).encode(), headers=(("content-type", "application/json"),))


def streamed(call: HttpCall, **fields: Any) -> HttpCall:
    """The same call with more fields in its body, streamed."""
    return replace(call, body=json.dumps({**json.loads(call.body), "stream": True, **fields}).encode())


class Response:
    """A complete response; checks the discipline of its frames."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        assert [i for i, frame in enumerate(frames) if frame.end] == [len(frames) - 1], "exactly one end, the last"
        heads = [i for i, frame in enumerate(frames) if frame.head]
        assert len(heads) == 1, "exactly one head"
        assert not any(frame.data for frame in frames[: heads[0]]), "the head comes before any data"
        self.head = frames[heads[0]].head
        self.end = frames[-1].end
        self.body = b"".join(frame.data for frame in frames)
        self.reports = [report for frame in frames for report in frame.kv]
        self._choices = [choice for frame in frames for choice in frame.choices]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        lines = [line for line in self.body.decode().split("\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def report(self) -> KvReport:
        (report,) = self.reports
        return report

    def token_ids(self, index: int = 0) -> list[int]:
        return [i for choice in self._choices if choice.index == index for i in choice.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(choice.text for choice in self._choices if choice.index == index)


async def ask(engine: HostedEngine, call: HttpCall, sources: Sequence[KvSource] = ()) -> Response:
    async with aclosing(engine.generate(context(), call, sources)) as frames:
        return Response([frame async for frame in frames])


@asynccontextmanager
async def ticketed(
    engines: Engines, call: HttpCall, about: RequestContext | None = None
) -> AsyncIterator[list[KvSource]]:
    """Sources for a call's prompts; their slots are free again at the end."""
    result = await engines.prefill.prefill(about or context(), call)
    assert isinstance(result, Prefilled)
    slots = [slot for prompt in result.prompts for slot in prompt.kv.slots]
    try:
        yield [await engines.prefill.source(p, f"ticket-{i}") for i, p in enumerate(result.prompts)]
    finally:
        await engines.prefill.free(slots)

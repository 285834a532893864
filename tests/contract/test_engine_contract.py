"""What every engine promises to a worker: one suite, run on the simulated engine and on vLLM with a real model.

Prefill and decode are two engines in two processes, as in a cluster. Each test asks about something nobody has asked
before, so that no engine has it cached.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest

from inferflux.cli import models
from inferflux.engine.base import KvSource, Prefilled
from inferflux.engine.options import MIB, EngineOptions
from inferflux.paths import models_dir
from inferflux.types import Frame, HttpAnswer, HttpCall, KvReport, RequestContext, Role
from tests.support.engine_host import HostedEngine, hosted

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


@pytest.fixture(
    scope="session", params=["sim", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(300)])]
)
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    options = EngineOptions("m", Role.PREFILL, kv_cache_bytes=96 * MIB, max_model_len=1024, max_num_seqs=8)
    if request.param == "vllm":
        options = replace(options, **real_model(), dtype="float32")
    with hosted(request.param, options, replace(options, role=Role.DECODE)) as (prefill, decode):
        yield Engines(request.param, "m", prefill, decode)


def real_model() -> dict[str, Any]:
    """The model of real engines: a given folder, or the default one, built when it is missing."""
    name = os.environ.get("INFERFLUX_TEST_MODEL_DIR", models.DEFAULT)
    model = models.prepare(name, models_dir(os.environ), lambda *_: None, available_bytes=1 << 34)
    return {"model_dir": model.folder, "model_digest": model.weights_digest, "numerics_reference": model.reference}


@pytest.fixture(autouse=True)
async def nothing_is_left(engines: Engines) -> AsyncIterator[None]:
    """After every test nothing runs, and all blocks and slots are free again."""
    yield

    for engine in (engines.prefill, engines.decode):
        await settle(engine)
    assert await engines.prefill.num_free_slots() == await engines.prefill.num_slots()


async def settle(engine: HostedEngine) -> None:
    """Wait until an engine is idle and holds no blocks."""
    deadline = time.monotonic() + DEADLINE_S
    load = await engine.load()
    while load.num_running + load.num_waiting > 0 or load.num_free_blocks < load.num_blocks:
        assert time.monotonic() < deadline, load
        await asyncio.sleep(0.01)
        load = await engine.load()
    assert load.is_alive


# --- helpers ----------------------------------------------------------------------------------------------------------


def context() -> RequestContext:
    return RequestContext(f"request-{next(TOPICS)}", tenant="acme", cache_salt="5a17")


def question() -> str:
    """A prompt of several blocks that no test has asked yet."""
    return f"Item {next(TOPICS)}: " + " ".join(f"the number after {i} is {i + 1}," for i in range(20)) + " and so"


def completion(prompt: str | None = None, **fields: Any) -> HttpCall:
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
async def ticketed(engines: Engines, call: HttpCall) -> AsyncIterator[list[KvSource]]:
    """Sources for a call's prompts; their slots are free again at the end."""
    result = await engines.prefill.prefill(context(), call)
    assert isinstance(result, Prefilled)
    slots = [slot for prompt in result.prompts for slot in prompt.kv.slots]
    try:
        yield [await engines.prefill.source(p, f"ticket-{i}") for i, p in enumerate(result.prompts)]
    finally:
        await engines.prefill.free(slots)


# --- prefill ----------------------------------------------------------------------------------------------------------


async def test_prefill_publishes_every_block_and_samples_one_token(engines: Engines) -> None:
    call = completion()
    size = (await engines.prefill.info()).fingerprint.block_size

    async with ticketed(engines, call) as (source,):
        tokenized = await ask(engines.decode, replace(call, path="/tokenize"))

        assert source.num_tokens == tokenized.json["count"]
        assert len(source.slots) == len(source.digests) == -(-source.num_tokens // size)
        assert len(source.first_token_ids) == 1


async def test_both_engines_are_compatible(engines: Engines) -> None:
    prefill, decode = await engines.prefill.info(), await engines.decode.info()

    assert prefill.fingerprint == decode.fingerprint
    assert prefill.slot_bytes > 0


async def test_numerics_are_proven(engines: Engines) -> None:
    await engines.prefill.check_numerics()
    await engines.decode.check_numerics()


# --- prefill, then generate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_call", [chat, completion], ids=["chat", "completions"])
async def test_a_response_from_a_ticket_equals_one_without(engines: Engines, make_call: Any) -> None:
    call = make_call()

    async with ticketed(engines, call) as (source,):
        alone = await ask(engines.prefill, call)
        disaggregated = await ask(engines.decode, call, [source])
        again = await ask(engines.decode, streamed(call, stream_options={"include_usage": True}))

    assert (disaggregated.report.ticket_id, disaggregated.report.result) == (source.ticket_id, "committed")
    assert disaggregated.report.num_bytes > 0
    assert disaggregated.head.status == again.head.status == 200
    assert disaggregated.token_ids() == alone.token_ids() == again.token_ids()
    assert source.first_token_ids[0] == alone.token_ids()[0]
    assert disaggregated.json["choices"] == alone.json["choices"]
    assert disaggregated.end.finish_reason == alone.end.finish_reason == "length"
    assert disaggregated.end.usage.completion_tokens == alone.end.usage.completion_tokens == 6
    assert again.events[-1]["usage"]["completion_tokens"] == 6


async def test_a_streamed_response_says_the_same_in_text_and_tokens(engines: Engines) -> None:
    call = streamed(chat(), stream_options={"include_usage": True})

    async with ticketed(engines, call) as sources:
        response = await ask(engines.decode, call, sources)

    deltas = [event["choices"][0] for event in response.events if event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in deltas)
    detokenized = await ask(engines.decode, detokenize(response.token_ids()))
    assert deltas[0]["delta"]["role"] == "assistant"
    assert deltas[-1]["finish_reason"] == "length"
    assert text == response.text() == detokenized.json["prompt"]


def detokenize(token_ids: list[int]) -> HttpCall:
    return replace(completion(), path="/detokenize", body=json.dumps({"model": "m", "tokens": token_ids}).encode())


async def test_a_seeded_response_from_a_ticket_equals_one_without(engines: Engines) -> None:
    call = completion(temperature=0.9, seed=7)

    async with ticketed(engines, call) as sources:
        disaggregated = await ask(engines.decode, call, sources)
    alone = await ask(engines.prefill, call)

    assert disaggregated.report.result == "committed"
    assert disaggregated.token_ids() == alone.token_ids()


async def test_two_choices_from_one_ticket(engines: Engines) -> None:
    call = completion(temperature=1.2, seed=11, n=2, max_tokens=8)

    async with ticketed(engines, call) as sources:
        disaggregated = await ask(engines.decode, call, sources)
    alone = await ask(engines.prefill, call)

    assert disaggregated.token_ids(0) != disaggregated.token_ids(1)
    assert [disaggregated.token_ids(i) for i in (0, 1)] == [alone.token_ids(i) for i in (0, 1)]
    assert {report.ticket_id for report in disaggregated.reports} == {"ticket-0"}
    assert disaggregated.end.usage.completion_tokens == 16


async def test_two_prompts_have_two_tickets(engines: Engines) -> None:
    call = completion(prompt=[question(), question()], max_tokens=3)

    async with ticketed(engines, call) as sources:
        disaggregated = await ask(engines.decode, call, sources)
    alone = await ask(engines.prefill, call)

    assert sorted((r.ticket_id, r.result) for r in disaggregated.reports) == [
        ("ticket-0", "committed"),
        ("ticket-1", "committed"),
    ]
    assert disaggregated.json["choices"] == alone.json["choices"]


async def test_a_stop_string_ends_a_response_and_is_cut_off(engines: Engines) -> None:
    prompt = question()
    free = await ask(engines.prefill, completion(prompt, max_tokens=10))
    text = free.json["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    call = completion(prompt, max_tokens=10, stop=stop)

    async with ticketed(engines, call) as sources:
        stopped = await ask(engines.decode, call, sources)

    choice = stopped.json["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == stopped.end.finish_reason == "stop"


async def test_a_prompt_that_decode_has_cached_needs_no_ticket(engines: Engines) -> None:
    info = await engines.decode.info()
    prompt = [100 + i % 50 for i in range(2 * info.fingerprint.block_size)] + [next(TOPICS) % 200 + 1]
    call = completion(prompt, max_tokens=2)
    first = await ask(engines.decode, call)

    async with ticketed(engines, call) as (source,):
        second = await ask(engines.decode, call, [source])

    assert second.token_ids() == first.token_ids()
    assert second.report.result in ("committed", "unneeded")
    assert second.report.num_bytes < len(source.slots) * source.slot_bytes


# --- KV that must not be used -----------------------------------------------------------------------------------------


async def assert_recomputed(engines: Engines, call: HttpCall, source: KvSource, reason: str) -> None:
    response = await ask(engines.decode, call, [source])
    alone = await ask(engines.prefill, call)

    assert (response.report.ticket_id, response.report.result) == (source.ticket_id, "recomputed")
    assert response.report.reason == reason
    assert response.token_ids() == alone.token_ids()
    assert response.json["choices"] == alone.json["choices"]


@pytest.mark.parametrize("place", [0, -1], ids=["first-block", "last-block"])
async def test_one_wrong_bit_is_found_and_the_prompt_computed_again(engines: Engines, place: int) -> None:
    call = completion()

    async with ticketed(engines, call) as (source,):
        await engines.prefill.corrupt(source.slots[place], 17)
        await assert_recomputed(engines, call, source, "digest")


async def test_blocks_of_another_start_of_the_worker_are_stale(engines: Engines) -> None:
    call = completion()

    async with ticketed(engines, call) as (source,):
        await assert_recomputed(engines, call, replace(source, incarnation="incarnation-0"), "stale")


async def test_freed_slots_are_stale(engines: Engines) -> None:
    call = completion()

    async with ticketed(engines, call) as (source,):
        pass
    await assert_recomputed(engines, call, source, "stale")


async def test_a_worker_that_is_gone_is_unreachable(engines: Engines) -> None:
    call = completion()

    async with ticketed(engines, call) as (source,):
        nowhere = replace(source, socket_path="/tmp/ifx-nobody-listens-here")
        await assert_recomputed(engines, call, nowhere, "unreachable")


# --- calls that end early ---------------------------------------------------------------------------------------------


async def test_a_closed_stream_is_aborted_and_frees_its_blocks(engines: Engines) -> None:
    call = streamed(completion(max_tokens=300, ignore_eos=True))

    async with ticketed(engines, call) as sources:  # noqa: SIM117 - nested as in life
        async with aclosing(engines.decode.generate(context(), call, sources)) as frames:
            async for frame in frames:
                if frame.choices:
                    break

    await settle(engines.decode)


async def test_a_cancelled_prefill_leaves_no_slots(engines: Engines) -> None:
    calls = [asyncio.create_task(engines.prefill.prefill(context(), completion())) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    for result in results[1:]:
        assert isinstance(result, Prefilled)
        await engines.prefill.free([slot for prompt in result.prompts for slot in prompt.kv.slots])


BAD_BODIES = {
    "no JSON": b"{",
    "no prompt": b'{"model": "m"}',
    "wrong type": b'{"model": "m", "prompt": "a", "max_tokens": "many"}',
    "too long": json.dumps({"model": "m", "prompt": "a", "max_tokens": 100_000}).encode(),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_bad_body_is_refused_by_both_with_an_openai_error(engines: Engines, body: bytes) -> None:
    call = replace(completion(), body=body)

    answer = await engines.prefill.prefill(context(), call)
    response = await ask(engines.decode, call)

    assert isinstance(answer, HttpAnswer)
    assert answer.head.status == response.head.status == 400
    for error in (json.loads(answer.body)["error"], response.json["error"]):
        assert error["code"] == 400
        assert error["message"]


async def test_another_model_is_not_found(engines: Engines) -> None:
    answer = await engines.prefill.prefill(context(), chat(model="another"))

    assert isinstance(answer, HttpAnswer)
    assert answer.head.status == 404
    assert "another" in json.loads(answer.body)["error"]["message"]


async def test_a_call_that_does_not_generate_is_answered(engines: Engines) -> None:
    call = replace(completion("hello"), path="/tokenize")

    response = await ask(engines.decode, call)

    assert response.head.status == 200
    assert response.json["count"] == len(response.json["tokens"]) > 0
    assert response.end.error is None

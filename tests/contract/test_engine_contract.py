"""What every engine promises to a worker: one suite, run on the simulated engine and on vLLM with a real model.

Prefill and decode are two engines in two processes, as in a cluster. Each test asks about something nobody has asked
before, so that no engine has it cached.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from inferflux.engine.base import KvSource, Prefilled
from inferflux.types import HttpAnswer, HttpCall
from tests.support import claims
from tests.support.engine_calls import (
    TOPICS,
    Engines,
    ask,
    chat,
    completion,
    context,
    question,
    settle,
    streamed,
    ticketed,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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


SAMPLING: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 0.9, "seed": 7},
    "at-least": {"min_tokens": 5},
    "stopped": {"stop": ["\n\n"], "stop_token_ids": [17], "min_tokens": 2, "temperature": 0.8, "top_p": 0.9, "seed": 3},
}


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


@pytest.mark.parametrize("how", SAMPLING.values(), ids=SAMPLING)
async def test_sampling_from_a_ticket_equals_sampling_without(engines: Engines, how: dict[str, Any]) -> None:
    """Prefill samples one token, so what the parameters say of the whole response must not trouble it."""
    call = completion(**how)

    async with ticketed(engines, call) as sources:
        disaggregated = await ask(engines.decode, call, sources)
    alone = await ask(engines.prefill, call)

    assert disaggregated.report.result == "committed"
    assert disaggregated.token_ids() == alone.token_ids()


async def test_seeded_prompts_that_take_several_steps(engines: Engines) -> None:
    """More prompt tokens at once than one step computes: some prompts are cut, and sampled from in between."""
    prompts = [[300 + (97 * next(TOPICS) + i) % 4000 for i in range(450)] for _ in range(6)]
    how: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 3}

    together = await ask(engines.decode, completion(prompt=prompts, **how))
    alone = [await ask(engines.decode, completion(prompt=prompt, **how)) for prompt in prompts]

    assert together.head.status == 200
    texts = [choice["text"] for choice in together.json["choices"]]
    assert texts == [answer.json["choices"][0]["text"] for answer in alone]


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


async def test_a_source_whose_claim_is_refused_is_not_read(engines: Engines) -> None:
    call = completion()

    async with ticketed(engines, call) as (source,):
        await assert_recomputed(engines, call, replace(source, claim=claims.refused), "conflict")


async def test_choices_whose_claim_is_refused_report_once(engines: Engines) -> None:
    call = completion(temperature=1.2, seed=11, n=2)

    async with ticketed(engines, call) as (source,):
        await assert_recomputed(engines, call, replace(source, claim=claims.refused), "conflict")


async def test_the_first_token_does_not_wait_for_the_claim_and_the_blocks_do(engines: Engines) -> None:
    call = streamed(completion())

    async with ticketed(engines, call) as (source,):
        arrivals = []
        async with aclosing(engines.decode.generate(context(), call, [replace(source, claim=claims.slow)])) as frames:
            async for frame in frames:
                arrivals += [time.monotonic()] * sum(len(choice.token_ids) for choice in frame.choices)
                assert not any(report.result != "committed" for report in frame.kv)

    assert len(arrivals) == 6
    assert arrivals[1] - arrivals[0] > claims.SLOW_S / 2


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

"""A response that is begun on one engine and ended on another is the response of one engine.

Each mode is answered undisturbed, then cut after some of its frames and continued elsewhere from what a gateway would
have kept: the tokens in their grouping, and the number of events.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from inferflux.engine.base import KvSource
from inferflux.errors import InvalidRequest, Unavailable
from inferflux.types import ChoiceTokens, Delivered, Frame, HttpCall, RequestContext
from tests.support.engine_calls import (
    TOPICS,
    Engines,
    Response,
    chat,
    completion,
    context,
    question,
    streamed,
    ticketed,
)
from tests.support.engine_host import HostedEngine

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CREATED_S = 1_700_000_000
# What the last engine had cached is its own affair.
CACHED = re.compile(rb'"prompt_tokens_details":(null|\{[^}]*\})|"(cached_tokens|cache_read_input_tokens)":\d+')
LOGPROB = re.compile(rb"-?\d+\.\d+(?:e-\d+)?")
USAGE = {"stream_options": {"include_usage": True}}
SEEDED = {"temperature": 1.1, "seed": 7}


def api(path: str, **fields: Any) -> HttpCall:
    return replace(chat(), path=path, body=json.dumps({"model": "m", "temperature": 0, **fields}).encode())


def short() -> str:
    """A question that fits in a block, of which nothing can be cached."""
    return f"What is {next(TOPICS)} + 1?"


MODES = {
    "greedy": lambda: chat(max_tokens=8, **USAGE),
    "seeded": lambda: chat(max_tokens=8, **SEEDED, **USAGE),
    "choices": lambda: chat(max_tokens=6, n=3, **SEEDED, **USAGE),
    "completion": lambda: completion(max_tokens=8, **SEEDED),
    "prompts": lambda: completion([question(), question()], max_tokens=5, **SEEDED, **USAGE),
    "to-the-end": lambda: completion("1 2 3", max_tokens=5, seed=3, temperature=1),
    "messages": lambda: api("/v1/messages", messages=[{"role": "user", "content": short()}], max_tokens=8),
    "responses": lambda: api("/v1/responses", input=short(), max_output_tokens=8),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "boolean"}},
                "required": ["a", "b"],
            },
        },
    }
]
TOOL_CALL = r'ok <tool_call>\n\{"name": "add", "arguments": \{"a": [1-9], "b": true\}\}\n</tool_call>'
SCHEMA = {"name": "s", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
GRAMMAR = 'root ::= "yes" (" or " ("no" | "maybe"))+ "."'

# What the simulated engine does not simulate.
VLLM_MODES = {
    "penalties": lambda: chat(max_tokens=10, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.5),
    "limits": lambda: completion(max_tokens=8, min_tokens=6, logit_bias={"28": 4.5}, bad_words=["the"], **SEEDED),
    "nucleus": lambda: completion(max_tokens=8, top_p=0.9, top_k=40, min_p=0.01, **SEEDED),
    "completion-logprobs": lambda: completion(max_tokens=6, logprobs=2, echo=False),
    "choices-logprobs": lambda: chat(max_tokens=4, n=2, logprobs=True, top_logprobs=1, **SEEDED),
    "running-usage": lambda: chat(max_tokens=6, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    "json": lambda: chat(max_tokens=16, response_format={"type": "json_schema", "json_schema": SCHEMA}, **SEEDED),
    "regex": lambda: completion(max_tokens=16, structured_outputs={"regex": "[a-c]{3}-[0-9]{4,8}"}, **SEEDED),
    "grammar": lambda: chat(max_tokens=16, structured_outputs={"grammar": GRAMMAR}, **SEEDED),
    "one-of": lambda: chat(max_tokens=16, structured_outputs={"choice": ["some apples", "many pears indeed"]}),
    "tools-required": lambda: chat(max_tokens=40, tools=TOOLS, tool_choice="required", **SEEDED),
    "tools-named": lambda: chat(
        max_tokens=30, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add"}}, **SEEDED
    ),
    "tools-auto": lambda: chat(max_tokens=40, tools=TOOLS, structured_outputs={"regex": TOOL_CALL}, **SEEDED),
    "messages-tools": lambda: api(
        "/v1/messages",
        messages=[{"role": "user", "content": short()}],
        max_tokens=30,
        tools=[{"name": "add", "input_schema": TOOLS[0]["function"]["parameters"]}],
        tool_choice={"type": "tool", "name": "add"},
    ),
}
on_vllm = pytest.mark.parametrize(
    "engines", [pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)])], indirect=True
)


# --- helpers ----------------------------------------------------------------------------------------------------------


def of_one_time() -> RequestContext:
    return replace(context(), created_s=CREATED_S)


async def frames_of(
    engine: HostedEngine,
    about: RequestContext,
    call: HttpCall,
    sources: Sequence[KvSource] = (),
    delivered: Delivered | None = None,
) -> list[Frame]:
    async with aclosing(engine.generate(about, call, sources, delivered)) as stream:
        frames = [frame async for frame in stream]
    Response(frames)
    return frames


def journal(frames: Sequence[Frame]) -> Delivered:
    """What a gateway keeps of the frames it took."""
    return Delivered(tuple(c for frame in frames for c in frame.choices), sum(bool(frame.data) for frame in frames))


def cuts(engine: str, frames: Sequence[Frame]) -> list[int]:
    """Numbers of frames after which a worker may die: all, or, where that takes long, some of each kind."""
    n = len(frames)
    return list(range(1, n)) if engine == "sim" else sorted({2, n // 2, n - 2} & set(range(1, n)))


def told(data: bytes) -> dict[str, list[bytes]]:
    """The events of each choice, and those of none, in their order."""
    events: dict[str, list[bytes]] = {}
    for event in data.split(b"\n\n"):
        index = re.search(rb'"choices":\[\{"index":(\d+)', event)
        events.setdefault(index[1].decode() if index else "none", []).append(event)
    return events


def said(choices: Sequence[ChoiceTokens]) -> dict[int, tuple[tuple[int, ...], str]]:
    """Tokens and text of each choice."""
    result: dict[int, tuple[tuple[int, ...], str]] = {}
    for choice in choices:
        ids, text = result.get(choice.index, ((), ""))
        result[choice.index] = (ids + choice.token_ids, text + choice.text)
    return result


def assert_one_response(whole: Sequence[Frame], events: Sequence[Frame], tokens: Sequence[ChoiceTokens]) -> None:
    text, wanted_text = (CACHED.sub(b"", data(frames)) for frames in (events, whole))
    assert told(LOGPROB.sub(b"#", text)) == told(LOGPROB.sub(b"#", wanted_text))
    # Tokens are computed together that were computed one by one: the last digits may differ.
    logprobs, wanted_logprobs = (sorted(map(float, LOGPROB.findall(t))) for t in (text, wanted_text))
    assert logprobs == pytest.approx(wanted_logprobs, abs=1e-3)
    assert said(tokens) == said(journal(whole).tokens)
    assert (end := events[-1].end)
    assert (wanted := whole[-1].end)
    assert replace(end, usage=replace(end.usage, cached_tokens=0)) == replace(
        wanted, usage=replace(wanted.usage, cached_tokens=0)
    )


async def assert_resumes(engines: Engines, call: HttpCall) -> list[Frame]:
    """Compare a call's undisturbed response with those that change engines; return the former."""
    about, call = of_one_time(), streamed(call)
    whole = await frames_of(engines.prefill, about, call)
    for cut in cuts(engines.name, whole):
        past = journal(whole[:cut])
        rest = await frames_of(engines.decode, about, call, delivered=past)
        assert_one_response(whole, whole[:cut] + rest, past.tokens + journal(rest).tokens)
    return whole


# --- in all modes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_call", MODES.values(), ids=MODES)
async def test_a_stream_that_changes_engines_is_the_same_stream(engines: Engines, make_call: Any) -> None:
    whole = await assert_resumes(engines, make_call())

    assert len(whole) > 5


@on_vllm
@pytest.mark.parametrize("make_call", VLLM_MODES.values(), ids=VLLM_MODES)
async def test_a_real_stream_that_changes_engines_is_the_same_stream(engines: Engines, make_call: Any) -> None:
    whole = await assert_resumes(engines, make_call())

    assert len(whole) > 4


async def test_a_stop_string_is_found_across_the_cut(engines: Engines) -> None:
    prompt = question()
    free = await frames_of(engines.prefill, of_one_time(), completion(prompt, max_tokens=12))
    text = json.loads(free[-1].data or free[-2].data)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:4]

    whole = await assert_resumes(engines, completion(prompt, max_tokens=12, stop=[stop, "never said"]))

    assert whole[-1].end.finish_reason == "stop"


async def test_tokens_may_be_ahead_of_the_events(engines: Engines) -> None:
    """A worker dies between the tokens and the event that tells them: the event is told, the tokens are not."""
    about, call = of_one_time(), streamed(chat(max_tokens=8, **SEEDED))
    whole = await frames_of(engines.prefill, about, call)

    past = replace(journal(whole[:6]), num_events=journal(whole[:4]).num_events)
    rest = await frames_of(engines.decode, about, call, delivered=past)

    assert_one_response(whole, whole[:4] + rest, past.tokens + journal(rest).tokens)


async def test_delivered_tokens_go_with_a_ticket(engines: Engines) -> None:
    about, call = of_one_time(), streamed(chat(max_tokens=8))
    whole = await frames_of(engines.prefill, about, call)

    async with ticketed(engines, call, about) as sources:
        past = journal(whole[:5])
        rest = await frames_of(engines.decode, about, call, sources, past)

    assert_one_response(whole, whole[:5] + rest, past.tokens + journal(rest).tokens)
    assert [report.result for frame in rest for report in frame.kv] == ["committed"]


async def test_what_had_ended_samples_nothing_more(engines: Engines) -> None:
    """All tokens are delivered, but not the events that end the stream."""
    about, call = of_one_time(), streamed(completion(max_tokens=4, **USAGE))
    whole = await frames_of(engines.prefill, about, call)

    past = replace(journal(whole), num_events=1)
    rest = await frames_of(engines.decode, about, call, delivered=past)

    assert not journal(rest).tokens
    first = next(i for i, frame in enumerate(whole) if frame.data)
    assert_one_response(whole, whole[: first + 1] + rest, past.tokens)


async def test_tokens_of_a_choice_that_the_call_does_not_have_are_refused(engines: Engines) -> None:
    past = Delivered((ChoiceTokens(3, (100,)),), 1)

    with pytest.raises(InvalidRequest, match="choice 3"):
        await frames_of(engines.decode, of_one_time(), streamed(completion(n=2, **SEEDED)), delivered=past)


@on_vllm
async def test_what_is_random_goes_on_from_the_tokens(engines: Engines) -> None:
    """Nobody can draw the same tokens again, but the client sees one response."""
    about, call = of_one_time(), streamed(chat(max_tokens=8, temperature=1.5, **USAGE))
    past = (await frames_of(engines.prefill, about, call))[:5]

    rest = await frames_of(engines.decode, about, call, delivered=journal(past))

    (ids, text) = said(journal(past).tokens + journal(rest).tokens)[0]
    events = [json.loads(event.removeprefix(b"data: ")) for event in told(data(past) + data(rest))["0"]]
    usage = told(data(rest))["none"][0]
    assert len(ids) == 8
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == text
    assert len({(event["id"], event["created"]) for event in events}) == 1
    assert b'"completion_tokens":8' in usage


@on_vllm
@pytest.mark.parametrize(
    ("make_call", "mode"),
    [
        (lambda: completion(echo=True, logprobs=1), "prompt_logprobs"),
        (lambda: api("/v1/responses", input=short(), include=["message.output_text.logprobs"]), "repeated at the end"),
    ],
    ids=["echo", "responses"],
)
async def test_what_needs_more_than_the_tokens_is_refused_by_name(engines: Engines, make_call: Any, mode: str) -> None:
    past = Delivered((ChoiceTokens(0, (100,)),), 1)

    with pytest.raises(Unavailable, match=mode):
        await frames_of(engines.decode, of_one_time(), streamed(make_call()), delivered=past)


def data(frames: Sequence[Frame]) -> bytes:
    return b"".join(frame.data for frame in frames)

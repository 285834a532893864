"""The simulated application speaks the official clients' JSON: their own types check it."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from inferflux.engine.sim.api import App
from inferflux.engine.sim.api.call import Plan
from inferflux.types import HttpAnswer, HttpCall, RequestContext, Usage
from tests.unit.sim.test_sim_engine import running

MESSAGES = [{"role": "user", "content": "hi"}]
CASES = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}, ChatCompletion, ChatCompletionChunk),
    "completions": ("/v1/completions", {"prompt": "hi"}, Completion, Completion),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}, Message, RawMessageStreamEvent),
    "responses": ("/v1/responses", {"input": "hi"}, Response, ResponseStreamEvent),
}
LIMITS = {"responses": "max_output_tokens"}
by_endpoint = pytest.mark.parametrize("name", CASES)


async def respond(path: str, body: dict[str, Any]) -> tuple[Any, bytes]:
    call = HttpCall("POST", path, json.dumps({"model": "m", **body}).encode())
    async with running() as engine, aclosing(engine.generate(RequestContext("r-1"), call)) as stream:
        frames = [frame async for frame in stream]
    return next(frame.head for frame in frames if frame.head), b"".join(frame.data for frame in frames)


def events(body: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@by_endpoint
async def test_a_response_validates(name: str) -> None:
    path, body, document, _ = CASES[name]

    head, data = await respond(path, {**body, LIMITS.get(name, "max_tokens"): 3})

    assert dict(head.headers) == {"content-type": "application/json", "content-length": str(len(data))}
    validated: BaseModel = document.model_validate_json(data, strict=False)
    assert validated.model == "m"


@by_endpoint
async def test_every_event_of_a_stream_validates(name: str) -> None:
    path, body, _, event_type = CASES[name]

    head, data = await respond(path, {**body, LIMITS.get(name, "max_tokens"): 3, "stream": True})

    assert dict(head.headers)["content-type"].startswith("text/event-stream")
    assert len(events(data)) >= 3
    for event in events(data):
        if name == "completions" and event["choices"][0]["finish_reason"] is None:
            event["choices"][0]["finish_reason"] = "length"  # null until the end: the client's type is too narrow
        TypeAdapter(event_type).validate_python(event)


@by_endpoint
async def test_a_stream_says_what_the_whole_response_says(name: str) -> None:
    path, body, _, _ = CASES[name]

    _, whole = await respond(path, body)
    _, stream = await respond(path, {**body, "stream": True})

    assert "".join(map(text_of, events(stream))) == text_of(json.loads(whole))


def text_of(document: dict[str, Any]) -> str:
    """The text in any of the four APIs' responses or events."""
    match document:
        case {"choices": [{"message": {"content": text}}]} | {"choices": [{"delta": {"content": text}}]}:
            return text
        case {"choices": [{"text": text}]}:
            return text
        case {"type": "message", "content": [{"text": text}]} | {"delta": {"text": text}}:
            return text
        case {"object": "response", "output": [{"content": [{"text": text}]}]}:
            return text
        case {"type": "response.output_text.delta", "delta": text}:
            return text
    return ""


def test_usage_comes_with_a_stream_on_request_only() -> None:
    fields = {"model": "m", "prompt": "a", "stream": True}
    plan = read("/v1/completions", fields)
    with_usage = read("/v1/completions", {**fields, "stream_options": {"include_usage": True}})

    assert isinstance(plan, Plan)
    assert isinstance(with_usage, Plan)
    assert b"usage" not in plan.renderer.closing([], Usage(1, 2))
    assert b'"total_tokens":3' in with_usage.renderer.closing([], Usage(1, 2))


def read(path: str, body: Any, method: str = "POST") -> Plan | HttpAnswer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return App("m", 100).read(HttpCall(method, path, data), RequestContext("r-1"))


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, b"[]", None),
        (CHAT, b"\xff", None),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": ""}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": True}, "max_completion_tokens"),
        (CHAT, {"messages": MESSAGES, "temperature": 3}, "temperature"),
        (CHAT, {"messages": MESSAGES, "temperature": 0, "n": 2}, "n"),
        (CHAT, {"messages": MESSAGES, "n": 1000}, "n"),
        (CHAT, {"messages": MESSAGES, "stop": 5}, "stop"),
        (CHAT, {"messages": MESSAGES, "stream": "yes"}, "stream"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"messages": MESSAGES, "stream_options": 3}, None),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "seed": 1 << 63}, "seed"),
        (COMPLETIONS, {"prompt": "a" * 99, "max_tokens": 3}, None),
        ("/v1/responses", {"input": 3}, "input"),
        ("/v1/messages", {"messages": MESSAGES, "tools": [{}]}, "tools"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/tokenize", {}, "prompt"),
    ],
)
def test_what_is_wrong_is_refused_with_400(path: str, body: Any, param: str | None) -> None:
    answer = read(path, body)

    assert isinstance(answer, HttpAnswer)
    error = json.loads(answer.body)["error"]
    assert (answer.head.status, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["param"] == param
    assert error["message"]


def test_unknown_paths_methods_and_models_are_refused() -> None:
    answers = [read("/v1/none", {}), read(CHAT, {}, "GET"), read(CHAT, {"model": "x", "messages": MESSAGES})]

    assert [answer.head.status for answer in answers] == [404, 405, 404]


def test_neutral_values_of_unsupported_fields_are_fine() -> None:
    fields = {"messages": MESSAGES, "tools": [], "logprobs": False, "response_format": {"type": "text"}}

    assert isinstance(read(CHAT, fields), Plan)


def test_tokens_can_be_counted_before_they_are_sent() -> None:
    counted = read("/v1/messages/count_tokens", {"system": "be", "messages": MESSAGES})
    tokenized = read("/tokenize", {"messages": [{"role": "system", "content": "be"}, *MESSAGES]})

    assert json.loads(counted.body)["input_tokens"] == json.loads(tokenized.body)["count"] == 9

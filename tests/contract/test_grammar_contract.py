"""Structured output on a real engine: what can't be compiled is refused as the client's mistake, and harms nobody."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest

from inferflux.errors import InvalidRequest
from inferflux.types import HttpCall
from tests.support.engine_calls import Engines, ask, chat, context, streamed

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.parametrize("engines", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True),
    pytest.mark.timeout(600),
]

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 99, "minimum": 0}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


def with_schema(schema: Any, **fields: Any) -> HttpCall:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return chat("Answer in JSON.", response_format=wanted, max_tokens=40, **fields)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


GOOD: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"structured_outputs": {"regex": "[0-9]{2}-[a-f]{3}"}}, r"[0-9]{2}-[a-f]{3}"),
    "choice": ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    "lark": ({"structured_outputs": {"grammar": 'start: ("a" | "b") "c"'}}, "[ab]c"),
    "ebnf": ({"structured_outputs": {"grammar": 'root ::= ("a" | "b") "c"'}}, "[ab]c"),
}
BAD: dict[str, tuple[HttpCall, str]] = {
    "no type": (with_schema({"type": "objekt"}), "objekt"),
    "unknown keyword": (with_schema({"type": "object", "not": {"type": "object"}}), "not"),
    "no instance": (with_schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
    "regex": (chat(structured_outputs={"regex": "(((("}), "regular expression"),
    "grammar": (chat(structured_outputs={"grammar": "start: nowhere"}), "nowhere"),
    "structural tag": (
        chat(structured_outputs={"structural_tag": json.dumps({"structures": [], "triggers": ["<"]})}),
        "",
    ),
}
# Without limits these take minutes, gigabytes, or the process. Empty: lazy compilation makes them cheap.
BOMBS: dict[str, tuple[HttpCall, str]] = {
    "many properties": (
        with_schema(
            {"type": "object", "properties": {f"{i * 7919 % 10007}_{i}": {"type": "string"} for i in range(8000)}}
        ),
        "the limit is 2 s of CPU time",
    ),
    "many items": (with_schema({"type": "array", "minItems": 10_000_000, "items": POINT}), "the limit of 256 MiB"),
    "many branches": (
        with_schema({"anyOf": [{"type": "object", "properties": {f"p{i}": POINT}} for i in range(20_000)]}),
        "too large",
    ),
    "many digits": (with_schema({"type": "string", "minLength": 1 << 40}), "invalid"),
    "repeated repetitions": (chat(structured_outputs={"regex": "((a{1,1000}){1,1000}){1,1000}"}), ""),
    "subsets": (chat(structured_outputs={"regex": "(.*a.{300}){40}"}), ""),
    "deep regex": (chat(structured_outputs={"regex": "(" * 20_000 + "a" + ")" * 20_000}), "regex"),
    "deep schema": (with_schema(nested(60)), ""),
}


@pytest.mark.parametrize("kind", GOOD)
async def test_the_answer_follows_the_grammar(engines: Engines, kind: str) -> None:
    fields, pattern = GOOD[kind]
    response = await ask(engines.decode, chat("Choose.", max_tokens=12, **fields))
    (choice,) = response.json["choices"]

    assert re.fullmatch(pattern, choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


async def test_the_answer_is_an_instance_of_the_schema(engines: Engines) -> None:
    response = await ask(engines.decode, with_schema(POINT))

    jsonschema.validate(json.loads(response.json["choices"][0]["message"]["content"]), POINT)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("how", ["whole", "streamed"])
async def test_a_grammar_that_means_nothing_is_refused(engines: Engines, kind: str, how: str) -> None:
    call, says = BAD[kind]
    call = streamed(call) if how == "streamed" else call
    for refused in (engines.prefill.prefill, engines.decode):
        with pytest.raises(InvalidRequest, match=re.escape(says)):
            await (ask(engines.decode, call) if refused is engines.decode else refused(context(), call))


@pytest.mark.parametrize("kind", BOMBS)
async def test_a_bomb_ends_within_its_limits(engines: Engines, kind: str) -> None:
    """It is refused, or answered like any other grammar; meanwhile the engine answers others."""
    call, says = BOMBS[kind]
    bomb = asyncio.create_task(ask(engines.decode, call))
    neighbour = await ask(engines.decode, chat(max_tokens=2))
    try:
        said, status = "", (await bomb).head.status
    except InvalidRequest as e:
        said, status = e.message, e.http_status

    assert neighbour.head.status == 200
    assert status == (400 if says else 200)
    assert says in said


async def test_verdicts_are_remembered(engines: Engines) -> None:
    """The second request with a grammar is refused without another trial."""
    call, says = BOMBS["many properties"]
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=says):
            await ask(engines.decode, call)

"""What measures conformance finds what it should find."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conformance import json_schemas, tools
from tests.conformance.dialects import DIALECTS, ToolCall, events_of
from tests.conformance.schemas import FLAG, SCHEMAS, WHOLE, record
from tests.conformance.tools import Task

CALL = ToolCall("add", '{"a": 3, "b": 4.5}')
STREAMS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "add", "arguments": ""}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 3, '}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '"b": 4.5}'}}]}}]},
        {"choices": []},
    ],
    "responses": [
        {"type": "response.created", "response": {}},
        {
            "type": "response.output_item.done",
            "item": {"type": "function_call", "name": CALL.name, "arguments": CALL.arguments},
        },
    ],
    "messages": [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "name": "add"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"a": 3, '}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '"b": 4.5}'}},
    ],
}


@pytest.mark.parametrize(
    ("schema", "text", "kind"),
    [
        (record(a=WHOLE, b=FLAG), '{"a":1,"b":true}', "valid"),
        (record(a=WHOLE, b=FLAG), '{"a":1}', "invalid"),
        (record(a=WHOLE, b=FLAG), '{"a":1,', "invalid"),
        (SCHEMAS["format"], '{"day":"2026-02-31","id":"x","mail":"x"}', "invalid"),
    ],
)
def test_instances_are_told_from_others(schema: Any, text: str, kind: str) -> None:
    assert json_schemas.judge("x", schema, text).kind == kind


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_are_found_in_streams(dialect: str) -> None:
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in STREAMS[dialect]) + "data: [DONE]\n\n"

    assert DIALECTS[dialect].streamed(list(events_of(text))) == [CALL]


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([CALL], "valid"),
        ([], "none"),
        ([ToolCall("nope", "{}")], "invalid"),
        ([ToolCall("add", '{"a": 3}')], "invalid"),
        ([ToolCall("add", '{"a": 3,')], "invalid"),
        ([CALL, CALL], "invalid"),
    ],
)
def test_calls_are_judged_by_the_tools(calls: list[ToolCall], kind: str) -> None:
    prompt = next(p for p in tools.read(None, 100) if p.tools[0].name == "add")

    assert tools.judge(Task(prompt, "chat", "required", is_streamed=False), calls).kind == kind


def test_types_of_the_leaderboard_become_those_of_json_schema() -> None:
    theirs = {"type": "dict", "properties": {"x": {"type": "float", "optional": True}, "type": {"type": "any"}}}

    assert tools.schema(theirs) == {"type": "object", "properties": {"x": {"type": "number"}, "type": {}}}

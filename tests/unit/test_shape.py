"""Answers in the shape of OpenAI's description, checked by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from inferflux.engine.vllm.shape import shaped

COMPONENTS = json.loads((Path(__file__).parents[1] / "api/openai.json").read_text())["components"]
# As vLLM writes them.
USAGE = {
    "prompt_tokens": 1,
    "total_tokens": 2,
    "completion_tokens": 1,
    "prompt_tokens_details": None,
    "completion_tokens_details": None,
}
CHAT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
            },
            "logprobs": {"content": []},
            "finish_reason": "stop",
        }
    ],
    "service_tier": None,
    "system_fingerprint": None,
    "usage": USAGE,
}
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "stop"}],
    "system_fingerprint": None,
    "usage": USAGE,
}
RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "created_at": 1,
    "incomplete_details": None,
    "instructions": None,
    "metadata": None,
    "model": "m",
    "object": "response",
    "output": [
        {
            "id": "msg_1",
            "content": [{"annotations": [], "text": "x", "type": "output_text", "logprobs": None}],
            "role": "assistant",
            "status": "completed",
            "type": "message",
        }
    ],
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "none",
    "tools": [{"type": "function", "name": "f", "strict": None, "parameters": {"text": None}}],
    "top_p": 1.0,
    "status": "completed",
    "text": None,
    "user": None,
}
ANSWERS = {"CreateChatCompletionResponse": CHAT, "CreateCompletionResponse": COMPLETION, "Response": RESPONSE}


def errors(name: str, answer: Any) -> list[str]:
    """What the description says against an answer."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": COMPONENTS}
    found = jsonschema.Draft202012Validator(schema).iter_errors(answer)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_vllm_gets_the_shape_of_the_description(name: str) -> None:
    assert errors(name, ANSWERS[name])
    assert errors(name, json.loads(shaped(json.dumps(ANSWERS[name]).encode()))) == []


def test_nulls_that_are_allowed_and_what_clients_have_written_stay() -> None:
    chat = json.loads(shaped(json.dumps(CHAT).encode()))
    response = json.loads(shaped(json.dumps(RESPONSE).encode()))

    assert chat["choices"][0]["message"] == {"role": "assistant", "content": None, "refusal": None, "audio": None}
    assert chat["service_tier"] is None
    assert response["tools"] == RESPONSE["tools"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b'{"object": "list"}', b'{"object": ["x"]}', b'{"id":  1}']
)
def test_everything_else_stays_as_it_is(body: bytes) -> None:
    assert shaped(body) == body

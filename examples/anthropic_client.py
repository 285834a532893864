"""Anthropic's client: an answer, a stream, a tool call."""

import os

from anthropic import Anthropic

URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("INFERFLUX_MODEL", "smollm2-135m")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "name": "look_up",
    "description": "Look up a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

with Anthropic(base_url=URL, api_key=os.environ["INFERCTL_API_KEY"]) as client:
    answer = client.messages.create(model=MODEL, messages=QUESTION, max_tokens=32)
    print("answer:", answer.content[0].text)

    with client.messages.stream(model=MODEL, messages=QUESTION, max_tokens=32) as stream:
        print("stream:", "".join(stream.text_stream))

    answer = client.messages.create(
        model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice={"type": "tool", "name": "look_up"}, max_tokens=64
    )
    print("tool call:", *((part.name, part.input) for part in answer.content if part.type == "tool_use"))

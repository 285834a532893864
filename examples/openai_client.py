"""OpenAI's client: an answer, a stream, an object of a schema, a tool call."""

import json
import os

from openai import OpenAI

URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("INFERFLUX_MODEL", "smollm2-135m")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
    "required": ["name", "is_capital"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Look up a city", "parameters": CITY}}

with OpenAI(base_url=f"{URL}/v1", api_key=os.environ["INFERCTL_API_KEY"]) as client:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=32, temperature=0)
    print("answer:", answer.choices[0].message.content)

    with client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=32, temperature=0, stream=True
    ) as stream:
        print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))

    response = client.responses.create(model=MODEL, input="What is the capital of France?", max_output_tokens=32)
    print("response:", response.output_text)

    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
        max_tokens=64,
    )
    print("object:", json.loads(answer.choices[0].message.content))

    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=96
    )
    call = answer.choices[0].message.tool_calls[0].function
    print("tool call:", call.name, json.loads(call.arguments))

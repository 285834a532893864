"""What clients ask for: every mode of a request that can go wrong in a way of its own, with prompts never seen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `twin`: number of the request with the same body from another tenant, -1: none."""

    number: int
    mode: str
    path: str
    body: dict[str, Any]
    tenant: int = 0
    twin: int = -1

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))


class Workload:
    """Draws requests. Equal seeds draw equal requests."""

    def __init__(self, engine: str, seed: int, *, num_tokens: int) -> None:
        self._random = random.Random(seed)
        self._nonce = f"{seed:x}"
        self._num_tokens = num_tokens
        self._numbers = count()
        self._modes = SIM_MODES if engine == "sim" else VLLM_MODES

    def draw(self, num: int) -> list[Ask]:
        """Draw requests of all modes in turn; the first one twice, from both tenants."""
        modes = [*self._turn(num - 1)]
        asks = [self._ask(mode) for mode in modes]
        first = asks[0]
        asks[0] = Ask(first.number, first.mode, first.path, first.body, 0, next(self._numbers))
        return [*asks, Ask(asks[0].twin, first.mode, first.path, first.body, 1, first.number)]

    def everything(self) -> list[Ask]:
        """Draw one request of each mode."""
        return [self._ask(mode) for mode in self._modes]

    def _turn(self, num: int) -> Iterator[str]:
        names = list(self._modes)
        streamed = [name for name in names if "whole" not in name]
        for i in range(num):  # most are streams: they have more to lose
            yield self._random.choice(names if i % 3 == 0 else streamed)

    def _ask(self, mode: str) -> Ask:
        path, fields = self._modes[mode]
        number = next(self._numbers)
        body = {**fields, "temperature": fields.get("temperature", 0)}
        size = self._random.choice((1, 4, 12))
        # The number comes first, so that no prefix is cached and KV must really travel.
        text = f"{self._nonce}-{number}: " + " ".join(f"tell me about {self._random.random()}" for _ in range(size))
        limit = self._num_tokens + self._random.randrange(self._num_tokens)
        body |= {"max_output_tokens" if path == RESPONSES else "max_tokens": limit}
        match path:
            case "/v1/completions":
                body["prompt"] = [text, f"{text}?"] if body.pop("two_prompts", False) else text
            case "/v1/responses":
                body["input"] = text
            case _:
                body["messages"] = [{"role": "user", "content": text}]
        if path in {CHAT, COMPLETIONS} and body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        return Ask(number, mode, path, body)


STREAM = {"stream": True}
SEEDED = {"temperature": 0.9, "seed": 7}
Modes = dict[str, tuple[str, dict[str, Any]]]
SIM_MODES: Modes = {
    "chat stream": (CHAT, {**STREAM}),
    "chat stream seeded": (CHAT, {**STREAM, **SEEDED}),
    "chat stream n=2": (CHAT, {**STREAM, **SEEDED, "n": 2}),
    "chat stream stop": (CHAT, {**STREAM, "stop": [" ba", "zu z", "qq"]}),
    "chat whole": (CHAT, {}),
    "completion stream": (COMPLETIONS, {**STREAM}),
    "completion stream two prompts": (COMPLETIONS, {**STREAM, "two_prompts": True}),
    "completion whole n=3": (COMPLETIONS, {**SEEDED, "n": 3}),
    "messages stream": (MESSAGES, {**STREAM}),
    "responses stream": (RESPONSES, {**STREAM}),
}
VLLM_MODES: Modes = {
    "chat stream": (CHAT, {**STREAM}),
    "chat stream seeded": (CHAT, {**STREAM, **SEEDED}),
    "chat stream n=2": (CHAT, {**STREAM, **SEEDED, "n": 2}),
    "chat stream logprobs": (CHAT, {**STREAM, "logprobs": True, "top_logprobs": 2}),
    "chat stream penalties": (CHAT, {**STREAM, "presence_penalty": 0.6, "frequency_penalty": 0.4, "min_tokens": 8}),
    "chat stream json_schema": (
        CHAT,
        {**STREAM, "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
    ),
    "chat stream tool": (
        CHAT,
        {**STREAM, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}},
    ),
    "chat stream stop": (CHAT, {**STREAM, "stop": [" the", "qq"]}),
    "chat whole": (CHAT, {}),
    "completion stream": (COMPLETIONS, {**STREAM}),
    "completion whole n=3": (COMPLETIONS, {**SEEDED, "n": 3}),
}

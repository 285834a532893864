"""What all endpoints share: reading a body strictly, refusing it properly, and rendering what was generated."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from inferflux.engine.sim import tokenizer
from inferflux.engine.sim.sequence import Emitted, Sampling
from inferflux.types import HttpAnswer, HttpHead, RequestContext, Usage

JSON_HEADERS = (("content-type", "application/json"),)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Understood by real engines, not simulated: better refused than ignored.
UNSUPPORTED = ("tools", "response_format", "logprobs", "top_logprobs", "echo", "suffix", "logit_bias")


class BadCall(Exception):
    """The call can't be served; `answer` is what the client gets."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        kind = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError"}[status]
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.answer = answer({"error": error}, status)


def answer(document: Mapping[str, Any], status: int = 200) -> HttpAnswer:
    """A complete JSON response."""
    body = orjson.dumps(document)
    return HttpAnswer(HttpHead(status, (*JSON_HEADERS, ("content-length", str(len(body))))), body)


class Fields:
    """A JSON object with typed access. Null and absent are the same; everything wrong raises BadCall."""

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict):
            raise BadCall("the body is not a JSON object")
        self._values = document

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        try:
            return cls(orjson.loads(body))
        except orjson.JSONDecodeError as e:
            raise BadCall("the body is not valid JSON") from e

    def refuse(self, *names: str) -> None:
        """Raise for the first of `names` that is set to anything but a neutral value."""
        for name in names:
            if self._values.get(name) not in (None, False, [], {}, {"type": "text"}, 0):
                raise BadCall(f"the sim engine does not support {name}", param=name)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadCall(f"{name} must be an integer from {low} to {high}", param=name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise BadCall(f"{name} must be a number from {low} to {high}", param=name)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._values.get(name, False)
        if not isinstance(value, bool | None):
            raise BadCall(f"{name} must be true or false", param=name)
        return bool(value)

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str):
            raise BadCall(f"{name} must be a string", param=name)
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A string, a list of strings, or nothing."""
        value = self._values.get(name)
        items = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise BadCall(f"{name} must be a string or a list of strings", param=name)
        return tuple(item for item in items if item)

    def object(self, name: str) -> Fields:
        return Fields(self._values.get(name) or {})


def sampling(fields: Fields, max_tokens: str, *, stop: str = "stop", default_max_tokens: int | None = None) -> Sampling:
    """The sampling fields that endpoints share; `max_tokens` and `stop` are what they call these."""
    limit = fields.integer(max_tokens, 1, 1 << 31)
    n = fields.integer("n", 1, 128) or 1
    temperature = fields.number("temperature", 0, 2, 1.0)
    if n > 1 and temperature == 0:
        raise BadCall(f"n must be 1 when using greedy sampling, got {n}.", param="n")
    seed = fields.integer("seed", -(1 << 63), (1 << 63) - 1) or 0
    limit = default_max_tokens if limit is None else limit
    return Sampling(limit, n, temperature, seed, fields.strings(stop), fields.flag("ignore_eos"))


def messages(value: Any, param: str = "messages") -> list[dict[str, str]]:
    """Check chat messages; parts are joined, only text is understood."""
    if not isinstance(value, list) or not value:
        raise BadCall(f"{param} must be a list with at least one message", param=param)
    return [_message(item, param) for item in value]


def _message(item: Any, param: str) -> dict[str, str]:
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise BadCall(f"each of {param} must have a role out of {', '.join(ROLES)}", param=param)
    return {"role": item["role"], "content": content(item.get("content"), param)}


def content(value: Any, param: str) -> str:
    """The text of a message: a string or a list of text parts."""
    if isinstance(value, str) or value is None:
        return value or ""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise BadCall(f"the content in {param} must be a string or a list of parts", param=param)
    texts = [part.get("text") for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise BadCall(f"the sim engine supports only text parts in {param}", param=param)
    return "".join(texts)


def chat_prompt(value: Any, system: str = "") -> tuple[int, ...]:
    """The prompt of a chat."""
    first = [{"role": "system", "content": system}] if system else []
    return tuple(tokenizer.render_chat([*first, *messages(value)]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished choice."""

    index: int
    text: str
    finish_reason: str
    stop: str | None


class Renderer(ABC):
    """Turns what was generated into the bytes of one endpoint's response.

    Everything follows from the context, the call and what is generated, so that another worker can write it again.
    """

    prefix = "cmpl-"

    def __init__(self, model: str, context: RequestContext) -> None:
        self.model = model
        self.id = self.prefix + context.request_id
        self.created = context.created_s or int(time.time())

    def opening(self, num_choices: int) -> bytes:
        """What a stream starts with, an event of its own; empty: nothing."""
        return b""

    @abstractmethod
    def chunk(self, part: Emitted) -> bytes:
        """The next part of a stream."""

    @abstractmethod
    def closing(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        """What a stream ends with."""

    @abstractmethod
    def document(self, outcomes: Sequence[Outcome], usage: Usage) -> dict[str, Any]:
        """The response of a call that does not stream."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A call that generates; or one that is `is_pooling`, whose tokens are nobody's: its prompts are what counts."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    stream: bool
    renderer: Renderer
    is_pooling: bool = False


def event(document: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return b"%bdata: %b\n\n" % (head, orjson.dumps(document))


DONE = b"data: [DONE]\n\n"


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI's chat and completions have it."""
    details = {"cached_tokens": usage.cached_tokens} if usage.cached_tokens else None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": details,
    }

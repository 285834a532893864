"""`inferctl chat` and `inferctl completion`: prompts in, text out as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends; Ctrl-C stops an answer"

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the user chose; None = the server's default."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    is_streamed: bool = True

    def body(self, api: Api) -> dict[str, Any]:
        """Build the fields that chat and completions have in common."""
        chosen = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return {"model": self.model or api.default_model(), **{k: v for k, v in chosen.items() if v is not None}}


def chat(prompt: str | None, sampling: Sampling, output: Format) -> None:
    """Answer one message."""
    messages = [{"role": "user", "content": text_of(prompt)}]
    with Api() as api:
        answer(api, CHAT, {**sampling.body(api), "messages": messages}, sampling, output)


def complete(prompt: str | None, sampling: Sampling, output: Format) -> None:
    """Continue one text."""
    text = text_of(prompt)
    with Api() as api:
        answer(api, COMPLETIONS, {**sampling.body(api), "prompt": text}, sampling, output)


def converse(first: str | None, sampling: Sampling) -> None:
    """Chat until the user has had enough."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - gives input() editing and history
    with Api() as api:
        base = sampling.body(api)
        note(f"{base['model']} at {api.url}\n{HELP}")
        messages: list[Message] = []
        for prompt in prompts(first):
            if prompt == "/reset":
                messages.clear()
                continue
            messages.append({"role": "user", "content": prompt})
            reply = say(deltas(api, CHAT, {**base, "messages": messages}))
            messages.append({"role": "assistant", "content": reply})


def prompts(first: str | None) -> Iterator[str]:
    """Yield what the user types, until the end."""
    if first:
        yield first
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        if line == "/exit":
            return
        if line:
            yield line


def say(parts: Generator[str]) -> str:
    """Print an answer as it comes; Ctrl-C ends it there. Returns what was said."""
    said = ""
    try:
        for part in parts:
            said += part
            write(part)
    except KeyboardInterrupt:
        parts.close()  # ends the request too
    except CliError as e:
        note(f"inferctl: {e.message}")
    write("\n")
    return said


def answer(api: Api, path: str, body: dict[str, Any], sampling: Sampling, output: Format) -> None:
    """Print one answer in the way that was asked for."""
    if output is Format.JSON:
        print_json(api.post(path, body))
        return
    if sampling.is_streamed:
        for part in deltas(api, path, body):
            write(part)
    else:
        write(text_in(api.post(path, body)["choices"][0], "message"))
    write("\n")


def deltas(api: Api, path: str, body: dict[str, Any]) -> Generator[str]:
    """Yield the text of each event."""
    for event in api.stream(path, body):
        for choice in event.get("choices", ()):
            yield text_in(choice, "delta")


def text_in(choice: dict[str, Any], key: str) -> str:
    """Read the text of a chat or completions choice."""
    if "text" in choice:
        return choice["text"] or ""
    return (choice.get(key) or {}).get("content") or ""


def text_of(prompt: str | None) -> str:
    """Return the argument, or else what is piped into us."""
    text = prompt if prompt is not None else "" if sys.stdin.isatty() else sys.stdin.read()
    if not text.strip():
        raise CliError("no prompt: give one as the argument or on stdin", Exit.USAGE)
    return text


def write(text: str) -> None:
    """Print a part of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()

"""`inferctl admin cache`: look at the prefix caches of prefill workers, fill and pin them, over HTTP."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table

PATH = "/v1/admin/cache"
COLUMNS = ("worker", "cached tokens", "slots free", "kept", "pinned", "hits", "partial", "misses", "evicted", "pins")
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What to cache. `text`: a file's name or the prefix itself; None: read stdin. The rest is for the body."""

    text: str | None
    model: str | None
    tenant: str | None


def show(output: Format) -> None:
    """Show each worker's store."""
    with Api() as api:
        document: Document = api.get(PATH)
    if output is Format.JSON:
        print_json(document)
        return
    print_table(COLUMNS, map(row, document["data"]))


def warm(prefix: Prefix, output: Format) -> None:
    """Have a prefix computed everywhere."""
    with Api() as api:
        document: Document = api.post(f"{PATH}/warm", body(prefix))
    report("cached", document, output)


def pin(name: str, prefix: Prefix, output: Format) -> None:
    """Pin a prefix everywhere."""
    with Api() as api:
        document: Document = api.post(f"{PATH}/pins", {**body(prefix), "name": name})
    report(f"pinned {name}:", document, output)


def unpin(name: str, output: Format) -> None:
    """Let a pin go."""
    with Api() as api:
        document: Document = api.delete(f"{PATH}/pins/{quote(name, safe='')}")
    if output is Format.JSON:
        print_json(document)
        return
    note(f"unpinned {name}")


def report(what: str, document: Document, output: Format) -> None:
    """Say how much of a prefix is cached where."""
    if output is Format.JSON:
        print_json(document)
        return
    for worker in document["workers"]:
        note(f"{what} {worker['num_tokens']} tokens on {worker['worker']}")


def body(prefix: Prefix) -> Document:
    """A request with the prefix as its prompt: JSON as it is, anything else as text."""
    document = content(sys.stdin.read() if prefix.text is None else read(prefix.text))
    document |= {"model": prefix.model} if prefix.model else {}
    document |= {"tenant": prefix.tenant} if prefix.tenant else {}
    return document


def read(text_or_file: str) -> str:
    """The content of a file of this name, if there is one, else the text itself."""
    try:
        return Path(text_or_file).read_text()
    except (OSError, ValueError):  # ValueError: a NUL in it, so no name; or no text in the file
        return text_or_file


def content(text: str) -> Document:
    """Take a JSON object with messages or a prompt for a request, everything else for a prompt."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if isinstance(document, dict) and document.keys() & {"messages", "prompt"}:
        return document
    if not text.strip():
        raise CliError("the prefix is empty", Exit.USAGE)
    return {"prompt": text}


def row(store: Document) -> tuple[Any, ...]:
    """Render one worker's store for people."""
    if "error" in store:
        return store["worker"], store["error"], *[""] * (len(COLUMNS) - 2)
    slots, requests = store["slots"], store["requests"]
    pins = ", ".join(f"{pin['name']} ({pin['num_tokens']})" for pin in store["pins"])
    numbers = slots["free"], slots["kept"], slots["pinned"], requests["hit"], requests["partial"], requests["miss"]
    return store["worker"], store["cached_tokens"], *numbers, sum(store["evictions"].values()), pins

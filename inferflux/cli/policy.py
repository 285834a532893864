"""`inferctl policy`: the policy document, over HTTP with an admin key."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.keys import when
from inferflux.cli.output import Format, note, print_json

PATH = "/v1/admin/policy"
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a document is applied; None: left to the service."""

    reason: str = ""
    expected_revision: int | None = None
    stage: str = "live"
    share: float | None = None
    max_error_excess: float | None = None

    def body(self) -> Document:
        """Render what was given."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value not in (None, "")}


def get(output: Format) -> None:
    """Print the document in force."""
    with Api() as api:
        state = api.get(PATH)
    if output is Format.JSON:
        print_json(state)
        return
    describe(state)
    if state["candidate"]:
        describe(state["candidate"])
    print_json(state["document"])


def apply(file: str, terms: Terms, output: Format) -> None:
    """Make a file's document the newest revision."""
    body = {"document": read_document(file)} | terms.body()
    with Api() as api:
        made = api.put(PATH, body)
    report(made, output)


def report(made: Document, output: Format) -> None:
    """Say which revision was made."""
    if output is Format.JSON:
        print_json(made)
    else:
        describe(made)


def describe(revision: Document) -> None:
    """Say in one line what a revision is, to people."""
    if not revision["revision"]:
        note("no policy has been applied yet: nothing is restricted")
        return
    share = f" for {revision['share']:.0%} of the traffic" if revision["share"] else ""
    why = f": {revision['reason']}" if revision["reason"] else ""
    made = f"{when(revision['created_at'])} by {revision['author']}"
    note(f"revision {revision['revision']}, {revision['stage']}{share}, {made}{why}")


def read_document(file: str) -> Document:
    """Read a document from a .toml or a JSON file; `-`: JSON from stdin."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        document = tomllib.loads(text) if file.endswith(".toml") else json.loads(text)
    except OSError as e:
        raise CliError(f"cannot read {file}: {e.strerror}", Exit.USAGE) from e
    except ValueError as e:
        raise CliError(f"{file}: {e}", Exit.USAGE) from e
    if not isinstance(document, dict):
        raise CliError(f"{file} holds no JSON object", Exit.USAGE)
    return document

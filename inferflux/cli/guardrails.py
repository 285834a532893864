"""`inferctl admin guardrails`: a dry run of rules, over HTTP with an admin key."""

from __future__ import annotations

import sys
from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.output import Format, note, print_json
from inferflux.cli.policy import read_document

PATH = "/v1/admin/guardrails/test"


def dry_run(text: str | None, whose: dict[str, str], file: str, output: Format) -> None:
    """Try a text, or stdin."""
    body: dict[str, Any] = {"text": sys.stdin.read() if text is None else text} | whose
    if file:
        body["guardrails"] = read_document(file).get("guardrails", {})
    with Api() as api:
        trial = api.post(PATH, body)
    if output is Format.JSON:
        print_json(trial)
        return
    for verdict in trial["verdicts"]:
        note(f"{verdict['rule']} (tier {verdict['tier']}): {verdict['action']} {verdict['label']}")
    note(trial["unasked"] or trial["action"])
    if trial["text"] is not None:
        print(trial["text"])  # noqa: T201 - the result

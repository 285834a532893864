"""python -m tests.conformance.json_schemas: find out whether answers follow the schemas that were asked for.

Each schema is asked for through prefill, ticket and decode of a real cluster, and each answer is validated by
jsonschema. Exit status 1 when more than 0.5% of the answers to accepted schemas are no instances, or anything is
neither an answer nor a clear 400. An answer that `max_tokens` cuts off is asked for once more, with more tokens, and
then counted apart.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.conformance.schemas import SCHEMAS
from tests.conformance.site import Site, for_all, opened, parser, say

TOKENS = (200, 600)
GOOD_SHARE = 0.995


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a schema: valid, refused, truncated, invalid or failed; `why` of all but the first."""

    name: str
    kind: str
    why: str = ""


async def measure(site: Site, item: tuple[str, Any]) -> Outcome:
    """Ask for an instance of one schema."""
    for max_tokens in TOKENS:
        outcome = await ask(site, *item, max_tokens)
        if outcome.kind != "truncated":
            break
    return outcome


async def ask(site: Site, name: str, schema: Any, max_tokens: int) -> Outcome:
    """Ask once."""
    body = {
        "messages": [{"role": "user", "content": "Write a short example as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}},
        "max_tokens": max_tokens,
        "temperature": 0,
        "logit_bias": site.bias,
    }
    try:
        response = await site.ask("/v1/chat/completions", body)
    except httpx.HTTPError as e:
        return Outcome(name, "failed", type(e).__name__)
    if response.status_code == 400 and response.json()["error"]["message"]:
        return Outcome(name, "refused", response.json()["error"]["message"])
    if response.status_code != 200:
        return Outcome(name, "failed", f"status {response.status_code}")
    (choice,) = response.json()["choices"]
    if choice["finish_reason"] == "length":
        return Outcome(name, "truncated", f"at {max_tokens} tokens")
    return judge(name, schema, choice["message"]["content"])


def judge(name: str, schema: Any, text: str) -> Outcome:
    """Validate an answer, formats included."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except ValueError as e:
        return Outcome(name, "invalid", f"no JSON: {e}")
    except jsonschema.ValidationError as e:
        return Outcome(name, "invalid", f"{e.json_path}: {e.message[:200]}")
    return Outcome(name, "valid")


def read(folder: Path | None, limit: int | None) -> list[tuple[str, Any]]:
    """Read the schemas of a folder; without one, our own."""
    found: Mapping[str, Any] = SCHEMAS
    if folder is not None:
        found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return list(found.items())[:limit]


def report(outcomes: list[Outcome]) -> int:
    """Say what was found; returns the exit status."""
    counts = Counter(outcome.kind for outcome in outcomes)
    for outcome in outcomes:
        if outcome.kind != "valid":
            say(f"{outcome.kind:9} {outcome.name}: {' '.join(outcome.why.split())[:160]}")
    num_whole = counts["valid"] + counts["invalid"]
    share = counts["valid"] / num_whole if num_whole else 0.0
    say(
        f"{len(outcomes)} schemas: {counts['refused']} refused with 400, {num_whole + counts['truncated']} accepted",
        f"of the accepted: {counts['valid']} valid, {counts['invalid']} invalid, {counts['truncated']} cut off at "
        f"{TOKENS[-1]} tokens; {share:.2%} of the complete ones are valid",
        f"hangs and failures: {counts['failed']}",
    )
    return 0 if share >= GOOD_SHARE and not counts["failed"] else 1


async def run(argv: list[str]) -> int:
    """Measure and report."""
    flags = parser(__doc__, "json_schemas")
    flags.add_argument("--schemas", type=Path, help="folder with *.json; default: a few of our own")
    flags.add_argument("--limit", type=int, help="only the first so many")
    chosen = flags.parse_args(argv)
    async with opened(chosen) as site:
        items = read(chosen.schemas, chosen.limit)
        return report(await for_all(items, partial(measure, site), chosen.concurrency))


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))

"""python -m tests.conformance.tools: find out whether tool calls can be parsed and their arguments are valid.

Each prompt is asked in each dialect; ways of asking take turns: a named tool, any of two that must be called (one call,
or several in parallel), and the model's own choice, each streamed and not. Exit status 1 when a call that was required
is missing or its arguments are no instances of the tool's parameters, or a request fails. What a model does by its own
choice is counted, not judged, beyond that the answer is a proper one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.conformance.dialects import DIALECTS, Tool, ToolCall, events_of
from tests.conformance.prompts import PROMPTS
from tests.conformance.site import Site, for_all, opened, parser, say

# Names of types in the Berkeley Function-Calling Leaderboard that are none in JSON Schema.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
CHOICES = ("named", "required", "parallel", "auto")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, the tool that answers it, and another one."""

    text: str
    tools: tuple[Tool, Tool]


@dataclass(frozen=True, slots=True)
class Task:
    """One way to ask."""

    prompt: Prompt
    dialect: str
    choice: str
    is_streamed: bool

    @property
    def body(self) -> dict[str, Any]:
        tools = self.prompt.tools[:1] if self.choice == "auto" else self.prompt.tools
        choice = {"named": tools[0].name, "parallel": "required"}.get(self.choice, self.choice)
        body = DIALECTS[self.dialect].body(self.prompt.text, tools, choice)
        if self.choice == "required" and self.dialect != "messages":
            body["parallel_tool_calls"] = False
        return body | {"temperature": 0, "stream": self.is_streamed}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task: valid, none (no call), truncated, invalid or failed."""

    task: Task
    kind: str
    why: str = ""
    num_calls: int = 0


async def measure(site: Site, task: Task) -> Outcome:
    """Ask, and judge the answer."""
    dialect = DIALECTS[task.dialect]
    bias = {} if task.dialect == "messages" else {"logit_bias": site.bias}
    try:
        response = await site.ask(dialect.path, task.body | bias)
    except httpx.HTTPError as e:
        return Outcome(task, "failed", type(e).__name__)
    if response.status_code != 200:
        return Outcome(task, "failed", f"status {response.status_code}: {response.text[:200]}")
    answers = list(events_of(response.text)) if task.is_streamed else [response.json()]
    if errors := [a for a in answers if a.get("type") == "error" or a.get("error")]:
        return Outcome(task, "failed", str(errors[0])[:200])
    if any(dialect.is_cut(answer) for answer in answers):
        return Outcome(task, "truncated")
    return judge(task, dialect.streamed(answers) if task.is_streamed else dialect.calls(answers[0]))


def judge(task: Task, calls: Sequence[ToolCall]) -> Outcome:
    """Validate all calls of an answer."""
    schemas = {tool.name: tool.parameters for tool in task.prompt.tools}
    for call in calls:
        if call.name not in schemas:
            return Outcome(task, "invalid", f"no tool of that name: {call.name[:60]!r}", len(calls))
        try:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        except (ValueError, jsonschema.ValidationError) as e:
            return Outcome(task, "invalid", " ".join(str(e).split())[:160], len(calls))
    if not calls:
        return Outcome(task, "none")
    if len(calls) > 1 and task.choice == "required" and task.dialect != "messages":
        return Outcome(task, "invalid", f"{len(calls)} calls, one was allowed", len(calls))
    return Outcome(task, "valid", num_calls=len(calls))


def is_good(outcome: Outcome) -> bool:
    """Whether an outcome is what was promised."""
    if outcome.task.choice == "auto":
        return outcome.kind != "failed"
    return outcome.kind in ("valid", "truncated")


def tasks(prompts: Sequence[Prompt]) -> list[Task]:
    """Ask each prompt in each dialect; the ways of asking take turns."""
    ways = cycle(product(CHOICES, (False, True)))
    return [Task(prompt, dialect, *next(ways)) for dialect in DIALECTS for prompt in prompts]


def read(path: Path | None, limit: int) -> list[Prompt]:
    """Read prompts of the leaderboard's format, a document per line; without a file, our own."""
    found = [(p["question"], p["tool"]) for p in PROMPTS]
    if path is not None:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found = [(line["question"][0][0]["content"], line["function"][0]) for line in lines]
    tools = [tool(function) for _, function in found]
    others = [next(t for t in tools[i + 1 :] + tools[: i + 1] if t.name != own.name) for i, own in enumerate(tools)]
    texts = (text for text, _ in found)
    return [Prompt(*each) for each in zip(texts, zip(tools, others, strict=True), strict=True)][:limit]


def tool(function: dict[str, Any]) -> Tool:
    """Make a tool of a function; names have no dots in OpenAI's API."""
    return Tool(function["name"].replace(".", "_"), function["description"], schema(function["parameters"]))


def schema(node: Any) -> Any:
    """Translate parameters into JSON Schema: their own names of types, and marks that are no keywords."""
    if isinstance(node, list):
        return [schema(part) for part in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("type")
    if not isinstance(kind, str):
        return {name: schema(value) for name, value in node.items()}
    rest = {name: schema(value) for name, value in node.items() if name not in ("type", "optional", "format")}
    kind = TYPES.get(kind, kind)
    return {"type": kind, **rest} if kind else rest


def report(outcomes: Sequence[Outcome]) -> int:
    """Say what was found; returns the exit status."""
    for outcome in outcomes:
        if not is_good(outcome) or outcome.kind == "invalid":
            task = outcome.task
            how = "streamed" if task.is_streamed else "whole"
            say(f"{outcome.kind:9} {task.dialect} {task.choice} {how}: {outcome.why}: {task.prompt.text[:60]}")
    for dialect, choice in product(DIALECTS, CHOICES):
        own = [o for o in outcomes if (o.task.dialect, o.task.choice) == (dialect, choice)]
        counts = Counter(o.kind for o in own)
        kinds = ", ".join(f"{num} {kind}" for kind, num in counts.most_common())
        say(f"{dialect:10} {choice:9} {len(own):4} prompts, {sum(o.num_calls for o in own):4} calls: {kinds}")
    num_bad = sum(not is_good(outcome) for outcome in outcomes)
    say(f"{len(outcomes)} requests, {num_bad} not as promised")
    return 1 if num_bad else 0


async def run(argv: list[str]) -> int:
    """Measure and report."""
    flags = parser(__doc__, "tools")
    flags.add_argument("--prompts", type=Path, help="a file of the leaderboard; default: a few of our own")
    flags.add_argument("--limit", type=int, default=100, help="only the first so many")
    chosen = flags.parse_args(argv)
    async with opened(chosen) as site:
        return report(
            await for_all(tasks(read(chosen.prompts, chosen.limit)), partial(measure, site), chosen.concurrency)
        )


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))

"""What guardrails cost: a verdict of tier 1, of tier 2 on 4 kB, and the gaps between the events of a guarded stream.

    python -m bench.guardrails [--workers] [--seconds 5] [--json FILE]

The first part runs in this process, without a network, as the gateway does it: authentication by key, then the verdict
on a prompt. The rules are 5,000 phrases, all kinds of personal data and credentials, 20 patterns and one rule for URLs.
CPU time is that of the thread, which other processes of the machine do not add to. The second part paces a stream at
20 ms per event, with and without the same rules on its output, and compares the gaps.
`--workers` adds tier 2: each kind of model on 4 kB of prose, one question at a time, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from inferflux.policy.document import parse
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, hash_secret
from services.gateway.endpoints import ENDPOINTS, Scope
from services.gateway.guardrails.guard import Guard, Subject
from services.gateway.guardrails.referees import Referees
from services.gateway.guardrails.rules import Guardrails, compile_guardrails

PROMPT_CHARS = 4096
GAP_S = 0.02
CHAT = ENDPOINTS["/v1/chat/completions"]
SECRET, PEPPER = b"ifx_a-key-of-the-benchmark", b"p" * 32
Clock = Callable[[], float]
WORDS = tuple("the of and to in that was his it with as had for she not at by but have from one all".split())  # noqa: SIM905


def rules() -> Guardrails:
    """Make a large policy."""
    made = random.Random(7)
    phrases = [" ".join("".join(made.choices("abcdefghijklmnop", k=7)) for _ in range(2)) for _ in range(5000)]
    section = {
        "rules": [
            {"name": "words", "kind": "blocklist", "phrases": phrases, "action": "block"},
            {"name": "pii", "kind": "pii", "action": "redact"},
            {"name": "secrets", "kind": "secrets", "action": "block"},
            {"name": "urls", "kind": "urls", "deny": ["evil.example"], "action": "block"},
            {
                "name": "patterns",
                "kind": "pattern",
                "patterns": [rf"(?i)\b{a}ward (?:of|to) \w{{1,20}} {b}ing\b" for a in "abcde" for b in "wxyz"],
                "action": "flag",
            },
        ]
    }
    compiled = compile_guardrails(parse(orjson.dumps({"guardrails": section})).guardrails)
    assert compiled is not None
    return compiled


def prose(num_chars: int) -> str:
    """Make text that looks like sentences."""
    made, text = random.Random(3), ""
    while len(text) < num_chars:
        text += " ".join(made.choices(WORDS, k=12)).capitalize() + ". "
    return text[:num_chars]


def guard(compiled: Guardrails) -> Guard:
    subject = Subject(CHAT.path, "m", "default", "key_1", CHAT.texts.ids, CHAT.texts.stream)
    return Guard(compiled, subject, Referees())


async def verdicts(compiled: Guardrails, num_chars: int, seconds: float, clock: Clock) -> list[float]:
    """Seconds for authentication and verdict, one after the other."""
    digest = hash_secret(PEPPER, SECRET)
    key = Key(digest, Principal("key_1", "default", frozenset((Scope.GENERATE,))))
    auth = Authenticator(PEPPER, lambda: KeyRing(1, {digest: key}))
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": prose(num_chars)}]})
    headers, taken, end = {b"authorization": b"Bearer " + SECRET}, [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = clock()
        await auth.authorize(headers, Scope.GENERATE)
        await guard(compiled).admit(body)
        taken.append(clock() - begin)
    return taken


def events(num: int) -> list[bytes]:
    """One word an event, with the space before it, as models write."""
    made = []
    for word in prose(num * 6).split(" ")[:num]:
        choice = {"index": 0, "delta": {"content": " " + word}, "logprobs": None, "finish_reason": None}
        document = {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}
        made.append(b"data: " + orjson.dumps(document) + b"\n\n")
    return made


async def gaps(compiled: Guardrails | None, num: int) -> tuple[list[float], list[float]]:
    """Seconds between writes to the client, and seconds of work per event."""
    output = guard(compiled).output() if compiled is not None else None
    written, work, next_at = [], [], time.perf_counter()
    for event in events(num):
        next_at += GAP_S
        await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
        begin = time.thread_time()
        shown = event if output is None else await output.feed(event)
        work.append(time.thread_time() - begin)
        if shown:
            written.append(time.perf_counter())
    return [b - a for a, b in zip(written, written[1:], strict=False)], work  # noqa: RUF007


def judged(seconds: float) -> dict[str, list[float]]:
    """Seconds that each model takes for 4 kB."""
    from services.guardrails.judges import KINDS, Question  # noqa: PLC0415 - loads seconds of libraries

    found = {}
    for kind, make in KINDS.items():
        judge = make()
        question = Question([prose(PROMPT_CHARS)], ["PERSON", "LOCATION"], 0.8, ())
        found[kind] = timed(lambda judge=judge, question=question: list(judge.judge(question)), seconds)  # type: ignore[misc]
    return found


def timed(work: Callable[[], object], seconds: float) -> list[float]:
    work()
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return taken


def spread(taken: Sequence[float]) -> dict[str, float]:
    """Quantiles in milliseconds."""
    ordered = sorted(taken)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * q))] * 1e3, 3) for name, q in at.items()}


async def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    compiled = rules()
    results = {
        f"auth and tier 1, {num} chars{name}": spread(await verdicts(compiled, num, args.seconds, clock))
        for num in (300, PROMPT_CHARS)
        for name, clock in (("", time.perf_counter), (", CPU time", time.thread_time))
    }
    num = int(args.seconds / GAP_S)
    (bare, _), (guarded, work) = await gaps(None, num), await gaps(compiled, num)
    results["gap of a stream"] = spread(bare) | {"mean": round(statistics.mean(bare) * 1e3, 3)}
    results["gap of a guarded stream"] = spread(guarded) | {"mean": round(statistics.mean(guarded) * 1e3, 3)}
    results["CPU time per guarded event"] = spread(work)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", action="store_true", help="measure the models of tier 2, too")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    results = asyncio.run(measure(args))
    if args.workers:
        results |= {f"tier 2, {kind}, 4 kB": spread(taken) for kind, taken in judged(args.seconds).items()}
    for name, row in results.items():
        print(f"{name:42s}" + "".join(f"  {key} {value:9.3f} ms" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""1P1D against one aggregated vLLM server on the same machine: TTFT, ITL, throughput.

Three loads, each against a running cluster (INFERCTL_URL, INFERCTL_API_KEY) and against vLLM's own server,
started here:

    c1   one client, short chats
    c4   four clients, short chats
    mix  three clients with short chats and one that sends 1,024-token prompts, for a fixed time

A cluster and its peer never run a load at the same time. vLLM's server busy-waits for a second after its last step:
each turn waits until that is over, then the idle one costs no CPU.

    python -m bench.disagg --model-dir DIR [--dtype float32] [--seconds 60] [--peer-threads 0]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.load import Sample, Server, closed_loop, gather, summary
from bench.peers import vllm_server

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write one line about rain.",
)
LONG_PROMPT_TOKENS = 1024
ROUNDS = 4
CALM_S = 2.0
"""Longer than vLLM's processes spin after their last step (vllm 0.32, shm_broadcast.SpinCondition: 1 s)."""
COLUMNS = (
    "requests",
    "failed",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_p50_ms",
    "itl_p99_ms",
    "requests_s",
    "output_tok_s",
    "total_tok_s",
)


Results = dict[str, dict[str, float]]


def chats(num: int | None, num_tokens: int) -> Iterator[dict[str, object]]:
    """Short chats with a fixed number of output tokens."""
    for i in itertools.count() if num is None else range(num):
        question = QUESTIONS[i % len(QUESTIONS)]
        messages = [{"role": "user", "content": f"{question} ({i})"}]
        yield {"messages": messages, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


def long_prompts(num_tokens: int) -> Iterator[dict[str, object]]:
    """Prompts of 1,024 tokens that begin like no other, of an earlier run neither: no cache helps anybody."""
    for i in itertools.count(random.SystemRandom().randrange(1 << 30)):
        ids = [1000 + (7919 * (i + 1) + 31 * k) % 40000 for k in range(LONG_PROMPT_TOKENS)]
        yield {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


async def measure(servers: dict[str, Server], seconds: float) -> dict[str, Results]:
    """Run each load on each server in turn. The first two in short alternating rounds: the machine's mood changes."""
    samples: dict[str, dict[str, list[Sample]]] = {name: {"c1": [], "c4": []} for name in servers}
    for server in servers.values():
        await closed_loop(server, "warm", chats(2, 8), lambda: False)
    for _ in range(ROUNDS):
        for name, server in servers.items():
            await asyncio.sleep(CALM_S)
            samples[name]["c1"] += await closed_loop(server, "c1", chats(6, 24), lambda: False)
    for _ in range(ROUNDS):
        for name, server in servers.items():
            await asyncio.sleep(CALM_S)
            clients = (closed_loop(server, "c4", chats(2, 24), lambda: False) for _ in range(4))
            samples[name]["c4"] += await gather(*clients)
    results = {name: {load: summary(of_load) for load, of_load in loads.items()} for name, loads in samples.items()}
    for name, server in servers.items():
        await asyncio.sleep(CALM_S)
        results[name] |= mix(await run_mix(server, seconds))
    return results


async def run_mix(server: Server, seconds: float) -> list[Sample]:
    """Three clients with short chats, one with long prompts."""
    end = time.monotonic() + seconds
    clients = [closed_loop(server, "short", chats(None, 64), lambda: time.monotonic() > end) for _ in range(3)]
    return await gather(*clients, closed_loop(server, "long", long_prompts(8), lambda: time.monotonic() > end))


def mix(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """The mix as a whole, and its two kinds of requests."""
    kinds = {kind: [s for s in samples if s.kind == kind] for kind in ("short", "long")}
    return {"mix": summary(samples)} | {f"mix/{kind}": summary(of_kind) for kind, of_kind in kinds.items()}


def table(name: str, results: dict[str, dict[str, float]]) -> str:
    """One row per load."""
    lines = [f"{name:<12}" + "".join(f"{column:>14}" for column in COLUMNS)]
    for load, row in results.items():
        lines.append(f"{load:<12}" + "".join(f"{row.get(column, float('nan')):>14.1f}" for column in COLUMNS))
    return "\n".join(lines)


def verdicts(ours: dict[str, dict[str, float]], peer: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """The ratios that matter, with their goals."""
    ratios = {
        "ttft c1 (ours/peer), goal <= 1.1": (ours["c1"]["ttft_p50_ms"] / peer["c1"]["ttft_p50_ms"], "<=", 1.1),
        "mix output tok/s (ours/peer), goal >= 1.3": (
            ours["mix"]["output_tok_s"] / peer["mix"]["output_tok_s"],
            ">=",
            1.3,
        ),
        "mix requests/s (ours/peer), goal >= 1.3": (ours["mix"]["requests_s"] / peer["mix"]["requests_s"], ">=", 1.3),
        "mix prompt + output tok/s (ours/peer), no goal": (
            ours["mix"]["total_tok_s"] / peer["mix"]["total_tok_s"],
            ">=",
            0,
        ),
        "mix ITL p99 (ours/peer), goal <= 0.1": (ours["mix"]["itl_p99_ms"] / peer["mix"]["itl_p99_ms"], "<=", 0.1),
    }
    return [
        {"what": what, "ratio": round(r, 3), "met": r <= goal if op == "<=" else r >= goal}
        for what, (r, op, goal) in ratios.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="what the cluster runs in; the peer runs in the same")
    parser.add_argument("--seconds", type=float, default=60, help="length of the mix")
    parser.add_argument("--peer-threads", type=int, default=0, help="0: as vLLM decides")
    args = parser.parse_args()
    cluster = Server(
        os.environ.get("INFERCTL_URL", "http://127.0.0.1:8080"), args.model, os.environ["INFERCTL_API_KEY"]
    )
    with vllm_server(args.model_dir, args.model, args.dtype, threads=args.peer_threads) as peer:
        results = asyncio.run(measure({"vllm": peer, "inferflux": cluster}, args.seconds))
    theirs, ours = results["vllm"], results["inferflux"]
    rows = verdicts(ours, theirs)
    print(table("inferflux", ours), table("vllm", theirs), sep="\n")
    for row in rows:
        print(f"{'met ' if row['met'] else 'MISS'} {row['what']}: {row['ratio']}")
    print(json.dumps({"inferflux": ours, "vllm": theirs, "verdicts": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

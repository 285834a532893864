"""What a repeated prefix of 1,024 tokens saves, on the worker that computed it and on another one.

Runs against a cluster (INFERCTL_URL, INFERCTL_API_KEY of an administrator) with two prefill workers or more, and nobody
else's requests. Each round takes a prefix nobody has sent and asks with a new ending again and again; equally idle
workers take turns. Which case a request was is not assumed but read from the workers' own counts of where tokens came
from: computed (cold), the engine's cache or its arena (same), another worker's arena (across).

    python -m bench.prefix_reuse [--rounds 3] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
from collections import defaultdict

import httpx

from bench.load import Sample, Server, stream

PREFIX_TOKENS, ENDING_TOKENS, OUTPUT_TOKENS = 1024, 16, 4
REPEATS = 4
GOAL = 0.25
# Between requests: until the pulse that shows everybody idle has come.
PAUSE_S = 0.6
SOURCES = {"peer": "across", "arena": "same", "engine": "same"}


async def tokens_by_source(client: httpx.AsyncClient, server: Server) -> dict[str, int]:
    """Prompt tokens that all prefill workers had since their start, by where their KV came from."""
    answer = await client.get(f"{server.url}/v1/admin/cache", headers=server.headers)
    stores = answer.raise_for_status().json()["data"]
    return {source: sum(store["tokens"][source] for store in stores) for source in (*SOURCES, "computed")}


def case(grown: dict[str, int]) -> str:
    """Which case a request was, by what its tokens' sources counted."""
    source = max(SOURCES, key=lambda source: grown[source])
    return SOURCES[source] if grown[source] > PREFIX_TOKENS / 2 else "cold"


async def ask(client: httpx.AsyncClient, server: Server, ids: list[int]) -> tuple[str, Sample, dict[str, int]]:
    """Send one prompt; tells the case, its times and how its tokens' sources grew."""
    before = await tokens_by_source(client, server)
    body: dict[str, object] = {"prompt": ids, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    sample = await stream(client, server, "prefix", body)
    after = await tokens_by_source(client, server)
    grown = {source: after[source] - before[source] for source in after}
    await asyncio.sleep(PAUSE_S)
    return case(grown), sample, grown


async def measure(server: Server, rounds: int) -> dict[str, list[tuple[Sample, dict[str, int]]]]:
    """All samples by case."""
    randomly = random.Random()
    samples = defaultdict(list)
    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        for _ in range(rounds):
            prefix = randomly.choices(range(1000, 40000), k=PREFIX_TOKENS)
            for _ in range(1 + REPEATS):
                ending = randomly.choices(range(1000, 40000), k=ENDING_TOKENS)
                name, sample, grown = await ask(client, server, prefix + ending)
                samples[name].append((sample, grown))
    return samples


def row(samples: list[tuple[Sample, dict[str, int]]]) -> dict[str, float]:
    """Numbers of one case: requests, errors, median TTFT and median tokens computed."""
    ttfts = [sample.ttft_s for sample, _ in samples if not sample.error]
    return {
        "requests": len(samples),
        "failed": len(samples) - len(ttfts),
        "ttft_p50_ms": round(1000 * statistics.median(ttfts), 1) if ttfts else float("nan"),
        "ttft_max_ms": round(1000 * max(ttfts), 1) if ttfts else float("nan"),
        "computed_tokens": statistics.median(grown["computed"] for _, grown in samples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3, help="prefixes, each sent five times")
    args = parser.parse_args()
    server = Server(os.environ.get("INFERCTL_URL", "http://127.0.0.1:8080"), args.model, os.environ["INFERCTL_API_KEY"])
    samples = asyncio.run(measure(server, args.rounds))
    results = {name: row(samples[name]) for name in ("cold", "same", "across") if samples.get(name)}
    columns = ("requests", "failed", "ttft_p50_ms", "ttft_max_ms", "computed_tokens")
    print(f"{'prefix':<10}" + "".join(f"{column:>17}" for column in columns))
    for name, of_case in results.items():
        print(f"{name:<10}" + "".join(f"{of_case[column]:>17.1f}" for column in columns))
    verdicts = []
    for name in ("same", "across"):
        if {name, "cold"} <= results.keys():
            ratio = results[name]["ttft_p50_ms"] / results["cold"]["ttft_p50_ms"]
            verdicts.append(
                {"what": f"TTFT {name}/cold, goal <= {GOAL}", "ratio": round(ratio, 3), "met": ratio <= GOAL}
            )
            print(f"{'met ' if ratio <= GOAL else 'MISS'} {verdicts[-1]['what']}: {ratio:.3f}")
        else:
            print(f"MISS no request was {name}: are there two prefill workers, and nobody else's requests?")
    print(json.dumps({"cases": results, "verdicts": verdicts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

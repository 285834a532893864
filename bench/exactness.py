"""Compare the cluster's tokens with those of one vLLM server.

Runs the same prompts, greedy and seeded, at concurrency 1 and 4, against a running cluster (INFERCTL_URL,
INFERCTL_API_KEY) and against vLLM's own server, and compares token ids. Only float32 can be exact: half precision is
not batch-invariant even in one engine.

    python -m bench.exactness --model-dir DIR [--prompts 50] [--tokens 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import zlib
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx

from bench.load import Server
from bench.peers import vllm_server

TEXT = Path(__file__).parent.parent / "LICENSE"
MODES = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "seed": 20250101},
}
Answers = list[list[int]]
Row = dict[str, Any]


def lengths(num: int, longest: int, shortest: int = 5) -> list[int]:
    """Prompt lengths in tokens, evenly spaced on a logarithmic scale."""
    if num == 1:
        return [longest]
    return [round(shortest * (longest / shortest) ** (i / (num - 1))) for i in range(num)]


async def tokens(client: httpx.AsyncClient, server: Server) -> list[int]:
    """Token ids of the licence's text."""
    body = {"model": server.model, "prompt": TEXT.read_text(), "add_special_tokens": False}
    response = await client.post(server.url + "/tokenize", json=body, headers=server.headers)
    return response.raise_for_status().json()["tokens"]


def prompts(text: list[int], name: str, num: int, longest: int) -> list[list[int]]:
    """Cut prompts from the text, each from another place and different for each run: no cache may answer."""
    first = zlib.crc32(name.encode())
    return [(text[(first + 37 * i) % 600 :] + text)[:n] for i, n in enumerate(lengths(num, longest))]


async def answer(client: httpx.AsyncClient, server: Server, prompt: list[int], body: dict[str, object]) -> list[int]:
    """Token ids of one completion."""
    body = {"model": server.model, "prompt": prompt, "return_token_ids": True, **body}
    response = await client.post(server.url + "/v1/completions", json=body, headers=server.headers)
    if response.status_code != httpx.codes.OK:
        raise RuntimeError(f"{len(prompt)} tokens: {response.status_code} {response.text[:300]}")
    return response.json()["choices"][0]["token_ids"]


async def answer_all(
    client: httpx.AsyncClient, server: Server, prompts: list[list[int]], body: dict[str, object], concurrency: int
) -> list[list[int]]:
    """Token ids of all prompts, at most `concurrency` at a time, in the order of the prompts."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> list[int]:
        async with gate:
            return await answer(client, server, prompt, body)

    return await asyncio.gather(*map(one, prompts))


async def run(ours: Server, peer: Server, num_prompts: int, num_tokens: int, longest: int = 1500) -> list[Row]:
    """Compare all modes at both concurrencies, in the same order, and say at once how each went."""
    rows = []
    print(f"{'mode':<12}{'prompts':>8}{'equal':>8}{'seconds':>9}{'peer':>6}  differ")
    async with httpx.AsyncClient(timeout=900) as client:
        text = await tokens(client, ours)
        for mode, params in MODES.items():
            for concurrency in (1, 4):
                name, body = f"{mode}/c{concurrency}", {"max_tokens": num_tokens, **params}
                ids = prompts(text, name, num_prompts, longest)
                got, got_s = await timed(answer_all(client, ours, ids, body, concurrency))
                expected, expected_s = await timed(answer_all(client, peer, ids, body, concurrency))
                differ = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
                equal = len(ids) - len(differ)
                rows.append({"mode": name, "prompts": len(ids), "equal": equal, "differ": differ})
                line = f"{name:<12}{len(ids):>8}{equal:>8}{got_s:>9.0f}{expected_s:>6.0f}  {differ or ''}"
                print(line, flush=True)
    return rows


async def timed(work: Awaitable[Answers]) -> tuple[Answers, float]:
    """The result, and how many seconds it took."""
    start = time.monotonic()
    return await work, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    ours = Server(os.environ.get("INFERCTL_URL", "http://127.0.0.1:8080"), args.model, os.environ["INFERCTL_API_KEY"])
    # One step for all prompts of a batch: where a seeded prompt takes several, vLLM's own CPU engine dies.
    with vllm_server(args.model_dir, args.model, "float32", threads=1, max_num_batched_tokens=8192) as peer:
        rows = asyncio.run(run(ours, peer, args.prompts, args.tokens))
    print(json.dumps(rows))
    return 0 if all(row["equal"] == row["prompts"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

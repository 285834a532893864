"""The cluster that a measurement runs on: one of its own, or one that runs already."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from tests.support.cluster import Cluster

T, R = TypeVar("T"), TypeVar("R")
# Tokens that end strings, lists and objects, and those that numbers go on with. A small model goes on for ever without
# a little help; what the grammar allows does not depend on it.
CLOSERS = ('"', '"}', "}", "]", '"]', "}}", "]}", '"]}', '"}}')
DIGITS = "0123456789"
BIAS = 10


@dataclass(frozen=True, slots=True)
class Site:
    """Where to ask. `bias`: the logit_bias that keeps answers short."""

    client: httpx.AsyncClient
    model: str
    bias: dict[str, int]

    async def ask(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        """Ask once."""
        return await self.client.post(path, json={"model": self.model, **body}, headers=headers)


def parser(about: str | None, name: str) -> argparse.ArgumentParser:
    """Make a parser with the flags that all measurements have."""
    result = argparse.ArgumentParser(prog=f"python -m tests.conformance.{name}", description=about)
    result.add_argument("--url", help="a running cluster, with its key in INFERCTL_API_KEY; default: one of our own")
    result.add_argument("--model", default="smollm2-135m", help="the model on it")
    result.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    result.add_argument("--timeout", type=float, default=300.0, help="seconds after which a request counts as a hang")
    return result


@asynccontextmanager
async def opened(chosen: argparse.Namespace) -> AsyncIterator[Site]:
    """Open the site that the flags say."""
    if chosen.url:
        async with connected(chosen, chosen.url, os.environ["INFERCTL_API_KEY"]) as site:
            yield site
        return
    options = ["--dtype", "float32"]
    async with (
        Cluster.start(engine="vllm", model=chosen.model, options=options) as cluster,
        connected(chosen, cluster.url, cluster.api_key) as site,
    ):
        yield site


@asynccontextmanager
async def connected(chosen: argparse.Namespace, url: str, key: str) -> AsyncIterator[Site]:
    """Connect, and learn the ids of the tokens that end things."""
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=chosen.concurrency)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=chosen.timeout, limits=limits, trust_env=False
    ) as client:
        bias = {}
        for text in (*CLOSERS, *DIGITS):
            tokens = {"model": chosen.model, "prompt": text, "add_special_tokens": False}
            ids = (await client.post("/tokenize", json=tokens)).raise_for_status().json()["tokens"]
            if len(ids) == 1:
                bias[str(ids[0])] = -BIAS if text in DIGITS else BIAS
        yield Site(client, chosen.model, bias)


async def for_all(items: Sequence[T], work: Callable[[T], Awaitable[R]], concurrency: int) -> list[R]:
    """Do `work` for all items, so many at a time; results are in the order of the items."""
    slots = asyncio.Semaphore(concurrency)

    async def one(item: T) -> R:
        async with slots:
            return await work(item)

    return list(await asyncio.gather(*map(one, items)))


def say(*lines: str) -> None:
    """Print."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()

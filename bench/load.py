"""A small closed-loop load generator for OpenAI-compatible servers; what the comparisons in this folder share.

Times are taken where bytes arrive, on one monotonic clock. TTFT: request sent -> first event with text. ITL: gaps
between events with text of one stream (servers here send one event per token).
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import httpx


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; times in seconds."""

    kind: str
    started_at: float
    ttft_s: float = math.nan
    itls_s: list[float] = field(default_factory=list)
    ended_at: float = math.nan
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send requests."""

    url: str
    model: str
    api_key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


async def stream(client: httpx.AsyncClient, server: Server, kind: str, body: dict[str, object]) -> Sample:
    """Send one streamed completion and time its events. Failures are part of the sample."""
    sample = Sample(kind, time.perf_counter())
    body = {"model": server.model, "stream": True, "stream_options": {"include_usage": True}, **body}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    last = None
    try:
        async with client.stream("POST", server.url + path, json=body, headers=server.headers) as response:
            if response.status_code != httpx.codes.OK:
                sample.error = f"{response.status_code} {(await response.aread())[:200]!r}"
                return sample
            async for line in response.aiter_lines():
                last = _event(sample, line, last)
    except httpx.HTTPError as error:
        sample.error = type(error).__name__
    sample.ended_at = time.perf_counter()
    return sample


def _event(sample: Sample, line: str, last: float | None) -> float | None:
    if not line.startswith("data: {"):
        return last
    event, now = json.loads(line[6:]), time.perf_counter()
    if usage := event.get("usage"):
        sample.num_prompt_tokens, sample.num_output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if "error" in event:
        sample.error = str(event["error"].get("code"))
    choice = (event.get("choices") or [{}])[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    if not text:
        return last
    sample.text += text
    if last is None:
        sample.ttft_s = now - sample.started_at
    else:
        sample.itls_s.append(now - last)
    return now


async def closed_loop(
    server: Server, kind: str, bodies: Iterable[dict[str, object]], until: Callable[[], bool]
) -> list[Sample]:
    """One client: the next request starts when the last one ended, until `until()` or the bodies end."""
    samples = []
    async with httpx.AsyncClient(timeout=600) as client:
        for body in bodies:
            if until():
                break
            samples.append(await stream(client, server, kind, body))
    return samples


async def gather(*clients: asyncio.Future[list[Sample]]) -> list[Sample]:
    """Run clients together."""
    return [sample for samples in await asyncio.gather(*clients) for sample in samples]


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (nearest rank); nan of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def busy_s(samples: Sequence[Sample]) -> float:
    """Time in which at least one request was running."""
    total, until = 0.0, -math.inf
    for sample in sorted(samples, key=lambda s: s.started_at):
        total += max(0.0, sample.ended_at - max(until, sample.started_at))
        until = max(until, sample.ended_at)
    return total


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Latencies in ms, throughput per second of the time with requests running."""
    good = [s for s in samples if not s.error]
    if not good:
        return {"requests": 0, "failed": len(samples)}
    wall = busy_s(good)
    itls = [gap for s in good for gap in s.itls_s]
    return {
        "requests": len(good),
        "failed": len(samples) - len(good),
        "ttft_p50_ms": 1e3 * statistics.median(s.ttft_s for s in good),
        "ttft_p99_ms": 1e3 * quantile([s.ttft_s for s in good], 0.99),
        "itl_p50_ms": 1e3 * quantile(itls, 0.5),
        "itl_p99_ms": 1e3 * quantile(itls, 0.99),
        "requests_s": len(good) / wall,
        "output_tok_s": sum(s.num_output_tokens for s in good) / wall,
        "total_tok_s": sum(s.num_output_tokens + s.num_prompt_tokens for s in good) / wall,
    }

"""What policy costs a request, and how fast it changes: limits in process, added TTFT, update to effect.

    python -m bench.policy [--requests 400] [--updates 40] [--outage 20] [--json FILE]

In process: authenticate a key and count a request against six limits, from a share, with nothing but this process.
The rest is measured on a local cluster of three gateways with the sim engine: the TTFT of a key without limits and of a
busy key with six, by turns in the same seconds; the time from sending a new document to its being in force on the last
gateway; requests that failed while the policy service and Redis hang; and what one budget lets through that three
gateways spend in parallel.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop

from inferflux.clock import SystemClock
from inferflux.policy.counting import Counters, Exchange, Refusal, Share
from inferflux.policy.limits import LimitsSection, compile_limits
from inferflux.process import Tasks
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, hash_secret, read_credential
from services.gateway.purse import Need
from services.gateway.reservations import settle
from services.gateway.shares import Shares
from tests.support.cluster import Cluster

CHAT = "/v1/chat/completions"
PLENTY = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "concurrent_requests": 10**4}
BUDGET = {"tokens_per_day": 10**11, "usd_per_month": 1e8}
SIX = {
    "rate_limit": {"tenants": {"limited": PLENTY}},
    "budgets": {"tenants": {"limited": BUDGET}, "prices": {"*": {"input": 1, "output": 2}}},
}
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True, "temperature": 0}
NUM_IN_PROCESS = 5_000
Headers = dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement. `goal`: what it should be below; None: there is none."""

    what: str
    p50: float
    p99: float
    unit: str
    goal: float | None = None

    def __str__(self) -> str:
        verdict = "" if self.goal is None else f"  goal {self.goal:g}: {'met' if self.p99 <= self.goal else 'MISSED'}"
        return f"{self.what:58} p50 {self.p50:9.3f}  p99 {self.p99:9.3f} {self.unit}{verdict}"


async def in_process() -> Result:
    """Authenticate, count and settle in this process; in CPU time, which neighbours on the machine do not change."""
    pepper, secret, counters, clock = b"p" * 32, b"a-key-of-the-bench", Counters(), SystemClock()
    limits = compile_limits(LimitsSection.model_validate({**SIX, "rate_limit": {"defaults": {"tenant": PLENTY}}}))
    digest = hash_secret(pepper, secret)
    ring = KeyRing(1, {digest: Key(digest, Principal("key_1", "limited", frozenset()))})
    auth = Authenticator(pepper, lambda: ring)
    assert limits is not None

    async def exchange(message: Exchange) -> list[Share] | Refusal:
        return counters.exchange(clock.time(), message)

    times = []
    async with Tasks() as tasks:
        shares = Shares(exchange, "gateway-0", clock, tasks)
        tasks.spawn(shares.run(), "shares")
        for _ in range(NUM_IN_PROCESS):
            started_at = time.thread_time()
            principal = auth.authenticate(read_credential({b"authorization": b"Bearer " + secret}))
            needs = [Need(limit, 1) for limit in limits.of(principal.tenant, "", principal.key_id)]
            pieces = await shares.take(principal.tenant, needs, limits)
            settle(shares.account(principal.tenant), needs, pieces, {need.limit: 1 for need in needs})
            times.append(1000 * (time.thread_time() - started_at))
            await asyncio.sleep(0)
    return summary("key and limits, in process (CPU time)", times, "ms", goal=1.0)


class Bench:
    """A cluster and clients of its gateways."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.clients = [httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) for url in cluster.urls]
        self.admin = cluster.headers

    async def apply(self, limits: dict[str, Any]) -> int:
        """Put limits in force; returns the revision."""
        body = {"document": {"limits": limits}}
        answer = await self.clients[0].put("/v1/admin/policy", json=body, headers=self.admin)
        return int(answer.raise_for_status().json()["revision"])

    async def key(self, tenant: str) -> Headers:
        """Make a key that all gateways know."""
        body = {"name": "bench", "scopes": ["generate"], "tenant": tenant}
        made = (await self.clients[0].post("/v1/admin/api_keys", json=body, headers=self.admin)).raise_for_status()
        await self.reached(made.json()["revision"])
        return {"authorization": f"Bearer {made.json()['secret']}"}

    async def reached(self, revision: int) -> float:
        """Wait until all gateways use a revision; returns when the last one did."""
        return max(await asyncio.gather(*(self._reached(client, revision) for client in self.clients)))

    async def _reached(self, client: httpx.AsyncClient, revision: int) -> float:
        while int((await client.get("/livez")).headers["x-inferflux-policy-rev"]) < revision:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.002)
        return time.perf_counter()

    async def ttft(self, client: httpx.AsyncClient, headers: Headers) -> float:
        """Time from the request to the first data, in milliseconds."""
        started_at = time.perf_counter()
        async with client.stream("POST", CHAT, json=BODY, headers=headers) as stream:
            assert stream.status_code == 200, await stream.aread()
            lines = stream.aiter_lines()
            await anext(lines)
            first_ms = 1000 * (time.perf_counter() - started_at)
            async for _ in lines:
                pass
        return first_ms

    async def added_ttft(self, num_requests: int) -> list[Result]:
        """Compare a key with limits to one without."""
        await self.reached(await self.apply(SIX))
        free, limited = await self.key("free"), await self.key("limited")
        times: dict[str, list[float]] = {"free": [], "limited": []}
        for n in range(num_requests + 20):
            client = self.clients[n % len(self.clients)]
            order = (("free", free), ("limited", limited))
            for name, headers in order if n % 2 else order[::-1]:
                times[name].append(await self.ttft(client, headers))
        kept = {name: sorted(values[20:]) for name, values in times.items()}
        results = [summary(f"TTFT of a key: {name}", values, "ms") for name, values in kept.items()]
        added = [percentile(kept["limited"], p) - percentile(kept["free"], p) for p in (50, 99)]
        return [*results, Result("added TTFT (difference of the percentiles)", added[0], added[1], "ms", goal=2.0)]

    async def update_to_effect(self, num_updates: int) -> Result:
        """Time from sending a document to the last gateway's using it."""
        times = []
        for n in range(num_updates):
            before = int((await self.clients[0].get("/livez")).headers["x-inferflux-policy-rev"])
            started_at = time.perf_counter()
            watching = asyncio.create_task(self.reached(before + 1))
            await self.apply({"rate_limit": {"tenants": {"other": {"requests_per_minute": n + 1}}}})
            times.append(1000 * (await watching - started_at))
        return summary("update to effect, 3 gateways", times, "ms", goal=250.0)

    async def outage(self, seconds: float) -> Result:
        """Count what fails while nobody counts."""
        await self.reached(await self.apply(SIX))
        headers, failed, total = await self.key("limited"), 0, 0
        stopped = [self.cluster.kill(role, signum=signal.SIGSTOP) for role in ("policy", "redis")]
        try:
            ends_at = time.perf_counter() + seconds
            while time.perf_counter() < ends_at:
                asking = (client.post(CHAT, json=BODY, headers=headers) for client in self.clients)
                answers = await asyncio.gather(*asking)
                failed += sum(answer.status_code != 200 for answer in answers)
                total += len(answers)
        finally:
            for process in stopped:
                self.cluster.kill(process["role"], signum=signal.SIGCONT)
        return Result(f"failed of {total} requests in an outage of {seconds:g} s", failed, failed, "requests", goal=0)

    async def overshoot(self, budget: int) -> Result:
        """Spend one budget through all gateways at once."""
        limits = {"budgets": {"tenants": {"shared": {"tokens_per_day": budget}}}, "when_store_is_away": "fail_closed"}
        await self.reached(await self.apply(limits))
        headers, used = await self.key("shared"), []

        async def spend(client: httpx.AsyncClient) -> None:
            while True:
                answer = await client.post(CHAT, json=BODY | {"stream": False}, headers=headers)
                if answer.status_code == 429:
                    return
                if answer.status_code == 200:
                    used.append(answer.json()["usage"]["total_tokens"])

        await asyncio.gather(*(spend(client) for client in self.clients for _ in range(8)))
        over = max(0.0, (sum(used) - budget) / max(used))
        return Result(f"overshoot: {sum(used)} of {budget} tokens", over, over, "requests", goal=1)

    async def close(self) -> None:
        """Close all clients."""
        for client in self.clients:
            await client.aclose()


async def on_cluster(arguments: argparse.Namespace) -> list[Result]:
    """Measure what takes a cluster."""
    with Cluster.start(gateways=3) as cluster:
        bench = Bench(cluster)
        try:
            results = await bench.added_ttft(arguments.requests)
            results.append(await bench.update_to_effect(arguments.updates))
            results.append(await bench.overshoot(2000))
            results.append(await bench.outage(arguments.outage))
        finally:
            await bench.close()
    return results


def summary(what: str, times: Sequence[float], unit: str, goal: float | None = None) -> Result:
    """Give the percentiles of many measurements."""
    ordered = sorted(times)
    return Result(what, percentile(ordered, 50), percentile(ordered, 99), unit, goal)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted numbers."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def main() -> int:
    """Run everything; fails if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400, help="per key")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--outage", type=float, default=20.0, help="seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = [uvloop.run(in_process()), *uvloop.run(on_cluster(arguments))]
    sys.stdout.write("\n".join(map(str, results)) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2), encoding="utf-8")
    return int(any(result.goal is not None and result.p99 > result.goal for result in results))


if __name__ == "__main__":
    sys.exit(main())

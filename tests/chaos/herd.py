"""A thousand clients lose all decode workers and get them back: the cluster must come back as fast as they do.

    python -m tests.chaos.herd [--clients 1000] [--outage 5]

Clients ask, think, and ask again; who is refused comes back when Retry-After says. Passes when each is refused or
answered (nothing hangs, nothing is cut), when 90% of the requests per second of before are answered within 10 s of
the worker's return, and when it stays so for as long again: a herd that comes back at once must not knock it over.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.support.cluster import Cluster

THINK_S = 10.0
CALM_S, WINDOW_S = 15.0, 10.0
GOAL = 0.9
NUM_TOKENS = 8
ANSWER_S = 30.0


@dataclass(slots=True)
class Herd:
    """All clients. `answered`: when each good answer was complete; `refused`, `broken`: how often, by what was said."""

    cluster: Cluster
    http: httpx.AsyncClient
    rng: random.Random
    answered: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    async def client(self, number: int) -> None:
        """Ask for ever."""
        await asyncio.sleep(self.rng.uniform(0, THINK_S))
        while True:
            wait_s = await self.ask(f"client {number} asks at {time.monotonic()}")
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * THINK_S if wait_s is None else wait_s)

    async def ask(self, text: str) -> float | None:
        """Send one request; returns the seconds after which to come back if it was refused."""
        body = {"model": self.cluster.model, "prompt": text, "max_tokens": NUM_TOKENS}
        try:
            response = await self.http.post("/v1/completions", json=body)
        except httpx.HTTPError as e:
            self.broken[type(e).__name__] += 1
            return 1.0
        if response.status_code == httpx.codes.OK:
            self.answered.append(time.monotonic())
            return None
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE or "retry-after" not in response.headers:
            self.broken[f"{response.status_code} {response.text[:80]}"] += 1
            return 1.0
        self.refused[response.json()["error"]["code"]] += 1
        return float(response.headers["retry-after"])

    def rate(self, begin: float, seconds: float) -> float:
        """Good answers per second in a stretch of time."""
        return sum(begin <= at < begin + seconds for at in self.answered) / seconds


async def run(num_clients: int, outage_s: float) -> int:
    """Run it; returns the exit status."""
    with Cluster.start(engine="sim") as cluster:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=cluster.url, headers=cluster.headers, timeout=ANSWER_S, limits=limits, trust_env=False
        ) as http:
            herd = Herd(cluster, http, random.Random(1))
            clients = [asyncio.ensure_future(herd.client(n)) for n in range(num_clients)]
            try:
                return await judge(herd, outage_s)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)


async def judge(herd: Herd, outage_s: float) -> int:
    """Let the clients be, take their workers away, give them back, and look."""
    await asyncio.sleep(THINK_S + CALM_S)
    calm = herd.rate(time.monotonic() - CALM_S, CALM_S)
    gone_at = time.monotonic()
    while time.monotonic() < gone_at + outage_s:
        if (pid := herd.cluster.pids.get("decode-0")) is not None:
            herd.cluster.kill("decode")
            await until(lambda: herd.cluster.pids.get("decode-0") != pid)
        await asyncio.sleep(0.1)
    back_at = await first_answer(herd, time.monotonic())
    await asyncio.sleep(2 * WINDOW_S)
    windows = [herd.rate(back_at + second, 1.0) for second in range(int(2 * WINDOW_S))]
    soon, later = herd.rate(back_at, WINDOW_S) / calm, herd.rate(back_at + WINDOW_S, WINDOW_S) / calm
    sys.stdout.write(
        f"calm              {calm:.1f} answers/s of {len(herd.answered)} in all\n"
        f"without workers   {back_at - gone_at:.1f} s, refused {dict(herd.refused)}\n"
        f"back, by second   {' '.join(f'{rate:.0f}' for rate in windows)}\n"
        f"first {WINDOW_S:.0f} s        {soon:.2f} of calm (goal {GOAL}); next {WINDOW_S:.0f} s: {later:.2f}\n"
        f"broken            {dict(herd.broken) or 'none'}\n"
    )
    return 0 if not herd.broken and soon >= GOAL and later >= GOAL else 1


async def first_answer(herd: Herd, after: float) -> float:
    """Wait for the first good answer since a time; returns when it was."""
    await until(lambda: herd.answered[-1] > after)
    return next(at for at in herd.answered if at > after)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


def main() -> int:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--outage", type=float, default=5.0, help="seconds in which each decode worker is killed")
    args = parser.parse_args()
    return asyncio.run(run(args.clients, args.outage))


if __name__ == "__main__":
    sys.exit(main())

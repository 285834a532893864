"""The clients: send what was drawn at its time, whoever is slow, and write down exactly what came back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import httpx

from tests.chaos.transcript import Transcript, of_document, of_stream
from tests.chaos.workload import Ask

ANSWER_S = 60.0
"""No request may take longer: a client that hears nothing for ever is the worst of all outcomes."""
RETRY_S = 0.05


class Verdict(StrEnum):
    """How a request ended for its client; each ends in exactly one of these."""

    OK = "ok"
    ERROR = "error"  # a status
    ERROR_EVENT = "error event"
    TRUNCATED = "truncated"  # an end that is none: no error, no last event
    RESET = "reset"  # the gateway's connection broke
    TIMEOUT = "timeout"
    LEFT = "left"  # the client itself hung up


@dataclass(slots=True)
class Outcome:
    """One attempt of one request. `arrivals`: when each piece of the body came, in time.monotonic."""

    ask: Ask
    gateway: int
    sent_at: float
    verdict: Verdict = Verdict.TIMEOUT
    status: int = 0
    request_id: str = ""
    detail: str = ""
    transcript: Transcript = field(default_factory=Transcript)
    arrivals: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    earlier: Outcome | None = None

    @property
    def longest_gap_s(self) -> float:
        """Longest time between two pieces of a stream."""
        return max((b - a for a, b in pairwise(self.arrivals)), default=0.0)

    @property
    def num_attempts(self) -> int:
        return 1 + (self.earlier.num_attempts if self.earlier else 0)


class Clients:
    """Many clients of a few gateways. `keys`: one per tenant."""

    def __init__(self, urls: Sequence[str], keys: Sequence[str]) -> None:
        self._urls = urls
        self._keys = keys
        # Each request has a connection of its own: one that another request left behind may be a dead gateway's.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(ANSWER_S), limits=limits, trust_env=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(self, ask: Ask, gateway: int, *, leave_after_s: float | None = None) -> Outcome:
        """Send one request; if its gateway is lost, once more to the next one. Never raises."""
        outcome = await self._attempt(ask, gateway, leave_after_s)
        deadline = time.monotonic() + ANSWER_S
        while outcome.verdict is Verdict.RESET and len(self._urls) > 1 and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_S)
            earlier, outcome = outcome, await self._attempt(ask, outcome.gateway + 1, leave_after_s)
            outcome.earlier = earlier
        return outcome

    async def _attempt(self, ask: Ask, gateway: int, leave_after_s: float | None) -> Outcome:
        gateway %= len(self._urls)
        outcome = Outcome(ask, gateway, time.monotonic())
        data = bytearray()
        try:
            async with asyncio.timeout(leave_after_s or ANSWER_S):
                await self._exchange(outcome, data)
        except TimeoutError:
            outcome.verdict = Verdict.LEFT if leave_after_s else Verdict.TIMEOUT
        except httpx.HTTPError as e:
            outcome.verdict, outcome.detail = Verdict.RESET, type(e).__name__
        outcome.ended_at = time.monotonic()
        _judge(outcome, bytes(data))
        return outcome

    async def _exchange(self, outcome: Outcome, data: bytearray) -> None:
        ask = outcome.ask
        headers = {"authorization": f"Bearer {self._keys[ask.tenant]}"}
        url = self._urls[outcome.gateway] + ask.path
        async with self._http.stream("POST", url, json=ask.body, headers=headers) as response:
            outcome.status, outcome.request_id = response.status_code, response.headers.get("x-request-id", "")
            async for piece in response.aiter_raw():
                outcome.arrivals.append(time.monotonic())
                data += piece
        outcome.verdict = Verdict.OK


def _judge(outcome: Outcome, data: bytes) -> None:
    """Read what came; what looks like an answer may be an error."""
    if outcome.status >= 400:
        if outcome.verdict is Verdict.OK:
            outcome.verdict, outcome.detail = Verdict.ERROR, data[:300].decode(errors="replace")
        return
    if outcome.ask.is_streamed:
        outcome.transcript = of_stream(data) if outcome.verdict is Verdict.OK else of_stream(_whole_events(data))
    elif outcome.verdict is Verdict.OK:
        outcome.transcript = of_document(data)
    if outcome.verdict is Verdict.OK and outcome.transcript.error is not None:
        outcome.verdict, outcome.detail = Verdict.ERROR_EVENT, outcome.transcript.error
    elif outcome.verdict is Verdict.OK and not outcome.transcript.is_complete:
        outcome.verdict = Verdict.TRUNCATED


def _whole_events(data: bytes) -> bytes:
    return data[: data.rfind(b"\n\n") + 2] if b"\n\n" in data else b""


async def send_all(
    clients: Clients, asks: Sequence[Ask], rng: random.Random, over_s: float, leaves: dict[int, float]
) -> list[asyncio.Task[Outcome]]:
    """Start each request at its own time within `over_s`, not waiting for any; `leaves`: who hangs up, and when."""
    times = sorted(rng.uniform(0, over_s) for _ in asks)
    gateways = [rng.randrange(len(clients._urls)) for _ in asks]

    async def one(ask: Ask, at_s: float, gateway: int) -> Outcome:
        await asyncio.sleep(at_s)
        return await clients.ask(ask, gateway, leave_after_s=leaves.get(ask.number))

    return [
        asyncio.create_task(one(a, t, g), name=f"ask-{a.number}") for a, t, g in zip(asks, times, gateways, strict=True)
    ]

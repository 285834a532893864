"""The counters of all limits, in Redis: one script reads, decides and writes what one exchange is about.

Layout: `ifx:{limits.<tenant>}:<scope>:<owner>:<kind>` a hash of entries; `ifx:{limits.<tenant>}:batch:<id>` exists
while a batch of bookings might be sent again. All of a tenant lies on one node of a Redis cluster. All keys expire.

What a budget had when this service last saw it is put back if Redis has lost it. Every failure of Redis, slow answers
included, is Unavailable: what failed so may still have happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inferflux.policy.counting import (
    SHARE_DIVISOR,
    Ask,
    Booking,
    Exchange,
    Refusal,
    Share,
    counts_until,
    share_slot,
    slot_at,
)
from inferflux.policy.limits import Kind, Name, Scope, Span
from inferflux.store import ANSWER_TIMEOUT_S, RedisStore
from inferflux.telemetry import metrics

MAX_CONNECTIONS = 32
SCAN_COUNT = 500
MAX_COUNTERS = 10_000
MAX_SEEN = 100_000
_SCRIPT = Path(__file__).with_name("limits.lua")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a counter has now."""

    name: Name
    used: int
    reset_s: float


class LimitsStore(RedisStore):
    """Counters in Redis; connects on demand. Safe to use concurrently. Raises ConfigError for a URL that is none."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "limits", MAX_CONNECTIONS)
        self._seen: dict[str, Booking] = {}
        self._script = self._redis.register_script(_SCRIPT.read_text(encoding="utf-8"))

    async def exchange(self, now_s: float, exchange: Exchange) -> list[Share] | Refusal:
        """Book, then give what is asked, all or nothing; see Counters.exchange. Raises Unavailable."""
        tenant, asks = exchange.tenant, exchange.asks
        names = [*(booking.name for booking in exchange.bookings), *(ask.name for ask in asks)]
        seen = {counter: self._seen[counter] for name in names if (counter := _counter(tenant, name)) in self._seen}
        bookings = [(booking, "lost") for booking in seen.values()]
        bookings += [(booking, _how(booking)) for booking in exchange.bookings]
        counters = [*(booking.name for booking, _ in bookings), *(ask.name for ask in asks)]
        keys = [_key(tenant, f"batch:{exchange.batch_id}"), *(_counter(tenant, name) for name in counters)]
        arguments: list[str | int] = [int(now_s * 1000), int(bool(exchange.batch_id))]
        arguments += [len(bookings), len(asks), SHARE_DIVISOR]
        for booking, how in bookings:
            arguments += [*_booking(booking, exchange.holder, now_s), how]
        for ask in asks:
            arguments += _ask(ask, exchange.holder, now_s)
        with self._answering(), metrics.STORE_SECONDS.labels("limits").time():
            answer = _answer([int(number) for number in await self._script(keys, arguments)], asks, now_s)
        if not isinstance(answer, Refusal):
            self._see(tenant, asks, answer)
        return answer

    async def usage(self, now_s: float, tenant: str = "") -> list[Usage]:
        """Read all counters of a tenant, or of all (empty), at most MAX_COUNTERS. Raises Unavailable."""
        with self._answering():
            async with asyncio.timeout(5 * ANSWER_TIMEOUT_S):
                found = [usage async for usage in self._usages(now_s, tenant or "*")]
        return sorted(found, key=lambda usage: (usage.name.scope, usage.name.owner, usage.name.kind))

    def _see(self, tenant: str, asks: Sequence[Ask], shares: Sequence[Share]) -> None:
        """Remember what budgets have: they are worth more than a minute."""
        if len(self._seen) > MAX_SEEN:
            self._seen.clear()
        for ask, share in zip(asks, shares, strict=True):
            if ask.name.kind.span in (Span.DAY, Span.MONTH):
                self._seen[_counter(tenant, ask.name)] = Booking(ask.name, share.slot, share.used)

    async def _usages(self, now_s: float, tenant: str) -> AsyncIterator[Usage]:
        num_left = MAX_COUNTERS
        async for key in self._redis.scan_iter(match=f"ifx:{{limits.{tenant}}}:*:*:*", count=SCAN_COUNT):
            name = _name(key)
            if name is not None and num_left > 0:
                num_left -= 1
                entries = [_entry(text) for text in (await self._redis.hgetall(key)).values()]
                live = [(amount, until_s) for amount, until_s in entries if until_s > now_s]
                if live:
                    yield Usage(name, sum(amount for amount, _ in live), max(until_s for _, until_s in live) - now_s)


def _key(tenant: str, name: str) -> str:
    return f"ifx:{{limits.{tenant}}}:{name}"


def _counter(tenant: str, name: Name) -> str:
    return _key(tenant, f"{name.scope}:{name.owner}:{name.kind}")


def _name(key: str) -> Name | None:
    """Read the name of a counter; owners may have colons. None: another key of ours."""
    scope, _, rest = key.partition("}:")[2].partition(":")
    owner, _, kind = rest.rpartition(":")
    try:
        return Name(Scope(scope), owner, Kind(kind))
    except ValueError:
        return None


def _entry(text: str) -> tuple[int, float]:
    amount, _, until_ms = text.partition(" ")
    return (int(amount), int(until_ms) / 1000) if amount.isdecimal() and until_ms.isdecimal() else (0, 0.0)


def _how(booking: Booking) -> str:
    return "instead" if booking.name.kind.span is Span.RUNNING else "add"


def _booking(booking: Booking, holder: str, now_s: float) -> list[str | int]:
    span = booking.name.kind.span
    entry = holder if span is Span.RUNNING else str(booking.slot)
    return [entry, booking.amount, 1000 * counts_until(span, booking.slot, now_s)]


def _ask(ask: Ask, holder: str, now_s: float) -> list[str | int]:
    span = ask.name.kind.span
    slot = slot_at(span, now_s)
    extra_slot = share_slot(span, slot)
    arguments: list[str | int] = [ask.most, ask.need, ask.want]
    for number in (slot, extra_slot):
        entry = holder if span is Span.RUNNING else str(number)
        arguments += [entry, 1000 * counts_until(span, number, now_s)]
    return arguments


def _answer(numbers: list[int], asks: Sequence[Ask], now_s: float) -> list[Share] | Refusal:
    if numbers[0]:
        index, wait_ms, used, reset_ms = numbers
        return Refusal(index - 1, wait_ms / 1000, used, reset_ms / 1000)
    shares = []
    for ask, at in zip(asks, range(1, len(numbers), 3), strict=True):
        used, extra, reset_ms = numbers[at : at + 3]
        slot = slot_at(ask.name.kind.span, now_s)
        shares.append(Share(used, extra, slot, share_slot(ask.name.kind.span, slot), reset_ms / 1000))
    return shares

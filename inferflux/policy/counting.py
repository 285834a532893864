"""How limits are counted: a sliding window of seconds, calendar days and months, and requests that run.

A counter is a set of entries, each with an amount and the instant until which it counts. A request is let through when
all that counts, and its own need, is not more than the limit: so no 60 seconds ever have more than a minute's limit,
which a bucket that refills (GCRA) does not promise, and how long to wait is read off the entries. What was reserved is
booked back into the entry it came from.

A gateway reserves what a request needs, and with it a little more: its share, so that the next request needs no call.
A share is part of what counts from the moment it is given, and good for `SHARE_S`. It is an eighth of what is left at
most: near the limit there are none, and every request is counted by itself.

`Counters` is the algorithm without a store: what gateways count with while the store is away, and what the script that
runs in the store (services/policy/limits.lua) is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import MAXYEAR, UTC, datetime

from inferflux.policy.limits import Name, Span

WINDOW_S = 60
SHARE_S = 1
"""How long a share is good for."""
SHARE_DIVISOR = 8
"""A share is at most this part of what is left."""
HOLD_S = 15
"""How long the requests of a gateway count that says nothing."""
DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Booking:
    """A change of an entry: `amount` more (less when negative) of its slot; of RUNNING: all that its holder has."""

    name: Name
    slot: int
    amount: int


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a counter: `need` or nothing, and up to `want` in all."""

    name: Name
    most: int
    need: int
    want: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a gateway, the holder, says and asks about a tenant. A batch counts once, even if it comes twice.

    `batch_id` empty: there is nothing to book, or it does not matter how often.
    """

    tenant: str
    holder: str
    batch_id: str = ""
    bookings: Sequence[Booking] = ()
    asks: Sequence[Ask] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """What was given: all that was needed, from `slot`, and `extra`, from `extra_slot`. `used` includes both."""

    used: int
    extra: int
    slot: int
    extra_slot: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which ask was refused, by its index, and when it may be asked again."""

    index: int
    wait_s: float
    used: int
    reset_s: float


def slot_at(span: Span, now_s: float) -> int:
    """Number the entry that counts what is spent now; of RUNNING there is one per holder, without a number."""
    match span:
        case Span.MINUTE:
            return math.ceil(now_s)
        case Span.DAY:
            return int(now_s // DAY_S)
        case Span.MONTH:
            date = datetime.fromtimestamp(now_s, UTC)
            return date.year * 12 + date.month - 1
        case Span.RUNNING:
            return 0


def share_slot(span: Span, slot: int) -> int:
    """Number the entry of a share that is given at `slot`: it counts as if it was spent at its last moment."""
    return slot + SHARE_S if span is Span.MINUTE else slot


def counts_until(span: Span, slot: int, now_s: float) -> int:
    """Say until when an entry counts, in Unix seconds."""
    match span:
        case Span.MINUTE:
            return slot + WINDOW_S
        case Span.DAY:
            return (slot + 1) * DAY_S
        case Span.MONTH:
            is_date = 1970 <= (slot + 1) // 12 <= MAXYEAR
            return int(datetime((slot + 1) // 12, (slot + 1) % 12 + 1, 1, tzinfo=UTC).timestamp()) if is_date else 0
        case Span.RUNNING:
            return math.ceil(now_s) + HOLD_S


@dataclass(slots=True)
class Entry:
    """One amount, and until when it counts."""

    amount: int
    until: int


@dataclass(slots=True)
class Counters:
    """All counters of one tenant."""

    entries: dict[Name, dict[str, Entry]] = field(default_factory=dict)
    _batches: set[str] = field(default_factory=set)

    def exchange(self, now_s: float, exchange: Exchange) -> list[Share] | Refusal:
        """Book, then give what is asked, all or nothing."""
        is_new = exchange.batch_id not in self._batches
        self._batches |= {exchange.batch_id} - {""}
        for booking in exchange.bookings:
            if is_new or booking.name.kind.span is Span.RUNNING:
                self.book(now_s, exchange.holder, booking)
        for index, ask in enumerate(exchange.asks):
            if self.used(ask.name, now_s) + ask.need > ask.most:
                return self._refusal(now_s, index, ask)
        return [self._give(now_s, exchange.holder, ask) for ask in exchange.asks]

    def used(self, name: Name, now_s: float) -> int:
        """Add up what counts now."""
        return sum(entry.amount for entry in self._live(name, now_s).values())

    def reset_s(self, name: Name, now_s: float) -> float:
        """Say when nothing that counts now will count any more."""
        return max((entry.until - now_s for entry in self._live(name, now_s).values() if entry.amount), default=0.0)

    def book(self, now_s: float, holder: str, booking: Booking) -> None:
        """Change one entry. It is never less than nothing."""
        span = booking.name.kind.span
        until = counts_until(span, booking.slot, now_s)
        if until <= now_s:
            return
        entries = self._live(booking.name, now_s)
        entry_id = holder if span is Span.RUNNING else str(booking.slot)
        before = entries[entry_id].amount if entry_id in entries and span is not Span.RUNNING else 0
        entries.pop(entry_id, None)
        if before + booking.amount > 0:
            entries[entry_id] = Entry(before + booking.amount, until)

    def _give(self, now_s: float, holder: str, ask: Ask) -> Share:
        span, name = ask.name.kind.span, ask.name
        left = ask.most - self.used(name, now_s) - ask.need
        extra = max(0, min(ask.want - ask.need, left // SHARE_DIVISOR))
        slot = slot_at(span, now_s)
        for at, amount in ((slot, ask.need), (share_slot(span, slot), extra)):
            held = self._held(name, holder, now_s) if span is Span.RUNNING else 0
            self.book(now_s, holder, Booking(name, at, held + amount))
        return Share(self.used(name, now_s), extra, slot, share_slot(span, slot), self.reset_s(name, now_s))

    def _held(self, name: Name, holder: str, now_s: float) -> int:
        entry = self._live(name, now_s).get(holder)
        return entry.amount if entry is not None else 0

    def _refusal(self, now_s: float, index: int, ask: Ask) -> Refusal:
        used, wait_s = self.used(ask.name, now_s), 0.0
        excess = used + ask.need - ask.most
        for entry in sorted(self._live(ask.name, now_s).values(), key=lambda entry: entry.until):
            excess, wait_s = excess - entry.amount, entry.until - now_s
            if excess <= 0:
                break
        return Refusal(index, wait_s, used, self.reset_s(ask.name, now_s))

    def _live(self, name: Name, now_s: float) -> dict[str, Entry]:
        live = {i: entry for i, entry in self.entries.get(name, {}).items() if entry.until > now_s}
        self.entries[name] = live
        return live

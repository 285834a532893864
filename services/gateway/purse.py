"""What this gateway has of one tenant's limits: shares it may spend at once, and what it has yet to book.

Everything here is memory and arithmetic, without waiting; `services/gateway/shares.py` talks to the store. Instants are
in monotonic time unless they say otherwise.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from inferflux.clock import Clock
from inferflux.errors import BudgetExhausted, ConcurrencyLimited, LimitExceeded, RateLimited
from inferflux.policy.counting import (
    HOLD_S,
    SHARE_DIVISOR,
    SHARE_S,
    Ask,
    Booking,
    Counters,
    Exchange,
    Refusal,
    Share,
    counts_until,
    slot_at,
)
from inferflux.policy.limits import MICRO, Limit, Name, Span, Unit

MAX_REFUSAL_S = 0.25
"""How long a refusal is believed without asking again; it spares the store those who do not wait."""
SLOT_RETRY_S = 1.0
IDLE_S = 2.0 * SHARE_S
HEARTBEAT_S = HOLD_S / 3
MAX_BATCH = 1000
MERGE_S = 0.1
MIN_BUSY = 1.5
_ERRORS: dict[Span, type[LimitExceeded]] = {
    Span.MINUTE: RateLimited,
    Span.DAY: BudgetExhausted,
    Span.MONTH: BudgetExhausted,
    Span.RUNNING: ConcurrencyLimited,
}


@dataclass(frozen=True, slots=True)
class Need:
    """What one request takes of one limit."""

    limit: Limit
    amount: int

    @property
    def name(self) -> Name:
        """Return its counter."""
        return self.limit.name


@dataclass(slots=True)
class Grant:
    """A part of a share: its entry in the store, and until when it may be spent."""

    slot: int
    amount: int
    until: float


@dataclass(frozen=True, slots=True)
class Piece:
    """What a request has taken of a grant. `is_away`: counted by this gateway alone."""

    purse: Purse
    slot: int
    amount: int
    until: float
    is_away: bool = False


@dataclass(slots=True)
class Lately:
    """A sum that forgets: what was added a share's life ago counts for a third of what is added now."""

    _value: float = 0.0
    _at: float = 0.0

    def add(self, amount: float, now: float) -> None:
        """Add to the sum."""
        self._value, self._at = self.sum(now) + amount, now

    def sum(self, now: float) -> float:
        """Return what is left of it."""
        return self._value * math.exp((self._at - now) / SHARE_S) if self._value else 0.0


@dataclass(slots=True)
class Purse:
    """This gateway's part of one counter.

    `left`: in the store, when it last answered an ask, at `asked_at`. `spent`: lately, by `num_spent` requests.
    `refused_need` is not to be had before `refused_until`. For counters of requests that run: `in_use` are ours, and
    `told` is what the store has heard of them, at `told_at`; -1: nobody knows.
    """

    name: Name
    grants: list[Grant] = field(default_factory=list)
    left: int = 0
    reset_at: float = 0.0
    spent: Lately = field(default_factory=Lately)
    num_spent: Lately = field(default_factory=Lately)
    asked_at: float = 0.0
    in_use: int = 0
    told: int = 0
    told_at: float = 0.0
    refusal: Refusal | None = None
    refused_need: int = 0
    refused_until: float = 0.0
    is_running: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_running = self.name.kind.span is Span.RUNNING

    def available(self, now: float) -> int:
        """Add up what may be spent now."""
        return sum(grant.amount for grant in self.grants if grant.until > now)

    def take(self, amount: int, now: float) -> list[Piece]:
        """Spend what is available; the oldest first."""
        pieces, rest = [], amount
        for grant in self.grants:
            part = min(rest, grant.amount) if grant.until > now else 0
            if part:
                grant.amount -= part
                rest -= part
                pieces.append(Piece(self, grant.slot, part, grant.until))
        self.grants = [grant for grant in self.grants if grant.amount]
        self.spent.add(amount, now)
        self.num_spent.add(1, now)
        self.in_use += amount if self.is_running else 0
        return pieces

    def put(self, slot: int, amount: int, until: float) -> None:
        """Take in what may be spent; with what is there already, if that is over at about the same time."""
        last = self.grants[-1] if self.grants else None
        if last is not None and last.slot == slot and 0 <= until - last.until < MERGE_S:
            last.amount += amount
        else:
            self.grants.append(Grant(slot, amount, until))

    def expire(self, now: float) -> Iterator[Grant]:
        """Give up grants that may not be spent any more."""
        for grant in self.grants:
            if grant.until <= now:
                yield grant
        self.grants = [grant for grant in self.grants if grant.until > now]

    def demand(self, now: float) -> int:
        """Guess what will be spent while the next share is good: as much as lately. Places are used again and again."""
        spent = round(self.spent.sum(now))
        return min(spent, self.in_use) if self.is_running else spent

    def is_low(self, now: float) -> bool:
        """Whether the share should be renewed before it is spent; a request now and then is not worth one."""
        is_worth_it = self.num_spent.sum(now) > MIN_BUSY and self.left >= SHARE_DIVISOR
        return is_worth_it and self.available(now) * 2 < self.demand(now)

    def held(self, now: float) -> int:
        """Count the places for requests that run: those in use, and those kept for a moment."""
        return self.in_use + self.available(now)

    def is_untold(self, now: float) -> bool:
        """Whether the store must hear how many places this gateway has: they are others, or it forgets them soon."""
        is_silent = self.in_use > 0 and now - self.told_at > HEARTBEAT_S
        return self.is_running and (is_silent or self.told != self.held(now))

    def is_idle(self, now: float) -> bool:
        """Whether nothing would be lost with it."""
        is_empty = not (self.grants or self.in_use or (self.told and self.is_running))
        return is_empty and now - self.asked_at > IDLE_S

    def refuse(self, need: int, refusal: Refusal, now: float) -> None:
        """Remember that the store refused."""
        self.refusal, self.refused_need = refusal, need
        self.refused_until = now + min(refusal.wait_s, MAX_REFUSAL_S)
        self.reset_at = now + refusal.reset_s


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of a limit, and when all of it will be there again."""

    most: int
    remaining: int
    reset_s: float


class Account:
    """All of one tenant. `outbox`: changes of entries, not booked yet; `away`: what was counted without the store."""

    def __init__(self, tenant: str, holder: str, clock: Clock) -> None:
        self.tenant = tenant
        self.purses: dict[Name, Purse] = {}
        self.outbox: dict[tuple[Name, int], int] = {}
        self.away = Counters()
        self._holder = holder
        self._clock = clock
        self._batch: tuple[str, tuple[Booking, ...]] = ("", ())

    def purse(self, name: Name) -> Purse:
        """Return the purse of a counter."""
        if name not in self.purses:
            self.purses[name] = Purse(name)
        return self.purses[name]

    def take(self, needs: Sequence[Need]) -> list[Piece] | None:
        """Take all needs from the shares, or nothing."""
        now = self._clock.monotonic()
        if any(self.purse(need.name).available(now) < need.amount for need in needs):
            return None
        return [piece for need in needs for piece in self.purse(need.name).take(need.amount, now)]

    def refusal(self, needs: Sequence[Need]) -> LimitExceeded | None:
        """Return the error of a refusal that is still fresh."""
        now = self._clock.monotonic()
        for need in needs:
            purse = self.purse(need.name)
            if purse.refusal is not None and now < purse.refused_until and need.amount >= purse.refused_need:
                return error_of(need, purse.refusal)
        return None

    def take_away(self, needs: Sequence[Need], share: float) -> list[Piece]:
        """Take all needs of what this gateway may give by itself. Raises LimitExceeded."""
        now_s, asks = self._clock.time(), []
        for need in needs:
            purse, most = self.purse(need.name), max(1, int(need.limit.most * share))
            if not purse.is_running:
                asks.append((need, Ask(purse.name, most, need.amount, need.amount)))
            elif purse.in_use + need.amount > most:
                raise error_of(need, Refusal(0, SLOT_RETRY_S, purse.in_use, SLOT_RETRY_S))
        answer = self.away.exchange(now_s, Exchange(self.tenant, self._holder, asks=[ask for _, ask in asks]))
        if isinstance(answer, Refusal):
            raise error_of(asks[answer.index][0], answer)
        return [self._take_away(need, now_s) for need in needs]

    def _take_away(self, need: Need, now_s: float) -> Piece:
        purse, slot = self.purse(need.name), slot_at(need.limit.kind.span, now_s)
        if purse.is_running:
            purse.in_use += need.amount
        else:
            self.book(purse.name, slot, need.amount)
        return Piece(purse, slot, need.amount, 0.0, is_away=True)

    def give_back(self, piece: Piece, amount: int) -> None:
        """Undo a part of what a request has taken."""
        purse = piece.purse
        purse.refused_until = 0.0
        if piece.until > self._clock.monotonic():
            purse.put(piece.slot, amount, piece.until)
            return
        self.book(purse.name, piece.slot, -amount)
        if piece.is_away:
            self.away.book(self._clock.time(), self._holder, Booking(purse.name, piece.slot, -amount))

    def charge(self, purse: Purse, amount: int) -> None:
        """Book what a request took beyond what it had reserved."""
        self.book(purse.name, slot_at(purse.name.kind.span, self._clock.time()), amount)
        purse.left = max(0, purse.left - amount)

    def end(self, piece: Piece) -> None:
        """Count a request less among those that run; its place may go to the next one for a while."""
        piece.purse.in_use -= piece.amount
        piece.purse.refused_until = 0.0
        if not piece.is_away:
            piece.purse.put(piece.slot, piece.amount, self._clock.monotonic() + SHARE_S)

    def book(self, name: Name, slot: int, amount: int) -> None:
        """Have an entry changed in the store with the next exchange."""
        self.outbox[name, slot] = self.outbox.get((name, slot), 0) + amount

    def undo(self, pieces: Sequence[Piece]) -> None:
        """Give all back that was taken for a request that will not be."""
        for piece in pieces:
            if piece.purse.is_running:
                self.end(piece)
            else:
                self.give_back(piece, piece.amount)

    def settle_shares(self, *, is_over: bool = False) -> None:
        """Book what was not spent of shares that are over (`is_over`: all are), and forget purses out of use."""
        now = math.inf if is_over else self._clock.monotonic()
        for purse in self.purses.values():
            for grant in purse.expire(now):
                if not purse.is_running:
                    self.book(purse.name, grant.slot, -grant.amount)
        self.purses = {name: purse for name, purse in self.purses.items() if not purse.is_idle(now)}

    def exchange(self, needs: Sequence[Need], limits: Sequence[Limit], others: dict[Name, int]) -> Exchange:
        """Make the next message: all that is to be booked; what a request needs, what `others` do, and shares."""
        self.settle_shares()
        now = self._clock.monotonic()
        amounts = {need.name: need.amount for need in needs}
        asks = []
        for limit in limits:
            purse = self.purse(limit.name)
            need = amounts.get(purse.name, 0)
            asks.append(Ask(purse.name, limit.most, need, need + purse.demand(now) + others.get(purse.name, 0)))
            purse.asked_at = now
        batch_id, bookings = self._next_batch()
        return Exchange(self.tenant, self._holder, batch_id, [*bookings, *self._running(now)], asks)

    def booked(self) -> None:
        """Hear that the store has the last message."""
        self._batch = ("", ())

    def unheard(self) -> None:
        """Hear that nobody knows whether the store has the last message."""
        for purse in self.purses.values():
            purse.told = -1

    def take_in(self, asks: Sequence[Ask], shares: Sequence[Share], asked_at: float) -> None:
        """Put what was given into the purses; it is good from when it was asked for."""
        until = asked_at + SHARE_S
        for ask, share in zip(asks, shares, strict=True):
            purse = self.purse(ask.name)
            given = ((share.slot, ask.need), (share.extra_slot, share.extra))
            for slot, amount in given:
                if amount:
                    purse.put(slot, amount, until)
            purse.left, purse.reset_at = max(0, ask.most - share.used), asked_at + share.reset_s
            purse.told += ask.need + share.extra
            purse.refusal = None

    def has_news(self) -> bool:
        """Whether there is something to book."""
        now = self._clock.monotonic()
        return bool(self.outbox or self._batch[0]) or any(purse.is_untold(now) for purse in self.purses.values())

    def standing(self, limit: Limit) -> Standing:
        """Say what is left of a limit: in the store when it last answered, and here."""
        now, purse = self._clock.monotonic(), self.purses.get(limit.name)
        if purse is None:
            return Standing(limit.most, limit.most, 0.0)
        remaining = min(limit.most, purse.left + purse.available(now))
        return Standing(limit.most, remaining, max(0.0, purse.reset_at - now))

    @property
    def num_unbooked(self) -> int:
        """How many entries are to be changed."""
        return len(self.outbox) + len(self._batch[1])

    @property
    def is_active(self) -> bool:
        """Whether there is anything that will have to be booked or renewed."""
        return self.has_news() or any(purse.grants or purse.in_use for purse in self.purses.values())

    def _next_batch(self) -> tuple[str, tuple[Booking, ...]]:
        """Return what was sent and not answered, as it was, or else a new batch."""
        if not self._batch[0] and self.outbox:
            now_s = self._clock.time()
            keys = list(islice(self.outbox, MAX_BATCH))
            changes = [Booking(*key, amount) for key in keys if (amount := self.outbox.pop(key))]
            due = tuple(b for b in changes if counts_until(b.name.kind.span, b.slot, now_s) > now_s)
            self._batch = (uuid.uuid4().hex, due) if due else ("", ())
        return self._batch

    def _running(self, now: float) -> list[Booking]:
        """Say how many places this gateway has, where the store does not know."""
        purses = [purse for purse in self.purses.values() if purse.is_untold(now)]
        for purse in purses:
            purse.told, purse.told_at = purse.held(now), now
        return [Booking(purse.name, 0, purse.told) for purse in purses]


def error_of(need: Need, refusal: Refusal) -> LimitExceeded:
    """Say which limit refused a request, what it is, and when to come back."""
    limit = need.limit
    span = limit.kind.span
    used, most, amount = (_written(number, limit.kind.unit) for number in (refusal.used, limit.most, need.amount))
    message = f"{limit.kind} of {limit.name.scope} {limit.name.owner}: {used} of {most} are used"
    if limit.kind.unit in (Unit.TOKENS, Unit.MICRO_USD):
        message += f", this request needs up to {amount}"
    wait_s = SLOT_RETRY_S if span is Span.RUNNING else refusal.wait_s
    return _ERRORS[span](message, retry_after_s=wait_s, param=limit.kind.value)


def _written(number: int, unit: Unit) -> str:
    return f"${number / MICRO:.6f}".rstrip("0").rstrip(".") if unit is Unit.MICRO_USD else str(number)

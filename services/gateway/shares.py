"""Counts requests against limits that all gateways share, without a call for most of them: see docs/limits.md.

A request takes what it needs of the shares that this gateway has. When they are not enough it waits for one exchange
with the policy service, briefly: a store that is slow or away delays nobody for long, and after the first nobody at all
until it is quick again. Meanwhile the policy says whether gateways count by themselves, or refuse.

One exchange per tenant is on its way at a time; whoever comes meanwhile is served by the next. Exchanges belong to
nobody who waits for them: a client that leaves takes no answer with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from inferflux.clock import Clock
from inferflux.errors import InferfluxError, LimitExceeded, LimitsUnavailable, RequestExceedsLimit, Unavailable
from inferflux.policy.counting import HOLD_S, Exchange, Refusal, Share
from inferflux.policy.limits import Limit, Limits, Name
from inferflux.process import Tasks
from inferflux.telemetry import metrics
from services.gateway.purse import Account, Need, Piece, error_of

PATIENCE_S, PATIENCE_TICKS = 0.25, 10
"""An exchange that takes longer is not waited for, by requests that may be counted by this gateway alone.

In ticks of our own loop: a gateway that was slow itself does not blame the store.
"""
LONG_PATIENCE_S = 2.5
"""Longest that the others wait."""
TICK_S = 0.1
"""How soon what was not spent is booked."""
PROBE_S = 0.5
CLOSE_S = 0.5
Client = Callable[[Exchange], Awaitable[list[Share] | Refusal]]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Waiter:
    """A request that waits for an exchange. `is_patient`: it can't go on without."""

    needs: Sequence[Need]
    is_patient: bool
    pieces: asyncio.Future[list[Piece]]


@dataclass(slots=True)
class Desk:
    """An account and who waits at it. `limits`: those that shares are wanted of. `patience`: ticks that are left."""

    account: Account
    waiters: list[Waiter] = field(default_factory=list)
    limits: dict[Name, Limit] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    used_at: float = 0.0
    patience: int = 0
    alarm: asyncio.TimerHandle = field(init=False)


class Shares:
    """All accounts of this gateway. `holder`: its id, the same after a restart."""

    def __init__(self, exchange: Client, holder: str, clock: Clock, tasks: Tasks) -> None:
        self._exchange = exchange
        self._tasks = tasks
        self._holder = holder
        self._clock = clock
        self._desks: dict[str, Desk] = {}
        self._has_work = asyncio.Event()
        self._is_up = True
        self._probed_at = 0.0
        metrics.LIMIT_STORE_UP.set(1)

    @property
    def is_up(self) -> bool:
        """Whether the store counts, and answers in time."""
        return self._is_up

    async def take(self, tenant: str, needs: Sequence[Need], limits: Limits) -> list[Piece]:
        """Count a request. Raises LimitExceeded, RequestExceedsLimit, LimitsUnavailable; then nothing is taken."""
        _check_size(needs)
        started_at = self._clock.monotonic()
        result = "unavailable"
        try:
            result, pieces = await self._take(self._desk(tenant), needs, limits)
        except LimitExceeded as e:
            result = "refused"
            metrics.LIMIT_REFUSALS.labels(e.param or "").inc()
            raise
        finally:
            metrics.LIMIT_RESERVATIONS.labels(result).inc()
            metrics.LIMIT_SECONDS.labels(result).observe(self._clock.monotonic() - started_at)
        return pieces

    def account(self, tenant: str) -> Account:
        """Return the account of a tenant, to give back what was taken."""
        self._has_work.set()
        return self._desk(tenant).account

    async def run(self) -> None:
        """Book what is over, keep what runs alive and look whether a store that was away is back, for ever."""
        while True:
            await self._has_work.wait()
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Begin the exchanges that are due."""
        for tenant, desk in list(self._desks.items()):
            if self._is_due(desk):
                self._work(desk)
            elif not desk.account.is_active and self._clock.monotonic() - desk.used_at > HOLD_S and not desk.task:
                self._forget(tenant, desk)
        accounts = [desk.account for desk in self._desks.values()]
        metrics.LIMIT_UNBOOKED.set(sum(account.num_unbooked for account in accounts))
        if self._is_up and not any(account.is_active for account in accounts):
            self._has_work.clear()

    async def close(self) -> None:
        """Give back the shares that were not spent, if the store takes them now."""
        for desk in self._desks.values():
            desk.account.settle_shares(is_over=True)
            if desk.account.has_news():
                with suppress(InferfluxError, TimeoutError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._exchange(desk.account.exchange((), (), {}))

    async def _take(self, desk: Desk, needs: Sequence[Need], limits: Limits) -> tuple[str, list[Piece]]:
        account, now = desk.account, self._clock.monotonic()
        self._has_work.set()
        desk.used_at = now
        if (pieces := account.take(needs)) is not None:
            if any(account.purse(need.name).is_low(now) for need in needs):
                self._want(desk, needs)
            return "share", pieces
        if refusal := account.refusal(needs):
            raise refusal
        if self._is_up or limits.is_fail_closed:
            try:
                return "store", await self._wait(desk, needs, limits)
            except Unavailable as e:
                self._note(is_up=False, reason=e.message)
                if limits.is_fail_closed:
                    raise LimitsUnavailable("limits can't be counted at the moment", retry_after_s=1.0) from e
        elif not desk.task and now - self._probed_at > PROBE_S:
            self._want(desk, needs)
        return "away", account.take_away(needs, limits.section.away_share)

    async def _wait(self, desk: Desk, needs: Sequence[Need], limits: Limits) -> list[Piece]:
        """Wait for an exchange, not for long. Raises LimitExceeded, Unavailable."""
        pieces: asyncio.Future[list[Piece]] = asyncio.get_running_loop().create_future()
        waiter = Waiter(needs, limits.is_fail_closed, pieces)
        desk.waiters.append(waiter)
        self._work(desk)
        try:
            async with asyncio.timeout(LONG_PATIENCE_S):
                return await pieces
        except BaseException as e:
            if waiter in desk.waiters:
                desk.waiters.remove(waiter)
            if pieces.done() and not pieces.cancelled() and pieces.exception() is None:
                desk.account.undo(pieces.result())  # they came at the moment in which it was given up
            if isinstance(e, TimeoutError):
                raise Unavailable("the policy service did not answer in time") from e
            raise

    def _want(self, desk: Desk, needs: Sequence[Need]) -> None:
        """Have the shares of these limits renewed, without waiting."""
        desk.limits.update((need.name, need.limit) for need in needs)
        self._work(desk)

    def _work(self, desk: Desk) -> None:
        if desk.task is None:
            desk.task = self._tasks.spawn(self._serve(desk), f"limits-{desk.account.tenant}", may_return=True)

    async def _serve(self, desk: Desk) -> None:
        """Exchange until nobody waits and there is nothing to say."""
        try:
            await self._talk(desk)
            while desk.waiters or desk.limits:
                await self._talk(desk)
        except InferfluxError as e:
            desk.account.unheard()
            self._give_up(desk, e.message, is_final=True)
        finally:
            desk.task = None

    async def _talk(self, desk: Desk) -> None:
        """Exchange once: for the first who waits, and for shares."""
        account, first = desk.account, next(iter(desk.waiters), None)
        needs = first.needs if first is not None else ()
        limits = {need.name: need.limit for need in needs} or desk.limits
        desk.limits = {}
        others: dict[Name, int] = {}
        for need in (need for waiter in desk.waiters[1:] for need in waiter.needs):
            others[need.name] = others.get(need.name, 0) + need.amount
        message = account.exchange(needs, list(limits.values()), others)
        asked_at = self._probed_at = self._clock.monotonic()
        desk.patience = PATIENCE_TICKS
        self._watch(desk)
        try:
            answer = await self._exchange(message)
        finally:
            desk.alarm.cancel()
        if desk.patience:
            self._note(is_up=True)
        account.booked()
        if isinstance(answer, Refusal):
            self._refuse(desk, message, answer)
        else:
            account.take_in(message.asks, answer, asked_at)
        self._serve_waiters(desk)

    def _watch(self, desk: Desk) -> None:
        """Lose patience with an exchange, tick by tick."""
        if desk.patience:
            desk.patience -= 1
            desk.alarm = asyncio.get_running_loop().call_later(PATIENCE_S / PATIENCE_TICKS, self._watch, desk)
        else:
            self._give_up(desk, "slow")

    def _give_up(self, desk: Desk, reason: str, *, is_final: bool = False) -> None:
        """Let those go on that wait for a store which is away, or slow; then the patient ones stay."""
        self._note(is_up=False, reason=reason)
        waiting, desk.waiters = desk.waiters, []
        for waiter in waiting:
            if waiter.is_patient and not is_final:
                desk.waiters.append(waiter)
            else:
                _fail(waiter, Unavailable(f"the store of limits is away: {reason}"))

    def _refuse(self, desk: Desk, message: Exchange, refusal: Refusal) -> None:
        ask = message.asks[refusal.index]
        purse = desk.account.purse(ask.name)
        purse.left = max(0, ask.most - refusal.used)
        purse.refuse(ask.need, refusal, self._clock.monotonic())

    def _serve_waiters(self, desk: Desk) -> None:
        """Give everyone what is there now, or the news that it is not to be had."""
        waiting, desk.waiters = desk.waiters, []
        for waiter in waiting:
            if waiter.pieces.done():
                continue
            if (pieces := desk.account.take(waiter.needs)) is not None:
                waiter.pieces.set_result(pieces)
            elif error := desk.account.refusal(waiter.needs):
                _fail(waiter, error)
            else:
                desk.waiters.append(waiter)

    def _is_due(self, desk: Desk) -> bool:
        """Whether it is time for an exchange that nobody waits for."""
        account, now = desk.account, self._clock.monotonic()
        if desk.task is not None or (not self._is_up and now - self._probed_at < PROBE_S):
            return False
        account.settle_shares()
        return account.has_news() or not self._is_up

    def _forget(self, tenant: str, desk: Desk) -> None:
        """Drop what is known of a tenant that has been quiet, unless requests were counted away from the store."""
        if not any(desk.account.away.entries.values()):
            del self._desks[tenant]

    def _desk(self, tenant: str) -> Desk:
        if tenant not in self._desks:
            self._desks[tenant] = Desk(Account(tenant, self._holder, self._clock))
        return self._desks[tenant]

    def _note(self, *, is_up: bool, reason: str = "") -> None:
        if is_up is not self._is_up:
            self._is_up = is_up
            metrics.LIMIT_STORE_UP.set(is_up)
            level = logging.INFO if is_up else logging.WARNING
            _log.log(level, "limits are counted %s", "together" if is_up else "alone", extra={"reason": reason})


def _fail(waiter: Waiter, error: InferfluxError) -> None:
    if not waiter.pieces.done():
        waiter.pieces.set_exception(error)


def _check_size(needs: Sequence[Need]) -> None:
    """Raise RequestExceedsLimit for what could never be let through."""
    for need in needs:
        if need.amount > need.limit.most:
            message = error_of(need, Refusal(0, 0.0, 0, 0.0)).message
            raise RequestExceedsLimit(f"{message}; a smaller max_tokens may help", param="max_tokens")

"""A request's place within the limits of its key: reserved before it runs, settled on every way out.

    async with reservations.hold(call, price, reply): ...

Every answer of a limited key says what is left, in the headers that clients of OpenAI's API know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from inferflux.policy.limits import Limit, Unit
from services.gateway import cost
from services.gateway.asgi import RawHeaders
from services.gateway.bounds import Price
from services.gateway.call import Call
from services.gateway.purse import Account, Need, Piece
from services.gateway.reply import Reply
from services.gateway.shares import Shares

_IN_HEADERS = (Unit.REQUESTS, Unit.TOKENS)


@dataclass(frozen=True, slots=True)
class Reservations:
    """All requests of this gateway."""

    shares: Shares

    @asynccontextmanager
    async def hold(self, call: Call, price: Price, reply: Reply) -> AsyncIterator[None]:
        """Count a request inside the block, and what it did cost after it. Raises what Shares.take raises."""
        limits, principal = call.policy.limits, call.principal
        found = limits.of(principal.tenant, principal.team, principal.key_id) if limits is not None else ()
        if limits is None or not found:
            yield
            return
        guessed, num_before = cost.guess(call, price, limits), call.journal.num_tokens
        needs = [Need(limit, guessed.amount(limit.kind.unit, limits, call.model)) for limit in found]
        account = self.shares.account(principal.tenant)
        try:
            pieces = await self.shares.take(principal.tenant, [need for need in needs if need.amount], limits)
        finally:
            reply.stamp(headers(account, found))
        error: BaseException | None = None
        try:
            yield
        except BaseException as e:
            error = e
            raise
        finally:
            spent = cost.known(call, guessed, num_before, error, was_heard=reply.has_started)
            amounts = {need.limit: spent.amount(need.limit.kind.unit, limits, call.model) for need in needs}
            settle(self.shares.account(principal.tenant), needs, pieces, amounts)


def settle(account: Account, needs: Sequence[Need], pieces: Sequence[Piece], amounts: dict[Limit, int]) -> None:
    """Give back what was not spent, newest first, and book what was spent beyond."""
    left = {need.name: need.amount - amounts[need.limit] for need in needs}
    for piece in reversed(pieces):
        name = piece.purse.name
        if piece.purse.is_running:
            account.end(piece)
        elif (part := min(piece.amount, left[name])) > 0:
            account.give_back(piece, part)
            left[name] -= part
    for need in needs:
        purse = account.purse(need.name)
        if left[purse.name] < 0 and not purse.is_running:
            account.charge(purse, -left[purse.name])


def headers(account: Account, limits: Sequence[Limit]) -> RawHeaders:
    """Say what is left of the tightest limit of requests and of tokens, as far as this gateway knows."""
    lines: RawHeaders = []
    for unit in _IN_HEADERS:
        standings = [account.standing(limit) for limit in limits if limit.kind.unit is unit]
        if standings:
            standing = min(standings, key=lambda standing: standing.remaining)
            values = {"limit": str(standing.most), "remaining": str(standing.remaining)}
            values["reset"] = duration(standing.reset_s)
            lines += [(f"x-ratelimit-{name}-{unit}".encode(), value.encode()) for name, value in values.items()]
    return lines


def duration(span_s: float) -> str:
    """Write a time as OpenAI does: 120ms, 59.5s, 6m0s, 23h59m0s."""
    if span_s < 1:
        return f"{round(span_s * 1000)}ms"
    minutes, seconds = divmod(round(span_s, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    text = f"{minutes}m{text}" if minutes or hours else text
    return f"{hours}h{text}" if hours else text

"""The decode worker's side of claims: it asks the worker that issued a ticket before it reads, and tells it afterwards.

    claim ----> granted             read
            |-> conflict, expired   another reader has it, or it is over: compute the prompt
            |-> stale               the owner was started anew: compute the prompt
            +-> no answer           read: a dead worker's blocks may still be mapped, and digests protect the reader

A claim is on its way from the moment a request arrives, beside its rendering and its first token; only the first read
of a block waits for it, and never longer than CLAIM_TIMEOUT_S. Claims that come together travel as one call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from inferflux.engine.base import KvSource
from inferflux.errors import InferfluxError, KvError, KvStale, TicketConflict, TicketExpired
from inferflux.rpc.client import open_channel, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.telemetry import metrics
from inferflux.tickets import Claimant
from inferflux.types import KvReport
from inferflux.v1 import prefill_service_pb2 as pb
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub

CLAIM_TIMEOUT_S = 0.2
COMMIT_TIMEOUT_S = 2.0
MAX_OWNERS = 64
GRANTED, UNANSWERED = "granted", "unanswered"
REFUSALS: dict[str, type[KvError]] = {"conflict": TicketConflict, "expired": TicketExpired, "stale": KvStale}
VERDICTS = {
    pb.CLAIM_VERDICT_GRANTED: GRANTED,
    pb.CLAIM_VERDICT_CONFLICT: "conflict",
    pb.CLAIM_VERDICT_EXPIRED: "expired",
    pb.CLAIM_VERDICT_STALE: "stale",
}
_log = logging.getLogger(__name__)
Send = Callable[[Sequence[KvSource]], Awaitable[Sequence[str]]]


class Claims:
    """All claims of a decode worker. One event loop; `close` once. `timeout_s`: longest wait for an owner."""

    def __init__(self, identity: Identity, claimant: Claimant, timeout_s: float = CLAIM_TIMEOUT_S) -> None:
        self._identity = identity
        self._timeout_s = timeout_s
        self._claimant = claimant
        self._owners: dict[str, Owner] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def begin(self, sources: Iterable[KvSource]) -> list[KvSource]:
        """Claim sources and return them with the claims that their readers have to wait for."""
        return [replace(source, claim=self._owner(source.address).claim(source)) for source in sources]

    def settle(self, sources: Iterable[KvSource], reports: Iterable[KvReport]) -> None:
        """Tell owners which of the sources from `begin` have been read.

        Returns at once. A commit that is lost, or that could not be sent for want of an answer to the claim, is made up
        for by the gateway's release.
        """
        read = {report.ticket_id for report in reports if report.result == "committed"}
        for source in sources:
            if source.ticket_id in read and isinstance(source.claim, Claim) and source.claim.is_granted:
                self._owner(source.address).commit(source)

    async def close(self) -> None:
        """Close all connections."""
        for owner in self._owners.values():
            self._close_soon(owner)
        self._owners.clear()
        await asyncio.gather(*self._closing)

    def _close_soon(self, owner: Owner) -> None:
        task = asyncio.create_task(owner.close(), name="close-owner")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _owner(self, address: str) -> Owner:
        if (owner := self._owners.pop(address, None)) is None:
            owner = Owner(open_channel(address, self._identity, "prefill"), self._claimant, self._timeout_s)
            if len(self._owners) >= MAX_OWNERS:
                self._close_soon(self._owners.pop(next(iter(self._owners))))
        self._owners[address] = owner  # the last one used is the last one to go
        return owner


class Owner:
    """One prefill worker, to readers of its tickets."""

    def __init__(self, channel: grpc.aio.Channel, claimant: Claimant, timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._stub: Any = PrefillServiceStub(channel)
        self._claimant = pb.Claimant(worker_id=claimant.worker_id, incarnation=claimant.incarnation)
        self._claims = Mailbox(self._send_claims)
        self._commits = Mailbox(self._send_commits)

    def claim(self, source: KvSource) -> Claim:
        """Ask for a ticket."""
        verdict = asyncio.create_task(
            _verdict(self._claims.put(source), self._timeout_s), name=f"claim-{source.ticket_id}"
        )
        return Claim(source.ticket_id, verdict)

    def commit(self, source: KvSource) -> None:
        """Say that a ticket has been read."""
        self._commits.put(source)

    async def close(self) -> None:
        """Give up what is on its way."""
        await asyncio.gather(self._claims.close(), self._commits.close())
        await self._channel.close(None)

    async def _send_claims(self, sources: Sequence[KvSource]) -> Sequence[str]:
        request = pb.ClaimRequest(claimant=self._claimant, tickets=map(_ref, sources))
        with translated_errors():
            response: pb.ClaimResponse = await self._stub.Claim(request, timeout=self._timeout_s)
        verdicts = [VERDICTS[verdict] for verdict in response.verdicts]
        return [_fenced(*pair, response.incarnation) for pair in zip(sources, verdicts, strict=True)]

    async def _send_commits(self, sources: Sequence[KvSource]) -> Sequence[str]:
        request = pb.CommitRequest(claimant=self._claimant, tickets=map(_ref, sources))
        with translated_errors():
            response: pb.CommitResponse = await self._stub.Commit(request, timeout=COMMIT_TIMEOUT_S)
        return [VERDICTS[verdict] for verdict in response.verdicts]


class Claim:
    """One ticket's claim on its way."""

    def __init__(self, ticket_id: str, verdict: asyncio.Task[str]) -> None:
        self._ticket_id = ticket_id
        self._verdict = verdict

    @property
    def is_granted(self) -> bool:
        """Whether the owner has said yes."""
        verdict = self._verdict
        return verdict.done() and not verdict.cancelled() and verdict.result() == GRANTED

    async def __call__(self) -> None:
        """Return when the ticket may be read: it was granted, or its owner does not answer in time. Raises KvError."""
        verdict = await asyncio.shield(self._verdict)
        if (refusal := REFUSALS.get(verdict)) is not None:
            raise refusal(f"ticket {self._ticket_id} was not granted: {verdict}")


class Mailbox:
    """Sends what comes in, one call at a time: what comes while one is on its way shares the next."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: list[tuple[KvSource, asyncio.Future[str]]] = []
        self._sending: asyncio.Task[None] | None = None

    def put(self, source: KvSource) -> asyncio.Future[str]:
        """Send a ticket with the next call. The result is a verdict; UNANSWERED when there is none."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((source, answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="claims")
        return answer

    async def close(self) -> None:
        """Stop sending."""
        if self._sending is not None:
            self._sending.cancel()
            with suppress(asyncio.CancelledError):
                await self._sending

    async def _send_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            for (_, answer), verdict in zip(batch, await self._verdicts([source for source, _ in batch]), strict=True):
                if not answer.done():
                    answer.set_result(verdict)

    async def _verdicts(self, sources: Sequence[KvSource]) -> Sequence[str]:
        try:
            return await self._send(sources)
        except (InferfluxError, KeyError, ValueError) as e:  # the latter two: an owner that speaks another dialect
            reason = e.reason if isinstance(e, InferfluxError) else "dialect"
            _log.warning("owner of tickets does not answer", extra={"num_tickets": len(sources), "reason": reason})
            return [UNANSWERED] * len(sources)


async def _verdict(answer: asyncio.Future[str], timeout_s: float) -> str:
    """Wait for an owner's answer, but not for long."""
    began_at = time.monotonic()
    done, _ = await asyncio.wait({answer}, timeout=timeout_s)
    verdict = answer.result() if done else UNANSWERED
    metrics.CLAIM_SECONDS.labels(verdict).observe(time.monotonic() - began_at)
    if verdict == UNANSWERED:
        metrics.TICKET_ORPHAN.inc()
    return verdict


def _fenced(source: KvSource, verdict: str, incarnation: str) -> str:
    """Do not listen to a start of the owner that is older than the ticket: it woke up after its successor began."""
    if incarnation >= source.incarnation:
        return verdict
    metrics.VERSION_REGRESSION.labels("worker").inc()
    return UNANSWERED


def _ref(source: KvSource) -> pb.TicketRef:
    return pb.TicketRef(ticket_id=source.ticket_id, incarnation=source.incarnation)

"""The gateway's side of a prefill worker: prompts in, tickets out, tickets back.

The watch stream carries the worker's pulses and is the lease of all tickets of this gateway. Tickets are given back as
soon as nobody needs them; returns that come close together travel as one call.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from inferflux.errors import InferfluxError, Unavailable, WorkerLost
from inferflux.rpc.client import num_cancels, translated_errors
from inferflux.telemetry import metrics
from inferflux.telemetry.tracing import Span
from inferflux.types import HttpAnswer, HttpHead, KvReport, Role
from inferflux.v1 import prefill_service_pb2 as pb
from inferflux.v1 import types_pb2
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub
from services.gateway.call import Call
from services.gateway.heart import Heart
from services.gateway.link import Link
from services.gateway.news import News
from services.gateway.poison import Inquest
from services.gateway.views import Worker

RELEASE_DELAY_S = 0.05
RELEASE_TIMEOUT_S = 2.0
LOSS_IS_CLEAR_S = 0.1
# Of rare calls: the first is as long as the longest prompt on a slow machine.
WARM_TIMEOUT_S = 300.0
ADMIN_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class Tickets:
    """The prompts that a prefill worker computed for one request, and the tickets to give back for them.

    Use it in a `with` block: each ticket is given back when a decode worker has reported on it, the rest at the end.
    `why_local`: without prompts, why the decode worker has to compute them; a label of metrics.
    """

    def __init__(
        self,
        prompts: Sequence[types_pb2.PrefilledPrompt] = (),
        link: PrefillLink | None = None,
        why_local: str = "",
    ) -> None:
        self.prompts = prompts
        self.why_local = why_local
        self._link = link
        self._held = {prompt.ticket.ticket_id for prompt in prompts if prompt.HasField("ticket")}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            self._give_back(self._held, _why(error))
            self._held = set()

    def settle(self, report: KvReport) -> None:
        """Hear what became of a ticket."""
        if report.result == "recomputed":
            metrics.KV_REJECTED.labels(report.reason or "other").inc()
        elif report.result == "committed":
            metrics.KV_TRANSFER_BYTES.labels(report.transport).inc(report.num_bytes)
            metrics.KV_TRANSFER_SECONDS.labels(report.transport).observe(report.transfer_s)
        if report.ticket_id in self._held:
            self._held.discard(report.ticket_id)
            self._give_back({report.ticket_id}, report.result)

    def _give_back(self, ticket_ids: set[str], why: str) -> None:
        if self._link is not None:
            self._link.release(ticket_ids, why)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix to cache: a call whose prompt it is, whose it is, and the name to pin it under, if any."""

    path: str
    body: bytes
    model: str
    tenant: str
    cache_salt: str = field(repr=False)
    pin: str = ""


@dataclass(slots=True)
class Returns:
    """What to give back for one reason: tickets by their ids, or all of a request."""

    ticket_ids: set[str] = field(default_factory=set)
    request_ids: set[str] = field(default_factory=set)


class PrefillLink(Link):
    """The connection to one prefill worker."""

    role = Role.PREFILL

    def __init__(
        self, worker: Worker, channel: grpc.aio.Channel, heart: Heart, inquest: Inquest, hello: pb.WatchRequest
    ) -> None:
        super().__init__(worker, channel, heart, inquest)
        self._stub: Any = PrefillServiceStub(channel)
        self._hello = hello
        self._phases = metrics.PHASES.labels("prefill", self.role.value, self.worker_id)
        self._running: dict[Any, Call] = {}
        self._losses = News()
        self._returns: dict[str, Returns] = {}
        self._returning: asyncio.Task[None] | None = None

    async def prefill(self, call: Call, span: Span) -> Tickets | HttpAnswer:
        """Compute all prompts of a call, or return the answer of the application that refused it.

        Cancelling the caller aborts it on the worker. Raises InferfluxError.
        """
        request = pb.PrefillRequest(context=call.context(span), call=call.http, session_id=self._hello.session_id)
        try:
            response = await self._compute(call, request)
        except asyncio.CancelledError:
            metrics.PREFILLS.labels("cancelled", "").inc()
            self.disown(call.request_id)
            raise
        except InferfluxError:
            metrics.PREFILLS.labels("failed", "").inc()
            self.disown(call.request_id)
            raise
        if response.HasField("answer"):
            metrics.PREFILLS.labels("answered", "").inc()
            return HttpAnswer(HttpHead.from_proto(response.answer.head), response.answer.body)
        metrics.PREFILLS.labels("remote", "").inc()
        self._phases.inc()
        call.num_prompt_tokens = sum(prompt.num_prompt_tokens for prompt in response.prefilled.prompts)
        return Tickets(response.prefilled.prompts, self)

    async def _compute(self, call: Call, request: pb.PrefillRequest) -> pb.PrefillResponse:
        running = self._stub.Prefill(request)
        self._running[running] = call
        self.num_assigned += 1
        try:
            with translated_errors():
                response: pb.PrefillResponse = await running
                return response
        except Unavailable:
            await self._hear_if_lost()
            raise
        except asyncio.CancelledError:
            if num_cancels():
                raise
            raise WorkerLost("the prefill worker was lost") from None
        finally:
            self.num_assigned -= 1
            self._running.pop(running, None)

    async def _hear_if_lost(self) -> None:
        """A call may break before the watch does: wait, so that all who were on a dead worker are heard together."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOSS_IS_CLEAR_S if self.heart.is_up else 0):
                await self._losses.next()

    async def warm(self, prefix: Prefix) -> int:
        """Have a prefix cached, and pinned if it has a name; returns its length in tokens. Raises InferfluxError."""
        context = types_pb2.RequestContext(
            request_id=f"warm-{uuid.uuid4().hex}", tenant=prefix.tenant, cache_salt=prefix.cache_salt
        )
        headers = [types_pb2.Header(name="content-type", value="application/json")]
        call = types_pb2.HttpCall(method="POST", path=prefix.path, headers=headers, body=prefix.body)
        request = pb.WarmRequest(context=context, call=call, pin=prefix.pin)
        with translated_errors():
            return int((await self._stub.Warm(request, timeout=WARM_TIMEOUT_S)).num_tokens)

    async def unpin(self, name: str) -> bool:
        """Let a pinned prefix go; tells whether there was one. Raises InferfluxError."""
        with translated_errors():
            return bool((await self._stub.Unpin(pb.UnpinRequest(name=name), timeout=ADMIN_TIMEOUT_S)).was_pinned)

    async def cache(self) -> dict[str, Any]:
        """What the worker's prefix store holds and did. Raises InferfluxError."""
        with translated_errors():
            answer = await self._stub.GetCache(pb.GetCacheRequest(), timeout=ADMIN_TIMEOUT_S)
        return _cache_document(answer)

    def release(self, ticket_ids: Iterable[str], why: str) -> None:
        """Give tickets back. Returns at once and never fails: if the worker is lost, so are its tickets."""
        self._returns.setdefault(why, Returns()).ticket_ids.update(ticket_ids)
        self._return_soon()

    def disown(self, request_id: str) -> None:
        """Give back whatever a request has there: its prefill was given up, but the answer may have been on its way."""
        self._returns.setdefault("cancelled", Returns()).request_ids.add(request_id)
        self._return_soon()

    def _return_soon(self) -> None:
        if self._returning is None or self._returning.done():
            self._returning = asyncio.create_task(self._return_all(), name=f"release-{self.worker_id}")

    async def _return_all(self) -> None:
        """Give everything back. What fails stays for the next pulse; without pulses the session ends it."""
        await asyncio.sleep(RELEASE_DELAY_S)
        while self._returns:
            why, returns = self._returns.popitem()
            request = pb.ReleaseRequest(ticket_ids=returns.ticket_ids, why=why, request_ids=returns.request_ids)
            try:
                with translated_errors():
                    await self._stub.Release(request, timeout=RELEASE_TIMEOUT_S)
            except InferfluxError as e:
                _log.warning("tickets not given back yet", extra={"worker": self.worker_id, "reason": e.reason})
                kept = self._returns.setdefault(why, Returns())
                kept.ticket_ids |= returns.ticket_ids
                kept.request_ids |= returns.request_ids
                return
            except grpc.aio.UsageError:  # the channel is closed: the worker was dropped, its tickets went with it
                self._returns.clear()

    async def _converse(self) -> None:
        call = self._call = self._stub.Watch(self._hello)
        try:
            async for message in call:
                self._take_pulse(message.pulse)
                if self._returns:
                    self._return_soon()
        finally:
            call.cancel()

    def _lost(self, *, is_death: bool) -> None:
        """Let others compute what runs here; the worker ends the tickets of a session that does not come back."""
        lost, self._running = self._running, {}
        if is_death and lost:
            self._inquest.died(self.incarnation, list(lost.values()))
        for running in lost:
            running.cancel()
        self._losses.ring()

    async def _finish(self) -> None:
        if self._returning is not None:
            await self._returning


def _why(error: BaseException | None) -> str:
    """Name why tickets end that no decode worker has reported on; without an error, decode refused the request."""
    if error is None:
        return "rejected"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"


def _cache_document(cache: pb.GetCacheResponse) -> dict[str, Any]:
    return {
        "block_size": cache.block_size,
        "slots": {
            "all": cache.num_slots,
            "free": cache.num_free_slots,
            "kept": cache.num_kept_slots,
            "cached": cache.num_cached_slots,
            "pinned": cache.num_pinned_slots,
            "pinned_limit": cache.max_pinned_slots,
        },
        "cached_tokens": cache.num_cached_slots * cache.block_size,
        "peers": cache.num_peers,
        "pins": [{"name": pin.name, "num_tokens": pin.num_tokens} for pin in cache.pins],
        "requests": {"hit": 0, "partial": 0, "miss": 0, **cache.requests},
        "tokens": {"engine": 0, "arena": 0, "peer": 0, "computed": 0, **cache.tokens},
        "evictions": dict(cache.evictions),
    }

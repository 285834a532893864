"""LimitsService on the wire: checks what comes in, asks the store, and is the only place with its protobuf messages."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from inferflux.clock import Clock
from inferflux.errors import InvalidRequest
from inferflux.policy.counting import Ask, Booking, Exchange, Refusal, Share
from inferflux.policy.limits import NAME, Kind, Name, Scope
from inferflux.v1 import limits_service_pb2 as pb
from inferflux.v1.limits_service_pb2_grpc import LimitsServiceServicer
from services.policy.limits_store import LimitsStore

SERVICE = "/inferflux.v1.LimitsService/"
CALLERS = {SERVICE + "Reserve": frozenset({"gateway"}), SERVICE + "GetUsage": frozenset({"gateway", "operator"})}
MAX_ITEMS = 4096
_TENANT = re.compile(NAME)
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
Context = grpc.aio.ServicerContext[Any, Any]


class LimitsServicer(LimitsServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, store: LimitsStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        _check(request)
        bookings = [Booking(_name(b.counter), b.slot, b.amount) for b in request.bookings]
        asks = [Ask(_name(a.counter), a.most, a.need, a.want) for a in request.asks]
        exchange = Exchange(request.tenant, request.gateway_id, request.batch_id, bookings, asks)
        answer = await self._store.exchange(self._clock.time(), exchange)
        if isinstance(answer, Refusal):
            return pb.ReserveResponse(refusal=_refusal(answer))
        return pb.ReserveResponse(shares=[_share(share) for share in answer])

    async def GetUsage(self, request: pb.GetUsageRequest, context: Context) -> pb.GetUsageResponse:
        if request.tenant and not _TENANT.fullmatch(request.tenant):
            raise InvalidRequest("the tenant's name is not one", param="tenant")
        usages = await self._store.usage(self._clock.time(), request.tenant)
        counters = [
            pb.CounterUsage(counter=_counter(usage.name), used=usage.used, reset=_duration(usage.reset_s))
            for usage in usages
        ]
        return pb.GetUsageResponse(counters=counters)


def _check(request: pb.ReserveRequest) -> None:
    """Names become parts of the store's keys."""
    if not _TENANT.fullmatch(request.tenant):
        raise InvalidRequest("the tenant's name is not one", param="tenant")
    if not _ID.fullmatch(request.gateway_id) or (request.batch_id and not _ID.fullmatch(request.batch_id)):
        raise InvalidRequest("gateway_id and batch_id are letters, digits, dots, dashes and underscores")
    if (num_items := len(request.bookings) + len(request.asks)) > MAX_ITEMS:
        raise InvalidRequest(f"{num_items} bookings and asks, the limit is {MAX_ITEMS}")


def _name(counter: pb.CounterName) -> Name:
    try:
        return Name(Scope(counter.scope), counter.owner, Kind(counter.kind))
    except ValueError as e:
        raise InvalidRequest("unknown scope or kind of a counter", param="counter") from e


def _counter(name: Name) -> pb.CounterName:
    return pb.CounterName(scope=name.scope, owner=name.owner, kind=name.kind)


def _share(share: Share) -> pb.Share:
    return pb.Share(
        used=share.used,
        extra=share.extra,
        slot=share.slot,
        extra_slot=share.extra_slot,
        reset=_duration(share.reset_s),
    )


def _refusal(refusal: Refusal) -> pb.Refusal:
    return pb.Refusal(
        index=refusal.index,
        wait=_duration(refusal.wait_s),
        used=refusal.used,
        reset=_duration(refusal.reset_s),
    )


def _duration(span_s: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=span_s))
    return message

"""The gateway's side of LimitsService: its messages become our values here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from inferflux.policy.counting import Ask, Booking, Exchange, Refusal, Share
from inferflux.policy.limits import Kind, Name, Scope
from inferflux.rpc.client import translated_errors
from inferflux.v1 import limits_service_pb2 as pb
from inferflux.v1.limits_service_pb2_grpc import LimitsServiceStub

EXCHANGE_TIMEOUT_S = 3.0
USAGE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class CounterUsage:
    """What counts now, for all gateways."""

    name: Name
    used: int
    reset_s: float


class LimitsClient:
    """Calls to the policy service. All of them raise InferfluxError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = LimitsServiceStub(channel)

    async def exchange(self, exchange: Exchange) -> list[Share] | Refusal:
        """Book, then ask; see Counters.exchange."""
        request = pb.ReserveRequest(
            gateway_id=exchange.holder,
            tenant=exchange.tenant,
            batch_id=exchange.batch_id,
            bookings=[_booking(booking) for booking in exchange.bookings],
            asks=[_ask(ask) for ask in exchange.asks],
        )
        with translated_errors():
            answer = await self._stub.Reserve(request, timeout=EXCHANGE_TIMEOUT_S)
        return _refusal(answer.refusal) if answer.HasField("refusal") else [_share(share) for share in answer.shares]

    async def usage(self, tenant: str) -> list[CounterUsage]:
        """Read the counters of a tenant, or of all (empty)."""
        with translated_errors():
            answer = await self._stub.GetUsage(pb.GetUsageRequest(tenant=tenant), timeout=USAGE_TIMEOUT_S)
        known = {*Kind}
        return [_usage(counter) for counter in answer.counters if counter.counter.kind in known]


def _counter(name: Name) -> pb.CounterName:
    return pb.CounterName(scope=name.scope, owner=name.owner, kind=name.kind)


def _booking(booking: Booking) -> pb.Booking:
    return pb.Booking(counter=_counter(booking.name), slot=booking.slot, amount=booking.amount)


def _ask(ask: Ask) -> pb.Ask:
    return pb.Ask(counter=_counter(ask.name), most=ask.most, need=ask.need, want=ask.want)


def _share(share: pb.Share) -> Share:
    return Share(share.used, share.extra, share.slot, share.extra_slot, share.reset.ToMilliseconds() / 1000)


def _refusal(refusal: pb.Refusal) -> Refusal:
    wait_s, reset_s = refusal.wait.ToMilliseconds() / 1000, refusal.reset.ToMilliseconds() / 1000
    return Refusal(refusal.index, wait_s, refusal.used, reset_s)


def _usage(usage: pb.CounterUsage) -> CounterUsage:
    name = Name(Scope(usage.counter.scope), usage.counter.owner, Kind(usage.counter.kind))
    return CounterUsage(name, usage.used, usage.reset.ToMilliseconds() / 1000)

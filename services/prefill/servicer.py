"""PrefillService on the wire; the only place of the prefill worker with protobuf messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import grpc

from inferflux.clock import until_tick
from inferflux.errors import InvalidRequest
from inferflux.types import HttpAnswer, HttpCall, Pulse, RequestContext
from inferflux.v1 import prefill_service_pb2 as pb
from inferflux.v1 import types_pb2
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceServicer
from inferflux.worker.leases import SessionLeases
from inferflux.worker.prefilling import Prefiller
from inferflux.worker.sessions import PULSE_S

CALLERS = {"/inferflux.v1.PrefillService/": frozenset({"gateway"})}
Context = grpc.aio.ServicerContext[Any, Any]
_log = logging.getLogger(__name__)


class PrefillServicer(PrefillServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, prefiller: Prefiller, leases: SessionLeases, pulse: Callable[[], Pulse]) -> None:
        self._prefiller = prefiller
        self._leases = leases
        self._pulse = pulse
        self._closed = asyncio.Event()

    def close(self) -> None:
        """End all watches."""
        self._closed.set()

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:  # noqa: N802
        if not request.session_id:
            raise InvalidRequest("session_id is missing")
        result = await self._prefiller.prefill(
            RequestContext.from_proto(request.context), HttpCall.from_proto(request.call), request.session_id
        )
        if isinstance(result, HttpAnswer):
            return pb.PrefillResponse(answer=_answer(result))
        response = pb.PrefillResponse()
        response.prefilled.prompts.extend([prompt.to_proto() for prompt in result.prompts])
        response.engine_time.FromTimedelta(timedelta(seconds=result.engine_s))
        return response

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:  # noqa: N802
        num_released = self._prefiller.release(request.ticket_ids, request.request_ids, request.why)
        return pb.ReleaseResponse(num_released=num_released)

    async def Warm(self, request: pb.WarmRequest, context: Context) -> pb.WarmResponse:  # noqa: N802
        result = await self._prefiller.warm(
            RequestContext.from_proto(request.context), HttpCall.from_proto(request.call)
        )
        if isinstance(result, HttpAnswer):
            raise InvalidRequest(f"the application answered the call with {result.head.status}")
        return pb.WarmResponse(num_tokens=result)

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.WatchResponse]:
        if not request.session_id:
            raise InvalidRequest("session_id is missing")
        _log.info("watch opened", extra={"session_id": request.session_id, "gateway_id": request.gateway_id})
        with self._leases.open(request.session_id):
            while not self._closed.is_set():
                yield pb.WatchResponse(pulse=self._pulse().to_proto())
                with suppress(TimeoutError):
                    async with asyncio.timeout(until_tick(PULSE_S)):
                        await self._closed.wait()


def _answer(answer: HttpAnswer) -> types_pb2.HttpAnswer:
    return types_pb2.HttpAnswer(head=answer.head.to_proto(), body=answer.body)

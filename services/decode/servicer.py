"""DecodeService on the wire; the only place of the decode worker with protobuf messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from inferflux import failpoints
from inferflux.errors import InvalidRequest
from inferflux.types import ChoiceTokens, Delivered, HttpCall, PrefilledPrompt, RequestContext, frame_to_proto
from inferflux.v1 import decode_service_pb2 as pb
from inferflux.v1.decode_service_pb2_grpc import DecodeServiceServicer
from inferflux.worker.answering import DecodeRequest
from inferflux.worker.sessions import Batch, Session, Sessions

CALLERS = {"/inferflux.v1.DecodeService/": frozenset({"gateway"})}
HELLO_TIMEOUT_S = 10.0
Context = grpc.aio.ServicerContext[Any, Any]
_log = logging.getLogger(__name__)


class DecodeServicer(DecodeServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, sessions: Sessions, incarnation: str) -> None:
        self._sessions = sessions
        self._incarnation = incarnation

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SessionCommand], context: Context
    ) -> AsyncIterator[pb.StepBatch]:
        commands = aiter(request_iterator)
        hello = await _read_hello(commands)
        _log.info("session opened", extra={"session_id": hello.session_id, "gateway_id": hello.gateway_id})
        session = self._sessions.open(hello.session_id)
        with self._sessions.leases.open(hello.session_id):
            stream = session.attach()
            reader = asyncio.create_task(_obey(commands, session), name=f"session-{hello.session_id}")
            # A gateway that stops talking is gone, whether it says so or not: its grace begins.
            reader.add_done_callback(lambda _: stream.end())
            try:
                async with aclosing(stream.batches()) as batches:
                    async for batch in batches:
                        if failpoints.ON and batch.frames:
                            failpoints.hit("session.batch")
                        yield self._to_proto(batch)
                if reader.done():
                    reader.result()
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def Recall(self, request: pb.RecallRequest, context: Context) -> pb.RecallResponse:  # noqa: N802
        record = await self._sessions.recall(request.request_id, request.tenant)
        _log.info("request recalled", extra={"recalled_id": request.request_id})
        response = pb.RecallResponse(call=record.request.call.to_proto(), context=record.context.to_proto())
        for tokens in record.tokens:
            response.delivered.add(index=tokens.index, token_ids=tokens.token_ids)
        return response

    def _to_proto(self, batch: Batch) -> pb.StepBatch:
        message = pb.StepBatch(incarnation=self._incarnation)
        message.deltas.extend([frame_to_proto(handle, frame) for handle, frame in batch.frames])
        if batch.pulse is not None:
            message.pulse.CopyFrom(batch.pulse.to_proto())
        return message


async def _read_hello(commands: AsyncIterator[pb.SessionCommand]) -> pb.Hello:
    async with asyncio.timeout(HELLO_TIMEOUT_S):
        command = await anext(commands, None)
    if command is None or not command.HasField("hello") or not command.hello.session_id:
        raise InvalidRequest("the first command of a session is hello, with a session id")
    return command.hello


async def _obey(commands: AsyncIterator[pb.SessionCommand], session: Session) -> None:
    async for command in commands:
        match command.WhichOneof("command"):
            case "start":
                session.start(_request(command.start))
            case "cancel":
                session.cancel(command.cancel.handle, command.cancel.why)
            case other:
                raise InvalidRequest(f"unexpected command {other or 'of an unknown kind'}")


def _request(start: pb.Start) -> DecodeRequest:
    return DecodeRequest(
        handle=start.handle,
        context=RequestContext.from_proto(start.context),
        call=HttpCall.from_proto(start.call),
        prompts=tuple(map(PrefilledPrompt.from_proto, start.prompts)),
        delivered=_delivered(start),
    )


def _delivered(start: pb.Start) -> Delivered | None:
    tokens = tuple(ChoiceTokens(c.index, tuple(c.token_ids), c.text) for c in start.delivered)
    return Delivered(tokens, start.num_events) if tokens or start.num_events else None

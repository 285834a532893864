"""A gateway in miniature for tests of workers: real gRPC with mTLS, one session, nothing clever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import grpc

from inferflux.rpc.client import translated_errors
from inferflux.types import (
    Frame,
    HttpCall,
    PrefilledPrompt,
    Pulse,
    RequestContext,
    SignedTicket,
    frame_from_proto,
)
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from inferflux.v1.decode_service_pb2_grpc import DecodeServiceStub
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tests.support.service import Service, until

REQUESTS = count(1)


def context(**fields: Any) -> RequestContext:
    """A request nobody has made before."""
    return RequestContext(f"request-{next(REQUESTS)}", "acme", "5a17", **fields)


def completion(prompt: str, **fields: Any) -> HttpCall:
    """A streamed, greedy completion."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 10, "temperature": 0, "stream": True, **fields}
    return HttpCall("POST", "/v1/completions", json.dumps(body).encode())


@dataclass(slots=True)
class Answer:
    """What came for one request so far."""

    handle: int
    frames: list[Frame]

    @property
    def token_ids(self) -> list[int]:
        return [i for frame in self.frames for choice in frame.choices for i in choice.token_ids]

    @property
    def reports(self) -> list[tuple[str, str]]:
        return [(report.result, report.reason) for frame in self.frames for report in frame.kv]

    @property
    def end(self) -> Any:
        return self.frames[-1].end if self.frames else None

    async def wait(self) -> Answer:
        await until(lambda: self.end is not None)
        return self


class Session:
    """One stream to a decode worker."""

    def __init__(self, stub: Any, session_id: str) -> None:
        self._call = stub.Session()
        self._session_id = session_id
        self._writing = asyncio.Lock()  # grpc.aio allows one outstanding write
        self._handles = count(1)
        self._answers: dict[int, Answer] = {}
        self.pulse: Pulse | None = None
        self.num_batches = 0
        self.error: grpc.aio.AioRpcError | None = None

    async def start(
        self, call: HttpCall, prompts: Sequence[PrefilledPrompt] = (), ctx: RequestContext | None = None
    ) -> Answer:
        answer = Answer(next(self._handles), [])
        self._answers[answer.handle] = answer
        start = decode_pb.Start(
            handle=answer.handle,
            context=(ctx or context()).to_proto(),
            call=call.to_proto(),
            prompts=[prompt.to_proto() for prompt in prompts],
        )
        await self._write(decode_pb.SessionCommand(start=start))
        return answer

    async def cancel(self, answer: Answer) -> None:
        await self._write(decode_pb.SessionCommand(cancel=decode_pb.Cancel(handle=answer.handle, why="test")))

    async def _write(self, command: decode_pb.SessionCommand) -> None:
        async with self._writing:
            await self._call.write(command)

    def break_off(self) -> None:
        """Vanish without a word, as a killed gateway does."""
        self._call.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Session]:
        hello = decode_pb.Hello(session_id=self._session_id, gateway_id="test")
        await self._call.write(decode_pb.SessionCommand(hello=hello))
        reader = asyncio.create_task(self._read())
        try:
            yield self
        finally:
            self._call.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self) -> None:
        with suppress(asyncio.CancelledError):
            try:
                async for batch in self._call:
                    self._receive(batch)
            except grpc.aio.AioRpcError as e:
                self.error = e

    def _receive(self, batch: decode_pb.StepBatch) -> None:
        if batch.HasField("pulse"):
            self.pulse = Pulse.from_proto(batch.pulse)
            assert self.pulse.incarnation == batch.incarnation
        self.num_batches += bool(batch.deltas)
        for delta in batch.deltas:
            if delta.handle in self._answers:
                self._answers[delta.handle].frames.append(frame_from_proto(delta))


class SmallGateway:
    """Channels to one prefill and one decode worker."""

    def __init__(self, stack: AsyncExitStack, prefill: Any, decode: Any, session_id: str) -> None:
        self._stack = stack
        self._prefill = prefill
        self._decode = decode
        self.session_id = session_id

    @classmethod
    @asynccontextmanager
    async def to(cls, prefill: Service, decode: Service, session_id: str = "session-1") -> AsyncIterator[SmallGateway]:
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(service.channel("gateway")) for service in (prefill, decode)]
            yield cls(stack, PrefillServiceStub(channels[0]), DecodeServiceStub(channels[1]), session_id)

    async def session(self) -> Session:
        """Open a session that lives as long as this gateway."""
        return await self._stack.enter_async_context(Session(self._decode, self.session_id).running())

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[list[Pulse]]:
        """Keep the tickets' lease; the pulses that came."""
        pulses: list[Pulse] = []
        call = self._prefill.Watch(prefill_pb.WatchRequest(session_id=self.session_id, gateway_id="test"))

        async def read() -> None:
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                async for message in call:
                    pulses.append(Pulse.from_proto(message.pulse))  # noqa: PERF401 - it never ends

        reader = asyncio.create_task(read())
        try:
            yield pulses
        finally:
            call.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def call_prefill(self, call: HttpCall, ctx: RequestContext) -> Any:
        """The RPC itself, for tests that cancel it."""
        request = prefill_pb.PrefillRequest(context=ctx.to_proto(), call=call.to_proto(), session_id=self.session_id)
        return self._prefill.Prefill(request)

    async def prefill(self, call: HttpCall, ctx: RequestContext | None = None) -> tuple[PrefilledPrompt, ...]:
        with translated_errors():
            response = await self.call_prefill(call, ctx or context())
        return tuple(map(PrefilledPrompt.from_proto, response.prefilled.prompts))

    async def warm(self, call: HttpCall, pin: str = "") -> int:
        with translated_errors():
            response = await self._prefill.Warm(
                prefill_pb.WarmRequest(context=context().to_proto(), call=call.to_proto(), pin=pin)
            )
        return response.num_tokens

    async def unpin(self, name: str) -> bool:
        with translated_errors():
            return (await self._prefill.Unpin(prefill_pb.UnpinRequest(name=name))).was_pinned

    async def cache(self) -> prefill_pb.GetCacheResponse:
        with translated_errors():
            return await self._prefill.GetCache(prefill_pb.GetCacheRequest())

    async def release(self, tickets: Sequence[SignedTicket] = (), request_ids: Sequence[str] = ()) -> int:
        ids = [ticket.ticket_id for ticket in tickets]
        with translated_errors():
            response = await self._prefill.Release(
                prefill_pb.ReleaseRequest(ticket_ids=ids, request_ids=request_ids, why="committed")
            )
        return response.num_released


def tickets(prompts: Sequence[PrefilledPrompt]) -> list[SignedTicket]:
    return [prompt.ticket for prompt in prompts if prompt.ticket is not None]

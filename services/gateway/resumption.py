"""The rest of a stream for a client that lost its connection, through this gateway or another one.

Each event of a stream has a number as its id. A client that comes back within a few seconds names its request and the
last event it has; decode workers remember their requests for as long. The request then walks through the cluster again,
from where the client has got to: the same way that it takes when a worker is lost.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from functools import partial

import orjson

from inferflux.errors import InvalidRequest, NotFound
from inferflux.journal import Journal
from inferflux.telemetry import metrics, tracing
from inferflux.v1 import decode_service_pb2 as decode_pb
from services.gateway import envelope, failures, flow
from services.gateway.account import Account
from services.gateway.asgi import AsgiScope, Headers, Receive, Send, header_map
from services.gateway.auth import Principal, read_credential
from services.gateway.bounds import Price
from services.gateway.call import Call
from services.gateway.endpoints import ENDPOINTS, Endpoint, Kind, Scope, Texts
from services.gateway.inference import Inference, new_request_id
from services.gateway.lifeline import Lifeline
from services.gateway.reply import Reply

STREAMS = "/v1/streams/"
LAST_EVENT_ID = b"last-event-id"
_ENDPOINT = Endpoint("/v1/streams", Kind.GENERATE, Texts())
_REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class Resumption:
    """Serves GET /v1/streams/{request_id}."""

    inference: Inference

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer one request, under the id of the one it goes on with."""
        request_id = scope["path"].removeprefix(STREAMS)
        is_id = _REQUEST_ID.fullmatch(request_id) is not None
        serve = partial(self._serve, scope, receive, request_id if is_id else None)
        await self.inference.conduct(_ENDPOINT, request_id if is_id else new_request_id(), scope, send, serve)

    async def _serve(
        self, scope: AsgiScope, receive: Receive, request_id: str | None, reply: Reply, account: Account
    ) -> None:
        if scope["method"] != "GET":
            raise failures.MethodNotAllowed("GET")
        headers = header_map(scope["headers"])
        credential = read_credential(headers)
        principal = await self.inference.auth.admit(credential, Scope.GENERATE)
        if request_id is None:
            raise NotFound("stream ids look like req_ and 24 hexadecimal digits, as in x-request-id")
        num_events = _num_events(headers)
        record = await self.inference.pool.recall(request_id, principal.tenant)
        with tracing.start_span("resume", record.context.traceparent) as span:
            account.call = call = self._call(record, principal, num_events, span.traceparent)
            call.policy = self.inference.policy(credential)
            account.endpoint, reply.dialect = call.endpoint, call.endpoint.dialect
            metrics.STREAM_RESUME.inc()
            held = self.inference.reservations.hold(call, Price(), reply)
            async with Lifeline(receive, call.deadline_at), held:
                await self.inference.screen(call, reply, num_events)
                await flow.serve(call, self.inference.pool, reply)

    def _call(self, record: decode_pb.RecallResponse, principal: Principal, num_events: int, traceparent: str) -> Call:
        """Make the call again, as it was, at the point where the client has got to."""
        now, body = asyncio.get_running_loop().time(), record.call.body
        is_streamed = orjson.loads(body).get("stream") is True
        model = self._model(body, principal)
        known = self.inference.pool.record(model)
        return Call(
            request_id=record.context.request_id,
            endpoint=ENDPOINTS[record.call.path],
            principal=principal,
            model=model,
            parent=known.parent if known is not None else "",
            http=record.call,
            received_at=now,
            deadline_at=now + record.context.time_left.ToTimedelta().total_seconds(),
            created_s=record.context.created,
            traceparent=traceparent,
            journal=_journal(record, num_events) if is_streamed else Journal(),
            is_recalled=is_streamed,
        )

    def _model(self, body: bytes, principal: Principal) -> str:
        known = envelope.parse(body, self.inference.limits)
        return self.inference.pool.resolve(known.model, principal.allowance, principal.tenant)


def _num_events(headers: Headers) -> int:
    """How many events the client has: up to the one with the last id, or none."""
    last = headers.get(LAST_EVENT_ID, b"")
    if not last:
        return 0
    if not re.fullmatch(rb"[0-9]{1,9}", last):
        raise InvalidRequest("last-event-id must be the id of an event, a number", param=LAST_EVENT_ID.decode())
    return int(last) + 1


def _journal(record: decode_pb.RecallResponse, num_events: int) -> Journal:
    journal = Journal()
    journal.num_events = num_events
    for tokens in record.delivered:
        journal.take(tokens.index, tokens.token_ids)
    return journal

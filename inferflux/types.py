"""The nouns that cross process borders, as frozen dataclasses, with their proto twins.

Everything outside servicers and `inferflux.rpc` works on these, never on `_pb2` messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from inferflux.errors import InferfluxError
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import types_pb2 as pb


class Role(StrEnum):
    """Which phase a worker computes; pooling is a prefill whose result is the answer."""

    PREFILL = "prefill"
    DECODE = "decode"
    POOLING = "pooling"


class State(StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Transport(StrEnum):
    """How KV blocks get from one worker to another."""

    SHM = "shm"
    NIXL = "nixl"


@dataclass(frozen=True, slots=True)
class NixlPeer:
    """What one-sided reads of an arena need: the owner's agent, and where the arena lies in its memory."""

    agent: bytes
    address: int
    num_slots: int
    slot_bytes: int

    def to_proto(self) -> pb.NixlPeer:
        return pb.NixlPeer(agent=self.agent, address=self.address, num_slots=self.num_slots, slot_bytes=self.slot_bytes)

    @classmethod
    def from_proto(cls, message: pb.NixlPeer) -> NixlPeer:
        return cls(message.agent, message.address, message.num_slots, message.slot_bytes)


@dataclass(frozen=True, slots=True)
class ArenaPath:
    """How one worker reads another's arena. `socket_path` belongs to shm, `peer` to nixl."""

    transport: Transport
    worker_id: str
    incarnation: str
    socket_path: str = ""
    peer: NixlPeer | None = None


@dataclass(frozen=True, slots=True)
class HttpCall:
    """An HTTP request as the client sent it; header names lower case, never credentials."""

    method: str
    path: str
    body: bytes
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def to_proto(self) -> pb.HttpCall:
        headers = [pb.Header(name=n, value=v) for n, v in self.headers]
        return pb.HttpCall(method=self.method, path=self.path, query=self.query, headers=headers, body=self.body)

    @classmethod
    def from_proto(cls, message: pb.HttpCall) -> HttpCall:
        headers = tuple((h.name, h.value) for h in message.headers)
        return cls(message.method, message.path, message.body, message.query, headers)


@dataclass(frozen=True, slots=True)
class HttpHead:
    """Status and headers of a response."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()

    def to_proto(self) -> pb.HttpHead:
        return pb.HttpHead(status=self.status, headers=[pb.Header(name=n, value=v) for n, v in self.headers])

    @classmethod
    def from_proto(cls, message: pb.HttpHead) -> HttpHead:
        return cls(message.status, tuple((h.name, h.value) for h in message.headers))


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete response of the worker's application."""

    head: HttpHead
    body: bytes


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What every hop knows about a request. `time_left_s`: None = no deadline.

    `adapter`: the name that the call has for its model, if that is an adapter; `adapter_digest`: of the one that is
    used, known on the worker that uses it.
    `created_s`: Unix time at which the gateway took it; part of the response, so the same on every worker.
    """

    request_id: str
    tenant: str = "default"
    cache_salt: str = ""
    traceparent: str = ""
    time_left_s: float | None = None
    priority: int = 0
    created_s: int = 0
    adapter: str = ""
    adapter_digest: str = ""

    def to_proto(self) -> pb.RequestContext:
        message = pb.RequestContext(
            request_id=self.request_id,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
            traceparent=self.traceparent,
            priority=self.priority,
            created=self.created_s,
            adapter=self.adapter,
        )
        if self.time_left_s is not None:
            message.time_left.FromTimedelta(timedelta(seconds=self.time_left_s))
        return message

    @classmethod
    def from_proto(cls, message: pb.RequestContext) -> RequestContext:
        time_left_s = message.time_left.ToTimedelta().total_seconds() if message.HasField("time_left") else None
        return cls(
            message.request_id,
            message.tenant,
            message.cache_salt,
            message.traceparent,
            time_left_s,
            message.priority,
            message.created,
            message.adapter,
        )


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """What must be equal before one worker may read another's KV blocks."""

    weights_digest: str
    dtype: str
    layout: str
    block_size: int
    adapter: str = ""

    def to_proto(self) -> pb.ModelFingerprint:
        return pb.ModelFingerprint(
            weights_digest=self.weights_digest,
            dtype=self.dtype,
            layout=self.layout,
            block_size=self.block_size,
            adapter=self.adapter,
        )

    @classmethod
    def from_proto(cls, message: pb.ModelFingerprint) -> ModelFingerprint:
        return cls(message.weights_digest, message.dtype, message.layout, message.block_size, message.adapter)


@dataclass(frozen=True, slots=True)
class SignedTicket:
    """A serialized, signed ticket; opaque to everyone but the two workers (see inferflux.tickets)."""

    ticket_id: str
    payload: bytes
    mac: bytes

    def to_proto(self) -> pb.SignedTicket:
        return pb.SignedTicket(ticket_id=self.ticket_id, payload=self.payload, mac=self.mac)

    @classmethod
    def from_proto(cls, message: pb.SignedTicket) -> SignedTicket:
        return cls(message.ticket_id, message.payload, message.mac)


@dataclass(frozen=True, slots=True)
class PrefilledPrompt:
    """One prompt after prefill. `prompt_digest`: xxh3-128 of the ids as little-endian uint32.

    `ticket` is None when the blocks could not be published; decode then computes the prompt again.
    """

    prompt_digest: bytes
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    ticket: SignedTicket | None
    num_cached_tokens: int = 0

    def to_proto(self) -> pb.PrefilledPrompt:
        return pb.PrefilledPrompt(
            prompt_digest=self.prompt_digest,
            num_prompt_tokens=self.num_prompt_tokens,
            token_ids=self.token_ids,
            ticket=self.ticket.to_proto() if self.ticket else None,
            num_cached_tokens=self.num_cached_tokens,
        )

    @classmethod
    def from_proto(cls, message: pb.PrefilledPrompt) -> PrefilledPrompt:
        ticket = SignedTicket.from_proto(message.ticket) if message.HasField("ticket") else None
        ids = tuple(message.token_ids)
        return cls(message.prompt_digest, message.num_prompt_tokens, ids, ticket, message.num_cached_tokens)


@dataclass(frozen=True, slots=True)
class ChoiceTokens:
    """New tokens of one choice and their text."""

    index: int
    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Delivered:
    """How far another worker got with a request.

    `tokens` in the order and grouping in which it sent them; `num_events`: frames with data that were taken from it.
    """

    tokens: tuple[ChoiceTokens, ...] = ()
    num_events: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request over all choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvReport:
    """What became of a ticket. `result`: committed | recomputed | unneeded; `reason` only for recomputed.

    `transport`: of the path to its blocks; engines leave it out.
    """

    ticket_id: str
    result: str
    reason: str = ""
    num_bytes: int = 0
    transfer_s: float = 0.0
    transport: str = ""


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    """A failure inside a stream; never carries prompt text."""

    reason: str
    message: str
    http_status: int = 500
    is_retryable: bool = False

    @classmethod
    def of(cls, error: InferfluxError) -> ErrorDetail:
        """What a caller may know of an error."""
        return cls(error.reason, error.message, error.http_status, error.is_retryable)


@dataclass(frozen=True, slots=True)
class End:
    """The last frame's news: why generation ended, what it cost, or how it failed."""

    finish_reason: str = ""
    usage: Usage = field(default_factory=Usage)
    error: ErrorDetail | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """The next part of one request's response: any mix of head, body bytes and sideband.

    Exactly one frame carries `head` (before any data) and exactly one, the last, carries `end`.
    """

    head: HttpHead | None = None
    data: bytes = b""
    choices: tuple[ChoiceTokens, ...] = ()
    kv: tuple[KvReport, ...] = ()
    end: End | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """Liveness, load and routing input of a worker; sent each 250 ms."""

    incarnation: str
    state: State
    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_free_slots: int = 0
    num_slots: int = 0
    num_live_tickets: int = 0

    def to_proto(self) -> pb.Pulse:
        return pb.Pulse(
            incarnation=self.incarnation,
            state=STATE_TO_PROTO[self.state],
            step=self.step,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_queued_tokens=self.num_queued_tokens,
            num_free_blocks=self.num_free_blocks,
            num_blocks=self.num_blocks,
            num_free_slots=self.num_free_slots,
            num_slots=self.num_slots,
            num_live_tickets=self.num_live_tickets,
        )

    @classmethod
    def from_proto(cls, message: pb.Pulse) -> Pulse:
        return cls(
            message.incarnation,
            STATE_FROM_PROTO[message.state],
            message.step,
            message.num_running,
            message.num_waiting,
            message.num_queued_tokens,
            message.num_free_blocks,
            message.num_blocks,
            message.num_free_slots,
            message.num_slots,
            message.num_live_tickets,
        )


ROLE_TO_PROTO = {
    Role.PREFILL: pb.WORKER_ROLE_PREFILL,
    Role.DECODE: pb.WORKER_ROLE_DECODE,
    Role.POOLING: pb.WORKER_ROLE_POOLING,
}
ROLE_FROM_PROTO = {v: k for k, v in ROLE_TO_PROTO.items()}
STATE_TO_PROTO = {
    State.STARTING: pb.WORKER_STATE_STARTING,
    State.READY: pb.WORKER_STATE_READY,
    State.DRAINING: pb.WORKER_STATE_DRAINING,
    State.FAILED: pb.WORKER_STATE_FAILED,
}
STATE_FROM_PROTO = {v: k for k, v in STATE_TO_PROTO.items()}
KV_RESULT_TO_PROTO = {
    "committed": decode_pb.KV_RESULT_COMMITTED,
    "recomputed": decode_pb.KV_RESULT_RECOMPUTED,
    "unneeded": decode_pb.KV_RESULT_UNNEEDED,
}
KV_RESULT_FROM_PROTO = {v: k for k, v in KV_RESULT_TO_PROTO.items()}


def end_to_proto(end: End) -> decode_pb.End:
    """Convert the last frame's news."""
    usage = pb.Usage(
        prompt_tokens=end.usage.prompt_tokens,
        completion_tokens=end.usage.completion_tokens,
        cached_tokens=end.usage.cached_tokens,
    )
    message = decode_pb.End(finish_reason=end.finish_reason, usage=usage)
    if end.error is not None:
        message.error.reason = end.error.reason
        message.error.message = end.error.message
        message.error.http_status = end.error.http_status
        message.error.is_retryable = end.error.is_retryable
    return message


def end_from_proto(message: decode_pb.End) -> End:
    """Convert the last frame's news."""
    usage = Usage(message.usage.prompt_tokens, message.usage.completion_tokens, message.usage.cached_tokens)
    error = None
    if message.HasField("error"):
        e = message.error
        error = ErrorDetail(e.reason, e.message, e.http_status, e.is_retryable)
    return End(message.finish_reason, usage, error)


def frame_to_proto(handle: int, frame: Frame) -> decode_pb.Delta:
    """Convert one frame of the request `handle`."""
    delta = decode_pb.Delta(handle=handle, data=frame.data)
    if frame.head is not None:
        delta.head.CopyFrom(frame.head.to_proto())
    for choice in frame.choices:
        delta.choices.add(index=choice.index, token_ids=choice.token_ids, text=choice.text)
    for report in frame.kv:
        item = delta.kv.add(
            ticket_id=report.ticket_id,
            result=KV_RESULT_TO_PROTO[report.result],
            reason=report.reason,
            num_bytes=report.num_bytes,
            transport=report.transport,
        )
        item.transfer_time.FromTimedelta(timedelta(seconds=report.transfer_s))
    if frame.end is not None:
        delta.end.CopyFrom(end_to_proto(frame.end))
    return delta


def frame_from_proto(delta: decode_pb.Delta) -> Frame:
    """Convert one delta. The common case, data and tokens of one choice, comes first: it runs once per token."""
    choices = tuple(ChoiceTokens(c.index, tuple(c.token_ids), c.text) for c in delta.choices)
    head = HttpHead.from_proto(delta.head) if delta.HasField("head") else None
    end = end_from_proto(delta.end) if delta.HasField("end") else None
    return Frame(head, delta.data, choices, tuple(map(kv_from_proto, delta.kv)), end)


def kv_from_proto(message: decode_pb.KvReport) -> KvReport:
    """Convert the outcome of one ticket."""
    result, transfer_s = KV_RESULT_FROM_PROTO[message.result], message.transfer_time.ToTimedelta().total_seconds()
    return KvReport(message.ticket_id, result, message.reason, message.num_bytes, transfer_s, message.transport)

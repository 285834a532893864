"""One inference request on its way: what the client asked, who it is, until when, and how far it is."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum

from inferflux.journal import Journal
from inferflux.telemetry import tracing
from inferflux.types import Role, Usage
from inferflux.v1 import types_pb2
from services.gateway.auth import Principal
from services.gateway.endpoints import Endpoint, Kind
from services.gateway.guardrails.guard import Guard
from services.gateway.losses import Losses
from services.gateway.policy import Policy

# Who may answer a call; what any worker of a model knows, any may.
_ANSWERERS = {
    Kind.GENERATE: frozenset({Role.DECODE}),
    Kind.POOLING: frozenset({Role.POOLING}),
    Kind.UTILITY: frozenset({Role.DECODE, Role.POOLING}),
}


class Phase(StrEnum):
    """Where a request is; a label of metrics."""

    READING = "reading"
    ROUTING = "routing"
    PREFILL = "prefill"
    DECODE = "decode"
    STREAM = "stream"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Call:
    """One request. Instants are in the loop's time; `created_s` is Unix time.

    The fields from `phase` on change as it proceeds. `journal`: what it has of its response. `is_recalled`: some of
    that has been sent through another connection. `guard`: what looks at what is said, if anything does.
    `parent`: the model whose workers serve it, if `model` is an adapter.
    """

    request_id: str
    endpoint: Endpoint
    principal: Principal
    model: str
    http: types_pb2.HttpCall
    received_at: float
    deadline_at: float
    policy: Policy = field(default_factory=Policy)
    created_s: int = 0
    is_recalled: bool = False
    parent: str = ""
    traceparent: str = ""
    phase: Phase = Phase.ROUTING
    prefill_worker: str = ""
    decode_worker: str = ""
    num_prompt_tokens: int = 0
    usage: Usage = field(default_factory=Usage)
    journal: Journal = field(default_factory=Journal)
    losses: Losses = field(default_factory=Losses)
    guard: Guard | None = None

    @property
    def needs_prefill(self) -> bool:
        """Whether the call has a prompt to compute."""
        return self.endpoint.kind is Kind.GENERATE

    @property
    def answerers(self) -> frozenset[Role]:
        """The roles of the workers that can answer it."""
        return _ANSWERERS[self.endpoint.kind]

    @property
    def adapter(self) -> str:
        """The adapter that it asks for; empty: none."""
        return self.model if self.parent else ""

    def span(self, name: str) -> AbstractContextManager[tracing.Span]:
        """Open a span of this request."""
        return tracing.start_span(name, self.traceparent)

    def context(self, span: tracing.Span) -> types_pb2.RequestContext:
        """Make what the next hop must know, with the time that is left now."""
        context = types_pb2.RequestContext(
            request_id=self.request_id,
            tenant=self.principal.tenant,
            cache_salt=self.principal.cache_salt,
            traceparent=span.traceparent,
            priority=self.principal.priority,
            created=self.created_s,
            adapter=self.adapter,
        )
        time_left_s = max(0.0, self.deadline_at - asyncio.get_running_loop().time())
        context.time_left.FromMilliseconds(int(time_left_s * 1000))
        return context

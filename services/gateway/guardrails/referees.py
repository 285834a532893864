"""Those outside this process who are asked for verdicts: guardrail workers and an OPA server. Both may be absent."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import grpc

from inferflux.errors import Unavailable
from inferflux.policy.guardrails import EntitiesRule, InjectionRule, ModelRule, OpaRule
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.v1 import guard_service_pb2 as pb
from inferflux.v1.guard_service_pb2_grpc import GuardServiceStub
from services.gateway.guardrails.code import OpaCode


class Finding(NamedTuple):
    """A part of a text that a guardrail worker found, by the number of the text."""

    text: int
    start: int
    end: int
    label: str


class Referees:
    """Connects with the first question. Use it in an `async with` block."""

    def __init__(self, identity: Identity | None = None, guardrails_address: str = "", opa_url: str = "") -> None:
        self._identity = identity
        self._address = guardrails_address
        self._opa_url = opa_url
        self._channel: grpc.aio.Channel | None = None
        self._opa: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close(None)
        if self._opa is not None:
            await self._opa.aclose()

    async def judge(self, rule: ModelRule, texts: list[str]) -> list[Finding]:
        """Ask a guardrail worker. Raises grpc.RpcError, or Unavailable when there is none."""
        request = pb.JudgeRequest(kind=rule.kind, texts=texts, threshold=rule.threshold)
        if isinstance(rule, EntitiesRule):
            request.types.extend(rule.types)
        if isinstance(rule, InjectionRule):
            request.examples.extend(rule.examples)
        response = await self._stub().Judge(request, timeout=rule.deadline_ms / 1000)
        return [Finding(m.text, m.start, m.end, m.label) for m in response.matches]

    def opa(self, rule: OpaRule) -> OpaCode:
        """Return the decision that an OPA server makes. Raises Unavailable when there is none."""
        if not self._opa_url:
            raise Unavailable("INFERFLUX_OPA_URL is not set")
        if self._opa is None:
            import httpx  # noqa: PLC0415 - 20 MB, and few gateways ask an OPA server

            self._opa = httpx.AsyncClient(base_url=self._opa_url, follow_redirects=False, trust_env=False)
        return OpaCode(self._opa, rule.path)

    def _stub(self) -> Any:
        if not self._address or self._identity is None:
            raise Unavailable("INFERFLUX_GUARDRAILS_ADDRESS is not set")
        if self._channel is None:
            self._channel = open_channel(self._address, self._identity, "guardrails")
        return GuardServiceStub(self._channel)

"""From the tickets of a request to blocks that its engine may read. The last check before KV becomes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inferflux import tickets
from inferflux.engine.base import KvSource
from inferflux.errors import KvError
from inferflux.types import KvReport, ModelFingerprint, PrefilledPrompt, RequestContext, SignedTicket


class TicketGate:
    """Lets through the tickets that were signed for this request and this model. Pure."""

    def __init__(self, key: bytes, fingerprint: ModelFingerprint) -> None:
        self._key = key
        self._fingerprint = fingerprint

    def admit(
        self, context: RequestContext, prompts: Sequence[PrefilledPrompt]
    ) -> tuple[list[KvSource], list[KvReport]]:
        """Sources for the engine, and a report for each ticket that is refused."""
        sources: list[KvSource] = []
        refused: list[KvReport] = []
        for prompt in prompts:
            if prompt.ticket is None:
                continue
            try:
                sources.append(self._source(context, prompt, prompt.ticket))
            except KvError as e:
                refused.append(KvReport(prompt.ticket.ticket_id, "recomputed", e.kv_reason))
        return sources, refused

    def _source(self, context: RequestContext, prompt: PrefilledPrompt, signed: SignedTicket) -> KvSource:
        ticket = tickets.verify(signed, self._key)
        tickets.check(
            ticket,
            request_id=context.request_id,
            tenant=context.tenant,
            prompt_digest=prompt.prompt_digest,
            fingerprint=replace(self._fingerprint, adapter=context.adapter_digest),
        )
        return replace(ticket.to_source(prompt.token_ids), num_cached_tokens=prompt.num_cached_tokens)

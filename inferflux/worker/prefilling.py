"""One request on a prefill worker, from the call to its tickets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from inferflux.engine.base import ComputedPrompt, Prefilled
from inferflux.errors import KvError
from inferflux.kv.arena import Arena
from inferflux.telemetry import logs, metrics, tracing
from inferflux.tickets import TicketBook
from inferflux.types import HttpAnswer, HttpCall, PrefilledPrompt, RequestContext, SignedTicket
from inferflux.worker.deadline import deadline
from inferflux.worker.leases import SessionLeases
from inferflux.worker.record import RequestRecord
from inferflux.worker.worker import Worker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompts:
    """All prompts of a call, computed."""

    prompts: tuple[PrefilledPrompt, ...]
    engine_s: float


class Prefiller:
    """Computes prompts and owns the way of their slots into the ticket book. Safe concurrently."""

    def __init__(self, worker: Worker, book: TicketBook, arena: Arena, leases: SessionLeases) -> None:
        self._worker = worker
        self._book = book
        self._arena = arena
        self._leases = leases

    async def prefill(self, context: RequestContext, call: HttpCall, session_id: str) -> Prompts | HttpAnswer:
        """Compute the prompts of a call and issue their tickets. Cancelling frees everything."""
        with self._running(context, call) as record, self._book.prefilling():
            result = await self._compute(context, call)
            if isinstance(result, HttpAnswer):
                record.status = result.head.status
                return result
            # The session's stream may not be open yet: its tickets get the grace.
            self._leases.touch(session_id)
            prompts = tuple(self._prefilled(context, session_id, prompt) for prompt in result.prompts)
            return Prompts(prompts, result.engine_s)

    async def warm(self, context: RequestContext, call: HttpCall) -> int | HttpAnswer:
        """Compute the prompts of a call so that the engine has them cached; returns their length in tokens."""
        with self._running(context, call) as record, self._book.prefilling():
            result = await self._compute(context, call)
            if isinstance(result, HttpAnswer):
                record.status = result.head.status
                return result
            for prompt in result.prompts:
                if prompt.kv is not None:
                    self._arena.free(prompt.kv.slots)
            return sum(prompt.num_prompt_tokens for prompt in result.prompts)

    def release(self, ticket_ids: Sequence[str], request_ids: Sequence[str], why: str) -> int:
        """End tickets by their ids and by their requests'. Idempotent; returns how many were live."""
        wanted = set(request_ids)
        lost = [record.ticket_id for record in self._book.list() if record.request_id in wanted] if wanted else []
        return self._book.release([*ticket_ids, *lost], why)

    async def _compute(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        attributes = {"inferflux.request_id": context.request_id, "gen_ai.request.model": self._worker.info.model}
        with tracing.start_span("prefill", context.traceparent, attributes) as span:
            async with deadline(context.time_left_s):
                result = await self._worker.engine.prefill(context, call)
            if isinstance(result, Prefilled):
                num_tokens = sum(prompt.num_prompt_tokens for prompt in result.prompts)
                metrics.TOKENS.labels("prompt", self._worker.info.model).inc(num_tokens)
                span.set("gen_ai.usage.input_tokens", num_tokens)
            return result

    def _prefilled(self, context: RequestContext, session_id: str, prompt: ComputedPrompt) -> PrefilledPrompt:
        ticket = self._ticket(context, session_id, prompt)
        return PrefilledPrompt(
            prompt.prompt_digest, prompt.num_prompt_tokens, prompt.token_ids, ticket, prompt.num_cached_tokens
        )

    def _ticket(self, context: RequestContext, session_id: str, prompt: ComputedPrompt) -> SignedTicket | None:
        """None when there are no blocks to read: decode computes the prompt again."""
        if prompt.kv is None:
            metrics.KV_REJECTED.labels("arena_full").inc()
            return None
        try:
            return self._book.issue(context, session_id, prompt)
        except KvError as e:
            _log.warning("no ticket", extra={"reason": e.reason})
            return None

    @contextmanager
    def _running(self, context: RequestContext, call: HttpCall) -> Iterator[RequestRecord]:
        """Admit the request and count how it went."""
        record = RequestRecord(self._worker.role, call.path)
        with record, logs.request_id(context.request_id), self._worker.work.running():
            yield record

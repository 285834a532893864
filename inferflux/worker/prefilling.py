"""One request on a prefill worker, from the call to its tickets."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from inferflux import failpoints
from inferflux.engine.base import ComputedPrompt, Prefilled
from inferflux.errors import InvalidRequest, KvError
from inferflux.kv.prefixes import PrefixStore
from inferflux.telemetry import logs, metrics, tracing
from inferflux.tickets import Claimant, TicketBook
from inferflux.types import HttpAnswer, HttpCall, PrefilledPrompt, RequestContext, SignedTicket
from inferflux.worker.deadline import deadline
from inferflux.worker.leases import SessionLeases
from inferflux.worker.prefixes import CacheStatus, PrefixTally
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

    def __init__(
        self, worker: Worker, book: TicketBook, prefixes: PrefixStore, tally: PrefixTally, leases: SessionLeases
    ) -> None:
        self._worker = worker
        self._book = book
        self._prefixes = prefixes
        self._tally = tally
        self._leases = leases

    async def prefill(self, context: RequestContext, call: HttpCall, session_id: str) -> Prompts | HttpAnswer:
        """Compute the prompts of a call and issue their tickets. Cancelling frees everything."""
        running, adapting = self._running(context, call), self._worker.using(context)
        with running as record, self._book.prefilling(), adapting as adapted:
            if failpoints.ON:
                failpoints.hit("prefill.start")
            result = await self._compute(adapted, call)
            if isinstance(result, HttpAnswer):
                record.status = result.head.status
                return result
            with self._handing_over(result) as computed:
                if failpoints.ON:
                    failpoints.hit("prefill.computed")
                # The session's stream may not be open yet: its tickets get the grace.
                self._leases.touch(session_id)
                prompts = tuple(self._prefilled(adapted, session_id, prompt) for prompt in computed)
            if failpoints.ON:
                failpoints.hit("ticket.issued")
            return Prompts(prompts, result.engine_s)

    async def warm(self, context: RequestContext, call: HttpCall, pin: str = "") -> int | HttpAnswer:
        """Compute the prompts of a call so that later prompts find them; returns how many tokens are cached.

        `pin` keeps them under this name until `unpin`. Raises InvalidRequest when there is nothing to keep, Conflict
        when the pins' quota is used up.
        """
        running, adapting = self._running(context, call), self._worker.using(context)
        with running as record, self._book.prefilling(), adapting as adapted:
            result = await self._compute(adapted, call)
            if isinstance(result, HttpAnswer):
                record.status = result.head.status
                return result
            slots: list[int] = []
            try:
                with self._handing_over(result) as computed:
                    for prompt in computed:
                        slots += self._adopted(prompt)
                named = self._prefixes.named(slots)
                if pin:
                    self._pin(pin, named)
                return len(set(named)) * self._block_size
            finally:
                self._prefixes.release(slots)

    def unpin(self, name: str) -> bool:
        """Let a pinned prefix go; tells whether there was one."""
        return self._prefixes.unpin(name)

    def cache_status(self) -> CacheStatus:
        """What the prefix store holds and did."""
        return self._tally.status(self._prefixes, self._block_size)

    def claim(self, ticket_id: str, claimant: Claimant, incarnation: str) -> str:
        """Reserve a ticket for a reader; "" when it is granted, else the reason why not."""
        return _refusal(lambda: self._book.claim(ticket_id, claimant, incarnation))

    def commit(self, ticket_id: str, claimant: Claimant, incarnation: str) -> str:
        """Note that a reader has a ticket's blocks; answers as `claim`."""
        return _refusal(lambda: self._book.commit(ticket_id, claimant, incarnation))

    def release(self, ticket_ids: Sequence[str], request_ids: Sequence[str], why: str) -> int:
        """End tickets by their ids and by their requests'. Idempotent; returns how many were live."""
        if failpoints.ON:
            failpoints.hit("ticket.released")
        wanted = set(request_ids)
        lost = [record.ticket_id for record in self._book.list() if record.request_id in wanted] if wanted else []
        return self._book.release([*ticket_ids, *lost], why)

    async def _compute(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        attributes = {"inferflux.request_id": context.request_id, "gen_ai.request.model": self._worker.info.model}
        with tracing.start_span("prefill", context.traceparent, attributes) as span:
            async with deadline(context.time_left_s):
                result = await self._worker.engine.prefill(context, call)
            if isinstance(result, Prefilled):
                for prompt in result.prompts:
                    self._tally.observe(prompt, self._block_size)
                num_tokens = sum(prompt.num_prompt_tokens for prompt in result.prompts)
                metrics.TOKENS.labels("prompt", self._worker.info.model).inc(num_tokens)
                self._worker.meter.add(num_tokens, result.engine_s)
                span.set("gen_ai.usage.input_tokens", num_tokens)
            return result

    @contextmanager
    def _handing_over(self, result: Prefilled) -> Iterator[Iterator[ComputedPrompt]]:
        """Yield the prompts for somebody to take their slots over; those that nobody got to are freed."""
        left = deque(result.prompts)
        try:
            yield (left.popleft() for _ in result.prompts)
        finally:
            for prompt in left:
                with suppress(KvError):
                    self._prefixes.release(self._adopted(prompt))

    def _adopted(self, prompt: ComputedPrompt) -> tuple[int, ...]:
        """The prompt's slots, held."""
        if prompt.kv is None:
            return ()
        self._prefixes.adopt(prompt.kv.slots, prompt.kv.block_hashes, prompt.kv.num_shared)
        return prompt.kv.slots

    def _pin(self, name: str, slots: Sequence[int]) -> None:
        if not slots:
            raise InvalidRequest(
                f"nothing to pin: the prompt fills no block of {self._block_size} tokens, or has no room"
            )
        self._prefixes.pin(name, slots)

    @property
    def _block_size(self) -> int:
        return self._worker.info.fingerprint.block_size

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


def _refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except KvError as e:
        return e.kv_reason
    return ""

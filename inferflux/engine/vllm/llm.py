"""vLLM's client with tickets: the same `generate` for the application, bent per API call by a `Phase`.

The application neither knows nor cares: it renders prompts, calls `generate` and formats what comes. A context variable
says which API call we are in, so that calls that run several prompts (or none) work alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM

from inferflux.engine.base import ComputedPrompt, KvSource, PublishedKv
from inferflux.engine.vllm import transfer
from inferflux.engine.vllm.plugin import delivered_tokens
from inferflux.errors import Conflict
from inferflux.kv.digests import prompt_digest
from inferflux.types import ChoiceTokens, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vllm.outputs import RequestOutput

    from inferflux.kv.arena import Arena

PHASE: ContextVar[Phase | None] = ContextVar("inferflux_phase", default=None)


class Phase(ABC):
    """What one API call does to the prompts that the application generates from."""

    def __init__(self, cache_salt: str, priority: int) -> None:
        self.cache_salt = cache_salt
        self.priority = priority

    def salted(self, prompt: Any) -> Any:
        """Separate the prefix caches of tenants, whatever the client asked for."""
        return {**prompt, "cache_salt": self.cache_salt} if isinstance(prompt, dict) and self.cache_salt else prompt

    @abstractmethod
    def params(self, prompt: Any, params: SamplingParams) -> SamplingParams:
        """Bend the sampling parameters, a copy of the client's, into what the engine gets."""

    @abstractmethod
    def observe(self, output: RequestOutput) -> None:
        """See an output before the application does."""


class PrefillPhase(Phase):
    """Compute the prompt, sample one token, leave the blocks in the arena."""

    def __init__(self, cache_salt: str, priority: int, arena: Arena | None) -> None:
        super().__init__(cache_salt, priority)
        self._arena = arena
        self.prompts: list[ComputedPrompt] = []

    def params(self, prompt: Any, params: SamplingParams) -> SamplingParams:
        if self.prompts:
            raise Conflict("prefill is over: the application asks for more after the first tokens (beams, tool turns)")
        params.n, params.max_tokens, params.stop = 1, 1, []
        params.structured_outputs = None
        params.output_kind = RequestOutputKind.FINAL_ONLY
        # Log-probabilities of the prompt need its forward pass on the worker that answers: no use for a ticket.
        publish = params.prompt_logprobs is None
        params.extra_args = {**(params.extra_args or {}), transfer.PARAMS: {transfer.PUBLISH: publish}}
        return params

    def observe(self, output: RequestOutput) -> None:
        ids = output.prompt_token_ids or []
        published = output.kv_transfer_params or {}
        slots = tuple(published.get(transfer.SLOTS, ()))
        kv = None
        if slots and self._arena is not None:
            kv = PublishedKv(slots, tuple(self._arena.digest(slot) for slot in slots), len(ids))
        sampled, num_cached = tuple(output.outputs[0].token_ids), published.get(transfer.CACHED) or 0
        self.prompts.append(ComputedPrompt(prompt_digest(ids), len(ids), sampled, kv, num_cached))


class DecodePhase(Phase):
    """Continue from another worker's blocks where a source matches the prompt."""

    def __init__(self, cache_salt: str, priority: int, sources: Sequence[KvSource]) -> None:
        super().__init__(cache_salt, priority)
        self._sources = list(sources)
        self.num_loads: dict[str, int] = {}
        self._tokens: list[ChoiceTokens] = []
        self._num_output: dict[tuple[str, int], int] = {}
        self._num_prompt: dict[str, int] = {}
        self._num_cached = 0
        self.finish_reason = ""
        self.has_failed = False

    def params(self, prompt: Any, params: SamplingParams) -> SamplingParams:
        source = self._take_source(prompt) if params.prompt_logprobs is None else None
        if source is None:
            return params
        self.num_loads[source.ticket_id] = params.n
        params.extra_args = {**(params.extra_args or {}), transfer.PARAMS: transfer.source_to_params(source)}
        if may_trust_first_token(params, source):
            params.extra_args[transfer.DELIVERED] = list(source.first_token_ids)
        return params

    def _take_source(self, prompt: Any) -> KvSource | None:
        """Each source serves one prompt: equal prompts of one call have a ticket and a first token each."""
        if not self._sources:
            return None
        digest = prompt_digest(prompt_ids(prompt))
        source = next((source for source in self._sources if source.prompt_digest == digest), None)
        if source is not None:
            self._sources.remove(source)
        return source

    def observe(self, output: RequestOutput) -> None:
        self._num_prompt[output.request_id] = len(output.prompt_token_ids or ())
        self._num_cached = max(self._num_cached, output.num_cached_tokens or 0)
        for choice in output.outputs:
            ids = tuple(choice.token_ids)
            key = (output.request_id, choice.index)
            self._num_output[key] = self._num_output.get(key, 0) + len(ids)
            self._tokens.append(ChoiceTokens(choice.index, ids, choice.text))
            if choice.finish_reason == "error":
                self.has_failed = True
            if choice.finish_reason and choice.index == 0:
                self.finish_reason = choice.finish_reason

    def take_tokens(self) -> tuple[ChoiceTokens, ...]:
        """Tokens observed since the last call."""
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    @property
    def usage(self) -> Usage:
        return Usage(sum(self._num_prompt.values()), sum(self._num_output.values()), self._num_cached)


def prompt_ids(prompt: Any) -> Sequence[int]:
    """Token ids of a rendered prompt; empty for prompts without (embeddings)."""
    return (prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else ()


def may_trust_first_token(params: SamplingParams, source: KvSource) -> bool:
    """Whether prefill's token is exactly what sampling here would give, with no state to carry over.

    Greedy, or random without a seed (one fair draw is as good as another). The rest samples again: a seeded generator
    would have to be advanced, a grammar fed, log-probabilities shipped.
    """
    return (
        bool(source.first_token_ids)
        and (params.temperature == 0 or params.seed is None)
        and params.n == 1
        and (params.max_tokens or 0) > 1
        and params.logprobs is None
        and params.prompt_logprobs is None
        and params.structured_outputs is None
        and params.thinking_token_budget is None
    )


def ends_request(token_ids: Sequence[int], params: SamplingParams) -> bool:
    """Whether one of the tokens may end the request: left to the scheduler, which knows all the ways to end."""
    return bool({params.eos_token_id, *params.all_stop_token_ids}.intersection(token_ids))


class TicketLLM(AsyncLLM):
    """AsyncLLM whose `generate` asks the current phase first."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like AsyncLLM.generate; each output passes the phase before it reaches the application."""
        phase = PHASE.get()
        if phase is not None:
            prompt, sampling_params = phase.salted(prompt), sampling_params.clone()
            sampling_params.extra_args = transfer.without_client_values(sampling_params.extra_args)
            sampling_params = phase.params(prompt, sampling_params)
            kwargs["priority"] = phase.priority
        async for output in super().generate(prompt, sampling_params, request_id, **kwargs):
            if phase is not None:
                phase.observe(output)
            yield output

    async def _add_request(self, request: Any, prompt: Any, parent_req: Any, index: int, queue: Any) -> None:
        """Give the application the tokens sampled elsewhere at once, then let the engine go on after them."""
        delivered = delivered_tokens(request.sampling_params)
        if delivered and ends_request(delivered, request.sampling_params):
            del request.sampling_params.extra_args[transfer.DELIVERED]
            delivered = ()
        if not delivered:
            await super()._add_request(request, prompt, parent_req, index, queue)
            return
        self.check_admission(request_id=request.request_id)
        self.output_processor.add_request(request, prompt, parent_req, index, queue)
        first = EngineCoreOutput(request_id=request.request_id, new_token_ids=list(delivered))
        if self.output_processor.process_outputs([first]).reqs_to_abort:
            return  # a stop string ended it
        # The engine's own first output still brings the prefill statistics.
        self.output_processor.request_states[request.request_id].is_prefilling = True
        await self.engine_core.add_request_async(request)

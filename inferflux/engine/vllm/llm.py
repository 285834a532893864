"""vLLM's client with tickets: the same `generate` for the application, bent per API call by a `Phase`.

The application neither knows nor cares: it renders prompts, calls `generate` and formats what comes. A context variable
says which API call we are in, so that calls that run several prompts (or none) work alike.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from contextvars import ContextVar
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from inferflux.engine.base import ComputedPrompt, KvSource, PublishedKv
from inferflux.engine.vllm import transfer
from inferflux.engine.vllm.pooling import PoolingPhase
from inferflux.engine.vllm.replay import Group, ReplayQueue, Turns, in_order, replay
from inferflux.errors import Conflict, InferfluxError, InvalidRequest, KvError, Unavailable
from inferflux.kv.digests import prompt_digest
from inferflux.types import ChoiceTokens, Delivered, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from vllm.lora.request import LoRARequest
    from vllm.outputs import PoolingRequestOutput, RequestOutput
    from vllm.pooling_params import PoolingParams

    from inferflux.engine.prefix import Prefixes
    from inferflux.engine.vllm.grammars import Grammars
    from inferflux.kv.prefixes import Opening

PHASE: ContextVar[Phase | PoolingPhase | None] = ContextVar("inferflux_phase", default=None)
COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
COMPLETION = re.compile(rb'data: \{[^\[{]*"choices":\[\{"index":(\d+)')
OPENING = b'"delta":{"role":"assistant","content":""}'


class Phase(ABC):
    """What one API call does to the prompts that the application generates from."""

    def __init__(self, cache_salt: str, priority: int) -> None:
        self.cache_salt = cache_salt
        self.priority = priority
        self.refusal: InferfluxError | None = None  # told in vain to an application that answers in its own words
        self.adapter = ""
        self.lora: LoRARequest | None = None

    def salted(self, prompt: Any) -> Any:
        """Separate the prefix caches of tenants, whatever the client asked for."""
        return {**prompt, "cache_salt": self.cache_salt} if isinstance(prompt, dict) and self.cache_salt else prompt

    def adapted(self, asked: LoRARequest | None) -> LoRARequest | None:
        """Put the version of the adapter with which the call began in place of what its name means by now."""
        name = asked.lora_name if asked is not None else ""
        if name != self.adapter:
            raise InvalidRequest(f"the call names adapter {name!r}, it was routed for {self.adapter!r}", param="model")
        return self.lora

    def begin(self, request_id: str, num_choices: int) -> None:  # noqa: B027 - most have nothing to note
        """Take note that the application is about to generate."""

    def prepare(self, request_id: str, prompt: Any, params: SamplingParams) -> None:  # noqa: B027
        """See a request just before the engine does; may add to `params`."""

    @abstractmethod
    def params(self, request_id: str, prompt: Any, params: SamplingParams) -> SamplingParams:
        """Bend the sampling parameters, a copy of the client's, into what the engine gets."""

    async def admit(self, params: SamplingParams) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait for what must be known before the engine sees a request; may change `params`."""

    @abstractmethod
    def observe(self, request_id: str, output: RequestOutput) -> None:
        """See an output before the application does."""


class PrefillPhase(Phase):
    """Compute the prompt, sample one token, leave the blocks in the arena. `prefixes` None: there is no arena."""

    def __init__(self, cache_salt: str, priority: int, prefixes: Prefixes | None) -> None:
        super().__init__(cache_salt, priority)
        self._prefixes = prefixes
        self._openings: dict[str, Opening] = {}
        self._digests: dict[str, bytes] = {}
        self.prompts: list[ComputedPrompt] = []

    def params(self, request_id: str, prompt: Any, params: SamplingParams) -> SamplingParams:
        if self.prompts:
            raise Conflict("prefill is over: the application asks for more after the first tokens (beams, tool turns)")
        params.n, params.max_tokens, params.stop = 1, 1, []
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        params.structured_outputs = None
        params.output_kind = RequestOutputKind.FINAL_ONLY
        return params

    def prepare(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        """Tell the connector what to publish, and what of it is there already."""
        self._digests[request_id] = digest(prompt)
        # Log-probabilities of the prompt need its forward pass on the worker that answers: no use for a ticket.
        if self._prefixes is None or params.prompt_logprobs is not None:
            return
        opening = self._openings[request_id] = self._prefixes.open(salt(prompt, self.cache_salt), prompt_ids(prompt))
        source = self._prefixes.source(opening, f"prefix/{request_id}")
        connector_params: dict[str, Any] = {transfer.PUBLISH: True, transfer.SHARED: list(opening.shared)}
        if source is not None:
            connector_params[transfer.SOURCE] = transfer.plain(source)
        params.extra_args = {**(params.extra_args or {}), transfer.PARAMS: connector_params}

    def observe(self, request_id: str, output: RequestOutput) -> None:
        ids = output.prompt_token_ids or []
        published = output.kv_transfer_params or {}
        opening, num_read = self._openings.pop(request_id, None), published.get(transfer.NUM_READ, 0)
        if num_read == transfer.FAILED and self._prefixes is not None and opening is not None:
            self._prefixes.reject(opening)
        self.prompts.append(
            ComputedPrompt(
                prompt_digest=self._digests.pop(request_id),
                num_prompt_tokens=len(ids),
                token_ids=tuple(output.outputs[0].token_ids),
                kv=self._publish(opening, published.get(transfer.SLOTS, ()), len(ids)),
                num_cached_tokens=published.get(transfer.CACHED) or 0,
                num_read_tokens=max(num_read, 0),
                is_from_peer=opening is not None and opening.is_peer,
                has_failed_read=num_read == transfer.FAILED,
            )
        )

    def _publish(self, opening: Opening | None, slots: Sequence[int], num_tokens: int) -> PublishedKv | None:
        if self._prefixes is None or opening is None:
            return None
        if not slots:
            self._prefixes.discard(opening)
            return None
        return self._prefixes.publish(opening, slots, num_tokens)

    def close(self) -> None:
        """Let go of what prompts hold that never came to their end. Idempotent."""
        while self._openings and self._prefixes is not None:
            self._prefixes.discard(self._openings.popitem()[1])

    def give_up(self) -> None:
        """Free what was published: nobody will receive it."""
        for prompt in self.prompts:
            if prompt.kv is not None and self._prefixes is not None:
                self._prefixes.give_up(prompt.kv)


class DecodePhase(Phase):
    """Continue from another worker's blocks where a source matches the prompt, and after the tokens it delivered.

    Choices are numbered over all prompts of the call, in the order in which the application asks for them. `report`:
    hears of sources that must not be read; the engine sets it.
    """

    def __init__(
        self,
        cache_salt: str,
        priority: int,
        sources: Sequence[KvSource],
        past: Delivered | None = None,
        path: str = "",
    ) -> None:
        super().__init__(cache_salt, priority)
        self._path = path
        self._sources = list(sources)
        self._claims = {source.ticket_id: source.claim for source in sources}
        self.report: Callable[[transfer.Report], None] | None = None
        self.num_loads: dict[str, int] = {}
        self.turns = Turns()
        self.replayed: dict[str, list[tuple[int, RequestOutput]]] = {}
        self._groups: dict[int, list[Group]] = {}
        for turn, part in enumerate(part for part in (past or Delivered()).tokens if part.token_ids):
            self._groups.setdefault(part.index, []).append((turn, part.token_ids))
        self._first_tokens: dict[int, tuple[int, ...]] = {}
        self._num_choices = 0
        self._first_choice: dict[str, int] = {}
        self._num_known: dict[int, int] = {}
        self._tokens: list[ChoiceTokens] = []
        self._num_output: dict[int, int] = {}
        self._num_prompt: dict[str, int] = {}
        self._num_cached = 0
        self.finish_reason = ""
        self.has_failed = False

    def begin(self, request_id: str, num_choices: int) -> None:
        self._first_choice[request_id] = self._num_choices
        self._num_choices += num_choices
        self.turns.num = sum(len(self._groups.get(index, ())) for index in range(self._num_choices))

    def params(self, request_id: str, prompt: Any, params: SamplingParams) -> SamplingParams:
        self._require_resumable(params)
        source = self._take_source(prompt) if params.prompt_logprobs is None else None
        if source is not None:
            self.num_loads[source.ticket_id] = params.n
            params.extra_args = {**(params.extra_args or {}), transfer.PARAMS: transfer.source_to_params(source)}
        first = self._first_choice[request_id]
        for index in range(first, first + params.n):
            self._num_known[index] = sum(len(ids) for _, ids in self._groups.get(index, ()))
        if source is not None and may_trust_first_token(params, source):
            self._first_tokens[first] = source.first_token_ids
        return params

    def _require_resumable(self, params: SamplingParams) -> None:
        if not self._groups:
            return
        if params.output_kind != RequestOutputKind.DELTA:
            self._groups.clear()  # nothing of a response that is not streamed has been told: it begins again
            self.turns.num = 0
            return
        if (index := max(self._groups)) >= self._num_choices:
            raise InvalidRequest(f"delivered tokens of choice {index}, the call has {self._num_choices} choices")
        if mode := unresumable_mode(params, self._path):
            raise Unavailable(f"the vllm engine can't continue a request with {mode} after delivered tokens")

    def groups(self, request_id: str, index: int) -> list[Group]:
        """Tokens of one choice of a prompt that were sampled elsewhere: delivered, or else prefill's first."""
        choice = self._first_choice[request_id] + index
        if choice in self._groups or choice not in self._first_tokens:
            return self._groups.get(choice, [])
        return [(self.turns.num, self._first_tokens[choice])]  # new to the client: after all that it has

    @property
    def is_resumed(self) -> bool:
        return self.turns.num > 0

    async def admit(self, params: SamplingParams) -> None:
        """Wait for the claim of the source in `params`; the prompt of a refused one is computed here."""
        source = transfer.source_from_params((params.extra_args or {}).get(transfer.PARAMS))
        claim = self._claims.get(source.ticket_id) if source is not None else None
        if source is None or claim is None:
            return
        try:
            await claim()
        except KvError as e:
            self.num_loads[source.ticket_id] = 1
            params.extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != transfer.PARAMS}
            if self.report is not None:
                self.report(transfer.Report(source.ticket_id, "recomputed", e.kv_reason))

    def _take_source(self, prompt: Any) -> KvSource | None:
        """Each source serves one prompt: equal prompts of one call have a ticket and a first token each."""
        if not self._sources:
            return None
        wanted = digest(prompt)
        source = next((source for source in self._sources if source.prompt_digest == wanted), None)
        if source is not None:
            self._sources.remove(source)
        return source

    def observe(self, request_id: str, output: RequestOutput) -> None:
        num_prompt = len(output.prompt_token_ids or ())
        self._num_prompt[request_id] = num_prompt
        self._num_cached = max(self._num_cached, min(output.num_cached_tokens or 0, num_prompt))
        for choice in output.outputs:
            index, ids = self._first_choice[request_id] + choice.index, tuple(choice.token_ids)
            self._num_output[index] = self._num_output.get(index, 0) + len(ids)
            if ids and self._num_output[index] > self._num_known[index]:
                self._tokens.append(ChoiceTokens(index, ids, choice.text))
            if choice.finish_reason == "error":
                self.has_failed = True
            if choice.finish_reason and index == 0:
                self.finish_reason = choice.finish_reason

    def take_tokens(self, data: bytes = b"") -> tuple[ChoiceTokens, ...]:
        """Tokens observed since the last call, for the event `data`: its tokens come with an event, never after it.

        The event that opens a chat's choice says nothing of them: they come with the next. Prompts of one call are
        read side by side and written one by one: there each event says whose tokens it brings.
        """
        if OPENING in data:
            return ()
        if self._path == COMPLETIONS and (event := COMPLETION.match(data)):
            return self._take_group(int(event[1]))
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def _take_group(self, index: int) -> tuple[ChoiceTokens, ...]:
        group = next((tokens for tokens in self._tokens if tokens.index == index), None)
        if group is None:
            return ()
        self._tokens.remove(group)
        return (group,)

    @property
    def usage(self) -> Usage:
        return Usage(sum(self._num_prompt.values()), sum(self._num_output.values()), self._num_cached)


def digest(prompt: Any) -> bytes:
    """What names a rendered prompt: its token ids, and the images between them."""
    return prompt_digest(prompt_ids(prompt), media(prompt))


def salt(prompt: Any, of_tenant: str) -> str:
    """What keeps apart the prefixes of prompts that may have the same ids; empty: nobody may share this one's."""
    kind = prompt.get("type") if isinstance(prompt, dict) else None
    if kind not in ("token", "multimodal") or not of_tenant:
        return ""
    return f"{of_tenant}/{named}" if (named := media(prompt)) else of_tenant


def media(prompt: Any) -> str:
    """Name the images of a rendered prompt, by hashes of their content and processing, and where they are; empty: none.

    Different images have the same placeholders. The hashes are vLLM's own, as in the keys of its prefix cache.
    """
    if not isinstance(prompt, dict) or prompt.get("type") != "multimodal":
        return ""
    named = [
        f"{modality}@{place.offset}+{place.length}={name}"
        for modality, names in sorted(prompt["mm_hashes"].items())
        for name, place in zip(names, prompt["mm_placeholders"][modality], strict=True)
    ]
    return ",".join(named)


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


def unresumable_mode(params: SamplingParams, path: str) -> str:
    """What of a request needs more than its tokens to be written again; empty: nothing."""
    if path == RESPONSES and params.logprobs is not None:
        return "logprobs that are repeated at the end"
    if params.prompt_logprobs is not None:
        return "prompt_logprobs"
    if params.logprob_token_ids:
        return "logprob_token_ids"
    if params.thinking_token_budget is not None:
        return "thinking_token_budget"
    return ""


class TicketLLM(AsyncLLM):
    """AsyncLLM whose `generate` asks the current phase first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send = self.engine_core.add_request_async
        self._sending: set[asyncio.Task[None]] = set()
        self.grammars: Grammars | None = None
        self.engine_core.add_request_async = self._submit

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like AsyncLLM.generate; each output passes the phase before it reaches the application."""
        phase = PHASE.get()
        if not isinstance(phase, Phase):
            return super().generate(prompt, sampling_params, request_id, **kwargs)
        phase.begin(request_id, sampling_params.n)
        return self._generate(phase, prompt, sampling_params.clone(), request_id, **kwargs)

    async def _generate(
        self, phase: Phase, prompt: Any, params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        params.extra_args = transfer.without_client_values(params.extra_args)
        try:
            kwargs["lora_request"] = phase.adapted(kwargs.get("lora_request"))
            if self.grammars is not None:
                await self.grammars.admit(params.structured_outputs)
            prompt, params = phase.salted(prompt), phase.params(request_id, prompt, params)
            params._verify_args()  # noqa: SLF001 - the engine core does so too, and ends when they are wrong
        except InferfluxError as e:
            phase.refusal = e
            raise
        phase.prepare(request_id, prompt, params)
        kwargs["priority"] = phase.priority
        async for output in super().generate(prompt, params, request_id, **kwargs):
            for part in parts(output, params):
                phase.observe(request_id, part)
                yield part

    def encode(
        self, prompt: Any, pooling_params: PoolingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Like AsyncLLM.encode; the phase sees each output before the application does."""
        phase = PHASE.get()
        if not isinstance(phase, PoolingPhase):
            return super().encode(prompt, pooling_params, request_id, **kwargs)
        kwargs["priority"] = phase.priority
        outputs = super().encode(phase.salted(prompt), pooling_params, request_id, **kwargs)
        return phase.observed(request_id, outputs)

    async def add_request(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """Like AsyncLLM.add_request; what is written again comes before what the engine says."""
        queue, phase = await super().add_request(request_id, *args, **kwargs), PHASE.get()
        outputs = phase.replayed.pop(request_id, []) if isinstance(phase, DecodePhase) else []
        if isinstance(phase, DecodePhase) and (outputs or phase.is_resumed):
            return ReplayQueue(queue, in_order(outputs), phase.turns)
        return queue

    async def _submit(self, request: Any) -> None:
        """Send a registered request to the engine, unless tokens sampled elsewhere end it."""
        phase, state = PHASE.get(), self.output_processor.request_states.get(request.request_id)
        if isinstance(phase, DecodePhase) and state is not None:
            name = request.external_req_id
            if groups := phase.groups(name, state.request_index):
                request.sampling_params = with_delivered(request.sampling_params, groups)
                outputs = replay(self.output_processor, request, groups, self.model_config.max_model_len)
                phase.replayed.setdefault(name, []).extend(outputs)
                if self.output_processor.has_request(request.request_id):
                    self._send_later(phase, request)
                return
            await phase.admit(request.sampling_params)
        await self._send(request)

    def _send_later(self, phase: DecodePhase, request: Any) -> None:
        """Send a request when it is admitted: its first tokens are on their way and do not wait for that."""

        async def send() -> None:
            await phase.admit(request.sampling_params)
            if self.output_processor.has_request(request.request_id):  # else it was aborted meanwhile
                await self._send(request)

        task = asyncio.create_task(send(), name=f"send-{request.request_id}")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


def with_delivered(params: SamplingParams, groups: Sequence[Group]) -> SamplingParams:
    """A choice's own parameters: choices share theirs."""
    own = copy(params)
    own.extra_args = {**(params.extra_args or {}), transfer.DELIVERED: [i for _, ids in groups for i in ids]}
    return own


def parts(output: RequestOutput, params: SamplingParams) -> Iterable[RequestOutput]:
    """One output for each choice where they are streamed: so the events of a choice stay with its tokens."""
    if params.output_kind != RequestOutputKind.DELTA or len(output.outputs) == 1:
        return [output]
    result = [copy(output) for _ in output.outputs]
    for part, choice in zip(result, output.outputs, strict=True):
        part.outputs, part.finished = [choice], output.finished and choice is output.outputs[-1]
    return result

"""The contract between a worker and its engine.

A worker owns exactly one engine. `vllm` serves users; `sim` serves tests, chaos and capacity studies. Both pass
tests/contract. An engine knows nothing of gRPC, leases or signatures: the worker turns `PublishedKv` into a signed
ticket and a verified ticket back into a `KvSource`.

Lifecycle: `start` once -> `prefill` / `generate` concurrently -> `close` once. Cancelling the task that awaits
`prefill`, or closing the iterator of `generate`, aborts the request in the engine at once and frees what it held.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inferflux.types import (
    ArenaPath,
    Delivered,
    Frame,
    HttpAnswer,
    HttpCall,
    ModelFingerprint,
    NixlPeer,
    RequestContext,
    Transport,
)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is after `start`. `slot_bytes`: bytes of one KV block over all layers."""

    name: str
    model: str
    fingerprint: ModelFingerprint
    max_model_len: int
    max_num_seqs: int
    slot_bytes: int
    capabilities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter. `folder` has adapter_config.json and adapter_model.safetensors and changes no more.

    `digest`: of both; `is_pinned`: its weights stay where they can be used at once.
    """

    name: str
    folder: Path
    digest: str
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class PublishedKv:
    """Blocks of one prompt in this worker's arena, complete and readable.

    `slots` in block order; `digests` are xxh3-128 (16 bytes) of each slot's bytes. The first `num_shared` were in the
    arena before and are held for this prompt; the rest is nobody's yet. Whoever receives this gives it to
    PrefixStore.adopt or PrefixStore.give_up. `block_hashes`: names of the full blocks; empty when no other prompt may
    ever use them.
    """

    slots: tuple[int, ...]
    digests: tuple[bytes, ...]
    num_tokens: int
    block_hashes: tuple[bytes, ...] = ()
    num_shared: int = 0


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    """One prompt after prefill. `kv` is None when the arena had no room for it; `token_ids` were sampled (one).

    `num_cached_tokens` were not computed; `num_read_tokens` of them were read from this worker's arena, or from another
    one's when `is_from_peer`; the engine had the others in its own cache. `has_failed_read`: blocks that were there
    could not be used, and were computed.
    """

    prompt_digest: bytes
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    kv: PublishedKv | None
    num_cached_tokens: int = 0
    num_read_tokens: int = 0
    is_from_peer: bool = False
    has_failed_read: bool = False


@dataclass(frozen=True, slots=True)
class Prefilled:
    """All prompts of one API call, in the order in which the application asked for them."""

    prompts: tuple[ComputedPrompt, ...]
    engine_s: float


Claim = Callable[[], Awaitable[None]]
"""Waits until a source may be read. Raises KvError when it must not be."""


@dataclass(frozen=True, slots=True)
class KvSource:
    """Blocks of one prompt, or of its beginning, in an arena, verified (MAC, tenant, fingerprint) by the worker.

    `generations`: one per slot; a slot with another generation has been freed since. `transport` is how the blocks are
    read; `peer` belongs to nixl. `socket_path` empty: shm is not offered.
    `address`: of the worker that issued the ticket. `claim`: awaited before the first block is read, and by nothing
    that does not need the blocks, such as the first token; a source whose claim is refused is reported as recomputed
    with the error's reason. None: read at once.
    """

    ticket_id: str
    prompt_digest: bytes
    num_tokens: int
    slots: tuple[int, ...]
    digests: tuple[bytes, ...]
    slot_bytes: int
    socket_path: str
    incarnation: str
    first_token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    generations: tuple[int, ...] = ()
    worker_id: str = ""
    host_id: str = ""
    address: str = ""
    claim: Claim | None = field(default=None, compare=False, repr=False)
    transport: Transport = Transport.SHM
    peer: NixlPeer | None = None

    @property
    def path(self) -> ArenaPath:
        """How its arena is read."""
        return ArenaPath(self.transport, self.worker_id, self.incarnation, self.socket_path, self.peer)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot of the engine, cheap enough to take four times a second.

    `step` counts engine steps since start. `is_alive` False: the engine died and will not come back.
    """

    step: int
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    num_free_blocks: int
    num_blocks: int
    is_alive: bool = True


class Engine(ABC):
    """One model, one engine. All methods run on one event loop; `prefill` and `generate` are safe concurrently."""

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Load the model. After this returns the engine must be able to compute. Raises InferfluxError."""

    @abstractmethod
    async def check_numerics(self) -> None:
        """Compare fixed prompts with the model's reference. Raises NumericsMismatch."""

    @abstractmethod
    async def prefill(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        """Compute all prompts of `call`, publish their blocks, sample one token each.

        Returns HttpAnswer when the application answered without computing (a bad request). On cancellation and on
        every error all slots are free again.
        """

    @abstractmethod
    def generate(
        self,
        context: RequestContext,
        call: HttpCall,
        sources: Sequence[KvSource] = (),
        delivered: Delivered | None = None,
    ) -> AsyncGenerator[Frame]:
        """Answer `call`, reading the blocks of `sources` instead of computing their prompts.

        Also serves calls that do not generate (tokenize...). Yields frames as inferflux.types.Frame describes. A source
        whose blocks can't be used is reported in `Frame.kv` as recomputed and the prompt is computed here. The caller
        closes the generator.

        `delivered`: the request was begun on another worker. Its tokens are output here (limits, penalties, grammar,
        stop strings, seeds and counts go on from them), the same response is written again, and of its frames with
        data the first `num_events` are left out. So the frames with data of a streamed response must follow from
        `context`, `call` and the grouping of the tokens alone: no clock, no random ids. Tokens come in the frame of
        their event or before it, never after, and delivered ones are not told again. A response that is not streamed
        may be begun again. Raises Unavailable, naming the mode, for what can't be written again from tokens.
        """

    @abstractmethod
    async def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter usable by requests whose context names it and its digest, beside others of its name.

        Calls may name it as their model from now on. Raises InvalidRequest when it does not fit the model, Conflict
        when the engine holds no adapters, or no more.
        """

    @abstractmethod
    async def drop_adapter(self, adapter: Adapter, *, is_last: bool) -> None:
        """Forget an adapter that no request uses. `is_last`: of its name, which calls may not use any more."""

    @abstractmethod
    def load(self) -> EngineLoad:
        """Current load."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine and its processes. Idempotent."""

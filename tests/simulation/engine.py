"""A simulated engine whose tokens are computed from the KV bytes it was given: a wrong byte is a wrong token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from hashlib import blake2b

import numpy as np

from inferflux.engine.base import (
    Adapter,
    ComputedPrompt,
    Engine,
    EngineInfo,
    EngineLoad,
    KvSource,
    Prefilled,
    PublishedKv,
)
from inferflux.errors import ArenaFull, Conflict, KvDigestMismatch, KvError
from inferflux.kv.arena import Arena, ArenaReader
from inferflux.kv.digests import block_digest, prompt_digest
from inferflux.types import (
    ChoiceTokens,
    Delivered,
    End,
    Frame,
    HttpAnswer,
    HttpCall,
    HttpHead,
    KvReport,
    ModelFingerprint,
    RequestContext,
    Usage,
)

BLOCK_SIZE, SLOT_BYTES = 4, 64
NUM_BLOCKS = 512
FINGERPRINT = ModelFingerprint("ab" * 32, "float32", "simulation", BLOCK_SIZE)
STREAM_HEAD = HttpHead(200, (("content-type", "text/event-stream"),))
JSON_HEAD = HttpHead(200, (("content-type", "application/json"),))
DONE = b"data: [DONE]\n\n"

OpenArena = Callable[[KvSource], ArenaReader]


def kv_of(prompt: Sequence[int], salt: str) -> list[bytes]:
    """The bytes of each block of a prompt."""
    tokens = [",".join(map(str, prompt[: i + BLOCK_SIZE])) for i in range(0, len(prompt), BLOCK_SIZE)]
    return [blake2b(f"{salt}/{text}".encode()).digest() for text in tokens]


def token(kv: Sequence[bytes], seed: int, i: int) -> int:
    """Output token `i`."""
    return int.from_bytes(blake2b(b"".join(kv) + f"{seed}/{i}".encode(), digest_size=3).digest())


def answer(prompt: Sequence[int], salt: str, seed: int, num_tokens: int) -> list[int]:
    """Everything that a request must be answered."""
    kv = kv_of(prompt, salt)
    return [token(kv, seed, i) for i in range(num_tokens)]


class GhostEngine(Engine):
    """Takes time, holds blocks, reads KV; see inferflux.engine.base for what each method means."""

    def __init__(
        self, arena: Arena | None, open_arena: OpenArena, is_frozen: Callable[[], bool], step_s: float
    ) -> None:
        self._arena = arena
        self._open_arena = open_arena
        self._is_frozen = is_frozen
        self._step_s = step_s
        self._step = 0
        self._num_used = 0
        self._num_running = 0

    async def start(self) -> EngineInfo:
        if self._arena is not None:
            self._arena.format(SLOT_BYTES)
        return EngineInfo("simulation", "m", FINGERPRINT, 1 << 16, 64, SLOT_BYTES, ("completions",))

    async def check_numerics(self) -> None:
        """Always right."""

    async def prefill(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        body = json.loads(call.body)
        prompt: list[int] = body["prompt"]
        self._num_running += 1
        try:
            await self._steps(1 + len(prompt) // 8)
            kv = kv_of(prompt, context.cache_salt)
            published = self._publish(kv, len(prompt))
        finally:
            self._num_running -= 1
        first = token(kv, body["seed"], 0)
        computed = ComputedPrompt(prompt_digest(prompt), len(prompt), (first,), published)
        return Prefilled((computed,), 0.0)

    async def generate(
        self,
        context: RequestContext,
        call: HttpCall,
        sources: Sequence[KvSource] = (),
        delivered: Delivered | None = None,
    ) -> AsyncGenerator[Frame]:
        body = json.loads(call.body)
        prompt, seed, limit = body["prompt"], body["seed"], body["max_tokens"]
        num_blocks = -(-(len(prompt) + limit) // BLOCK_SIZE)
        self._num_used += num_blocks
        self._num_running += 1
        try:
            writer = Writer(body["stream"], len(prompt), limit, delivered)
            source = next((s for s in sources if s.prompt_digest == prompt_digest(prompt)), None)
            if source is not None and writer.is_new and limit > 1:
                for frame in writer.add(source.first_token_ids[0]):
                    yield frame
            kv, report = await self._load(source, prompt, context.cache_salt)
            if report is not None:
                yield Frame(kv=(report,))
            while not writer.is_complete:
                await self._steps(1)
                for frame in writer.add(token(kv, seed, writer.num_tokens)):
                    yield frame
        finally:
            self._num_used -= num_blocks
            self._num_running -= 1

    async def load_adapter(self, adapter: Adapter) -> None:
        raise Conflict("ghosts hold no adapters")

    async def drop_adapter(self, adapter: Adapter, *, is_last: bool) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad(self._step, self._num_running, 0, 0, NUM_BLOCKS - self._num_used, NUM_BLOCKS)

    async def close(self) -> None:
        """Nothing runs beside the requests."""

    async def _steps(self, num: int) -> None:
        for _ in range(num):
            await asyncio.sleep(self._step_s)
            while self._is_frozen():
                await asyncio.sleep(self._step_s)
            self._step += 1

    def _publish(self, kv: Sequence[bytes], num_tokens: int) -> PublishedKv | None:
        assert self._arena is not None
        try:
            slots = self._arena.allocate(len(kv))
        except ArenaFull:
            return None
        for slot, block in zip(slots, kv, strict=True):
            self._arena.slot(slot)[:] = np.frombuffer(block, np.uint8)
        digests = tuple(block_digest((block,)) for block in kv)
        now_ns = int(asyncio.get_running_loop().time() * 1e9)
        self._arena.publish(slots, now_ns)
        return PublishedKv(tuple(slots), digests, num_tokens)

    async def _load(
        self, source: KvSource | None, prompt: Sequence[int], salt: str
    ) -> tuple[list[bytes], KvReport | None]:
        """Read the source's blocks; what can't be read is computed."""
        if source is not None:
            try:
                kv = await self._read(source)
                return kv, KvReport(source.ticket_id, "committed", "", len(kv) * SLOT_BYTES, 0.001)
            except KvError as e:
                await self._steps(1 + len(prompt) // 8)
                return kv_of(prompt, salt), KvReport(source.ticket_id, "recomputed", e.kv_reason)
        await self._steps(1 + len(prompt) // 8)
        return kv_of(prompt, salt), None

    async def _read(self, source: KvSource) -> list[bytes]:
        reader = self._open_arena(source)
        await asyncio.sleep(self._step_s * 2)  # the longer it takes, the more can happen to the slots
        reader.check(source.slots, source.generations)
        blocks = [reader.slot(slot).tobytes() for slot in source.slots]
        for i, block in enumerate(blocks):
            if block_digest((block,)) != source.digests[i]:
                raise KvDigestMismatch(f"block {i}")
        return blocks


class Writer:
    """The application: one event per token, or one document at the end. The first token comes with an opening."""

    def __init__(self, is_streamed: bool, num_prompt: int, limit: int, delivered: Delivered | None) -> None:
        self.tokens = [i for part in (delivered or Delivered()).tokens for i in part.token_ids]
        self.is_new = not self.tokens
        self.is_complete = False
        self._is_streamed = is_streamed
        self._num_prompt = num_prompt
        self._limit = limit
        self._num_left_out = delivered.num_events if delivered else 0
        self._needs_head = True
        self._num_events = 0
        self._replay = list(self.tokens)
        self.tokens = []

    @property
    def num_tokens(self) -> int:
        """Tokens of the response so far, another worker's among them."""
        return len(self.tokens) + len(self._replay)

    def add(self, token_id: int) -> list[Frame]:
        """Write the next token, after what another worker wrote."""
        frames = []
        for i in [*self._replay, token_id]:
            if len(self.tokens) < self._limit:
                frames += self._write(i, is_old=bool(self._replay))
                self._replay = self._replay[1:]
        return frames

    def _write(self, token_id: int, *, is_old: bool) -> list[Frame]:
        self.tokens.append(token_id)
        self.is_complete = len(self.tokens) == self._limit
        end = End("length", Usage(self._num_prompt, len(self.tokens))) if self.is_complete else None
        if not self._is_streamed:
            data = json.dumps({"tokens": self.tokens}).encode()
            return [Frame(JSON_HEAD, data, (ChoiceTokens(0, tuple(self.tokens)),), (), end)] if end else []
        choices = () if is_old else (ChoiceTokens(0, (token_id,), ""),)
        data = b"data: %d\n\n" % token_id + (DONE if end else b"")
        self._num_events += 1
        if self._num_events <= self._num_left_out:
            data = b""
        head, self._needs_head = STREAM_HEAD if self._needs_head else None, False
        return [Frame(head, data, choices, (), end)]

"""One prompt's way into the arena: opened before it is computed, published in the step that computes it, or undone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from inferflux import failpoints
from inferflux.engine.base import ComputedPrompt, KvSource, PublishedKv
from inferflux.engine.prefix import Prefixes
from inferflux.engine.sim.kv import KvCache
from inferflux.engine.sim.sequence import Job
from inferflux.errors import ArenaFull
from inferflux.kv.arena import Arena
from inferflux.kv.digests import block_digest, prompt_digest


class Publication:
    """Call `publish` once, or `undo`; after an error `undo` also takes back what was published."""

    def __init__(self, prefixes: Prefixes, arena: Arena, kv: KvCache, salt: str, prompt: Sequence[int]) -> None:
        self._prefixes = prefixes
        self._arena = arena
        self._kv = kv
        self._opening = prefixes.open(salt, prompt)
        self._is_open = True
        self._published: PublishedKv | None = None

    @property
    def source(self) -> KvSource | None:
        """Where the prompt's beginning can be read."""
        return self._prefixes.source(self._opening, "prefix")

    def publish(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Copy the blocks that are not there yet; with no room for them nothing is published."""
        new = blocks[len(self._opening.shared) :]
        with suppress(ArenaFull):
            slots = self._arena.allocate(len(new))
            if failpoints.ON:
                failpoints.hit("arena.allocated")
            for slot, block in zip(slots, new, strict=True):
                view = self._arena.slot(slot)
                view[:] = self._kv.block(block)
                self._arena.set_digest(slot, block_digest((view,)))
            self._arena.publish(slots)
            if failpoints.ON:
                failpoints.hit("ticket.published")
            self._is_open = False
            self._published = self._prefixes.publish(self._opening, self._opening.shared + slots, num_tokens)
        if self._is_open:
            self._close()

    def undo(self) -> None:
        """Let go of everything."""
        if self._is_open:
            self._close()
        if self._published is not None:
            self._prefixes.give_up(self._published)
            self._published = None

    def computed(self, job: Job) -> ComputedPrompt:
        """Describe the prompt, computed."""
        if job.has_failed_read:
            self._prefixes.reject(self._opening)
        output = tuple(job.choices[0].tokens[len(job.prompt) :])
        num_cached = job.num_cached + job.num_read
        return ComputedPrompt(
            prompt_digest(job.prompt),
            len(job.prompt),
            output,
            self._published,
            num_cached,
            job.num_read,
            self._opening.is_peer,
            job.has_failed_read,
        )

    def _close(self) -> None:
        self._is_open = False
        self._prefixes.discard(self._opening)

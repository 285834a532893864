"""What both engines do with the prefix store around the computation of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from inferflux.engine.base import KvSource, PublishedKv
from inferflux.kv.arena import Arena
from inferflux.kv.digests import block_hashes, prefix_root
from inferflux.kv.prefixes import Opening, PrefixStore
from inferflux.types import ModelFingerprint


class Prefixes:
    """One engine's way to the store. `store` None: one that keeps nothing."""

    def __init__(self, arena: Arena, store: PrefixStore | None, fingerprint: ModelFingerprint) -> None:
        self._arena = arena
        self._store = store or PrefixStore(arena)
        self._fingerprint = fingerprint

    def open(self, salt: str, token_ids: Sequence[int]) -> Opening:
        """Hold what is known of a prompt. Without a salt it is nobody's: nothing is found, nothing kept."""
        size = self._fingerprint.block_size
        hashes = block_hashes(prefix_root(self._fingerprint, salt), token_ids, size) if salt else ()
        return self._store.open(hashes, len(token_ids), size)

    def source(self, opening: Opening, name: str) -> KvSource | None:
        """Where the engine can read the prompt's beginning; `name` comes back with the report."""
        run = opening.run
        if run is None:
            return None
        return KvSource(
            ticket_id=name,
            prompt_digest=b"",
            num_tokens=len(run.slots) * self._fingerprint.block_size,
            slots=run.slots,
            digests=run.digests,
            slot_bytes=self._arena.slot_bytes,
            socket_path=run.place.socket_path,
            incarnation=run.place.incarnation,
            first_token_ids=(),
            generations=run.generations,
        )

    def publish(self, opening: Opening, slots: Sequence[int], num_tokens: int) -> PublishedKv:
        """Describe a prompt's slots, the shared ones first, when all of them are published."""
        self._store.settle(opening)
        digests = tuple(map(self._arena.digest, slots))
        return PublishedKv(tuple(slots), digests, num_tokens, opening.hashes, len(opening.shared))

    def reject(self, opening: Opening) -> None:
        """Its run could not be used: offer it to nobody else. Other arenas are their owners' business."""
        if not opening.is_peer:
            self._store.forget(opening.shared)

    def discard(self, opening: Opening) -> None:
        """End a prompt that has no blocks."""
        self._store.discard(opening)

    def give_up(self, kv: PublishedKv) -> None:
        """Let go of blocks that nobody will receive."""
        self._store.give_up(kv.slots, kv.num_shared)

"""The arenas of other prefill workers on this host, for prefixes that one of them has and this one lacks.

Each prefill worker hands its arena to processes of its user and keeps the names of its blocks in the arena's table, so
looking one up is reading memory: no call, no wait, and no load on the worker that has it, which may even have died.
Nothing read here is trusted: whoever loads a block checks its generation and digest, and names are made from weights,
layout, tenant and tokens, so that a block of anything else is not found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from inferflux.errors import KvError
from inferflux.kv import shm
from inferflux.kv.arena import ArenaReader
from inferflux.kv.prefixes import Place, Run

ARENA_SOCKETS = "*.arena.sock"
TIMEOUT_S = 1.0


class Peers:
    """Tables of the arenas whose sockets lie beside `own`, by their place. `slot_bytes`: of blocks that fit here."""

    def __init__(self, own: Path, slot_bytes: int) -> None:
        self._own = own
        self._slot_bytes = slot_bytes
        self._readers: dict[Place, ArenaReader] = {}

    @property
    def num_arenas(self) -> int:
        """Arenas that are looked into."""
        return len(self._readers)

    def refresh(self) -> None:
        """Map arenas that are new and let go of those whose owner is gone. Blocks: call it in a thread."""
        paths = [path for path in self._own.parent.glob(ARENA_SOCKETS) if path != self._own]
        readers: dict[Place, ArenaReader] = {}
        for path in paths:
            with contextlib.suppress(KvError):
                place = Place(str(path), shm.identify(path, TIMEOUT_S))
                readers[place] = self._readers.get(place) or self._fetch(place)
        self._readers = {place: reader for place, reader in readers.items() if reader.slot_bytes == self._slot_bytes}

    def close(self) -> None:
        """Let go of all arenas."""
        self._readers = {}

    def find(self, hashes: Sequence[bytes], more_than: int) -> Run | None:
        """Return the longest run of these blocks that one other arena has, if it has more than `more_than`."""
        best: Run | None = None
        for place, reader in self._readers.items():
            num_known = len(best.slots) if best else more_than
            if num_known < len(hashes) and reader.find(hashes[num_known]) is not None:
                run = _run(place, reader, hashes)
                best = run if len(run.slots) > num_known else best
        return best

    def _fetch(self, place: Place) -> ArenaReader:
        return shm.fetch(place.socket_path, place.incarnation, TIMEOUT_S, populate=False)


def _run(place: Place, reader: ArenaReader, hashes: Sequence[bytes]) -> Run:
    """Read the table once per block; its owner may change it at any time."""
    slots: list[int] = []
    generations: list[int] = []
    digests: list[bytes] = []
    for block_hash in hashes:
        slot = reader.find(block_hash)
        if slot is None:
            break
        generation, digest = reader.generation(slot), reader.digest(slot)
        if reader.find(block_hash) != slot:  # freed in between: generation and digest may be those of another block
            break
        slots.append(slot)
        generations.append(generation)
        digests.append(digest)
    return Run(place, tuple(slots), tuple(generations), tuple(digests))

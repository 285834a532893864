"""The prefix store: published blocks that outlive their tickets, found again by what they were computed from.

The releaser's side of an arena (see inferflux.kv.arena), so it lives in a prefill worker's frontend and is the one
owner of all published slots: it counts who holds each. A slot that nobody holds is freed, or, if its block has a name
(inferflux.kv.digests.block_hashes), kept until the room is needed, the longest unused first. A request whose prompt
begins with blocks that are here holds them like its own: its ticket names them, nobody copies them again.

Engines ask `open` before a prompt and `settle` or `discard` after it; the ticket book adopts what engines publish and
releases it. The names also stand in the arena's table, where other prefill workers of this host find them (see
inferflux.kv.peers). Whoever uses a block by its name checks its generation and its digest, as for tickets.

Pure but for the arena's memory: no I/O, no timers. Not safe across threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from inferflux.errors import Conflict, KvStale
from inferflux.kv.arena import Arena

# Why a kept block is gone.
ROOM, BROKEN = "room", "broken"


@dataclass(frozen=True, slots=True)
class Place:
    """Where readers on this host get an arena: its socket, and the start of the worker that owns it."""

    socket_path: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of a prompt, from its first, in one arena. All sequences in block order."""

    place: Place
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[bytes, ...]


class Elsewhere(Protocol):
    """Other arenas that can be read from here."""

    @property
    def num_arenas(self) -> int: ...

    def find(self, hashes: Sequence[bytes], more_than: int) -> Run | None:
        """Return a run of more than `more_than` blocks, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What the store has for a prompt about to be computed.

    `shared`: slots held for it here, from its first block on. `num_new`: slots that it may still allocate. `run`: the
    longest run to read from if the engine has not cached as much itself; `is_peer` when it lies in another arena.
    """

    hashes: tuple[bytes, ...] = ()
    shared: tuple[int, ...] = ()
    num_new: int = 0
    run: Run | None = None
    is_peer: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    """A named prefix that stays. `slots` in block order."""

    name: str
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Slots by what becomes of them: free, kept (nobody holds them), pinned, and the quota of pins."""

    num_slots: int
    num_free: int
    num_kept: int
    num_named: int
    num_pinned: int
    max_pinned: int


class PrefixStore:
    """Counts the holders of published slots and keeps named blocks after the last one.

    `place` None: nothing is kept, slots are freed with their last holder. `pinned_share`: of all slots, that pins may
    hold. `on_evict` hears why (ROOM, BROKEN) and how many kept blocks are gone.
    """

    def __init__(
        self,
        arena: Arena,
        place: Place | None = None,
        *,
        pinned_share: float = 0.5,
        on_evict: Callable[[str, int], None] | None = None,
    ) -> None:
        self.elsewhere: Elsewhere | None = None
        self._arena = arena
        self._place = place
        self._pinned_share = pinned_share
        self._on_evict = on_evict
        self._holders: Counter[int] = Counter()
        self._kept: dict[int, None] = {}
        self._slot_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._pins: dict[str, Pin] = {}
        self._num_promised = 0

    def __contains__(self, slot: int) -> bool:
        """Whether the store owns a slot."""
        return slot in self._holders or slot in self._kept

    # --- for engines --------------------------------------------------------------------------------------------------

    def open(self, hashes: Sequence[bytes], num_tokens: int, block_size: int) -> Opening:
        """Hold what is here of a prompt and make room for the rest. End it with `settle` or `discard`, once.

        At least one token is left to compute: a prompt that is here as a whole still needs its first output.
        """
        useful = hashes[: (num_tokens - 1) // block_size] if self._place is not None else ()
        shared = self._hold_known(useful)
        num_new = -(-num_tokens // block_size) - len(shared)
        self._num_promised += num_new
        self._make_room()
        run = self._run_elsewhere(useful, len(shared))
        is_peer = run is not None
        if run is None and shared and self._place is not None:
            run = self.run(self._place, shared)
        return Opening(tuple(hashes), shared, num_new, run, is_peer)

    def settle(self, opening: Opening) -> None:
        """The prompt's blocks are published, or never will be; `shared` stays held."""
        self._num_promised -= opening.num_new

    def discard(self, opening: Opening) -> None:
        """The prompt is over without blocks."""
        self.settle(opening)
        self.release(opening.shared)

    def give_up(self, slots: Sequence[int], num_shared: int) -> None:
        """Free a prompt's slots that nobody has adopted, and end the hold of those it shares."""
        self._arena.free(slots[num_shared:])
        self.release(slots[:num_shared])

    def run(self, place: Place, slots: Sequence[int]) -> Run:
        """Describe slots of this arena."""
        digests = tuple(map(self._arena.digest, slots))
        return Run(place, tuple(slots), self._arena.generations(slots), digests)

    # --- for whoever receives what engines publish --------------------------------------------------------------------

    def adopt(self, slots: Sequence[int], hashes: Sequence[bytes] = (), num_shared: int = 0) -> None:
        """Take over a prompt's slots and hold them once for the caller; the first `num_shared` are held already.

        Raises KvStale, ending that hold, unless the others were just published and are nobody's.
        """
        shared, new = slots[:num_shared], slots[num_shared:]
        if any(slot in self for slot in new) or not self._arena.are_published(new):
            self.release(shared)
            raise KvStale(f"slots {list(slots)} are not those that the engine published")
        self._holders.update(new)
        if self._place is not None:
            for slot, block_hash in zip(new, hashes[num_shared:], strict=False):
                self._name(slot, block_hash)

    def release(self, slots: Iterable[int]) -> None:
        """End one hold of each slot. Raises ValueError for a slot without.

        Later blocks count as unused for longer: without the first ones of their prompt they are no use.
        """
        free = []
        for slot in reversed(tuple(slots)):
            if self._holders[slot] <= 0:
                raise ValueError(f"slot {slot} is not held")
            self._holders[slot] -= 1
            if self._holders[slot]:
                continue
            del self._holders[slot]
            if slot in self._hash_of:
                self._kept[slot] = None
            else:
                free.append(slot)
        self._arena.free(free)

    def forget(self, slots: Iterable[int]) -> None:
        """Never offer these blocks again: a reader found them wrong. Their holders keep them."""
        named = [slot for slot in slots if slot in self._hash_of]
        for slot in named:
            self._unname(slot)
        self._drop([slot for slot in named if slot in self._kept])
        self._tell(BROKEN, len(named))

    # --- pins ---------------------------------------------------------------------------------------------------------

    def pin(self, name: str, slots: Sequence[int]) -> Pin:
        """Keep slots that the caller holds until `unpin`; a pin of the same name is replaced.

        Raises Conflict, changing nothing, when the pins would hold more than their quota.
        """
        others = {slot for pin in self._pins.values() if pin.name != name for slot in pin.slots}
        num_pinned = len(others.union(slots))
        if num_pinned > self.max_pinned:
            raise Conflict(f"pins would hold {num_pinned} slots of KV blocks, the limit is {self.max_pinned}")
        self._holders.update(slots)
        self.unpin(name)
        self._pins[name] = Pin(name, tuple(slots))
        return self._pins[name]

    def unpin(self, name: str) -> bool:
        """Let a pin go; tells whether there was one."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self.release(pin.slots)
        return pin is not None

    @property
    def max_pinned(self) -> int:
        """The quota of all pins together, in slots."""
        return int(self._arena.num_slots * self._pinned_share)

    def pins(self) -> tuple[Pin, ...]:
        """All pins, the oldest first."""
        return tuple(self._pins.values())

    # --- for people ---------------------------------------------------------------------------------------------------

    def named(self, slots: Iterable[int]) -> tuple[int, ...]:
        """Those of `slots` whose blocks can be found by others."""
        return tuple(slot for slot in slots if slot in self._hash_of)

    @property
    def num_kept(self) -> int:
        """Slots that nobody holds and that are free as soon as somebody needs them."""
        return len(self._kept)

    def counts(self) -> StoreCounts:
        """Where all slots are."""
        num_pinned = len({slot for pin in self._pins.values() for slot in pin.slots})
        arena = self._arena
        return StoreCounts(
            arena.num_slots, arena.num_free, len(self._kept), len(self._hash_of), num_pinned, self.max_pinned
        )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hold_known(self, hashes: Iterable[bytes]) -> tuple[int, ...]:
        slots: list[int] = []
        for block_hash in hashes:
            slot = self._slot_of.get(block_hash)
            if slot is None:
                break
            slots.append(slot)
        for slot in slots:
            self._kept.pop(slot, None)
        self._holders.update(slots)
        return tuple(slots)

    def _run_elsewhere(self, hashes: Sequence[bytes], num_here: int) -> Run | None:
        if self.elsewhere is None or num_here == len(hashes):
            return None
        return self.elsewhere.find(hashes, num_here)

    def _make_room(self) -> None:
        """Free the longest unused, so that every open prompt finds the slots it was promised."""
        if not self._kept:
            return
        num_missing = self._num_promised - self._arena.num_owned - self._arena.num_free
        evicted = list(self._kept)[: max(0, num_missing)]
        for slot in evicted:
            self._unname(slot)
        self._drop(evicted)
        self._tell(ROOM, len(evicted))

    def _name(self, slot: int, block_hash: bytes) -> None:
        if block_hash not in self._slot_of:  # else somebody else computed the same block meanwhile
            self._slot_of[block_hash] = slot
            self._hash_of[slot] = block_hash
            self._arena.set_block_hash(slot, block_hash)

    def _unname(self, slot: int) -> None:
        block_hash = self._hash_of.pop(slot)
        del self._slot_of[block_hash]
        self._arena.set_block_hash(slot, bytes(len(block_hash)))

    def _drop(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self._kept[slot]
        self._arena.free(slots)

    def _tell(self, reason: str, num: int) -> None:
        if num and self._on_evict is not None:
            self._on_evict(reason, num)

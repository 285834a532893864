"""The prefix store: who holds a slot, what is kept, what goes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferflux.errors import Conflict, KvStale
from inferflux.kv.arena import PAGE, Arena
from inferflux.kv.digests import block_digest, block_hashes, prefix_root
from inferflux.kv.prefixes import BROKEN, ROOM, Opening, Place, PrefixStore, Run
from inferflux.types import ModelFingerprint

NUM_SLOTS = 8
SIZE = 4
PLACE = Place("/run/kv.sock", "one")
FINGERPRINT = ModelFingerprint("ab" * 32, "float32", "sim/1", SIZE)
ROOT = prefix_root(FINGERPRINT, "salt")


@pytest.fixture
def arena() -> Iterator[Arena]:
    with closing(make_arena()) as arena:
        yield arena


@pytest.fixture
def evicted() -> Counter[str]:
    return Counter()


@pytest.fixture
def store(arena: Arena, evicted: Counter[str]) -> PrefixStore:
    return PrefixStore(arena, PLACE, on_evict=lambda reason, n: evicted.update({reason: n}))


def make_arena() -> Arena:
    arena = Arena.create((2 + NUM_SLOTS) * PAGE)
    assert arena.format(PAGE) == NUM_SLOTS
    return arena


def tokens(num: int, first: int = 1) -> list[int]:
    return list(range(first, first + num))


def begin(store: PrefixStore, token_ids: list[int]) -> Opening:
    return store.open(block_hashes(ROOT, token_ids, SIZE), len(token_ids), SIZE)


def compute(store: PrefixStore, arena: Arena, token_ids: list[int]) -> tuple[int, ...]:
    """Do what an engine and a ticket book do for one prompt; its slots are held."""
    opening = begin(store, token_ids)
    new = arena.allocate(opening.num_new)
    for slot in new:
        arena.slot(slot)[:] = slot
        arena.set_digest(slot, block_digest([arena.slot(slot)]))
    arena.publish(new)
    store.settle(opening)
    slots = opening.shared + new
    store.adopt(slots, opening.hashes, len(opening.shared))
    return slots


def used(store: PrefixStore, arena: Arena, token_ids: list[int]) -> tuple[int, ...]:
    """A prompt from its beginning to the end of its ticket."""
    slots = compute(store, arena, token_ids)
    store.release(slots)
    return slots


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_block_is_named_by_everything_before_it() -> None:
    """Equal tokens in a block mean nothing after another beginning; the last, partial block has no name."""
    a, b = (block_hashes(ROOT, [first, *tokens(3 * SIZE)], SIZE) for first in (1, 2))

    assert len(a) == 3
    assert not set(a) & set(b)
    assert block_hashes(ROOT, [1, *tokens(3 * SIZE), 99], SIZE) == a


@pytest.mark.parametrize(
    "other",
    [
        prefix_root(FINGERPRINT, "other"),
        prefix_root(ModelFingerprint("cd" * 32, "float32", "sim/1", SIZE), "salt"),
        prefix_root(ModelFingerprint("ab" * 32, "bfloat16", "sim/1", SIZE), "salt"),
        prefix_root(ModelFingerprint("ab" * 32, "float32", "sim/2", SIZE), "salt"),
    ],
    ids=["tenant", "weights", "dtype", "layout"],
)
def test_other_tenants_and_models_have_other_names(other: bytes) -> None:
    """So their blocks are never found."""
    assert not set(block_hashes(other, tokens(8), SIZE)) & set(block_hashes(ROOT, tokens(8), SIZE))


# -- keeping and finding ----------------------------------------------------------------------------------------------


def test_a_second_prompt_shares_the_whole_blocks_of_the_first(store: PrefixStore, arena: Arena) -> None:
    """And says where they are; the partial block at the end is freed."""
    first = used(store, arena, tokens(10))
    opening = begin(store, [*tokens(8), 77, 78])

    assert opening.shared == first[:2]
    assert opening.num_new == 1
    assert opening.run == Run(PLACE, first[:2], arena.generations(first[:2]), tuple(map(arena.digest, first[:2])))
    assert arena.num_free == NUM_SLOTS - 2
    store.discard(opening)


def test_one_token_is_always_computed(store: PrefixStore, arena: Arena) -> None:
    """A prompt that is here to its last token still needs its first output."""
    used(store, arena, tokens(8))
    opening = begin(store, tokens(8))

    assert (len(opening.shared), opening.num_new) == (1, 1)
    store.discard(opening)


def test_blocks_are_shared_while_their_first_ticket_lives(store: PrefixStore, arena: Arena) -> None:
    """The slot is free of holders when the last of both ends, in either order."""
    first = compute(store, arena, tokens(9))
    second = compute(store, arena, [*tokens(8), 50])

    assert second[:2] == first[:2]
    store.release(first)
    assert store.num_kept == 0
    store.release(second)
    assert store.num_kept == 2


def test_a_block_computed_twice_is_kept_once(store: PrefixStore, arena: Arena) -> None:
    """Two equal prompts at the same time do not see each other; the second copy goes with its ticket."""
    openings = [begin(store, tokens(9)) for _ in range(2)]
    for opening in openings:
        slots = arena.allocate(opening.num_new)
        arena.publish(slots)
        store.settle(opening)
        store.adopt(slots, opening.hashes)
        store.release(slots)

    assert (store.num_kept, arena.num_free) == (2, NUM_SLOTS - 2)


def test_nothing_is_kept_without_a_name_or_a_place(arena: Arena) -> None:
    """Prompts that no one else may use, and workers that keep nothing."""
    for store, names in ((PrefixStore(arena), block_hashes(ROOT, tokens(8), SIZE)), (PrefixStore(arena, PLACE), ())):
        slots = arena.allocate(2)
        arena.publish(slots)
        store.adopt(slots, names)
        store.release(slots)
        assert arena.num_free == NUM_SLOTS


def test_slots_have_one_owner(store: PrefixStore, arena: Arena) -> None:
    """What is here already, or was not published, can't be adopted; nothing that it shared stays held for it."""
    slots = compute(store, arena, tokens(9))
    unpublished = arena.allocate(1)
    for wrong, num_shared in ((slots, 0), (unpublished, 0), ((slots[0], slots[0]), 0)):
        with pytest.raises(KvStale):
            store.adopt(wrong, (), num_shared)
    opening = begin(store, [*tokens(8), 50])
    store.settle(opening)
    with pytest.raises(KvStale):
        store.adopt((*opening.shared, *unpublished), opening.hashes, len(opening.shared))

    store.release(slots)
    assert store.num_kept == 2
    with pytest.raises(ValueError, match="not held"):
        store.release(slots)


# -- room -------------------------------------------------------------------------------------------------------------


def test_the_longest_unused_goes_first_and_the_end_of_a_prompt_before_its_beginning(
    store: PrefixStore, arena: Arena, evicted: Counter[str]
) -> None:
    """A block without the blocks before it is no use."""
    old, new = used(store, arena, tokens(13)), used(store, arena, tokens(9, first=100))
    store.discard(begin(store, tokens(13)))  # used again: now `new` is older
    assert arena.num_free == NUM_SLOTS - 5

    opening = begin(store, tokens(20, first=500))

    assert (opening.num_new, arena.num_free) == (5, 5)
    assert evicted == {ROOM: 2}
    assert old[0] in store
    assert not set(new) & {slot for slot in range(NUM_SLOTS) if slot in store}
    store.discard(opening)


def test_prompts_on_their_way_are_promised_room_of_their_own(store: PrefixStore, arena: Arena) -> None:
    """Several may be opened before the engine allocates for the first."""
    used(store, arena, tokens(NUM_SLOTS * SIZE))
    openings = [begin(store, tokens(3 * SIZE, first=100 * i)) for i in (1, 2)]

    assert arena.num_free == 6
    slots = [arena.allocate(opening.num_new) for opening in openings]
    assert begin(store, tokens(2 * SIZE, first=900)).num_new == arena.num_free == 2
    assert len({*slots[0], *slots[1]}) == 6


def test_held_blocks_are_never_evicted(store: PrefixStore, arena: Arena) -> None:
    """Then there is no room, and the engine publishes nothing."""
    held = compute(store, arena, tokens(NUM_SLOTS * SIZE))
    begin(store, tokens(9, first=100))

    assert arena.num_free == 0
    assert arena.are_published(held)


def test_evicted_slots_are_stale_for_whoever_knew_them(store: PrefixStore, arena: Arena) -> None:
    """Another generation, and no name in the table."""
    slots = used(store, arena, tokens(9))
    before = arena.generations(slots[:2])
    begin(store, tokens(NUM_SLOTS * SIZE, first=100))

    assert all(now == then + 1 for now, then in zip(arena.generations(slots[:2]), before, strict=True))
    assert not arena._table["block_hash"].any()


def test_broken_blocks_are_not_offered_again(store: PrefixStore, arena: Arena, evicted: Counter[str]) -> None:
    """Held ones go with their last holder, the others at once."""
    slots = compute(store, arena, tokens(9))
    store.forget(slots)
    assert evicted == {BROKEN: 2}
    assert begin(store, tokens(9)).shared == ()
    store.release(slots)
    assert arena.num_free == NUM_SLOTS

    kept = used(store, arena, tokens(9))
    store.forget(kept[:1])
    assert (kept[0] in store, kept[1] in store) == (False, True)


# -- pins -------------------------------------------------------------------------------------------------------------


def test_a_pinned_prefix_stays(store: PrefixStore, arena: Arena) -> None:
    """Whatever room is needed, until it is let go."""
    slots = compute(store, arena, tokens(9))
    store.pin("system", store.named(slots))
    store.release(slots)
    opening = begin(store, tokens(NUM_SLOTS * SIZE, first=100))
    assert begin(store, tokens(9)).shared == slots[:2]

    assert store.unpin("system")
    assert not store.unpin("system")
    store.discard(opening)


def test_pins_have_a_quota(store: PrefixStore, arena: Arena) -> None:
    """Half of the slots here; shared ones count once, a replaced pin not at all."""
    a, b = compute(store, arena, tokens(12)), compute(store, arena, tokens(8, first=100))
    store.pin("a", a)
    with pytest.raises(Conflict, match="5 slots of KV blocks, the limit is 4"):
        store.pin("b", b)
    assert [pin.name for pin in store.pins()] == ["a"]

    store.pin("a2", a[:2])
    store.pin("a", b)
    assert store.counts().num_pinned == 4
    store.release(a + b)
    assert store.unpin("a")
    assert store.unpin("a2")
    assert (store.num_kept, arena.num_free) == (5, NUM_SLOTS - 5)


# -- anything in any order --------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Prompts with common beginnings come, live and go; slots never leak, and a shared block is the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = make_arena()
        self.store = PrefixStore(self.arena, PLACE)
        self.live: list[tuple[int, ...]] = []
        self.content: dict[int, tuple[int, bytes]] = {}

    def teardown(self) -> None:
        for slots in self.live:
            self.store.release(slots)
        for pin in self.store.pins():
            self.store.unpin(pin.name)
        assert self.arena.num_free + self.store.num_kept == NUM_SLOTS
        self.arena.close()

    @rule(prompt=st.lists(st.sampled_from([tokens(SIZE), tokens(SIZE, 50)]), min_size=1, max_size=3))
    def compute(self, prompt: list[list[int]]) -> None:
        token_ids = [*(token_id for part in prompt for token_id in part), 7]
        opening = begin(self.store, token_ids)
        for slot, block_hash in zip(opening.shared, opening.hashes, strict=False):
            assert self.content[slot] == (self.arena.generation(slot), block_hash)
        if opening.num_new > self.arena.num_free:
            self.store.discard(opening)
            return
        new = self.arena.allocate(opening.num_new)
        self.arena.publish(new)
        self.store.settle(opening)
        slots = opening.shared + new
        self.store.adopt(slots, opening.hashes, len(opening.shared))
        for slot, block_hash in zip(slots, opening.hashes, strict=False):
            self.content[slot] = (self.arena.generation(slot), block_hash)
        self.live.append(slots)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.store.release(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), name=st.sampled_from("ab"))
    def pin(self, data: st.DataObject, name: str) -> None:
        slots = self.store.named(data.draw(st.sampled_from(self.live)))
        try:
            self.store.pin(name, slots)
        except Conflict:
            assert self.store.counts().num_pinned <= self.store.max_pinned

    @rule(name=st.sampled_from("ab"))
    def unpin(self, name: str) -> None:
        self.store.unpin(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.store.forget(data.draw(st.sampled_from(self.live)))

    @invariant()
    def everything_is_somewhere(self) -> None:
        held = {slot for slots in self.live for slot in slots} | {s for pin in self.store.pins() for s in pin.slots}
        counts = self.store.counts()
        assert counts.num_free + counts.num_kept + len(held) == NUM_SLOTS
        assert counts.num_pinned <= self.store.max_pinned
        assert all(slot in self.store for slot in held)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase

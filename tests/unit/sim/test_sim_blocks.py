from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferflux.engine.sim.blocks import BlockPool

NUM_BLOCKS = 12
HASHES = st.lists(st.integers(0, 30).map(lambda n: n.to_bytes(1, "big")), max_size=4, unique=True)


class Pool(RuleBasedStateMachine):
    """Whatever sequences do, blocks are conserved and no block has two contents."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(hashes=HASHES, num_more=st.integers(0, 4))
    def start(self, hashes: list[bytes], num_more: int) -> None:
        found = self.pool.find(hashes)
        num_new = len(hashes) - len(found) + num_more
        assert [self.content[block] for block in found] == hashes[: len(found)]
        if not self.pool.can_take(num_new, found):
            return
        self.pool.share(found)
        new = self.pool.take(num_new)
        assert not set(new) & {block for blocks in self.held for block in blocks}
        for block in new:
            self.content.pop(block, None)
        for block, block_hash in zip(new, hashes[len(found) :], strict=False):
            self.pool.register(block, block_hash)
            self.content[block] = block_hash
        self.held.append(found + new)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.drop(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def free_blocks_are_those_that_nobody_holds(self) -> None:
        assert self.pool.num_free == NUM_BLOCKS - len({block for blocks in self.held for block in blocks})


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=30)


def test_the_longest_unused_content_is_forgotten_first() -> None:
    pool = BlockPool(2)
    for name in (b"a", b"b"):
        (block,) = pool.take(1)
        pool.register(block, name)
        pool.drop([block])
    pool.share(pool.find([b"a"]))
    pool.drop(pool.find([b"a"]))

    pool.take(1)

    assert (bool(pool.find([b"a"])), bool(pool.find([b"b"]))) == (True, False)

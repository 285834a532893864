"""Who holds which block of the paged cache, and which blocks can be found again by their content.

Pure bookkeeping; the bytes are `kv`'s. A block is free when nobody holds it; a free block that was registered under its
chained hash can be found again until it is taken for something else, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """Counts the holders of `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._found_again: dict[int, None] = {}  # free, but registered; the longest unused first
        self._holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._found_again)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of known hashes, from the first. Holds nothing."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_take(self, num_new: int, shared: Sequence[int] = ()) -> bool:
        """Whether `take(num_new)` works after `share(shared)`."""
        return num_new + sum(self._holders[block] == 0 for block in shared) <= self.num_free

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that exist."""
        for block in blocks:
            self._holders[block] += 1
            self._found_again.pop(block, None)

    def take(self, num: int) -> list[int]:
        """Hold `num` blocks whose bytes don't matter. The caller has asked `can_take`."""
        blocks = [self._pop() for _ in range(num)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def drop(self, blocks: Iterable[int]) -> None:
        """End one hold of each block."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._release(block)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a full block findable. A block that is known already, or the same content elsewhere, changes nothing."""
        if block not in self._hash_of and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def _release(self, block: int) -> None:
        if block in self._hash_of:
            self._found_again[block] = None
        else:
            self._blank.append(block)

    def _pop(self) -> int:
        if self._blank:
            return self._blank.pop()
        block = next(iter(self._found_again))
        del self._found_again[block]
        del self._block_of[self._hash_of.pop(block)]
        return block

"""One KV block of the whole model, in a slot, and the parts of it that ranks of an engine compute.

A slot holds pieces, one for each layer and KV head, and behind them a digest of each in the same order:

    [layer][head][piece]   [layer][head][digest]

So it looks the same however many ranks wrote it side by side, and a reader with any number of ranks takes its own
pieces out. The digest of the slot, which the ticket carries, is that of its pieces' digests: small enough for whoever
publishes to make when all ranks are done, and a rank that reads can check what it copied without reading the rest.

Many small digests cost more than a few large ones, so a digest may cover the pieces of several heads that its writer
has: then zeros are in the places of the others. A rank that reads some of these heads only digests them all.

Both ways copy layer by layer and digest what was copied while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import xxhash

from inferflux import failpoints
from inferflux.kv.arena import Bytes
from inferflux.kv.digests import DIGEST_BYTES

COVERED_BYTES = 32 << 10
"""What one digest covers at most, if that is more than a piece: as many as fit the first cache of a core."""
NONE = bytes(DIGEST_BYTES)
Run = tuple[int, int, slice]


@dataclass(frozen=True, slots=True)
class BlockShape:
    """How a block is cut: `num_layers` times `num_heads` pieces of `piece_bytes`."""

    num_layers: int
    num_heads: int
    piece_bytes: int

    @property
    def num_pieces(self) -> int:
        return self.num_layers * self.num_heads

    @property
    def slot_bytes(self) -> int:
        return self.num_pieces * (self.piece_bytes + DIGEST_BYTES)


@dataclass(frozen=True)
class Part:
    """What one rank has of every block: the pieces of some layers and of some heads in each."""

    shape: BlockShape
    layers: range
    heads: range

    @classmethod
    def whole(cls, shape: BlockShape) -> Part:
        """The part of the only rank."""
        return cls(shape, range(shape.num_layers), range(shape.num_heads))

    @property
    def num_bytes(self) -> int:
        return len(self.layers) * len(self.heads) * self.shape.piece_bytes

    @cached_property
    def num_covered(self) -> int:
        """Heads that share a digest when this rank writes."""
        fitting = max(1, COVERED_BYTES // self.shape.piece_bytes)
        return max(n for n in range(1, len(self.heads) + 1) if n <= fitting and len(self.heads) % n == 0)

    def copy_out(self, block: Sequence[Bytes], slot: Bytes) -> None:
        """Copy a block's part, given as the bytes of each layer, into its slot, with the digests of its pieces."""
        self._require_fit(slot)
        view, digests = slot.data, _tail(slot, self.shape.num_pieces).data
        for source, (start, stop, theirs) in zip(block, self._own_runs, strict=True):
            slot[start:stop] = source
            digests[theirs] = self._digest(view, start, stop, self.num_covered)

    def copy_in(self, slot: Bytes, block: Sequence[Bytes]) -> bytes:
        """Fill a block's part from a slot.

        Returns the slot's digest if this part of it is what is in the block then, and the rest what its digests say.
        """
        self._require_fit(slot)
        digests = bytearray(_tail(slot, self.shape.num_pieces))
        num_covered = _num_covered(digests, self.shape.num_heads)
        heads = _widened(self.heads, num_covered)
        if heads != self.heads:
            return self._copy_in_some(slot, block, heads, num_covered, digests)
        for target, (start, stop, theirs) in zip(block, self._own_runs, strict=True):
            target[:] = slot[start:stop]
            if failpoints.ON:
                failpoints.hit("xfer.read", target)
            digests[theirs] = self._digest(target.data, 0, target.size, num_covered)
        return xxhash.xxh3_128_digest(digests)

    def _copy_in_some(
        self, slot: Bytes, block: Sequence[Bytes], heads: range, num_covered: int, digests: bytearray
    ) -> bytes:
        """Take this part out of copies of more `heads`, whose digests cover it."""
        first = (self.heads.start - heads.start) * self.shape.piece_bytes
        for target, (start, stop, theirs) in zip(block, self._runs(heads), strict=True):
            copy = slot[start:stop].copy()
            if failpoints.ON:
                failpoints.hit("xfer.read", copy)
            digests[theirs] = self._digest(copy.data, 0, copy.size, num_covered)
            target[:] = copy[first : first + target.size]
        return xxhash.xxh3_128_digest(digests)

    @cached_property
    def _own_runs(self) -> list[Run]:
        return self._runs(self.heads)

    def _runs(self, heads: range) -> list[Run]:
        """Where the pieces of `heads` begin and end in a slot, and their digests' place, layer by layer."""
        size, runs = self.shape.piece_bytes, []
        for layer in self.layers:
            first = layer * self.shape.num_heads + heads.start
            last = first + len(heads)
            runs.append((first * size, last * size, slice(first * DIGEST_BYTES, last * DIGEST_BYTES)))
        return runs

    def _digest(self, view: memoryview, start: int, stop: int, num_covered: int) -> bytes:
        """The digests of pieces that lie one behind the other, each of `num_covered` of them."""
        digest, size = xxhash.xxh3_128_digest, self.shape.piece_bytes * num_covered
        padding = NONE * (num_covered - 1)
        return padding.join([digest(view[at : at + size]) for at in range(start, stop, size)]) + padding

    def _require_fit(self, slot: Bytes) -> None:
        if slot.size != self.shape.slot_bytes:
            raise ValueError(f"a slot has {slot.size} bytes, {self.shape} takes {self.shape.slot_bytes}")


def heads_of_rank(rank: int, num_ranks: int, num_heads: int) -> range:
    """KV heads of a tensor-parallel rank; where there are more ranks than heads, several ranks have the same one."""
    first = rank * num_heads // num_ranks
    return range(first, first + max(1, num_heads // num_ranks))


def is_first_of_replicas(rank: int, num_ranks: int, num_heads: int) -> bool:
    """Whether no earlier rank has the same heads."""
    return rank % max(1, num_ranks // num_heads) == 0


def clear(slot: Bytes, num_pieces: int) -> None:
    """Take the digests out of a slot that is about to be filled: a piece that nobody writes fits none."""
    _tail(slot, num_pieces)[:] = 0


def slot_digest(slot: Bytes, num_pieces: int) -> bytes:
    """The digest of a slot whose pieces are all there."""
    return xxhash.xxh3_128_digest(_tail(slot, num_pieces).data)


def _num_covered(digests: bytearray, num_heads: int) -> int:
    """How many heads one digest covers, by the zeros behind the first. Wrong digests give some wrong number."""
    later = (n for n in range(1, num_heads) if digests[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES] != NONE)
    num_covered = next(later, num_heads)
    return num_covered if num_heads % num_covered == 0 else 1


def _widened(heads: range, num_covered: int) -> range:
    """The heads whose digests cover `heads`."""
    return range(heads.start // num_covered * num_covered, -(-heads.stop // num_covered) * num_covered)


def _tail(slot: Bytes, num_pieces: int) -> Bytes:
    """View the digests of a slot."""
    return slot[slot.size - num_pieces * DIGEST_BYTES :]

"""One KV block of the whole model, in a slot, and the parts of it that ranks of an engine compute.

A slot holds pieces, one for each layer and KV head, and behind them a digest of each in the same order:

    [layer][head][piece]   [layer][head][digest]

So it looks the same however many ranks wrote it side by side, and a reader with any number of ranks takes its own
pieces out. The digest of the slot, which the ticket carries, is that of its pieces' digests: small enough for whoever
publishes to make when all ranks are done, and a rank that reads can check what it copied without reading the rest.

Both ways copy layer by layer and digest what was copied while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from inferflux import failpoints
from inferflux.kv.arena import Bytes
from inferflux.kv.digests import DIGEST_BYTES


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

    def pieces(self, slot: Bytes) -> Bytes:
        """View the pieces of a slot, `[layer, head, byte]`."""
        return self._split(slot)[0].reshape(self.num_layers, self.num_heads, self.piece_bytes)

    def digests(self, slot: Bytes) -> Bytes:
        """View the digests in a slot, `[layer, head, byte]`."""
        return self._split(slot)[1].reshape(self.num_layers, self.num_heads, DIGEST_BYTES)

    def _split(self, slot: Bytes) -> tuple[Bytes, Bytes]:
        if slot.size != self.slot_bytes:
            raise ValueError(f"a slot of {slot.size} bytes does not hold {self}, which takes {self.slot_bytes}")
        at = self.num_pieces * self.piece_bytes
        return slot[:at], slot[at:]


@dataclass(frozen=True, slots=True)
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

    @property
    def _columns(self) -> slice:
        return slice(self.heads.start, self.heads.stop)

    def copy_out(self, block: Sequence[Bytes], slot: Bytes) -> None:
        """Copy a block's part, given as the bytes of each layer, into its slot, with the digests of its pieces."""
        pieces, digests = self.shape.pieces(slot), self.shape.digests(slot)
        for layer, source in zip(self.layers, block, strict=True):
            copies = pieces[layer, self._columns]
            np.copyto(copies.reshape(-1), source)
            digests[layer, self._columns] = _digests(copies)

    def copy_in(self, slot: Bytes, block: Sequence[Bytes]) -> bytes:
        """Fill a block's part from a slot.

        Returns the slot's digest if this part of it is what is in the block then, and the rest what its digests say.
        """
        pieces, digests = self.shape.pieces(slot), self.shape.digests(slot).copy()
        for layer, target in zip(self.layers, block, strict=True):
            np.copyto(target, pieces[layer, self._columns].reshape(-1))
            if failpoints.ON:
                failpoints.hit("xfer.read", target)
            digests[layer, self._columns] = _digests(target.reshape(len(self.heads), -1))
        return xxhash.xxh3_128_digest(digests.data)


def heads_of_rank(rank: int, num_ranks: int, num_heads: int) -> range:
    """KV heads of a tensor-parallel rank; where there are more ranks than heads, several ranks have the same one."""
    first = rank * num_heads // num_ranks
    return range(first, first + max(1, num_heads // num_ranks))


def is_first_of_replicas(rank: int, num_ranks: int, num_heads: int) -> bool:
    """Whether no earlier rank has the same heads."""
    return rank % max(1, num_ranks // num_heads) == 0


def clear(slot: Bytes, num_pieces: int) -> None:
    """Take the digests out of a slot that is about to be filled: a piece that nobody writes fits none."""
    slot[-num_pieces * DIGEST_BYTES :] = 0


def slot_digest(slot: Bytes, num_pieces: int) -> bytes:
    """The digest of a slot whose pieces are all there."""
    return xxhash.xxh3_128_digest(slot[-num_pieces * DIGEST_BYTES :].data)


def _digests(pieces: Bytes) -> Bytes:
    """Digest each row of `[head, byte]`; returns `[head, digest]`."""
    digests = b"".join(xxhash.xxh3_128_digest(piece.data) for piece in pieces)
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)

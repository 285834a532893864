"""The simulated KV cache: bytes that say exactly which tokens they stand for, and tokens computed from those bytes.

    root(salt)       = blake2b(salt)                         keyed by the model's fingerprint
    hash(p)          = blake2b(hash(p - 1) + token(p))       so it depends on the tenant's salt and all tokens up to p
    entry(p)         = lines of 32 bytes: hash(p) as four words, plus a constant that differs by line
    block            = the entries of `block_size` positions
    token(p + 1)     = f(one line of every entry 0..p, digest of all of the prompt's bytes, p, sampling key)

The line read for a position differs from the last one's, so a wrong byte anywhere shows sooner or later and a wrong
block at once. Nothing but the bytes is remembered: also the next hash is computed from the last entry as it lies there.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import cast

import numpy as np
import numpy.typing as npt
import xxhash

from inferflux.engine.sim.profile import LINE_BYTES
from inferflux.engine.sim.tokenizer import FIRST_WORD, NUM_WORDS

Words = npt.NDArray[np.uint64]

HASH_BYTES = 32
# Any odd number makes all lines of an entry differ; this one is 2**64 / golden ratio, which spreads them well.
LINE_STEP = np.uint64(0x9E3779B97F4A7C15)


def chain(key: bytes, salt: str, token_ids: Sequence[int]) -> list[bytes]:
    """The chained hash of every position."""
    hashes, last = [], root(key, salt)
    for token_id in token_ids:
        last = link(key, last, token_id)
        hashes.append(last)
    return hashes


def root(key: bytes, salt: str) -> bytes:
    """What the first token's hash is chained to."""
    return blake2b(salt.encode(), key=key, digest_size=HASH_BYTES).digest()


def link(key: bytes, last: bytes, token_id: int) -> bytes:
    """The hash of a token after the hash of the one before it."""
    return blake2b(last + token_id.to_bytes(4, "little"), key=key, digest_size=HASH_BYTES).digest()


class KvCache:
    """The bytes of all blocks. Who may touch which is `blocks.BlockPool`'s business."""

    def __init__(self, num_blocks: int, block_size: int, slot_bytes: int, key: bytes) -> None:
        lines = slot_bytes // block_size // LINE_BYTES
        # zeros, not empty: the kernel gives pages only when they are written first
        self._words: Words = np.zeros((num_blocks, block_size, lines, 4), np.uint64)
        self._line_offsets = (np.arange(lines, dtype=np.uint64) * LINE_STEP)[:, None]
        self._num_lines = lines
        self._block_size = block_size
        self._key = key

    def block(self, block: int) -> npt.NDArray[np.uint8]:
        """View the bytes of a block."""
        return cast("npt.NDArray[np.uint8]", self._words[block].reshape(-1).view(np.uint8))

    def copy(self, source: int, target: int) -> None:
        """Copy a block."""
        self._words[target] = self._words[source]

    def clear(self, block: int) -> None:
        """Zero a block, so that what a partial block ends with does not depend on its last holder."""
        self._words[block] = 0

    def write(self, blocks: Sequence[int], first: int, hashes: Sequence[bytes]) -> None:
        """Write the entries of the positions `first`... from their chained hashes."""
        rows = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 1, 4)
        done = 0
        while done < len(hashes):
            index, at = divmod(first + done, self._block_size)
            num = min(self._block_size - at, len(hashes) - done)
            np.add(rows[done : done + num], self._line_offsets, out=self._words[blocks[index], at : at + num])
            done += num

    def append(self, blocks: Sequence[int], position: int, token_id: int) -> None:
        """Write the entry of `token_id` at `position` > 0 from the entry before it, as that lies in the cache."""
        self.write(blocks, position, (link(self._key, self.hash_at(blocks, position - 1), token_id),))

    def hash_at(self, blocks: Sequence[int], position: int) -> bytes:
        """The chained hash of a position, read back."""
        index, at = divmod(position, self._block_size)
        return cast("bytes", self._words[blocks[index], at, 0].tobytes())

    def digest(self, blocks: Sequence[int], num_tokens: int) -> bytes:
        """Hash every byte of the first `num_tokens` entries."""
        digest = xxhash.xxh3_128()
        for start in range(0, num_tokens, self._block_size):
            num = min(self._block_size, num_tokens - start)
            digest.update(self._words[blocks[start // self._block_size], :num].data)
        return digest.digest()

    def sample(self, blocks: Sequence[int], num_tokens: int, digest: bytes, sampling_key: bytes) -> int:
        """The token that follows `num_tokens` tokens."""
        lines = self._words[blocks[: -(-num_tokens // self._block_size)], :, num_tokens % self._num_lines]
        read = lines.reshape(-1, 4)[:num_tokens]
        value = xxhash.xxh3_64(digest + num_tokens.to_bytes(8, "little") + sampling_key)
        value.update(read.data)
        return FIRST_WORD + value.intdigest() % NUM_WORDS

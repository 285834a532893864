"""Digests of KV blocks and prompts, and the names of prefixes.

xxh3-128 runs at memory speed and finds every torn, stale or flipped block; forgery is not its job, a ticket's MAC
covers its digests (see inferflux.tickets). Hash the bytes where they are used, after copying: what lies in an arena may
change between a check and a copy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, cast

import numpy.typing as npt
import xxhash

from inferflux.types import ModelFingerprint

DIGEST_BYTES = 16
BLOCK_HASH_BYTES = 32

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]


def block_digest(parts: Iterable[Buffer]) -> bytes:
    """Hash the concatenation of `parts`, each C-contiguous, to 16 bytes. Large parts are hashed without the GIL."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(cast("bytes", part))  # numpy declares its buffers only for Python 3.12
    return digest.digest()


def prompt_digest(token_ids: Sequence[int], media: str = "") -> bytes:
    """Hash token ids as little-endian uint32 to 16 bytes. Raises OverflowError for an id that does not fit.

    `media`: names what else the prompt is made of. Its placeholders are the same ids for every image.
    """
    ids = _as_bytes(token_ids)
    return xxhash.xxh3_128_digest(ids + b"/" + media.encode() if media else ids)


def prefix_root(fingerprint: ModelFingerprint, salt: str) -> bytes:
    """What the hash of a prompt's first block is chained to: other weights, layouts and tenants never meet.

    `salt` is a tenant's secret (an HMAC), so nobody can make another tenant's hashes.
    """
    return blake2b(repr((fingerprint, salt)).encode(), digest_size=BLOCK_HASH_BYTES, person=b"ifx-prefix").digest()


def block_hashes(root: bytes, token_ids: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """Name each full block of a prompt by all tokens from the first to its last.

    Unlike digests these must stand up to forgery: they say what a block's KV was computed from. 2 us per 128 tokens.
    """
    ids, num_bytes = _as_bytes(token_ids), 4 * block_size
    hashes, last = [], root
    for end in range(num_bytes, len(ids) + 1, num_bytes):
        last = blake2b(last + ids[end - num_bytes : end], digest_size=BLOCK_HASH_BYTES).digest()
        hashes.append(last)
    return tuple(hashes)


def _as_bytes(token_ids: Sequence[int]) -> bytes:
    ids = array("I", token_ids)  # six times faster than numpy on a list
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()

"""One KV block of all layers, between an engine's paged cache and a slot: `[layer][block bytes]`.

Both ways copy layer by layer and digest what was copied while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from inferflux import failpoints
from inferflux.kv.arena import Arena, Bytes


def copy_out(block: Sequence[Bytes], arena: Arena, slot: int) -> None:
    """Copy one block into its slot and keep the digest there."""
    target, hasher, offset = arena.slot(slot), xxhash.xxh3_128(), 0
    for part in block:
        copy = target[offset : offset + part.nbytes]
        np.copyto(copy, part)
        hasher.update(copy.data)
        offset += part.nbytes
    arena.set_digest(slot, hasher.digest())


def copy_in(slot: Bytes, block: Sequence[Bytes]) -> bytes:
    """Fill one block from a slot's bytes; returns the digest of what is in the block then."""
    hasher, offset = xxhash.xxh3_128(), 0
    for part in block:
        np.copyto(part, slot[offset : offset + part.nbytes])
        if failpoints.ON:
            failpoints.hit("xfer.read", part)
        hasher.update(part.data)
        offset += part.nbytes
    return hasher.digest()

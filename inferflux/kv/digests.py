"""Digests of KV blocks and prompts.

xxh3-128 runs at memory speed and finds every torn, stale or flipped block; forgery is not its job, a ticket's MAC
covers its digests (see inferflux.tickets). Hash the bytes where they are used, after copying: what lies in an arena may
change between a check and a copy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy.typing as npt
import xxhash

DIGEST_BYTES = 16

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]


def block_digest(parts: Iterable[Buffer]) -> bytes:
    """Hash the concatenation of `parts`, each C-contiguous, to 16 bytes. Large parts are hashed without the GIL."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(cast("bytes", part))  # numpy declares its buffers only for Python 3.12
    return digest.digest()


def prompt_digest(token_ids: Sequence[int]) -> bytes:
    """Hash token ids as little-endian uint32 to 16 bytes. Raises OverflowError for an id that does not fit."""
    ids = array("I", token_ids)  # six times faster than numpy on a list
    if sys.byteorder == "big":
        ids.byteswap()
    return xxhash.xxh3_128_digest(ids)

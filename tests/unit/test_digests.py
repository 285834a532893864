from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from inferflux.kv.digests import DIGEST_BYTES, block_digest, prompt_digest


@given(data=st.binary(max_size=4096), cuts=st.lists(st.integers(0, 4096), max_size=5))
def test_a_block_digest_does_not_depend_on_how_the_block_is_cut(data: bytes, cuts: list[int]) -> None:
    """Layers are hashed one by one; the digest is that of their concatenation, whatever kind of buffer they are."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[a:b] for a, b in pairwise(edges)]

    assert block_digest([data]) == xxhash.xxh3_128_digest(data)
    assert block_digest(parts) == block_digest([data])
    assert block_digest(np.frombuffer(part, np.uint8) for part in parts) == block_digest([data])


def test_a_block_digest_takes_any_element_type() -> None:
    """Engines hash their caches as they are, without converting them to bytes."""
    block = np.arange(1000, dtype=np.float32).reshape(10, 100)

    assert block_digest([block]) == block_digest([block.tobytes()])


def test_a_block_with_gaps_is_refused() -> None:
    """A strided view has bytes between its elements that belong to others."""
    with pytest.raises((ValueError, BufferError, TypeError)):
        block_digest([np.zeros((4, 4), np.uint8)[:, ::2]])


@given(data=st.binary(min_size=1, max_size=2048), where=st.integers(0), bit=st.integers(0, 7))
def test_any_flipped_bit_changes_the_digest(data: bytes, where: int, bit: int) -> None:
    """Wrong KV never passes for right KV."""
    flipped = bytearray(data)
    flipped[where % len(data)] ^= 1 << bit

    assert block_digest([flipped]) != block_digest([data])


@given(ids=st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_a_prompt_digest_is_that_of_little_endian_uint32(ids: list[int]) -> None:
    """Both workers must agree, whatever they keep token ids in."""
    want = xxhash.xxh3_128_digest(struct.pack(f"<{len(ids)}I", *ids))

    assert prompt_digest(ids) == prompt_digest(tuple(ids)) == want
    assert len(want) == DIGEST_BYTES
    assert len({want, prompt_digest(ids, "image@0+4=a"), prompt_digest(ids, "image@0+4=b")}) == 3


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_a_token_id_that_does_not_fit_is_refused(token_id: int) -> None:
    """Cutting ids to 32 bits would let two prompts share a digest."""
    with pytest.raises(OverflowError):
        prompt_digest([token_id])

"""The sim's oracle must bite: whatever is wrong with the KV must change the tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.engine.sim.kv import KvCache, chain

KEY = b"k" * 32
SIZE, SLOT_BYTES = 4, 1024
PROMPT = list(b"a prompt of 24 tokens...")
NUM_BLOCKS = len(PROMPT) // SIZE
BLOCKS = list(range(NUM_BLOCKS))


def filled(salt: str = "", prompt: list[int] = PROMPT, key: bytes = KEY) -> KvCache:
    kv = KvCache(2 * NUM_BLOCKS, SIZE, SLOT_BYTES, key)
    kv.write(BLOCKS, 0, chain(key, salt, prompt))
    return kv


def outputs(kv: KvCache, blocks: list[int] = BLOCKS) -> list[int]:
    """The tokens of all positions; what a stream would see of them sooner or later."""
    digest = kv.digest(blocks, len(PROMPT))
    return [kv.sample(blocks, n, digest, b"") for n in range(1, len(PROMPT) + 1)]


RIGHT = outputs(filled())


@given(block=st.integers(0, NUM_BLOCKS - 1), at=st.integers(0, SLOT_BYTES - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_changes_the_tokens(block: int, at: int, bit: int) -> None:
    """All of them, but for chance: the digest of the whole prompt is part of each token."""
    kv = filled()

    kv.block(block)[at] ^= 1 << bit

    assert sum(wrong != right for wrong, right in zip(outputs(kv), RIGHT, strict=True)) >= len(RIGHT) - 2


def test_swapped_blocks_change_the_tokens() -> None:
    assert outputs(filled(), [1, 0, *BLOCKS[2:]]) != RIGHT


def test_a_block_that_was_given_away_and_rewritten_changes_the_next_token() -> None:
    """Found without a second look at the whole prompt: each step reads a line of every entry."""
    kv = filled()
    digest = kv.digest(BLOCKS, len(PROMPT))
    right = kv.sample(BLOCKS, len(PROMPT), digest, b"")

    kv.write([NUM_BLOCKS, BLOCKS[3]], 4, chain(KEY, "another tenant", PROMPT[:8])[4:])

    assert kv.sample(BLOCKS, len(PROMPT), digest, b"") != right


@pytest.mark.parametrize(
    "kv",
    [filled(salt="another tenant"), filled(prompt=[*PROMPT[:-1], 0]), filled(key=b"another model")],
    ids=["tenant", "prompt", "model"],
)
def test_kv_of_another_tenant_prompt_or_model_changes_the_tokens(kv: KvCache) -> None:
    assert outputs(kv) != RIGHT


def test_output_tokens_extend_the_chain_as_if_they_had_been_prompt() -> None:
    """So a worker that resumes a stream, or serves its next turn, computes the same bytes."""
    kv, num = filled(prompt=PROMPT[:-3]), len(PROMPT) - 3

    for position, token_id in enumerate(PROMPT[num:], num):
        kv.append(BLOCKS, position, token_id)

    assert outputs(kv) == RIGHT
    assert kv.hash_at(BLOCKS, len(PROMPT) - 1) == chain(KEY, "", PROMPT)[-1]


def test_seeds_and_choices_get_other_tokens() -> None:
    kv = filled()
    digest = kv.digest(BLOCKS, len(PROMPT))

    tokens = [kv.sample(BLOCKS, len(PROMPT), digest, key) for key in (b"", b"1/0", b"1/1", b"2/0")]

    assert len(set(tokens)) == 4

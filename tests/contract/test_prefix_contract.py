"""What every engine promises of prompts whose beginning the arena has: nothing is computed twice, no token differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from inferflux.engine.base import ComputedPrompt, Prefilled
from inferflux.types import HttpCall
from tests.support.engine_calls import TOPICS, Engines, ask, chat, completion, context, question, ticketed

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def prefilled(engines: Engines, call: HttpCall, salt: str = "5a17") -> ComputedPrompt:
    """Compute one prompt; its slots are released."""
    result = await engines.prefill.prefill(replace(context(), cache_salt=salt), call)
    assert isinstance(result, Prefilled)
    (prompt,) = result.prompts
    assert prompt.kv is not None
    await engines.prefill.free(prompt.kv.slots)
    return prompt


async def whole_blocks(engines: Engines, num_tokens: int) -> int:
    size = (await engines.prefill.info()).fingerprint.block_size
    return num_tokens // size * size


@pytest.mark.parametrize("make_call", [chat, completion], ids=["chat", "completions"])
async def test_prompts_that_begin_alike_share_slots(engines: Engines, make_call: Any) -> None:
    beginning = question()
    first = await prefilled(engines, make_call(beginning))
    call = make_call(f"{beginning} {next(TOPICS)}, or")

    async with ticketed(engines, call) as (source,):
        disaggregated = await ask(engines.decode, call, [source])
    alone = await ask(engines.prefill, call)

    num_shared = sum(a == b for a, b in zip(first.kv.slots, source.slots, strict=False))
    size = (await engines.prefill.info()).fingerprint.block_size
    # A chat's template ends what the prompts share a few tokens earlier.
    assert num_shared * size >= await whole_blocks(engines, first.num_prompt_tokens - 16) > 0
    assert disaggregated.report.result == "committed"
    assert disaggregated.token_ids() == alone.token_ids()


async def test_what_the_engine_has_lost_is_read_from_the_arena(engines: Engines) -> None:
    beginning = question()
    first = await prefilled(engines, completion(beginning))
    await engines.prefill.lose_cache()
    call = completion(f"{beginning} {next(TOPICS)}, or")

    second = await prefilled(engines, call)
    third = await prefilled(engines, call)
    async with ticketed(engines, call) as (source,):
        disaggregated = await ask(engines.decode, call, [source])
    await engines.prefill.lose_cache()
    alone = await ask(engines.prefill, call)

    assert second.num_read_tokens == second.num_cached_tokens == await whole_blocks(engines, first.num_prompt_tokens)
    assert third.num_read_tokens == 0
    assert third.num_cached_tokens >= second.num_cached_tokens
    assert second.token_ids == third.token_ids
    assert disaggregated.report.result == "committed"
    assert disaggregated.token_ids() == alone.token_ids()


async def test_a_prompt_that_is_there_as_a_whole_still_has_its_first_token(engines: Engines) -> None:
    size = (await engines.prefill.info()).fingerprint.block_size
    call = completion([100 + i % 50 for i in range(2 * size - 1)] + [next(TOPICS) % 200 + 1], max_tokens=3)
    first = await prefilled(engines, call)
    await engines.prefill.lose_cache()

    second = await prefilled(engines, call)

    assert second.token_ids == first.token_ids
    assert second.num_read_tokens == size


async def test_a_broken_block_of_the_arena_is_never_used(engines: Engines) -> None:
    beginning = question()
    first = await prefilled(engines, completion(beginning))
    await engines.prefill.corrupt(first.kv.slots[0], 17)
    await engines.prefill.lose_cache()
    call = completion(f"{beginning} {next(TOPICS)}, or")

    second = await prefilled(engines, call)
    await engines.prefill.lose_cache()
    third = await prefilled(engines, call)
    await engines.prefill.lose_cache()
    fourth = await prefilled(engines, call)

    assert [p.has_failed_read for p in (second, third, fourth)] == [True, False, False]
    assert (second.num_read_tokens, third.num_read_tokens) == (0, 0)
    assert fourth.num_read_tokens > 0, "the broken blocks were replaced"
    assert second.token_ids == third.token_ids == fourth.token_ids


@pytest.mark.parametrize("salt", ["another", ""])
async def test_tenants_share_no_blocks(engines: Engines, salt: str) -> None:
    call = completion()
    first = await prefilled(engines, call, salt="mine")
    await engines.prefill.lose_cache()
    other = await prefilled(engines, call, salt=salt)
    again = await prefilled(engines, call, salt=salt)

    kept = first.kv.slots[: len(first.kv.block_hashes)]  # the last, which is not full, is free again
    assert kept
    assert other.num_cached_tokens == 0
    assert not set(other.kv.slots) & set(kept)
    assert (again.kv.num_shared > 0) == bool(salt)

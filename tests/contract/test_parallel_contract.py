"""Tickets between engines of one rank and of two: the same tokens, whoever wrote the blocks and whoever reads them.

Both engines have an arena, so each is prefill and decode in turn. All in float32, where equal tokens mean equal KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from inferflux.engine.base import KvSource
from inferflux.engine.options import MIB, EngineOptions, Parallelism
from inferflux.types import HttpCall, Role
from tests.support.engine_calls import Engines, Response, ask, completion, context, settle, streamed, ticketed
from tests.support.engine_host import HostedEngine, hosted
from tests.support.tiny_models import LLAMA, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BLOCK_SIZE, NUM_HEADS, NUM_LAYERS = 32, 4, 3
PIECE_BYTES = BLOCK_SIZE * 2 * 32 * 4
# A block exactly, and a last block that is not full.
LENGTHS = (32, 300)
PAIRS = [("one rank", "two ranks"), ("two ranks", "one rank"), ("two ranks", "two ranks")]

EnginesByRanks = dict[str, HostedEngine]


@pytest.fixture(scope="module")
def engines() -> Iterator[EnginesByRanks]:
    options = EngineOptions("m", Role.PREFILL, kv_cache_bytes=24 * MIB, max_model_len=1024, max_num_seqs=4)
    options = replace(options, **tiny_model(LLAMA), dtype="float32", block_size=BLOCK_SIZE)
    with hosted("vllm", options, replace(options, parallelism=Parallelism(tensor=2))) as (one, two):
        yield {"one rank": one, "two ranks": two}


def prompt(length: int, seed: int) -> list[int]:
    return [(7919 * i + 104729 * seed) % 40000 + 100 for i in range(length)]


def question(length: int, seed: int = 1) -> HttpCall:
    return completion(prompt(length, seed), max_tokens=12)


async def alone(engines: EnginesByRanks, call: HttpCall) -> list[int]:
    """What one rank answers that has no ticket and nothing cached."""
    await settle(engines["one rank"])
    await engines["one rank"].lose_cache()
    return (await ask(engines["one rank"], call)).token_ids()


async def read(reader: HostedEngine, call: HttpCall, source: KvSource) -> Response:
    """Answer from the ticket, not from what the engine computed itself."""
    await settle(reader)
    await reader.lose_cache()
    return await ask(reader, call, [source])


async def test_engines_of_any_number_of_ranks_are_compatible(engines: EnginesByRanks) -> None:
    one, two = [await engine.info() for engine in engines.values()]

    assert one.fingerprint == two.fingerprint
    assert one.slot_bytes == two.slot_bytes == NUM_LAYERS * NUM_HEADS * (PIECE_BYTES + 16)
    await engines["two ranks"].check_numerics()


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
async def test_tokens_do_not_depend_on_who_wrote_and_who_reads(
    engines: EnginesByRanks, writer: str, reader: str
) -> None:
    for length in LENGTHS:
        call = question(length)
        expected = await alone(engines, call)
        await engines[writer].lose_cache()
        async with ticketed(Engines("vllm", "m", engines[writer], engines[reader]), call) as (source,):
            response = await read(engines[reader], call, source)

        assert source.first_token_ids == tuple(expected[:1])
        assert (response.report.result, response.token_ids()) == ("committed", expected), length
        assert response.report.num_bytes == len(source.slots) * NUM_LAYERS * NUM_HEADS * PIECE_BYTES
        assert len(set(expected)) > 3, "a model that repeats itself proves nothing"


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
async def test_the_blocks_of_another_prompt_give_other_tokens(
    engines: EnginesByRanks, writer: str, reader: str
) -> None:
    """The control: if tokens did not follow from the blocks, the test above would prove nothing."""
    pair, call = Engines("vllm", "m", engines[writer], engines[reader]), question(300)
    async with ticketed(pair, call) as (own,), ticketed(pair, question(300, seed=2)) as (foreign,):
        mixed = replace(own, slots=foreign.slots, digests=foreign.digests, generations=foreign.generations)
        response = await read(engines[reader], call, mixed)

    assert response.report.result == "committed"
    assert response.token_ids()[1:] != (await alone(engines, call))[1:]


@pytest.mark.parametrize(("pair", "head"), [(PAIRS[0], NUM_HEADS - 1), (PAIRS[1], 0)])
async def test_a_flipped_bit_in_the_part_of_any_rank_is_never_used(
    engines: EnginesByRanks, pair: tuple[str, str], head: int
) -> None:
    writer, reader = (engines[name] for name in pair)
    call = question(75, seed=3 + head)
    async with ticketed(Engines("vllm", "m", writer, reader), call) as (source,):
        await writer.corrupt(source.slots[1], head * PIECE_BYTES + 17)
        response = await read(reader, call, source)
        await writer.corrupt(source.slots[1], head * PIECE_BYTES + 17)

    assert (response.report.result, response.report.reason) == ("recomputed", "digest")
    assert response.token_ids() == await alone(engines, call)


async def test_the_death_of_a_rank_is_the_loss_of_the_worker(engines: EnginesByRanks) -> None:
    """And no part of the response, which goes on elsewhere. The last test here: the engine is gone."""
    two, told = engines["two ranks"], []
    call = streamed(question(75), max_tokens=500, ignore_eos=True)

    async with aclosing(two.generate(context(), call)) as frames:
        async for frame in frames:
            told.append(frame)
            if len(told) == 5:
                two.ranks()[-1].kill()

    assert told[-1].end.error.reason == "WORKER_LOST"
    assert b"error" not in b"".join(frame.data for frame in told)
    assert not (await two.load()).is_alive

"""Engines whose ranks are actors on two Ray nodes, compared with one rank, in float32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from inferflux.engine.options import MIB, EngineOptions, Parallelism
from inferflux.types import HttpCall, Role
from tests.support.engine_calls import Engines, Response, ask, completion, settle, ticketed
from tests.support.engine_host import HostedEngine, hosted
from tests.support.ray_nodes import RayCluster
from tests.support.tiny_models import LLAMA, QWEN_MOE, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTHS = (20, 75, 300, 900)


def options(kind: str, role: Role, parallelism: Parallelism | None = None) -> EngineOptions:
    """A tiny model with a small cache."""
    small = EngineOptions("m", role, kv_cache_bytes=24 * MIB, max_model_len=1024, max_num_seqs=4, block_size=32)
    return replace(small, **tiny_model(kind), dtype="float32", parallelism=parallelism or Parallelism())


@contextmanager
def pair(prefill: EngineOptions, decode: EngineOptions) -> Iterator[Engines]:
    with hosted("vllm", prefill, decode) as (one, other):
        yield Engines("vllm", "m", one, other)


def question(length: int) -> HttpCall:
    return completion([(7919 * i + length) % 40000 + 100 for i in range(length)], max_tokens=12)


async def alone(engine: HostedEngine, call: HttpCall) -> list[int]:
    """What an engine answers without a ticket and with nothing cached."""
    await settle(engine)
    await engine.lose_cache()
    return (await ask(engine, call)).token_ids()


async def by_ticket(engines: Engines, call: HttpCall) -> Response:
    await settle(engines.prefill)
    await engines.prefill.lose_cache()
    async with ticketed(engines, call) as sources:
        await settle(engines.decode)
        await engines.decode.lose_cache()
        return await ask(engines.decode, call, sources)


async def test_prefill_on_two_ray_nodes_for_decode_with_one_rank(ray_nodes: RayCluster) -> None:
    two = Parallelism(tensor=2, nodes=2, ray_address=ray_nodes.address)
    with pair(options(LLAMA, Role.PREFILL, two), options(LLAMA, Role.DECODE)) as engines:
        await engines.prefill.check_numerics()
        for length in LENGTHS:
            response = await by_ticket(engines, question(length))
            assert response.report.result == "committed"
            assert response.token_ids() == await alone(engines.decode, question(length)), length


@pytest.fixture(scope="module")
def mixture_of_one_rank() -> Iterator[HostedEngine]:
    with hosted("vllm", options(QWEN_MOE, Role.PREFILL)) as (engine,):
        yield engine


async def until_experts_are_counted(engine: HostedEngine) -> None:
    """Each token that was decoded went to two of eight experts in each of three layers, and all of that is counted."""
    chosen, deadline = 2 * 3, time.monotonic() + 60
    while sum(tokens := await engine.expert_tokens()) < len(LENGTHS) * 12 * chosen:
        assert time.monotonic() < deadline, tokens
        await ask(engine, question(LENGTHS[0]))
    assert len(tokens) == 8
    assert sum(tokens) % chosen == 0
    assert sum(map(bool, tokens)) > 1


@pytest.mark.parametrize(
    "parallelism",
    [Parallelism(tensor=2, expert=True, nodes=2), Parallelism(data=2, expert=True, nodes=2)],
    ids=["two ranks", "two replicas"],
)
async def test_a_mixture_of_experts_decodes_on_two_ray_nodes(
    ray_nodes: RayCluster, mixture_of_one_rank: HostedEngine, parallelism: Parallelism
) -> None:
    spread = options(QWEN_MOE, Role.DECODE, replace(parallelism, ray_address=ray_nodes.address))
    with hosted("vllm", spread) as (decode,):
        engines = Engines("vllm", "m", mixture_of_one_rank, decode)
        await engines.decode.check_numerics()
        for length in LENGTHS:
            expected = await alone(engines.prefill, question(length))
            response = await by_ticket(engines, question(length))
            assert (response.report.result, response.token_ids()) == ("committed", expected), length
            assert len(set(expected)) > 3, "a model that repeats itself proves nothing"
        await until_experts_are_counted(engines.decode)

"""Who plans, with two registries on one store: exactly one, and another one when it is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from inferflux.v1 import pool_service_pb2 as pb
from inferflux.v1.pool_service_pb2_grpc import PoolServiceStub
from tests.support.redis_server import RedisServer
from tests.support.service import Service, temporary_home, until

SPEC = {"model": "tiny", "role": "decode", "min_replicas": 2}


class Pair:
    """Two registries and their Redis."""

    def __init__(self, stack: ExitStack) -> None:
        self.home, self.redis = stack.enter_context(temporary_home()), stack.enter_context(RedisServer())
        settings = {"redis_url": self.redis.url, "planner_period_s": "0.3"}
        self.services = [Service("services.registry", f"registry-{i}", self.home, settings) for i in range(2)]
        for service in self.services:
            stack.callback(service.kill)
            service.start()

    def leaders(self) -> list[Service]:
        return [service for service in self.services if leads(service)]

    async def put(self, *specs: dict[str, object]) -> None:
        async with self.services[0].channel("operator") as channel:
            request = pb.PutPoolsRequest(pools_json=json.dumps(specs).encode())
            await PoolServiceStub(channel).PutPools(request, wait_for_ready=True)

    async def plan(self, service: Service) -> dict[str, object]:
        """What a registry says of the only pool."""
        async with service.channel("gateway") as channel:
            answer = await PoolServiceStub(channel).ListPools(pb.ListPoolsRequest(), wait_for_ready=True)
        (pool,) = json.loads(answer.pools_json)
        return pool["plan"] or {}


def leads(service: Service) -> bool:
    try:
        return "inferflux_planner_leads 1.0" in service.get("/metrics")
    except OSError:
        return False


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


async def test_one_plans_and_another_takes_over(pair: Pair) -> None:
    """At a crash, at an orderly end, and when the store comes back; either replica shows the leader's plans."""
    await pair.put(SPEC)
    await until(lambda: len(pair.leaders()) == 1)
    (first,) = pair.leaders()
    other = next(service for service in pair.services if service is not first)
    plans = [await pair.plan(service) for service in pair.services]

    first.kill()
    await until(lambda: leads(other))
    first.start()
    await until(first.is_ready)
    assert pair.leaders() == [other]

    with pair.redis.paused():
        await until(lambda: pair.leaders() == [])
    await until(lambda: len(pair.leaders()) == 1)
    (last,) = pair.leaders()
    assert last.terminate() == 0
    await until(lambda: len(pair.leaders()) == 1)

    assert {plan["target"] for plan in plans} == {2}


async def test_without_specs_nobody_plans(pair: Pair) -> None:
    """A cluster that does not use it has nothing of it."""
    await until(lambda: all(service.is_ready() for service in pair.services))
    await pair.put(SPEC)
    await until(lambda: len(pair.leaders()) == 1)

    await pair.put()

    await until(lambda: pair.leaders() == [])

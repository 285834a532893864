"""Policy over a real Redis with TLS, users of few rights and a replica that takes over with less than there was."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
import redis

from tests.support.redis_pair import RedisPair, running_pair
from tests.support.service import Service, temporary_home, until

KEY = "ifx_admin-of-the-tests"
ADMIN = {"authorization": f"Bearer {KEY}"}
TIMEOUT_S = 60.0
# What the services' user may not do; each is refused for its name alone.
FORBIDDEN = """ACL LIST|BGREWRITEAOF|BGSAVE|CLIENT LIST|CLIENT KILL ID 1|CONFIG GET *|CONFIG SET maxmemory 1
FAILOVER|FLUSHALL|FLUSHDB|INFO|KEYS *|LASTSAVE|MIGRATE a 1 k 0 1|MODULE LIST|MONITOR|PSYNC ? -1|REPLICAOF NO ONE
RESTORE ifx:a 0 x|ROLE|SAVE|SHUTDOWN|SLOWLOG GET|SORT ifx:a|SWAPDB 0 1|GET other|SET other 1|PUBLISH other 1"""


class Plane:
    """A pair of Redis servers, a policy service and gateways. No registry: nothing is inferred here."""

    def __init__(self, stack: ExitStack, pair: RedisPair) -> None:
        self._stack = stack
        self.pair = pair
        self.home = stack.enter_context(temporary_home())
        self.http = httpx.AsyncClient(timeout=20, trust_env=False)
        self.policy = self._run("services.policy", "policy-0", redis_url=pair.url, api_keys=f"{KEY}:admin")

    async def gateway(self, number: int = 0) -> tuple[str, Service]:
        """Start one; returns its URL when it lets the administrator in."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        addresses = {"policy_address": self.policy.address, "registry_address": f"unix:{self.home}/registry.sock"}
        service = self._run("services.gateway", f"gateway-{number}", http_port=str(port), **addresses)
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(TIMEOUT_S):
            while await self.status(url, KEY) != 200:
                await asyncio.sleep(0.05)
        return url, service

    async def status(self, url: str, key: str) -> int:
        """What a key gets; 0 while nobody answers."""
        with suppress(httpx.TransportError):
            # As if through a proxy: from this machine metrics may be read without a key.
            headers = {"authorization": f"Bearer {key}", "x-forwarded-for": "192.0.2.7"}
            return (await self.http.get(f"{url}/metrics", headers=headers)).status_code
        return 0

    async def revision(self, url: str) -> int:
        return int((await self.http.get(f"{url}/livez")).headers["x-inferflux-policy-rev"])

    async def create_key(self, url: str) -> tuple[str, str]:
        """Make a key; returns its id and its secret."""
        body = {"name": "test", "scopes": ["read"]}
        made = (await self.http.post(f"{url}/v1/admin/api_keys", headers=ADMIN, json=body)).raise_for_status().json()
        return made["id"], made["secret"]

    def _run(self, module: str, name: str, **settings: str) -> Service:
        service = Service(module, name, self.home, settings)
        self._stack.callback(service.kill)
        return service.start()


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with running_pair(tmp_path) as pair:
        with ExitStack() as stack:  # the services go first
            plane = Plane(stack, pair)
            async with plane.http:
                yield plane


@pytest.mark.timeout(240)
@pytest.mark.parametrize("is_policy_killed", [False, True], ids=["policy lives", "policy dies as well"])
async def test_a_revoked_key_stays_revoked_when_a_lagging_replica_takes_over(plane: Plane, is_policy_killed: bool):
    """It is revoked in the gap. Then the only ones who know are the policy service or, if that dies too, gateways."""
    pair = plane.pair
    url, gateway = await plane.gateway()
    key_id, secret = await plane.create_key(url)
    assert await plane.status(url, secret) == 200
    await until(lambda: bool(pair.replica.command("HEXISTS", "ifx:{policy}:keys", key_id)))
    pair.lag()
    (await plane.http.delete(f"{url}/v1/admin/api_keys/{key_id}", headers=ADMIN)).raise_for_status()
    assert await plane.status(url, secret) == 401
    await until(lambda: pair.num_bytes_unheard > 0)
    before = await plane.revision(url)

    if is_policy_killed:
        plane.policy.kill()
    await pair.fail_over()
    assert pair.replica.command("HEXISTS", "ifx:{policy}:keys", key_id), "the replica knows of the revocation"
    if is_policy_killed:
        plane.policy.start()
    async with asyncio.timeout(TIMEOUT_S):
        while not pair.replica.command("SISMEMBER", "ifx:{policy}:revoked", key_id):
            assert await plane.status(url, secret) == 401
            await asyncio.sleep(0.02)
    other, _ = await plane.gateway(1)
    _, fresh = await plane.create_key(other)
    async with asyncio.timeout(TIMEOUT_S):
        while await plane.status(url, fresh) != 200:
            await asyncio.sleep(0.02)

    assert [await plane.status(each, secret) for each in (url, other)] == [401, 401]
    assert not pair.replica.command("HEXISTS", "ifx:{policy}:keys", key_id)
    assert await plane.revision(url) > before
    assert "inferflux_version_regression_total{" not in gateway.get("/metrics")


@pytest.mark.timeout(120)
async def test_the_services_user_may_do_nothing_but_its_work(tmp_path: Path):
    """No administration, nobody else's keys and channels; what the stores need is in the other test."""
    async with running_pair(tmp_path) as pair:
        for command in FORBIDDEN.replace("\n", "|").split("|"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                pair.primary.command(*command.split(), user="inferflux")
        assert pair.primary.command("SET", "ifx:a", "1", user="inferflux")

"""Who asks and what they may use, through a gateway that runs: tokens of an issuer, roles, allow-lists, rotation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from inferflux.v1 import policy_service_pb2 as policy_pb
from tests.support.fake_cluster import FakeClient, FakeCluster, FakeDecode, fake_cluster, running_gateway
from tests.support.issuer import TokenIssuer, rsa_key, running_issuer, stranger

MAPPING = {"tenant": {"claim": "org", "values": {"o-1": "acme"}}, "roles": {"claim": "groups", "values": {"u": "dev"}}}


@pytest.fixture
def issuer() -> Iterator[TokenIssuer]:
    with running_issuer() as issuer:
        yield issuer


def rules(issuer: TokenIssuer) -> dict[str, Any]:
    return {"issuer": issuer.url, "audiences": ["inferflux"], "network": "loopback"} | MAPPING


def apply(cluster: FakeCluster, **identity: Any) -> None:
    """Push a document to the gateway, as the policy service does."""
    cluster.policy.policy = policy_pb.PolicyRevision(
        revision=cluster.policy.revision + 1,
        document=orjson.dumps({"identity": identity}),
        stage=policy_pb.POLICY_STAGE_LIVE,
    )
    cluster.policy.publish(cluster.policy.revision + 1)


@asynccontextmanager
async def site() -> AsyncIterator[tuple[FakeCluster, FakeDecode, FakeClient]]:
    """A gateway with one worker of each role."""
    async with fake_cluster() as cluster:
        decode, _ = await cluster.add_decode(), await cluster.add_prefill()
        async with running_gateway(cluster) as client:
            await client.ready()
            yield cluster, decode, client


async def status(client: FakeClient, credential: str, **fields: Any) -> int:
    client.http.headers["authorization"] = f"Bearer {credential}"
    return (await client.chat(**fields)).status_code


async def becomes(client: FakeClient, credential: str, wanted: int) -> None:
    """Wait until a chat with the credential is answered so."""
    deadline = time.monotonic() + 10
    while (found := await status(client, credential)) != wanted:
        assert time.monotonic() < deadline, found


async def test_a_token_is_as_good_as_a_key(issuer):
    """Its tenant goes with the request; what it may not do, it may not; a change of the policy ends it."""
    async with site() as (cluster, decode, client):
        token = issuer.token(org="o-1", groups=["u"])
        assert await status(client, token) == 401

        apply(cluster, roles={"dev": ["generate"]}, issuers=[rules(issuer)])
        await becomes(client, token, 200)
        assert decode.jobs[-1].start.context.tenant == "acme"
        assert await status(client, issuer.token(org="o-1")) == 403
        assert await status(client, issuer.token(org="o-2", groups=["u"])) == 403
        assert await status(client, issuer.token(org="o-1", groups=["u"], aud="other")) == 401
        assert await status(client, token + "A") == 401
        assert (await client.http.get("/v1/admin/api_keys")).status_code == 401

        apply(cluster, roles={"dev": ["generate"]}, issuers=[rules(issuer) | {"blocked_subjects": ["ann"]}])
        await becomes(client, token, 401)


async def test_a_token_of_a_new_key_is_taken(issuer, monkeypatch):
    """The request waits while its key is fetched; meanwhile others go on."""
    monkeypatch.setattr("services.gateway.jwks.MIN_INTERVAL_S", 0.05)
    async with site() as (cluster, _, client):
        apply(cluster, roles={"dev": ["generate"]}, issuers=[rules(issuer)])
        await becomes(client, issuer.token(org="o-1", groups=["u"]), 200)
        fresh = stranger("rsa-fresh")
        issuer.keys = [rsa_key(), fresh]
        token = issuer.token(fresh, org="o-1", groups=["u"])
        await becomes(client, token, 200)

        issuer.keys = [fresh]
        old, deadline = issuer.token(rsa_key(), org="o-1", groups=["u"]), time.monotonic() + 10
        while await status(client, old) != 401:
            assert time.monotonic() < deadline
            # Makes the gateway fetch the keys, and see that one is gone, before it would by itself.
            assert await status(client, issuer.token(stranger("unknown"), org="o-1")) == 401
        assert await status(client, token) == 200


async def test_a_model_that_may_not_be_used_is_not_there():
    """For the key, its team or its tenant; in chats and in lists, with the same words."""
    async with site() as (cluster, _, client):
        cluster.policy.add("key-with-a-list", "admin", models=policy_pb.ModelList(names=["other"]))
        cluster.policy.add("key-of-a-team", "generate", tenant="acme", team="red")
        apply(cluster, tenants={"acme": {"teams": {"red": {"models": ["other"]}}}})
        for key in ("key-with-a-list", "key-of-a-team"):
            await becomes(client, key, 404)
            bodies = [(await client.chat(model=model)).text.replace(model, "?") for model in ("tiny", "nobody")]
            assert bodies[0] == bodies[1]
            assert (await client.http.get("/v1/models")).json()["data"] == []
            assert (await client.http.get("/v1/models/tiny")).status_code == 404
            assert (await client.chat(model=None)).status_code == 404


async def test_both_secrets_of_a_rotated_key_work_until_the_old_one_expires():
    """By the gateway's own clock: nobody has to tell it."""
    async with site() as (cluster, _, client):
        old = cluster.policy.add("old-secret", "generate")
        record = cluster.policy.add("new-secret", "generate", previous_hash=old.secret_hash)
        record.previous_until.FromMilliseconds(int((time.time() + 1) * 1000))
        del cluster.policy.keys[old.key_id]
        cluster.policy.publish(cluster.policy.revision + 1)
        await becomes(client, "new-secret", 200)
        assert await status(client, "old-secret") in {200, 401}
        await becomes(client, "old-secret", 401)
        assert await status(client, "new-secret") == 200


async def test_what_was_revoked_once_stays_refused_whatever_a_later_snapshot_says():
    """A store that forgot a revocation in a failover brings the key back; the gateway has not forgotten."""
    async with site() as (cluster, _, client):
        policy, lost = cluster.policy, cluster.policy.add("revoked-secret", "generate")
        await becomes(client, "revoked-secret", 200)
        policy.publish(policy.revision + 1, revoked=[f"key_{lost.secret_hash[:8].hex()}"])
        await becomes(client, "revoked-secret", 401)
        policy.add("later-secret", "generate")
        await becomes(client, "later-secret", 200)

        assert lost.key_id in policy.keys
        assert await status(client, "revoked-secret") == 401

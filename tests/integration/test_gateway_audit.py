"""What a gateway writes down of requests, and where it goes when the policy service is away."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.fake_cluster import (
    ADMIN_KEY,
    GENERATE_KEY,
    FakeClient,
    FakeCluster,
    fake_cluster,
    running_gateway,
    until,
)

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
CANARY = "canary-of-the-audit-log"


@asynccontextmanager
async def cluster(section: dict[str, Any], **settings: Any) -> AsyncIterator[tuple[FakeCluster, FakeClient]]:
    async with fake_cluster() as fake:
        await fake.add_decode()
        fake.policy.apply({"audit": section})
        async with running_gateway(fake, **settings) as gateway:
            await gateway.ready()
            yield fake, gateway


def found(fake: FakeCluster, **fields: Any) -> list[dict[str, Any]]:
    return [record for record in fake.policy.audit if fields.items() <= record.items()]


async def test_every_refusal_is_written_down_and_other_requests_are_not():
    """Whoever it was, without any text; what was no refusal is not sampled by default."""
    async with cluster({}) as (fake, gateway):
        assert (await gateway.chat()).status_code == 200
        unknown = await gateway.http.get("/v1/models", headers={"authorization": "Bearer not-a-key-of-ours"})
        await gateway.http.post("/v1/chat/completions", json={}, headers={"authorization": "Bearer not-a-key-of-ours"})
        bad = await gateway.http.post("/v1/chat/completions", content=b'{"model": 1, "x": "' + CANARY.encode() + b'"}')
        forbidden = await gateway.http.get("/v1/admin/policy")
        await until(lambda: len(found(fake, kind="refusal")) == 4)

        first, second, third, fourth = fake.policy.audit
        assert (first["status"], first["path"], first["request_id"]) == (
            401,
            "/v1/models",
            unknown.headers["x-request-id"],
        )
        assert (second["status"], second["reason"]) == (401, "UNAUTHENTICATED")
        assert (third["status"], third["tenant"], third["request_id"]) == (
            400,
            "default",
            bad.headers["x-request-id"],
        )
        assert third["key_id"].startswith("key_")
        assert (fourth["status"], fourth["path"]) == (403, "/v1/admin/policy")
        assert forbidden.status_code == 403
        assert CANARY not in json.dumps(fake.policy.audit)
        assert GENERATE_KEY not in json.dumps(fake.policy.audit)


async def test_prompts_are_keyed_hashes_unless_debugging():
    """The same prompt has the same hash, under a key that only the cluster has."""
    async with cluster({"sample": 1.0}) as (fake, gateway):
        for _ in range(2):
            await gateway.chat(user=CANARY)
        await until(lambda: len(found(fake, kind="request")) == 2)
        one, two = fake.policy.audit
        key = hmac.digest((fake.root / "secrets/pepper.key").read_bytes(), b"\1audit", hashlib.sha256)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "user": CANARY}
        digests = [
            hmac.digest(key, json.dumps(body, separators=separators).encode(), hashlib.sha256).hex()
            for separators in ((",", ":"), (", ", ": "))
        ]

        assert one["prompt_hash"] == two["prompt_hash"]
        assert one["prompt_hash"] in digests
        assert CANARY not in json.dumps(fake.policy.audit)
        assert one["policy_revision"] == fake.policy.revision

        fake.policy.apply({"audit": {"sample": 1.0, "debug_mode": True}})
        await until(lambda: fake.policy.reports[-1].policy_revision == fake.policy.revision)
        await gateway.chat(user=CANARY)
        await until(lambda: len(fake.policy.audit) == 3)
        assert CANARY in fake.policy.audit[-1]["prompt"]


async def test_a_sample_is_a_share_of_the_requests():
    """Chosen by their ids."""
    async with cluster({"sample": 0.5}) as (fake, gateway):
        for _ in range(60):
            await gateway.chat()
        await gateway.http.get("/v1/admin/policy")
        await until(lambda: bool(found(fake, kind="refusal")))

        assert 10 < len(found(fake, kind="request")) < 50


async def test_an_action_of_an_administrator_is_written_down_before_and_after():
    """With his key's id; its body may hold secrets and is not."""
    async with cluster({}) as (fake, gateway):
        made = await gateway.http.post(
            "/v1/admin/api_keys", json={"name": CANARY, "scopes": ["read"], "secret": "secret-of-a-key"}, headers=ADMIN
        )
        await until(lambda: len(found(fake, kind="admin")) == 2)
        intent, done = fake.policy.audit

        assert made.status_code == 201
        assert (intent["phase"], intent["method"], intent["path"]) == ("intent", "POST", "/v1/admin/api_keys")
        assert (done["phase"], done["status"], done["actor"]) == ("done", 201, intent["actor"])
        assert "secret-of-a-key" not in json.dumps(fake.policy.audit)


async def test_records_wait_on_disk_while_the_policy_service_is_away():
    """And none is lost or doubled; requests go on."""
    async with cluster({"sample": 1.0}) as (fake, gateway):
        await gateway.chat()
        await until(lambda: len(fake.policy.audit) == 1)
        await fake.kill("policy")
        ids = [(await gateway.chat()).headers["x-request-id"] for _ in range(5)]
        spool = fake.root / "spool/gateway-0.jsonl"
        await until(lambda: spool.exists() and len(spool.read_bytes().splitlines()) == 5)
        assert await gateway.metric("inferflux_audit_spool_bytes") > 0
        assert (await gateway.chat()).status_code == 200

        await fake.start_policy()
        await until(lambda: len(fake.policy.audit) == 7)
        await until(lambda: spool.stat().st_size == 0)
        assert [record["request_id"] for record in fake.policy.audit[1:6]] == ids
        assert await gateway.metric("inferflux_audit_dropped_total") == 0


async def test_without_any_place_for_records_requests_go_on_and_administrators_wait():
    """Disk full and the policy service away: the action is refused before anything is done."""
    async with cluster({"sample": 1.0}, audit_spool_bytes=10) as (fake, gateway):
        await fake.kill("policy")
        assert [(await gateway.chat()).status_code for _ in range(5)] == [200] * 5
        refused = await gateway.http.delete("/v1/admin/api_keys/key_1", headers=ADMIN)

        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")
        assert (await gateway.http.get("/v1/models", headers=ADMIN)).status_code == 200

        await fake.start_policy()
        await until(lambda: len(found(fake, kind="request")) == 5)
        assert found(fake, kind="admin", phase="intent") == []

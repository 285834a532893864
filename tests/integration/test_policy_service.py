"""The policy service as real processes on a real Redis-protocol server, with faults."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial

import grpc
import pytest

from inferflux.errors import (
    AuditUnavailable,
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PolicyInvalid,
    PolicyPersistFailed,
    Unavailable,
)
from inferflux.policy.signature import Verifier
from inferflux.rpc.client import translated_errors
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.policy.pepper import Pepper
from tests.support.leaks import unfinished_tasks
from tests.support.redis_server import RedisServer
from tests.support.service import Service, Watcher, temporary_home, until


class Cluster:
    """One Redis and any number of policy replicas."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.home = stack.enter_context(temporary_home())
        self.redis = stack.enter_context(RedisServer())

    def service(self, name: str = "policy-0", **settings: str) -> Service:
        service = Service("services.policy", name, self.home, {"redis_url": self.redis.url} | settings)
        self._stack.callback(service.kill)
        return service.start()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)
        assert await unfinished_tasks() == []  # gRPC ends its calls after we have ended ours


@asynccontextmanager
async def client(service: Service, role: str = "operator") -> AsyncIterator[PolicyServiceStub]:
    async with service.channel(role) as channel:
        yield PolicyServiceStub(channel)


@asynccontextmanager
async def watching(service: Service, revision: int = 0) -> AsyncIterator[Watcher]:
    verifier = Verifier.load(service.home / "secrets/snapshot.pub")

    def read(message: pb.WatchSnapshotResponse) -> pb.PolicySnapshot:
        assert verifier.is_valid(message.signature, message.snapshot)
        return pb.PolicySnapshot.FromString(message.snapshot)

    async with client(service, "gateway") as stub, Watcher(partial(_watch, stub), revision, read).running() as watcher:
        yield watcher


def _watch(stub: PolicyServiceStub, revision: int = 0) -> grpc.aio.UnaryStreamCall:
    return stub.WatchSnapshot(pb.WatchSnapshotRequest(gateway_id="gateway-0", revision=revision), wait_for_ready=True)


async def create(stub: PolicyServiceStub, name: str = "ci", **fields: object) -> pb.CreateKeyResponse:
    request = pb.CreateKeyRequest(**{"name": name, "scopes": [pb.SCOPE_GENERATE]} | fields)
    with translated_errors():
        return await stub.CreateKey(request, wait_for_ready=True)


async def revoke(stub: PolicyServiceStub, key_id: str) -> pb.RevokeKeyResponse:
    with translated_errors():
        return await stub.RevokeKey(pb.RevokeKeyRequest(key_id=key_id))


async def listed(stub: PolicyServiceStub) -> set[str]:
    with translated_errors():
        return {key.key_id for key in (await stub.ListKeys(pb.ListKeysRequest(), wait_for_ready=True)).keys}


def ids(snapshot: pb.PolicySnapshot) -> set[str]:
    return {key.key_id for key in snapshot.keys}


async def test_a_rotated_key_keeps_what_it_may_and_its_old_secret_for_a_while(cluster):
    """Gateways get both hashes and until when; a restart forgets nothing; a revocation ends both."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        fields = {"team": "red", "roles": ["dev"], "models": pb.ModelList(names=["tiny"]), "scopes": []}
        made = await create(stub, "ci", **fields)
        request = pb.RotateKeyRequest(key_id=made.key.key_id)
        request.grace.FromSeconds(60)
        rotated = await stub.RotateKey(request)
        snapshot = await watcher.until(lambda s: s.revision >= rotated.revision)

        pepper = Pepper.load(cluster.home / "secrets/pepper.key")
        record = snapshot.keys[0]
        assert (record.team, list(record.roles), list(record.models.names)) == ("red", ["dev"], ["tiny"])
        assert record.secret_hash == pepper.hash_secret(rotated.secret)
        assert record.previous_hash == pepper.hash_secret(made.secret)
        assert 0 < record.previous_until.ToSeconds() - time.time() <= 60
        assert rotated.key.previous_hash == rotated.key.secret_hash == b""

        service.restart()
        listing = (await stub.ListKeys(pb.ListKeysRequest(), wait_for_ready=True)).keys
        assert list(listing) == [rotated.key]
        await revoke(stub, made.key.key_id)
        for secret in (made.secret, rotated.secret):
            with pytest.raises(Conflict):
                await create(stub, secret=secret)
        assert not [secret for secret in (made.secret, rotated.secret) if secret in service.log()]


async def test_keys_are_created_listed_pushed_and_revoked(cluster):
    """The secret is in one answer only; gateways get its hash, lists get neither."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        made = await create(stub, "ci", tenant="acme", scopes=[pb.SCOPE_READ, pb.SCOPE_ADMIN], priority=2)
        snapshot = await watcher.until(lambda s: s.revision >= made.revision)
        listing = await stub.ListKeys(pb.ListKeysRequest())

        assert (made.key.name, made.key.tenant, made.key.priority) == ("ci", "acme", 2)
        assert set(made.key.scopes) == {pb.SCOPE_READ, pb.SCOPE_ADMIN}
        assert snapshot.keys[0].secret_hash == Pepper.load(cluster.home / "secrets/pepper.key").hash_secret(made.secret)
        assert list(listing.keys) == [made.key]
        assert made.key.secret_hash == b""

        await revoke(stub, made.key.key_id)
        await watcher.until(lambda s: not s.keys)
        assert made.secret not in service.log()


async def test_bad_requests_have_their_own_errors(cluster):
    """Validation, conflict and not found come through the wire as such."""
    async with client(cluster.service()) as stub:
        made = await create(stub, secret="operators-own-secret")

        assert made.secret == "operators-own-secret"
        with pytest.raises(InvalidRequest, match="scope"):
            await create(stub, scopes=[])
        with pytest.raises(InvalidRequest, match="unknown scope 0"):
            await create(stub, scopes=[pb.SCOPE_UNSPECIFIED])
        with pytest.raises(Conflict):
            await create(stub, secret="operators-own-secret")
        with pytest.raises(NotFound):
            await revoke(stub, "key_nobody")


async def test_only_gateways_watch_and_only_gateways_and_operators_administrate(cluster):
    """Every method denies the other roles."""
    service = cluster.service()
    for role in ("prefill", "decode", "registry", "policy"):
        async with client(service, role) as stub:
            with pytest.raises(PermissionDenied):
                await create(stub)
            with pytest.raises(PermissionDenied):
                await listed(stub)
            with pytest.raises(PermissionDenied):
                await revoke(stub, "key_1")
    async with client(service, "gateway") as stub:
        assert (await create(stub)).secret
    async with client(service) as stub:
        with pytest.raises(PermissionDenied), translated_errors():
            await _watch(stub).read()


async def test_a_write_reaches_the_watchers_of_all_replicas_in_time(cluster):
    """From the call to the snapshot, on the replica that was asked and on another one."""
    one, two = cluster.service("policy-0"), cluster.service("policy-1")
    async with client(one) as stub, watching(one) as near, watching(two) as far:
        times_ms = {name: await _push_times_ms(stub, watcher) for name, watcher in (("same", near), ("other", far))}

    for name, times in times_ms.items():
        print(f"write to push, {name} replica: median {sorted(times)[10]:.1f} ms, max {max(times):.1f} ms of 20")  # noqa: T201
        assert sorted(times)[10] < 250


async def _push_times_ms(stub: PolicyServiceStub, watcher: Watcher) -> list[float]:
    await watcher.until(lambda s: s.revision > 0)
    times = []
    for _ in range(20):
        started_at = time.perf_counter()
        made = await create(stub)
        await until(lambda: watcher.revision >= made.revision)  # noqa: B023 - awaited in the same turn
        times.append((time.perf_counter() - started_at) * 1000)
    return times


async def test_without_redis_reads_and_watches_live_on_and_writes_fail(cluster):
    """Redis is killed and comes back; the stream that was open before still carries the next write."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        made = await create(stub)
        await watcher.until(lambda s: s.keys)
        cluster.redis.kill()

        with pytest.raises(Unavailable):
            await create(stub, "refused")
        assert await listed(stub) == {made.key.key_id}
        await until(lambda: 'inferflux_store_up{store="policy"} 0.0' in service.get("/metrics"))
        assert service.is_ready()
        async with watching(service) as late:
            assert ids(await late.until(lambda s: s.keys)) == {made.key.key_id}

        cluster.redis.start()
        await until(lambda: 'inferflux_store_up{store="policy"} 1.0' in service.get("/metrics"))
        second = await create(stub, "second")
        assert ids(await watcher.until(lambda s: s.revision >= second.revision)) == await listed(stub)
        assert watcher.num_opened == 1


@pytest.mark.parametrize("loss", ["flushall", "lost-file"])
async def test_an_emptied_redis_empties_no_policy(cluster, loss):
    """The service writes back what it knows, above all older revisions; no watcher ever sees an empty set."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        kept, gone = await create(stub, "kept"), await create(stub, "gone", secret="once-and-never-again")
        await revoke(stub, gone.key.key_id)
        before = await watcher.until(lambda s: ids(s) == {kept.key.key_id})
        num_seen = len(watcher.snapshots)

        if loss == "flushall":
            assert cluster.redis.command("FLUSHALL") == "+OK"
        else:
            cluster.redis.kill()
            cluster.redis.lose_data()
            cluster.redis.start()
        after = await watcher.until(lambda s: s.revision > before.revision)

        assert ids(after) == {kept.key.key_id}
        assert all(s.keys for s in watcher.snapshots[num_seen:])
        assert cluster.redis.command("HEXISTS", "ifx:{policy}:keys", kept.key.key_id) == ":1"
        with pytest.raises(Conflict, match="revoked"):
            await create(stub, secret="once-and-never-again")


async def test_a_watch_resumes_when_the_service_was_killed(cluster):
    """The gateway's channel finds the new process, which has all keys and no older revision."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        made = await create(stub)
        await watcher.until(lambda s: s.revision >= made.revision)
        service.restart()
        second = await create(stub, "second")

        assert ids(await watcher.until(lambda s: s.revision >= second.revision)) == {made.key.key_id, second.key.key_id}
        assert watcher.num_opened >= 2


async def test_everything_killed_at_once_comes_back(cluster):
    """Redis and the service die together; the acknowledged key survives in the append-only file."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        made = await create(stub)
        cluster.redis.kill()
        service.kill()
        cluster.redis.start()
        service.start()

        assert await listed(stub) == {made.key.key_id}
        assert ids(await watcher.until(lambda s: s.revision >= made.revision)) == {made.key.key_id}


async def test_without_any_witness_an_empty_store_denies_everybody(cluster):
    """Redis lost its data while no service ran: the new empty set is above what the gateway had."""
    async with client(service := cluster.service()) as stub:
        made = await create(stub)
    service.kill()
    cluster.redis.command("FLUSHALL")
    service.start()

    async with watching(service, revision=made.revision) as watcher:
        assert not (await watcher.until(lambda s: s.revision > made.revision)).keys
    assert "no keys in the policy store" in service.log()


async def test_a_service_gets_above_the_revision_of_a_gateway(cluster):
    """A clock that went back, or another cluster's past: the gateway is not left with refused snapshots."""
    async with client(service := cluster.service()) as stub:
        made = await create(stub)
        ahead = made.revision + 10_000_000_000
        async with watching(service, revision=ahead) as watcher:
            assert ids(await watcher.until(lambda s: s.revision > ahead)) == {made.key.key_id}
        assert (await create(stub, "later")).revision > ahead


async def test_a_gateway_tells_what_the_store_has_forgotten(cluster):
    """A revocation that only a gateway knows is one again, for everybody and at once; nonsense is refused."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        made, kept = await create(stub), await create(stub, "kept")
        ahead = pb.WatchSnapshotRequest(gateway_id="gateway-1", revision=kept.revision, revoked=[made.key.key_id])
        wrong = pb.WatchSnapshotRequest(gateway_id="gateway-1", revoked=["a" * 20])
        async with client(service, "gateway") as gateway:
            call = gateway.WatchSnapshot(ahead)
            first = pb.PolicySnapshot.FromString((await call.read()).snapshot)
            call.cancel()
            with pytest.raises(InvalidRequest), translated_errors():
                await gateway.WatchSnapshot(wrong).read()

        assert first.revision > kept.revision
        assert (ids(first), list(first.revoked)) == ({kept.key.key_id}, [made.key.key_id])
        await watcher.until(lambda s: ids(s) == {kept.key.key_id})
        service.restart()
        assert await listed(stub) == {kept.key.key_id}


async def test_a_service_that_starts_without_redis_waits_and_is_not_ready(cluster):
    """It publishes nothing, rather than an empty set, until it has read the store."""
    async with client(service := cluster.service()) as stub:
        made = await create(stub)
    cluster.redis.kill()
    service.restart()
    await until(lambda: bool(service.readiness()))

    assert "store: not read since the start" in service.readiness()["reason"]
    async with client(service) as stub, watching(service, made.revision) as watcher:
        with pytest.raises(Unavailable):
            await listed(stub)
        assert watcher.snapshots == []
        cluster.redis.start()
        assert ids(await watcher.until(lambda s: s.keys)) == {made.key.key_id}
        await until(service.is_ready)


async def test_api_keys_of_the_environment_exist_from_the_start(cluster):
    """Again after a restart, without a new revision; changed grants take effect, a revocation stays."""
    service = cluster.service(api_keys="ifx_one-one:generate+read,ifx_two-two:admin")
    async with client(service) as stub:
        await until(service.is_ready)
        first = await stub.ListKeys(pb.ListKeysRequest())
        await revoke(stub, next(key.key_id for key in first.keys if list(key.scopes) == [pb.SCOPE_ADMIN]))
        (left,) = await listed(stub)
    service.kill()
    service = cluster.service("policy-1", api_keys="ifx_one-one:read,ifx_two-two:admin")
    async with client(service) as stub:
        await until(service.is_ready)
        (key,) = (await stub.ListKeys(pb.ListKeysRequest())).keys

    assert len(first.keys) == 2
    assert (key.key_id, list(key.scopes)) == (left, [pb.SCOPE_READ])
    assert "ifx_one-one" not in service.log()


@pytest.mark.parametrize(
    ("setting", "value"), [("api_keys", "ifx_one-one:root"), ("redis_url", "http://x"), ("bind", "")]
)
def test_a_bad_setting_ends_the_start_with_code_2(cluster, setting, value):
    """One clear line, no traceback, no secret."""
    service = cluster.service(**{setting: value})

    assert service.wait() == 2
    assert f"INFERFLUX_{setting.upper()}" in service.log()
    assert "ifx_one-one" not in service.log()
    assert "Traceback" not in service.log()


async def test_a_drain_ends_the_watches_and_exits_in_order(cluster):
    """Open streams do not hold the process up."""
    service = cluster.service()
    async with watching(service) as watcher:
        await watcher.until(lambda s: s.revision > 0)
        started_at = time.monotonic()

        assert service.terminate() == 0
    assert time.monotonic() - started_at < 5


AUDIT = b'{"audit":{"sample":0.5}}'


async def apply(stub: PolicyServiceStub, document: bytes = AUDIT, **fields: object) -> pb.PolicyRevision:
    request = {"document": document, "author": "operator", "stage": pb.POLICY_STAGE_LIVE} | fields
    with translated_errors():
        return (await stub.ApplyPolicy(pb.ApplyPolicyRequest(**request), wait_for_ready=True)).policy


async def test_a_document_is_applied_pushed_listed_and_rolled_back(cluster):
    """Each step is a revision with its author and reason; the snapshot has the document beside the keys."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        await watcher.until(lambda s: s.revision > 0)
        assert not watcher.newest.HasField("policy")
        first = await apply(stub, b' {"audit": {"sample": 0.5}} ', reason="first")
        second = await apply(stub, b"{}", author="key_1", expected_revision=first.revision)
        snapshot = await watcher.until(lambda s: s.revision >= second.revision)
        with pytest.raises(Conflict), translated_errors():
            await stub.ApplyPolicy(pb.ApplyPolicyRequest(author="a", stage=1, expected_revision=first.revision))
        with pytest.raises(PolicyInvalid, match=r"\$.audit.sample"):
            await apply(stub, b'{"audit": {"sample": 2}}')
        request = pb.RollbackPolicyRequest(revision=first.revision, author="key_2", reason="too strict")
        back = (await stub.RollbackPolicy(request)).policy
        listing = (await stub.ListRevisions(pb.ListRevisionsRequest())).revisions

        assert (first.document, first.reason) == (AUDIT, "first")
        assert (snapshot.policy, snapshot.revision) == (second, second.revision)
        assert (back.document, back.author, back.revision > second.revision) == (AUDIT, "key_2", True)
        assert list(listing) == [back, second, first]
        assert (await stub.GetPolicy(pb.GetPolicyRequest())).policy == back
        assert (await stub.GetPolicy(pb.GetPolicyRequest(revision=second.revision))).policy == second


async def test_a_change_that_the_store_does_not_take_is_no_change(cluster):
    """Its own error; what was in force stays, and is there again when an emptied Redis comes back."""
    async with client(service := cluster.service()) as stub, watching(service) as watcher:
        first = await apply(stub)
        cluster.redis.kill()
        with pytest.raises(PolicyPersistFailed):
            await apply(stub, b"{}")
        assert (await stub.GetPolicy(pb.GetPolicyRequest())).policy == first
        cluster.redis.lose_data()
        cluster.redis.start()
        await watcher.until(lambda s: s.revision > first.revision)

        assert watcher.newest.policy == first
        assert cluster.redis.command("HEXISTS", "ifx:{policy}:revisions", str(first.revision)) == ":1"


def report(gateway: str = "gateway-0", **fields: object) -> pb.ReportPolicyRequest:
    return pb.ReportPolicyRequest(**{"gateway_id": gateway} | fields)


async def test_a_canary_that_fails_is_reverted_and_says_why(cluster):
    """By a revision of the service, within one report; what is as bad as the rest stays."""
    async with client(service := cluster.service()) as stub, client(service, "gateway") as gateway:
        live = await apply(stub)
        canary = await apply(stub, b"{}", stage=pb.POLICY_STAGE_CANARY, share=0.1)
        same = {"live": pb.Outcomes(num_requests=900, num_failures=300)}
        good = pb.Outcomes(num_requests=100, num_failures=33)
        bad = pb.Outcomes(num_requests=100, num_failures=60)
        await gateway.ReportPolicy(report(candidate_revision=canary.revision, candidate=good, **same))
        assert (await stub.GetPolicy(pb.GetPolicyRequest())).candidate == canary

        started_at = time.perf_counter()
        await gateway.ReportPolicy(report(candidate_revision=canary.revision, candidate=bad, **same))
        state = await stub.GetPolicy(pb.GetPolicyRequest())

        assert time.perf_counter() - started_at < 10
        assert not state.HasField("candidate")
        assert (state.policy.document, state.policy.author) == (live.document, "policy")
        assert "60 of 100 requests failed" in state.policy.reason
        assert state.policy.revision > canary.revision


async def test_a_candidate_that_a_gateway_cannot_read_is_reverted(cluster):
    """In shadow too: it could never be promoted."""
    async with client(service := cluster.service()) as stub, client(service, "gateway") as gateway:
        shadow = await apply(stub, stage=pb.POLICY_STAGE_SHADOW)
        await gateway.ReportPolicy(report(candidate_revision=shadow.revision, is_candidate_refused=True))
        state = await stub.GetPolicy(pb.GetPolicyRequest())

        assert not state.HasField("candidate")
        assert "gateway-0 can't read it" in state.policy.reason


async def test_gateways_are_listed_with_what_they_use_and_how_far_behind_they_are(cluster):
    """As this replica knows them; others may not report."""
    async with client(service := cluster.service()) as stub, client(service, "gateway") as gateway:
        first, second = await apply(stub), await apply(stub, b"{}")
        await gateway.ReportPolicy(report("gateway-0", revision=second.revision))
        await gateway.ReportPolicy(report("gateway-1", revision=first.revision))
        listed = await stub.ListReplicas(pb.ListReplicasRequest())

        assert [replica.report.gateway_id for replica in listed.replicas] == ["gateway-0", "gateway-1"]
        assert listed.replicas[0].lag_s == 0
        assert listed.replicas[1].lag_s > 0
        with pytest.raises(PermissionDenied), translated_errors():
            await stub.ReportPolicy(report())


async def test_what_is_configured_is_in_force_until_an_administrator_changes_it(cluster):
    """File, then environment, then administrators; also after a restart."""
    file = cluster.home / "policy.toml"
    file.write_text("[audit]\nsample = 0.1\n[guardrails]\n")
    service = cluster.service(policy_document=str(file), policy_sections='{"audit": {"sample": 0.2}}')
    async with client(service) as stub:
        await until(service.is_ready)
        configured = (await stub.GetPolicy(pb.GetPolicyRequest())).policy
        service.restart()
        again = (await stub.GetPolicy(pb.GetPolicyRequest(), wait_for_ready=True)).policy
        made = await apply(stub)
        service.restart()
        kept = (await stub.GetPolicy(pb.GetPolicyRequest(), wait_for_ready=True)).policy

    assert (configured.document, configured.author) == (b'{"audit":{"sample":0.2},"guardrails":{}}', "config")
    assert again == configured
    assert kept == made


async def test_what_an_operator_does_is_in_the_audit_log_and_is_not_done_without_it(cluster):
    """Gateways write down what they do themselves."""
    blocked = cluster.home / "blocked"
    blocked.write_text("no directory")
    service = cluster.service(audit_dir=str(blocked))
    async with client(service) as stub, client(service, "gateway") as gateway:
        for attempt in (create(stub), apply(stub), revoke(stub, "key_1")):
            with pytest.raises(AuditUnavailable):
                await attempt
        assert await listed(stub) == set()
        assert (await create(gateway)).secret
        blocked.unlink()
        made = await create(stub, "second")
        lines = (await stub.ListAudit(pb.ListAuditRequest(fields={"actor": "operator"}))).lines

    assert [json.loads(line)["record"]["target"] for line in lines] == [made.key.key_id]

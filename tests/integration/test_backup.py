"""The control state as a file and back, on real servers; valkey's own, and Debian's Redis where there is one."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from inferflux.cli import backup
from inferflux.cli.backup import Backup
from inferflux.cli.failure import CliError, Exit
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub
from tests.support.cluster import inferctl
from tests.support.redis_server import RedisServer, redis_binaries
from tests.support.service import Service, temporary_home, until

LASTING = {
    "ifx:{policy}:revision": b"100",
    "ifx:{registry}:revision": b"200",
    "ifx:{policy}:keys": {b"key_1": b"sealed \xff\x00"},
    "ifx:{policy}:revoked": {b"key_0"},
}
Inferctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", params=list(redis_binaries()))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(redis_binaries()[request.param]) as server:
        yield server


@pytest.fixture
def store(server: RedisServer) -> Iterator[redis.Redis]:
    """A server with a state, some of which is of the moment."""
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.flushall()
        client.mset({"ifx:{policy}:revision": "100", "ifx:{registry}:revision": "200", "other": "not ours"})
        client.hset("ifx:{policy}:keys", "key_1", b"sealed \xff\x00")
        client.sadd("ifx:{policy}:revoked", "key_0")
        client.hset("ifx:{registry}:rosters", "registry-0", "now")
        client.set("ifx:{limits}:window", "7", ex=60)
        yield client


@pytest.fixture
def run(server: RedisServer, tmp_path: Path) -> Inferctl:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return inferctl(tmp_path, "admin", *arguments, "-o", "json", INFERFLUX_REDIS_URL=server.url)

    return command


def state(store: redis.Redis) -> dict[str, object]:
    read = {b"string": store.get, b"hash": store.hgetall, b"set": store.smembers}
    return {key.decode(): read[store.type(key)](key) for key in store.scan_iter("ifx:*")}


def test_there_and_back(store: redis.Redis, run: Inferctl, tmp_path: Path) -> None:
    """Into an emptied Redis; what was of the moment is not brought back, what is not ours never touched."""
    file = tmp_path / "state.backup"

    saved = run("backup", str(file))
    store.flushall()
    store.set("other", "still there")
    restored = run("restore", str(file))

    assert (saved.returncode, restored.returncode) == (Exit.OK, Exit.OK), saved.stderr + restored.stderr
    assert json.loads(saved.stdout)["revisions"] == {"ifx:{policy}:revision": 100, "ifx:{registry}:revision": 200}
    assert state(store) == LASTING
    assert store.get("other") == b"still there"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_newer_state_is_not_replaced_unless_forced(store: redis.Redis, run: Inferctl, tmp_path: Path) -> None:
    """Forced, the revision still grows, and what was revoked meanwhile stays revoked."""
    file = tmp_path / "state.backup"
    assert run("backup", str(file)).returncode == Exit.OK
    store.set("ifx:{policy}:revision", "150")
    store.hset("ifx:{policy}:keys", "key_2", "later")
    store.sadd("ifx:{policy}:revoked", "key_1")

    refused = run("restore", str(file))
    left_alone = state(store)
    forced = run("restore", str(file), "--force")

    assert refused.returncode == Exit.FAILED
    assert "ifx:{policy}:revision is 150, the backup has 100" in refused.stderr
    assert left_alone["ifx:{policy}:keys"] == {b"key_1": b"sealed \xff\x00", b"key_2": b"later"}
    assert forced.returncode == Exit.OK, forced.stderr
    assert state(store)["ifx:{policy}:keys"] == LASTING["ifx:{policy}:keys"]
    assert state(store)["ifx:{policy}:revision"] == b"151"
    assert state(store)["ifx:{policy}:revoked"] == {b"key_0", b"key_1"}


def test_a_file_is_never_overwritten(store: redis.Redis, run: Inferctl, tmp_path: Path) -> None:
    file = tmp_path / "state.backup"
    file.write_text("precious")

    refused = run("backup", str(file))

    assert refused.returncode == Exit.FAILED
    assert "is there already" in refused.stderr
    assert file.read_text() == "precious"
    assert list(tmp_path.glob(".state*")) == []


def test_what_was_changed_or_cut_is_refused(store: redis.Redis) -> None:
    """Any byte, any cut: nothing of it is ever restored."""
    data = backup.take(store).encode()

    assert Backup.decode(data).entries.keys() == LASTING.keys()
    for i in range(0, len(data), 7):
        with pytest.raises(CliError):
            Backup.decode(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CliError):
            Backup.decode(data[:i])


def test_another_version_is_refused_by_name(store: redis.Redis) -> None:
    data = backup.take(store).encode().replace(b'"version":1', b'"version":2')

    with pytest.raises(CliError, match="version 2, this inferctl reads 1"):
        Backup.decode(data)


def test_all_kinds_of_values_survive(store: redis.Redis) -> None:
    store.rpush("ifx:{x}:list", "b", "a", "b")
    store.zadd("ifx:{x}:scores", {"one": 1.5, "two": 2})

    saved = Backup.decode(backup.take(store).encode())
    store.flushall()
    backup.put_back(store, saved, force=False)

    assert store.lrange("ifx:{x}:list", 0, -1) == [b"b", b"a", b"b"]
    assert store.zrange("ifx:{x}:scores", 0, -1, withscores=True) == [(b"one", 1.5), (b"two", 2.0)]


def test_without_a_redis_there_is_nothing_to_do(tmp_path: Path) -> None:
    result = inferctl(tmp_path, "admin", "backup", str(tmp_path / "x"), INFERFLUX_REDIS_URL=f"unix://{tmp_path}/none")

    assert result.returncode == Exit.NOT_RUNNING
    assert "no Redis to ask" in result.stderr


async def test_a_restored_policy_service_knows_its_keys(tmp_path: Path) -> None:
    """A real service wrote them, lost its store, and reads them again from what was restored."""
    with ExitStack() as stack:
        home, server = stack.enter_context(temporary_home()), stack.enter_context(RedisServer())
        policy = Service("services.policy", "policy-0", home, {"redis_url": server.url})
        stack.callback(policy.kill)
        policy.start()
        await until(policy.is_ready)
        async with policy.channel("operator") as channel:
            request = pb.CreateKeyRequest(name="ci", scopes=[pb.SCOPE_GENERATE])
            made = await PolicyServiceStub(channel).CreateKey(request)
        file = str(tmp_path / "state.backup")
        saved = inferctl(home, "admin", "backup", file, INFERFLUX_REDIS_URL=server.url)
        policy.kill()
        server.command("FLUSHALL")
        restored = inferctl(home, "admin", "restore", file, INFERFLUX_REDIS_URL=server.url)
        policy.start()
        await until(policy.is_ready)
        async with policy.channel("operator") as channel:
            found = await PolicyServiceStub(channel).ListKeys(pb.ListKeysRequest(), wait_for_ready=True)

    assert (saved.returncode, restored.returncode) == (Exit.OK, Exit.OK), saved.stderr + restored.stderr
    assert [key.key_id for key in found.keys] == [made.key.key_id]
    assert made.secret not in (tmp_path / "state.backup").read_text()

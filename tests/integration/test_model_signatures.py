"""Signed models through every layer: inferctl signs and promotes, the registry remembers, workers load or refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inferflux.cli.failure import Exit
from inferflux.errors import PermissionDenied
from inferflux.rpc.client import translated_errors
from inferflux.v1 import registry_service_pb2 as pb
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceStub
from tests.support.cluster import inferctl
from tests.support.leaks import unfinished_tasks
from tests.support.models import make_folder
from tests.support.redis_server import RedisServer
from tests.support.service import Service, Watcher, temporary_home, until

SETTINGS = {"engine": "sim", "model": "m", "kv_cache_bytes": str(32 << 20), "kv_arena_bytes": str(8 << 20)}


class Plant:
    """A registry with its Redis, a signed model in versions 1 and 2, and workers that must verify."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.home = stack.enter_context(temporary_home())
        (self.home / "run").mkdir()
        self.redis = stack.enter_context(RedisServer())
        self.registry = Service("services.registry", "registry-0", self.home, {"redis_url": self.redis.url})
        stack.callback(self.registry.kill)
        self.registry.start()
        assert self.run("keygen")["key"]
        for version in (1, 2):
            make_folder(self.folder(version), weights=bytes([version]) * 4096)
            self.sign(version)

    def folder(self, version: int) -> Path:
        return self.home / f"m-{version}"

    def sign(self, version: int, key: str = "release") -> dict:
        flags = ("--key", str(self.home / "signing" / f"{key}.key"), "--name", "m", "--no-numerics")
        return self.run("sign", str(self.folder(version)), "--version", str(version), *flags)

    def run(self, *words: str, status: int = 0) -> dict:
        """`inferctl registry ... -o json`."""
        result = self.inferctl(*words)
        assert result.returncode == status, result.stderr
        return json.loads(result.stdout) if status == 0 else {"error": result.stderr}

    def inferctl(self, *words: str):
        environ = {"INFERFLUX_REGISTRY_ADDRESS": self.registry.address}
        return inferctl(self.home, "registry", *words, "-o", "json", **environ)

    def worker(self, name: str, folder: Path, **settings: str) -> Service:
        where = {"model_dir": str(folder), "registry_address": self.registry.address, "model_signature": "require"}
        service = Service("services.decode", name, self.home, SETTINGS | where | settings)
        self.stack.callback(service.kill)
        return service.start()

    async def refused(self, name: str, folder: Path, **settings: str) -> str:
        """Start a worker that must refuse; returns its reason."""
        worker = self.worker(name, folder, **settings)
        await until(lambda: worker.readiness().get("state") == "failed", 20)
        reason = worker.readiness()["reason"]
        assert worker.terminate() == 0
        return reason


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    with ExitStack() as stack:
        yield Plant(stack)


@pytest.fixture(autouse=True)
async def no_leaks() -> AsyncIterator[None]:
    yield
    assert await unfinished_tasks() == []


async def test_a_worker_loads_what_is_signed_and_refuses_what_was_changed(plant):
    """The old one serves on; the new one says which file, in its readiness and in the registry, within 2 s."""
    path = plant.folder(1)
    serving = plant.worker("decode-0", path)
    await until(serving.is_ready, 20)
    view = plant.home / "run" / "decode-0.model"
    assert str((view / "model.safetensors").readlink()).startswith(f"/proc/{serving.pid}/fd/")

    tampered = shutil.copytree(path, plant.home / "tampered")
    with (tampered / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    async with plant.registry.channel("gateway") as channel:
        stub = RegistryServiceStub(channel)
        request = pb.WatchRegistryRequest(gateway_id="gateway-0")
        async with Watcher(lambda _: stub.WatchSnapshot(request)).running() as watcher:
            bad = plant.worker("decode-1", tampered)
            snapshot = await watcher.until(lambda s: {w.worker_id for w in s.workers} == {"decode-0", "decode-1"})
            states = {w.worker_id: (w.state, w.reason) for w in snapshot.workers}
    (model,) = snapshot.models
    reason = bad.readiness()["reason"]

    assert "model.safetensors: not the file that was signed" in reason
    assert states["decode-1"] == (pb.WorkerRecord(state=4).state, reason)
    assert (states["decode-0"][1], serving.is_ready()) == ("", True)
    assert (model.version, len(model.signed_by), list(model.capabilities)) == (
        1,
        64,
        ["chat", "completion", "messages", "responses"],
    )
    assert 'inferflux_model_verifications_total{result="refused"} 1.0' in bad.get("/metrics")
    assert (bad.terminate(), serving.terminate()) == (0, 0)
    assert not view.exists()


async def test_refusals_are_quick(plant):
    """From the start of a process that knows nothing to the reason: the machine may be busy, the work is small."""
    (extra := shutil.copytree(plant.folder(1), plant.home / "extra") / "extra.bin").write_text("x")
    started_at = time.monotonic()
    reason = await plant.refused("decode-2", extra.parent)
    print(f"refused {time.monotonic() - started_at:.1f} s after the start of the process")  # noqa: T201

    assert reason == "extra.bin: not among the signed files"


async def test_each_complaint_has_its_words(plant):
    """Unsigned, another model, another digest; a warning loads it all the same."""
    unsigned = make_folder(plant.home / "unsigned")

    assert "model.sig: missing" in await plant.refused("decode-3", unsigned)
    assert "signed as 'm', not as 'n'" in await plant.refused("decode-3", plant.folder(1), model="n")
    assert "was asked for" in await plant.refused("decode-3", plant.folder(1), model_digest="00" * 32)
    warned = plant.worker("decode-3", unsigned, model_signature="warn")
    await until(warned.is_ready, 20)
    assert 'inferflux_model_verifications_total{result="warned"} 1.0' in warned.get("/metrics")
    warned.terminate()


async def test_versions_and_keys_end(plant):
    """A promoted version ends the older ones, a rollback brings one back, a revoked key ends them all."""
    for version in (1, 2):
        plant.run("push", str(plant.folder(version)))
        assert plant.run("promote", "m", str(version))["floor"] == version
    reason = await plant.refused("decode-4", plant.folder(1))
    assert "version 1, at least 2" in reason

    assert plant.run("rollback", "m") == {"model": "m", "current": 1, "floor": 1}
    worker = plant.worker("decode-4", plant.folder(1))
    await until(worker.is_ready, 20)
    worker.terminate()
    history = plant.run("history", "m")
    assert [(e["action"], e["version"]) for e in history["events"]] == [
        ("push", 1),
        ("promote", 1),
        ("push", 2),
        ("promote", 2),
        ("rollback", 1),
    ]
    assert [v["source"] for v in history["versions"]] == [str(plant.folder(v)) for v in (1, 2)]

    os.kill(plant.registry.pid, signal.SIGSTOP)  # the worker remembers
    try:
        worker = plant.worker("decode-4", plant.folder(1))
        await until(worker.is_ready, 40)
        worker.kill()
    finally:
        os.kill(plant.registry.pid, signal.SIGCONT)

    plant.run("revoke", history["versions"][0]["key_id"])
    assert "was revoked" in await plant.refused("decode-4", plant.folder(2))


async def test_only_operators_release(plant):
    """Workers may read the rules and nothing else."""
    async with plant.registry.channel("decode") as channel:
        stub = RegistryServiceStub(channel)
        for attempt in (
            stub.PromoteVersion(pb.PromoteVersionRequest(model="m", version=1)),
            stub.RollBackVersion(pb.RollBackVersionRequest(model="m")),
            stub.RevokeSigningKey(pb.RevokeSigningKeyRequest(key_id="00" * 32)),
            stub.PushVersion(pb.PushVersionRequest()),
            stub.GetHistory(pb.GetHistoryRequest(model="m")),
        ):
            with pytest.raises(PermissionDenied), translated_errors():
                await attempt
        await stub.GetModelRules(pb.GetModelRulesRequest(model="m"), wait_for_ready=True)


def test_inferctl_says_what_is_wrong(plant):
    """One line and a status: a changed folder, an unknown version, a key that is there already."""
    folder = shutil.copytree(plant.folder(1), plant.home / "changed")
    (folder / "tokenizer.json").write_text("[]")

    assert "tokenizer.json: not the file" in plant.run("verify", str(folder), status=Exit.FAILED)["error"]
    assert "tokenizer.json: not the file" in plant.run("push", str(folder), status=Exit.FAILED)["error"]
    assert "never pushed" in plant.run("promote", "m", "9", status=Exit.FAILED)["error"]
    assert "keys are never replaced" in plant.run("keygen", status=Exit.FAILED)["error"]
    assert plant.run("verify", str(plant.folder(2)))["version"] == 2

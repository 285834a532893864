"""Workers forked from a warm parent; with simulated engines, so that nothing heavy is imported."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inferflux import pki
from inferflux.cli import probe
from inferflux.cli.child import Running, Spawned
from inferflux.cli.plan import ClusterOptions, ProcessSpec, plan
from inferflux.cli.warm import Forked, WarmStarter
from inferflux.paths import Home
from tests.support.cluster import assert_nothing_runs, environment, new_home, processes_of

pytestmark = pytest.mark.timeout(120)
MODULES = ("inferflux.worker.main",)


@pytest.fixture
async def home() -> AsyncIterator[Home]:
    """A home with identities and secrets, in which nothing runs afterwards."""
    home = Home(new_home()).ensure()
    pki.ensure_pki(home.pki)
    pki.ensure_secrets(home.secrets)
    yield home
    await asyncio.to_thread(assert_nothing_runs, home.root)
    shutil.rmtree(home.root)


@pytest.fixture
async def starter(home) -> AsyncIterator[WarmStarter]:
    starter = WarmStarter(home.logs / "zygote.log", MODULES)
    yield starter
    starter.close()


def decode_spec(home: Home, number: int = 0, **env: str) -> ProcessSpec:
    options = ClusterOptions("sim", "sim", decode=2)
    specs = plan(options, home, [0], environment(home.root, env))
    return next(spec for spec in specs if spec.id == f"decode-{number}")


async def until_ready(spec: ProcessSpec) -> probe.Readiness:
    async with asyncio.timeout(30):
        while not (readiness := await probe.ask(spec.role, spec.socket)).ready:
            await asyncio.sleep(0.05)
    return readiness


async def end_of(running: Running) -> int:
    async with asyncio.timeout(20):
        return await running.wait()


async def test_a_forked_worker_is_a_worker(home, starter):
    """It has its own session, name, log and environment, serves, and drains on SIGTERM."""
    spec = decode_spec(home)
    running = await starter.start(spec)
    await until_ready(spec)

    assert isinstance(running, Forked)
    assert os.getsid(running.pid) == running.pid
    assert name_of(running.pid) == "ifx-decode-0"
    assert "state ready" in spec.log.read_text()
    os.kill(running.pid, signal.SIGTERM)
    assert await end_of(running) == 0


async def test_it_can_be_killed_and_forked_again(home, starter):
    """A killed worker is reported with its signal; the next one is a new incarnation of the same zygote's."""
    spec = decode_spec(home)
    first = await starter.start(spec)
    before = await until_ready(spec)
    os.kill(first.pid, signal.SIGKILL)
    assert await end_of(first) == -signal.SIGKILL

    second = await starter.start(spec)
    after = await until_ready(spec)

    assert after.incarnation > before.incarnation
    assert [parent_of(second.pid)] == zygotes(home)


async def test_workers_die_with_their_zygote(home, starter):
    """A killed zygote takes its workers along, all are reported, and the next start makes a new one."""
    specs = [decode_spec(home, n) for n in (0, 1)]
    workers = await asyncio.gather(*(starter.start(spec) for spec in specs))
    await asyncio.gather(*(until_ready(spec) for spec in specs))
    (zygote,) = zygotes(home)

    os.kill(zygote, signal.SIGKILL)
    assert [await end_of(worker) for worker in workers] == [-signal.SIGKILL] * 2
    again = await starter.start(specs[0])
    await until_ready(specs[0])

    assert isinstance(again, Forked)


async def test_a_worker_that_cannot_start_is_reported(home, starter):
    """Bad settings end the fork with its exit status, not the zygote."""
    bad = await starter.start(decode_spec(home, INFERFLUX_MAX_NUM_SEQS="many"))
    assert await end_of(bad) == 2

    good = await starter.start(decode_spec(home, 1))
    await until_ready(decode_spec(home, 1))
    assert isinstance(good, Forked)


async def test_without_a_zygote_workers_start_cold(home, tmp_path):
    """A zygote that must not fork, because an import started a thread, gives up; the worker starts all the same."""
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    starter = WarmStarter(home.logs / "zygote.log", ("threaded",))
    spec = decode_spec(home, PYTHONPATH=str(tmp_path))
    worker = await starter.start(spec)
    try:
        await until_ready(spec)
        assert isinstance(worker, Spawned)
        assert "threads after the imports" in (home.logs / "zygote.log").read_text()
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        await end_of(worker)
        starter.close()


def zygotes(home: Home) -> list[int]:
    """Ids of the zygotes themselves; their forks have other names."""
    commands = processes_of(home.root)
    return [pid for pid in commands if "zygote" in commands[pid] and not name_of(pid).startswith("ifx-")]


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inferflux.cli import child as module
from inferflux.cli.child import Backoff, Child, Spawned, describe, rotate
from inferflux.cli.plan import ProcessSpec

SLEEPER = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
)


def make_spec(folder: Path, program: str) -> ProcessSpec:
    command = (sys.executable, "-c", program)
    return ProcessSpec("test", "test-0", command, folder / "none.sock", folder / "test-0.log", dict(os.environ))


async def spawn(spec: ProcessSpec) -> Spawned:
    return Spawned(spec)


@pytest.fixture
async def keep(tmp_path) -> AsyncIterator:
    """Start children that are gone after the test."""
    children = []

    def start(program: str) -> Child:
        children.append(Child(make_spec(tmp_path, program), spawn))
        children[-1].start()
        return children[-1]

    yield start
    for child in children:
        await child.stop(0.0)


async def until(check, timeout_s: float = 15.0):
    """Poll a condition with a deadline."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_backoff_doubles_to_its_limit_and_forgets():
    """Quick deaths make the pauses longer, half a minute of life makes them short again."""
    backoff = Backoff()

    assert [backoff.after(1.0) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert [backoff.after(31.0), backoff.after(1.0)] == [0.2, 0.4]


async def test_a_killed_process_comes_back(keep):
    """SIGKILL is noticed and answered with a new process; the reason is remembered."""
    child = keep(SLEEPER)
    await until(lambda: child.pid)
    first, first_incarnation = child.pid, child.incarnation

    os.kill(first, signal.SIGKILL)
    await until(lambda: child.pid not in (None, first))

    assert (child.restarts, child.last_exit) == (1, "was killed by SIGKILL")
    assert child.incarnation > first_incarnation


async def test_stop_is_final(keep):
    """A stopped process does not come back, also when it is stopped twice."""
    child = keep(SLEEPER)
    await until(lambda: child.pid)
    pid = child.pid

    await child.stop(10.0)
    await child.stop(10.0)

    assert child.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_stop_kills_what_ignores_it(keep):
    """Who ignores SIGTERM is killed after the grace."""
    child = keep(STUBBORN)
    await until(lambda: child.spec.log.exists() and "on" in child.spec.log.read_text())

    await child.stop(0.1)

    assert child.last_exit == "was killed by SIGKILL"


async def test_stop_during_a_pause_starts_nothing(keep):
    """A process that waits for its next start is not started any more."""
    child = keep("raise SystemExit(3)")
    await until(lambda: child.restarts)

    await child.stop(1.0)

    assert (child.pid, child.last_exit) == (None, "exited with status 3")


async def test_restart_is_immediate_and_no_death(keep):
    """A restart that was asked for is neither delayed nor counted as a failure."""
    child = keep(SLEEPER)
    await until(lambda: child.pid)
    first = child.pid

    await child.restart(10.0)

    assert child.pid not in (None, first)
    assert child.restarts == 0


async def test_a_missing_program_is_reported_and_tried_again(keep, tmp_path):
    """What can't be started at all says so and does not end the supervisor."""
    spec = ProcessSpec("test", "test-1", (str(tmp_path / "none"),), tmp_path / "s", tmp_path / "test-1.log")
    child = Child(spec, spawn)
    child.start()
    await until(lambda: child.restarts)

    assert "can't be started" in child.last_exit
    await child.stop(0.0)


async def test_grandchildren_die_with_their_process(keep):
    """What a killed process leaves in its group is killed before it starts again."""
    program = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    child = keep(program)
    log = child.spec.log
    await until(lambda: log.exists() and log.read_text().endswith("\n"))
    grandchild = int(log.read_text())

    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: child.restarts)

    await until(lambda: not is_running(grandchild))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_exits_are_described():
    """Statuses and signals have names."""
    assert [describe(n) for n in (0, 7, -9, -99)] == [
        "exited with status 0",
        "exited with status 7",
        "was killed by SIGKILL",
        "was killed by signal 99",
    ]


def test_big_logs_make_room(tmp_path):
    """A log over the limit is put aside, and there is one old log at most."""
    log = tmp_path / "a.log"
    for content in ("first", "second"):
        log.write_text(content)
        os.truncate(log, module.MAX_LOG_BYTES + 1)
        rotate(log)
    log.write_text("small")
    rotate(log)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.log", "a.log.1"]
    assert log.read_text() == "small"

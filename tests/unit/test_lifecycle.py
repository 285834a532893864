"""One state machine for every process, and the life of a real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.clock import ManualClock, SystemClock
from inferflux.lifecycle import Lifecycle, new_incarnation
from inferflux.process import TaskEnded, Tasks
from inferflux.types import State

DEADLINE_S = 20.0


def test_is_ready_only_between_start_and_drain() -> None:
    """Ready begins with set_ready and ends with the drain."""
    life = Lifecycle("decode", "decode-0")
    assert (life.readiness().ready, life.readiness().reason) == (False, "starting")

    life.set_ready()
    assert (life.readiness().ready, life.readiness().reason) == (True, "")

    life.begin_drain()
    assert (life.readiness().ready, life.readiness().reason) == (False, "draining")
    assert life.draining.is_set()


def test_checks_veto_readiness_with_their_reasons() -> None:
    """Every check that objects is named."""
    life = Lifecycle("gateway", "gateway-0")
    why: dict[str, str | None] = {"policy": "no snapshot yet", "registry": None, "worker": "none ready"}
    for name in ("policy", "registry", "worker"):
        life.add_readiness(name, partial(why.get, name))
    life.set_ready()

    assert life.readiness().reason == "policy: no snapshot yet; worker: none ready"

    why.update(policy=None, worker=None)
    assert life.readiness().ready


@given(st.lists(st.sampled_from(["set_ready", "set_failed", "begin_drain"]), max_size=8))
def test_never_becomes_ready_again(moves: list[str]) -> None:
    """After failing, and after the drain began, no sequence of moves makes a process ready."""
    life = Lifecycle("decode", "decode-0")
    states = [life.state]
    for move in moves:
        getattr(life, move)(*(["broken"] if move == "set_failed" else []))
        states.append(life.state)

    for earlier, later in pairwise(states):
        allowed = {
            State.STARTING: set(State),
            State.READY: {State.READY, State.FAILED, State.DRAINING},
            State.FAILED: {State.FAILED, State.DRAINING},
            State.DRAINING: {State.DRAINING},
        }
        assert later in allowed[earlier]
    assert life.draining.is_set() == (life.state is State.DRAINING)


def test_incarnations_differ_and_sort_by_start() -> None:
    """Two starts of the same process can be told apart and ordered."""
    first = new_incarnation()
    deadline = time.monotonic() + DEADLINE_S
    while new_incarnation()[:12] == first[:12]:
        assert time.monotonic() < deadline

    assert first < new_incarnation()
    assert len({new_incarnation() for _ in range(100)}) == 100


def test_manual_clock_moves_only_when_told() -> None:
    """Tests decide when time passes; the system's clock decides for itself."""
    clock = ManualClock(5.0)
    clock.advance(2.5)

    assert (clock.monotonic(), clock.time()) == (7.5, 7.5)
    assert SystemClock().time() > 1.7e9
    assert SystemClock().monotonic() <= SystemClock().monotonic()


async def test_tasks_end_with_their_block() -> None:
    """A background task is cancelled and awaited when the block that owns it ends."""
    ended = []

    async def serve() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with Tasks() as tasks:
        tasks.spawn(serve(), "serve")
        await asyncio.sleep(0)

    assert ended == [True]


async def test_task_that_ends_before_it_began_is_closed() -> None:
    """A block that ends at once leaves no coroutine that was never awaited."""
    async with Tasks() as tasks:
        tasks.spawn(asyncio.Event().wait(), "wait")


async def wait_beside(coro: Coroutine[Any, Any, None], name: str) -> None:
    """Wait for ever in a block that owns the task `name`."""
    async with Tasks() as tasks:
        tasks.spawn(coro, name)
        await asyncio.Event().wait()


async def test_background_task_that_returns_stops_the_block() -> None:
    """Something that should serve for ever must not end in silence."""
    with pytest.raises(TaskEnded, match="background task pulse ended"):
        await wait_beside(asyncio.sleep(0), "pulse")


async def test_background_task_that_raises_stops_the_block_with_its_error() -> None:
    """The exception of a task leaves the block as it is, not wrapped in a group."""

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await wait_beside(fail(), "fail")


async def test_finite_work_may_return() -> None:
    """A task declared finite ends without harm."""
    async with Tasks() as tasks:
        await tasks.spawn(asyncio.sleep(0), "request", may_return=True)


async def test_error_of_the_block_leaves_it_unwrapped() -> None:
    """The body's own exception passes through."""

    async def fail_beside_a_task() -> None:
        async with Tasks() as tasks:
            tasks.spawn(asyncio.Event().wait(), "wait")
            raise KeyError

    with pytest.raises(KeyError):
        await fail_beside_a_task()


SERVICE = """
import asyncio, os, sys, time
from pathlib import Path
from typing import Any
from inferflux import process
from inferflux.config import CommonSettings
from inferflux.errors import ConfigError

async def main(life):
    mode = sys.argv[1]
    if mode == "crash":
        raise ValueError("the secret prompt")
    if mode == "return":
        return
    if mode == "block":
        await asyncio.sleep(0)
        time.sleep(1.2)
        await asyncio.sleep(0.001)
        life.begin_drain()
        return
    if mode == "slow-start":
        Path(sys.argv[3]).touch()
        try:
            await asyncio.sleep(3600)
        finally:
            print("cleaned up", flush=True)
    life.set_ready()
    Path(sys.argv[3]).touch()
    await life.draining.wait()
    if mode == "stuck":
        print("draining", flush=True)
        await asyncio.sleep(3600)
    print("drained", flush=True)

def prepare():
    if sys.argv[1] == "bad-prepare":
        raise ConfigError("no model")
    # A real fork before any loop, thread or gRPC exists.
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

settings = CommonSettings(instance_id="test-0", ops_address=sys.argv[2])
sys.exit(process.run("decode", "test-0", settings, main, prepare=prepare))
"""


class Service:
    """A real process that runs SERVICE."""

    def __init__(self, directory: Path, mode: str, ops_address: str = "") -> None:
        self.started = directory / "started"
        self.ops_path = directory / "ops.sock"
        self.errors = directory / "stderr"
        arguments = [sys.executable, "-c", SERVICE, mode, ops_address or f"unix:{self.ops_path}", str(self.started)]
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, env=environ
            )

    def wait_started(self) -> None:
        eventually(self.started.exists)

    def stop(self) -> tuple[int, str]:
        """Wait for the end; returns exit code and output."""
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output.decode()

    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.errors.read_text().splitlines()]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    services: list[Service] = []

    def start(mode: str, ops_address: str = "") -> Service:
        services.append(Service(tmp_path, mode, ops_address))
        return services[-1]

    yield start
    for service in services:
        service.process.kill()
        service.process.communicate()


def test_sigterm_drains(start: Start) -> None:
    """The first SIGTERM lets main finish, then the process ends with 0 and its socket is gone."""
    service = start("serve")
    service.wait_started()
    assert service.ops_path.stat().st_mode & 0o777 == 0o600
    assert Path(f"/proc/{service.process.pid}/comm").read_text() == "ifx-test-0\n"

    service.process.send_signal(signal.SIGTERM)

    assert service.stop() == (0, "drained\n")
    assert not service.ops_path.exists()
    assert [line["msg"] for line in service.log()] == ["started", "state ready", "state draining", "stopped"]


def test_second_signal_exits_at_once(start: Start) -> None:
    """A drain that hangs can be cut short."""
    service = start("stuck")
    service.wait_started()

    service.process.send_signal(signal.SIGINT)
    assert service.process.stdout is not None
    assert service.process.stdout.readline() == b"draining\n"
    service.process.send_signal(signal.SIGTERM)

    assert service.stop()[0] == 128 + signal.SIGTERM


def test_signal_while_starting_cancels_main(start: Start) -> None:
    """Before a process is ready there is nothing to drain: main is cancelled and may clean up."""
    service = start("slow-start")
    service.wait_started()

    service.process.send_signal(signal.SIGTERM)

    assert service.stop() == (0, "cleaned up\n")


def test_crash_is_logged_without_its_text(start: Start) -> None:
    """An unexpected exception ends the process with 1; its text, which may quote a prompt, is nowhere."""
    service = start("crash")

    assert service.stop()[0] == 1
    assert service.log()[-1]["error"] == "ValueError"
    assert "secret prompt" not in service.errors.read_text()


def test_main_that_returns_undrained_is_a_failure(start: Start) -> None:
    """A service that just ends must be started again by its supervisor."""
    service = start("return")

    assert service.stop()[0] == 1
    assert service.log()[-1]["error_text"] == "main returned without being drained"


def test_blocked_event_loop_is_noticed(start: Start) -> None:
    """A loop that stood still says for how long; main may begin the drain itself."""
    service = start("block")

    assert service.stop()[0] == 0
    [line] = [line for line in service.log() if line["msg"] == "event loop was blocked"]
    assert isinstance(line["lag_s"], float)
    assert line["lag_s"] > 0.5


def test_failed_preparation_ends_before_anything_listens(start: Start) -> None:
    """An error of the synchronous set-up is reported like one of main."""
    service = start("bad-prepare")

    assert service.stop()[0] == 2
    assert [line["reason"] for line in service.log()] == ["no model"]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("follow", [True, False])
def test_outlives_its_parent_unless_told_otherwise(tmp_path: Path, follow: bool) -> None:
    """A supervisor that crashes does not take services with it, except where INFERFLUX_PDEATHSIG asks for that."""
    started = tmp_path / "started"
    parent = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, *sys.argv[1:]]);"
        "print(child.pid, flush=True); child.wait()"
    )
    service = ["-c", SERVICE, "serve", f"unix:{tmp_path}/ops.sock", str(started)]
    environ = {"PYTHONPATH": str(Path(__file__).parents[2]), "INFERFLUX_PDEATHSIG": "1" if follow else "0"}
    with subprocess.Popen([sys.executable, "-c", parent, *service], stdout=subprocess.PIPE, env=environ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        eventually(started.exists)
        supervisor.kill()

        if follow:
            eventually(lambda: not _is_alive(pid))
            return
        assert supervisor.wait(DEADLINE_S) == -signal.SIGKILL
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not _is_alive(pid))
        assert supervisor.stdout.read() == b"drained\n"


def test_unusable_ops_address_is_a_configuration_error(start: Start) -> None:
    """A bad address ends the process with 2 and one clear line."""
    service = start("serve", "unix:/nonexistent/ops.sock")

    assert service.stop()[0] == 2
    assert "ops server cannot listen on unix:/nonexistent/ops.sock" in str(service.log()[-1]["reason"])

"""One supervised process: started, watched, started again when it dies, stopped on request.

Deaths are noticed through a pidfd, so an idle supervisor does nothing at all. A process leads its own group; what is
left of the group after its death is killed before it starts again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from inferflux.cli.pdeathsig import die_with_parent
from inferflux.cli.plan import ProcessSpec

MAX_LOG_BYTES = 16 << 20
FIRST_DELAY_S, MAX_DELAY_S = 0.2, 10.0
HEALTHY_AFTER_S = 30.0
DRAINED = "exited with status 0"
GROUP_GRACE_S = 1.0
_log = logging.getLogger(__name__)


class Running(Protocol):
    """A process that was started, however that was done."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Wait for its end; returns its exit status, negative for a signal. Nothing of its group is left then."""
        ...


Start = Callable[[ProcessSpec], Awaitable[Running]]


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start: 0.2 s, doubling to 10 s, from the beginning after 30 s of life."""

    delay_s: float = FIRST_DELAY_S

    def after(self, lived_s: float) -> float:
        """Return the delay after a process that lived `lived_s`."""
        delay_s = FIRST_DELAY_S if lived_s >= HEALTHY_AFTER_S else self.delay_s
        self.delay_s = min(MAX_DELAY_S, delay_s * 2)
        return delay_s


class Child:
    """Keeps one process alive until `stop`. All methods run on the supervisor's loop."""

    def __init__(self, spec: ProcessSpec, start: Start) -> None:
        self.spec = spec
        self.started_at = 0.0
        self.restarts = 0
        self.last_exit = ""
        self._start = start
        self._running: Running | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_wanted = True
        self._hurry = asyncio.Event()
        self._has_started = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        return self._running.pid if self._running else None

    @property
    def incarnation(self) -> str:
        """Name this start of a process that has no name of its own."""
        return f"{int(self.started_at * 1000):012x}"

    def start(self) -> None:
        """Start it and keep it alive from then on."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.spec.id}")

    def signal(self, number: int) -> None:
        """Send a signal, if there is anyone to receive it."""
        if self._running is not None:
            with suppress(ProcessLookupError):
                os.kill(self._running.pid, number)

    async def restart(self, grace_s: float) -> None:
        """Let it drain, then start it at once; returns when the new process runs."""
        self._has_started.clear()
        self._hurry.set()
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._has_started.wait(), grace_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self._has_started.wait()

    async def stop(self, grace_s: float) -> None:
        """End it for good: SIGTERM, and SIGKILL after the grace. Idempotent."""
        self._is_wanted = False
        if self._keeper is None:
            return
        if self._running is None:
            self._keeper.cancel()
        self.signal(signal.SIGTERM)
        _, late = await asyncio.wait({self._keeper}, timeout=grace_s)
        if late:
            _log.warning("%s does not stop, killing it", self.spec.id)
            self.signal(signal.SIGKILL)
            await asyncio.wait(late)

    @property
    def is_wanted(self) -> bool:
        """Whether it is started again when it ends."""
        return self._is_wanted

    def retire(self, on_end: Callable[[], None]) -> None:
        """Let the process that runs be the last one: somebody drains it. `on_end` is called when it is over."""
        self._is_wanted = False
        if self._keeper is None:
            on_end()
            return
        self._keeper.add_done_callback(lambda _: on_end())
        if self._running is None:
            self._keeper.cancel()

    async def _keep(self) -> None:
        backoff = Backoff()
        while not self._is_stopping():
            began_at = time.monotonic()
            self.last_exit = await self._live()
            is_asked = self._hurry.is_set()
            if self._is_stopping():
                return
            # A worker that was drained by an administrator is wanted again: that is a rolling restart, and no failure.
            self.restarts += not (is_asked or self.last_exit == DRAINED)
            delay_s = backoff.after(time.monotonic() - began_at)
            _log.warning("%s %s, starts again in %.1f s", self.spec.id, self.last_exit, 0 if is_asked else delay_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), delay_s)
            self._hurry.clear()

    def _is_stopping(self) -> bool:
        return not self._is_wanted

    async def _live(self) -> str:
        """Run the process once, from start to end; says how it ended."""
        rotate(self.spec.log)
        try:
            self._running = await self._start(self.spec)
        except OSError as e:
            return f"can't be started: {e}"
        self.started_at = time.time()
        self._has_started.set()
        _log.info("%s started, pid %d", self.spec.id, self._running.pid)
        try:
            return describe(await self._running.wait())
        finally:
            self._running = None


class Spawned:
    """A process started with fork and exec."""

    def __init__(self, spec: ProcessSpec) -> None:
        with spec.log.open("ab") as log:
            self._popen = subprocess.Popen(
                spec.command,
                env=dict(spec.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - the supervisor has one thread
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def wait(self) -> int:
        await wait_for_exit(self.pid)
        status = self._popen.wait()
        await end_group(self.pid)
        return status


async def wait_for_exit(pid: int) -> None:
    """Wait until process `pid` has ended; it need not be our child."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def end_group(pgid: int) -> None:
    """Make sure that nothing is left of a process group whose leader has ended.

    What is left gets a moment: multiprocessing's resource tracker then removes the shared memory of the dead.
    """
    deadline = time.monotonic() + GROUP_GRACE_S
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(pgid, 0)
            await asyncio.sleep(0.01)
        os.killpg(pgid, signal.SIGKILL)


def describe(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def rotate(log: Path) -> None:
    """Keep a log from growing for ever: at the start of its process a big one makes room, the one before it goes."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))

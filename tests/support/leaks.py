"""What a test may leave behind: nothing.

`Traces.now()` is cheap (a few directory listings), so tests/conftest.py takes it around every test. What is over but
not yet gone (a child being reaped, a socket being closed) gets a moment; what stays after that is a leak.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 3.0
SHM = Path("/dev/shm")
# Helpers of the standard library that live as long as the interpreter.
LASTING_CHILDREN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
# Event loops and gRPC's pollers keep these; they are made once and shared.
CAPTURED_FDS = range(3)  # pytest exchanges them as it likes
LASTING_FDS = ("anon_inode:", "/dev/null", "/dev/urandom", "/proc/")


@dataclass(frozen=True, slots=True)
class Traces:
    """What this process holds of the machine."""

    children: frozenset[str]
    fds: frozenset[str]
    shm: frozenset[str]

    @classmethod
    def now(cls) -> Traces:
        """Look."""
        return cls(frozenset(_children()), frozenset(_fds()), frozenset(_shm()))

    def since(self, before: Traces) -> list[str]:
        """Name what is here and was not there."""
        processes = [f"process {pid}: {_command(pid)}" for pid in sorted(self.children - before.children)]
        files = [f"{SHM / name}" for name in sorted(self.shm - before.shm) if not _is_mapped_elsewhere(name)]
        return [*processes, *sorted(self.fds - before.fds), *files]


def left_behind(before: Traces) -> list[str]:
    """Name what is still there after a grace."""
    leaks = Traces.now().since(before)
    deadline = time.monotonic() + GRACE_S
    while leaks and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
        leaks = Traces.now().since(before)
    return leaks


async def unfinished_tasks() -> list[str]:
    """Name the tasks of this loop, apart from the caller's, that do not end within a grace."""
    for _ in range(int(GRACE_S / 0.01)):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if not tasks:
            return []
        await asyncio.sleep(0.01)
    return sorted(f"task {task.get_name()}: {task.get_coro()}" for task in tasks)


def _children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    pids = [pid for path in tasks for pid in _read(path).decode().split()]
    return [pid for pid in pids if not any(name in _command(pid) for name in LASTING_CHILDREN)]


def _command(pid: str) -> str:
    command = _read(Path("/proc") / pid / "cmdline").replace(b"\0", b" ").decode(errors="replace")
    return command.strip()[:200] or "ended, not waited for"


def _fds() -> list[str]:
    fds = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            target = str(path.readlink())
            if int(path.name) not in CAPTURED_FDS and not target.startswith(LASTING_FDS):
                fds.append(f"fd {path.name}: {target}")
    return fds


def _shm() -> list[str]:
    with suppress(OSError):
        return [path.name for path in SHM.iterdir()]
    return []


def _is_mapped_elsewhere(name: str) -> bool:
    """Whether another live process maps it: then it is not ours to judge."""
    needle, ours = str(SHM / name).encode(), str(os.getpid())
    others = [path for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != ours]
    return any(needle in _read(path / "maps") for path in others)


def _read(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""

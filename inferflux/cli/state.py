"""What a home remembers of its cluster: the options of the last start and the processes of the running one.

Written by the supervisor alone, which holds the home's lock while it lives; the kernel drops the lock with it, however
it dies. Process ids are kept with their start times, so a recycled id is never mistaken for ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from inferflux.cli.plan import ClusterOptions
from inferflux.paths import Home

LEFTOVER_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Content of the state file. `pids`: id of each process -> its start time in clock ticks since boot."""

    options: ClusterOptions
    pids: Mapping[int, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write atomically."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"options": self.options.to_json(), "pids": self.pids}))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> ClusterState | None:
        """Read the state; None when there is none, or what there is makes no sense."""
        try:
            document = json.loads(path.read_text())
            pids = {int(pid): int(ticks) for pid, ticks in document["pids"].items()}
            return cls(ClusterOptions.from_json(document["options"]), pids)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def take_lock(home: Home) -> IO[str] | None:
    """Become this home's supervisor for as long as the file is open; None if there is one already."""
    file = (home.root / "supervisor.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def start_ticks(pid: int) -> int | None:
    """Read when a process started; None when there is none (zombies are none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def is_alive(pid: int, ticks: int) -> bool:
    """Say whether it is still the same process."""
    return start_ticks(pid) == ticks


def sweep(pids: Mapping[int, int]) -> None:
    """Make sure that nothing of an earlier supervisor runs: it had a moment to die by itself, the rest is killed."""
    left = {pid: ticks for pid, ticks in pids.items() if is_alive(pid, ticks)}
    for pid in left:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    while any(is_alive(pid, ticks) for pid, ticks in left.items()) and time.monotonic() < deadline:
        time.sleep(0.02)

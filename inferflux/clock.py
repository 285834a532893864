"""Time as a dependency, so that leases, backoffs and tickets can be tested without waiting.

`monotonic` for every span and deadline inside a process, never compared across processes; `time` only for people and
for records that outlive the process.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Both clocks in seconds."""

    def monotonic(self) -> float:
        """Never goes back; has no meaning outside this process."""

    def time(self) -> float:
        """Unix time; may jump either way."""


def until_tick(period_s: float) -> float:
    """Seconds until the next multiple of a period on the running loop's clock: what to sleep between two rounds.

    Periodic work of a process, and of its neighbours on the machine, then wakes up together. A wake-up of an idle
    process costs more than the work it does: its code and data have left the caches.
    """
    left_s = period_s - asyncio.get_running_loop().time() % period_s
    return left_s if left_s > period_s / 10 else left_s + period_s  # a timer may ring a little early


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves only when told to; for tests and simulations."""

    def __init__(self, start_s: float = 1_000.0) -> None:
        self._now_s = start_s

    def monotonic(self) -> float:
        return self._now_s

    def time(self) -> float:
        return self._now_s

    def advance(self, span_s: float) -> None:
        """Move both clocks forward."""
        self._now_s += span_s

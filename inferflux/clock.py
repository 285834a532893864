"""Time as a dependency, so that leases, backoffs and tickets can be tested without waiting.

`monotonic` for every span and deadline inside a process, never compared across processes; `time` only for people and
for records that outlive the process.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Both clocks in seconds."""

    def monotonic(self) -> float:
        """Never goes back; has no meaning outside this process."""

    def time(self) -> float:
        """Unix time; may jump either way."""


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

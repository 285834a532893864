"""One state machine for all processes: starting -> ready -> draining, with failed on the side.

    STARTING --> READY --> DRAINING
        |          |          ^
        +--> FAILED ----------+

Draining is final. Failed is left only by draining: a process that proved itself wrong must be started anew.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from inferflux.types import State

_log = logging.getLogger(__name__)
Check = Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether to send requests here; `reason` says why not and is empty when ready."""

    ready: bool
    reason: str


class Lifecycle:
    """Where this process is in its life. Used from the event loop's thread only."""

    def __init__(self, role: str, instance_id: str) -> None:
        self.role = role
        self.instance_id = instance_id
        self.incarnation = new_incarnation()
        self.state = State.STARTING
        self.reason = "starting"
        self.draining = asyncio.Event()
        self._checks: dict[str, Check] = {}

    def add_readiness(self, name: str, check: Check) -> None:
        """Let `check` veto readiness: it returns None when fine, else the reason. Must be quick and not raise."""
        self._checks[name] = check

    def set_ready(self) -> None:
        """Start-up is over. Has no effect once failed or draining."""
        if self.state is State.STARTING:
            self._move(State.READY, "")

    def set_failed(self, reason: str) -> None:
        """Never ready again. Has no effect once draining."""
        if self.state is not State.DRAINING:
            self._move(State.FAILED, reason)

    def begin_drain(self) -> None:
        """Accept nothing new from now on. Idempotent."""
        if self.state is not State.DRAINING:
            self._move(State.DRAINING, "draining")
            self.draining.set()

    def readiness(self) -> Readiness:
        """Ready if the state is READY and no check objects; the reasons of all that object otherwise."""
        if self.state is not State.READY:
            return Readiness(ready=False, reason=self.reason)
        objections = [f"{name}: {why}" for name, check in self._checks.items() if (why := check()) is not None]
        return Readiness(ready=not objections, reason="; ".join(objections))

    def _move(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        level = logging.ERROR if state is State.FAILED else logging.INFO
        _log.log(level, "state %s", state, extra={"reason": reason, "incarnation": self.incarnation})


def new_incarnation() -> str:
    """Name one start of a process: wall-clock ms in hex, then randomness; sorts by time of start."""
    return f"{int(time.time() * 1000):012x}-{secrets.token_hex(4)}"

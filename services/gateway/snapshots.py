"""What the gateway knows of policy and registry: the newest snapshot of each, pushed to it.

Requests read the values from memory and never wait for either service. When a service is gone the value stays; an older
revision than the one in use is refused, since it would bring back revoked keys.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Generic, Protocol, TypeVar

from inferflux.errors import InferfluxError
from inferflux.telemetry import metrics

_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 2.0
_log = logging.getLogger(__name__)


class Revisioned(Protocol):
    """A value whose revision grows with every change."""

    @property
    def revision(self) -> int: ...


T = TypeVar("T", bound=Revisioned)
Open = Callable[[int], AsyncGenerator[T]]


class Snapshot(Generic[T]):
    """The newest value of one source. `on_change` runs for each new one."""

    def __init__(self, source: str, on_change: Callable[[T], None] = lambda _: None) -> None:
        self.source = source
        self.value: T | None = None
        self._on_change = on_change
        self._changed = asyncio.Event()

    @property
    def revision(self) -> int:
        """Of the value in use; 0 as long as there is none."""
        return self.value.revision if self.value is not None else 0

    def offer(self, value: T) -> bool:
        """Use `value` unless it is older than what is in use; tells whether it is used."""
        if value.revision < self.revision:
            metrics.VERSION_REGRESSION.labels(self.source).inc()
            _log.error(
                "refused an older snapshot",
                extra={"source": self.source, "revision": value.revision, "in_use": self.revision},
            )
            return False
        if self.value is None or value.revision > self.revision:
            self.value = value
            metrics.SNAPSHOT_REVISION.labels(self.source).set(value.revision)
            self._changed.set()
            self._changed = asyncio.Event()
            self._on_change(value)
        return True

    async def reached(self, revision: int, timeout_s: float) -> bool:
        """Wait until a revision is in use; tells whether it came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.revision < revision:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def changed(self, seen: T | None, timeout_s: float) -> None:
        """Wait until another value than `seen` is in use, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.value is seen:
                    await self._changed.wait()

    async def follow(self, open_stream: Open[T]) -> None:
        """Keep the value current until cancelled. `open_stream(revision)` yields values and raises InferfluxError."""
        num_failures = 0
        while True:
            try:
                async with aclosing(open_stream(self.revision)) as stream:
                    async for value in stream:
                        self.offer(value)
                        num_failures = 0
            except InferfluxError as e:
                level = logging.WARNING if num_failures == 0 else logging.DEBUG
                _log.log(level, "snapshot stream lost", extra={"source": self.source, "reason": e.reason})
            await asyncio.sleep(backoff_s(num_failures))
            num_failures += 1


def backoff_s(num_failures: int) -> float:
    """Return how long to wait before the next try: doubling, bounded, and different for everybody."""
    longest = min(_MAX_BACKOFF_S, _MIN_BACKOFF_S * float(1 << min(num_failures, 16)))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads reconnects, guards nothing

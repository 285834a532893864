"""The newest version of something and everyone who waits for a newer one: how services push snapshots.

A watcher never sees an older version after a newer one, and a slow one skips what it missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """One publisher, any number of watchers, all on one event loop."""

    def __init__(self) -> None:
        self.revision = 0
        self.num_watchers = 0
        self._value: T | None = None
        self._is_closed = False
        self._news = asyncio.Event()

    @property
    def value(self) -> T | None:
        """The newest version; None before the first."""
        return self._value

    def publish(self, revision: int, value: T) -> None:
        """Make `value` the newest one; ignored unless its revision (from 1) is above the last."""
        if revision > self.revision:
            self.revision, self._value = revision, value
            self._wake()

    def close(self) -> None:
        """End all watches, those to come too. Idempotent."""
        self._is_closed = True
        self._wake()

    async def watch(self, at_least: int = 0) -> AsyncIterator[tuple[int, T]]:
        """Yield the newest revision and value, then each newer one; none of them below revision `at_least`."""
        seen = max(at_least, 1) - 1
        self.num_watchers += 1
        try:
            while not self._is_closed:
                if self.revision > seen and self._value is not None:
                    seen = self.revision
                    yield seen, self._value
                else:
                    await self._news.wait()
        finally:
            self.num_watchers -= 1

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

"""Wakes requests that wait for the pool to change."""

from __future__ import annotations

import asyncio


class News:
    """A bell without memory: look first, then wait for the next ring, without an `await` in between."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def ring(self) -> None:
        """Wake everyone who waits now."""
        self._next.set()
        self._next = asyncio.Event()

    async def next(self) -> None:
        """Wait until it rings."""
        await self._next.wait()

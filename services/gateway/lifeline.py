"""What ends a request from outside: its client goes, or its deadline passes. In every phase and at once.

Works like `asyncio.timeout`: cancels the block's task and turns the cancellation into an error at the block's end, so
the code inside needs to know nothing but how to clean up.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from inferflux.errors import DeadlineExceeded
from services.gateway.asgi import ClientGone, Receive


class Lifeline:
    """Raises ClientGone or DeadlineExceeded from its `async with` block. `deadline_at` is in the loop's time."""

    def __init__(self, receive: Receive, deadline_at: float) -> None:
        self._receive = receive
        self._deadline_at = deadline_at
        self._error: Exception | None = None

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - coroutines of a server run in tasks
        self._task = task
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._until_gone())
        self._timer = loop.call_at(self._deadline_at, self._end, DeadlineExceeded("the request's deadline passed"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._watch.cancel()
        if self._error is not None and self._task.uncancel() == 0 and isinstance(error, asyncio.CancelledError):
            raise self._error from error

    async def _until_gone(self) -> None:
        """Wait for the disconnect; other messages after the body mean nothing."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end(ClientGone())

    def _end(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self._task.cancel()

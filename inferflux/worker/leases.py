"""Gateway sessions by their streams: a session lives while one is open, and a grace longer.

The grace lets a gateway reconnect under the same name before anything of it is thrown away.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 3.0


class SessionLeases:
    """Calls `on_lost(session_id)` when a session had no stream for the grace. One event loop."""

    def __init__(self, on_lost: Callable[[str], object], grace_s: float = GRACE_S) -> None:
        self._on_lost = on_lost
        self._grace_s = grace_s
        self._num_open: Counter[str] = Counter()
        self._ends: dict[str, asyncio.TimerHandle] = {}

    @property
    def num_open(self) -> int:
        """How many sessions have a stream."""
        return len(self._num_open)

    @contextmanager
    def open(self, session_id: str) -> Iterator[None]:
        """Wrap one stream of a session."""
        self._cancel_end(session_id)
        self._num_open[session_id] += 1
        try:
            yield
        finally:
            self._num_open[session_id] -= 1
            if not self._num_open[session_id]:
                del self._num_open[session_id]
                self.touch(session_id)

    def is_alive(self, session_id: str) -> bool:
        """Whether a session has a stream or a rest of its grace."""
        return session_id in self._num_open or session_id in self._ends

    def touch(self, session_id: str) -> None:
        """Give a session without a stream the grace from now on; its stream may be on its way."""
        if session_id not in self._num_open:
            self._cancel_end(session_id)
            loop = asyncio.get_running_loop()
            self._ends[session_id] = loop.call_later(self._grace_s, self._lose, session_id)

    def close(self) -> None:
        """Stop all timers."""
        for session_id in tuple(self._ends):
            self._cancel_end(session_id)

    def _lose(self, session_id: str) -> None:
        del self._ends[session_id]
        self._on_lost(session_id)

    def _cancel_end(self, session_id: str) -> None:
        if (end := self._ends.pop(session_id, None)) is not None:
            end.cancel()

"""The end of a worker: nothing new, and how long what runs may still take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from inferflux.lifecycle import Lifecycle

_log = logging.getLogger(__name__)


class Drain:
    """Starts draining with a budget and waits within it. `budget_s`: when nobody says another; 0: no limit."""

    def __init__(self, lifecycle: Lifecycle, budget_s: float) -> None:
        self._lifecycle = lifecycle
        self._budget_s = budget_s
        self._ends_at: float | None = None
        self._timer: asyncio.Timeout | None = None

    @property
    def time_left_s(self) -> float | None:
        """Time left of the budget; None: no limit, or no drain has begun."""
        return None if self._ends_at is None else max(0.0, self._ends_at - asyncio.get_running_loop().time())

    def begin(self, budget_s: float | None = None) -> None:
        """Start draining; None: the usual budget, 0: no time at all. A later call may shorten the budget."""
        if budget_s is not None:
            self._limit(budget_s)
        elif not self._lifecycle.draining.is_set():
            self._limit(self._budget_s or None)
        self._lifecycle.begin_drain()

    async def wait(self, *steps: Callable[[], Awaitable[None]]) -> None:
        """Wait for all steps, one after the other, or until the budget is used up."""
        if self._ends_at is None:  # a signal began the drain
            self._limit(self._budget_s or None)
        try:
            async with asyncio.timeout_at(self._ends_at) as self._timer:
                for step in steps:
                    await step()
        except TimeoutError:
            _log.warning("drain overrun")
        finally:
            self._timer = None

    def _limit(self, budget_s: float | None) -> None:
        if budget_s is None:
            return
        ends_at = asyncio.get_running_loop().time() + budget_s
        if self._ends_at is None or ends_at < self._ends_at:
            self._ends_at = ends_at
            if self._timer is not None:
                self._timer.reschedule(ends_at)

"""The end of a worker: nothing new, and how long what runs may still take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from inferflux.lifecycle import Lifecycle

_log = logging.getLogger(__name__)


class Drain:
    """Starts draining with a budget and waits within it. `budget_s` 0: no limit."""

    def __init__(self, lifecycle: Lifecycle, budget_s: float) -> None:
        self._lifecycle = lifecycle
        self._budget_s = budget_s

    def begin(self, budget_s: float) -> None:
        """Start draining; only the first call's budget counts."""
        if not self._lifecycle.draining.is_set():
            self._budget_s = budget_s
        self._lifecycle.begin_drain()

    async def wait(self, *steps: Callable[[], Awaitable[None]]) -> None:
        """Wait for all steps, one after the other, or until the budget is used up."""
        try:
            async with asyncio.timeout(self._budget_s or None):
                for step in steps:
                    await step()
        except TimeoutError:
            _log.warning("drain overrun", extra={"budget_s": self._budget_s})

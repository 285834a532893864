"""Which requests a worker accepts, and when the last one is over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from inferflux.errors import Draining, Unavailable
from inferflux.lifecycle import Lifecycle
from inferflux.telemetry import metrics
from inferflux.types import State


class Work:
    """Counts running requests; admits none unless the worker is ready."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._inflight = metrics.INFLIGHT.labels(lifecycle.role)
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wrap one request. Raises Draining or Unavailable instead of admitting it."""
        self._require_ready()
        self._change(+1)
        try:
            yield
        finally:
            self._change(-1)

    async def wait_idle(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    def _require_ready(self) -> None:
        match self._lifecycle.state:
            case State.READY:
                self._require_fit()
            case State.DRAINING:
                raise Draining(f"worker {self._lifecycle.instance_id} is draining")
            case state:
                raise Unavailable(f"worker {self._lifecycle.instance_id} is {state}")

    def _require_fit(self) -> None:
        if reason := self._lifecycle.readiness().reason:
            raise Draining(f"worker {self._lifecycle.instance_id} takes nothing new: {reason}")

    def _change(self, by: int) -> None:
        self.num_running += by
        self._inflight.set(self.num_running)
        if self.num_running:
            self._idle.clear()
        else:
            self._idle.set()

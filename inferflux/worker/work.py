"""Which requests a worker accepts, and when the last one is over."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from inferflux.errors import Draining, Unavailable
from inferflux.lifecycle import Lifecycle
from inferflux.telemetry import metrics
from inferflux.types import State
from inferflux.worker.eta import left_s

NUM_LENGTHS = 64


class Work:
    """Counts running requests; admits none unless the worker is ready."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._inflight = metrics.INFLIGHT.labels(lifecycle.role)
        self._idle = asyncio.Event()
        self._idle.set()
        self._began: dict[object, float] = {}
        self._lengths_s: deque[float] = deque(maxlen=NUM_LENGTHS)

    @property
    def num_running(self) -> int:
        """Requests that run now."""
        return len(self._began)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wrap one request. Raises Draining or Unavailable instead of admitting it."""
        self._require_ready()
        request, began_at = object(), time.monotonic()
        self._began[request] = began_at
        self._note()
        try:
            yield
        finally:
            del self._began[request]
            self._lengths_s.append(time.monotonic() - began_at)
            self._note()

    def left_s(self) -> float | None:
        """Time until all that runs now is over, probably; None when nothing is over yet that tells."""
        now = time.monotonic()
        return left_s((now - began_at for began_at in self._began.values()), self._lengths_s)

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

    def _note(self) -> None:
        self._inflight.set(self.num_running)
        if self.num_running:
            self._idle.clear()
        else:
            self._idle.set()

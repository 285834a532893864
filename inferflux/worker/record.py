"""What metrics hear of one request on a worker."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

from inferflux.errors import InferfluxError
from inferflux.telemetry import metrics

CANCELLED = 499  # nginx's code for a client that went away


class RequestRecord:
    """Counts a request when its `with` block ends: by `status`, or by the exception that leaves the block."""

    def __init__(self, role: str, endpoint: str) -> None:
        self.status = 200
        self._role = role
        self._endpoint = endpoint
        self._started_at = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.status = _status(error)
        metrics.REQUESTS.labels(self._role, self._endpoint, str(self.status)).inc()
        metrics.REQUEST_SECONDS.labels(self._role, self._endpoint).observe(time.perf_counter() - self._started_at)


def _status(error: BaseException) -> int:
    if isinstance(error, asyncio.CancelledError):
        return CANCELLED
    return error.http_status if isinstance(error, InferfluxError) else 500

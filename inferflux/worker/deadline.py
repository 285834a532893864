"""The request's one deadline, on a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from inferflux.errors import DeadlineExceeded


@asynccontextmanager
async def deadline(time_left_s: float | None) -> AsyncIterator[None]:
    """Cancel the block when the time is over and raise DeadlineExceeded. None: no deadline."""
    timer = asyncio.timeout(time_left_s)
    try:
        async with timer:
            yield
    except TimeoutError as e:
        if not timer.expired():
            raise
        raise DeadlineExceeded("the request's deadline is over") from e

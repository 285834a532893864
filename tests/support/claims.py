"""Claims for sources; in a module, so that they can travel to an engine in another process."""

from __future__ import annotations

import asyncio

from inferflux.errors import TicketConflict

SLOW_S = 1.0


async def refused() -> None:
    """Somebody else was first."""
    raise TicketConflict("taken")


async def slow() -> None:
    """Take so long that everything that can begin without it does."""
    await asyncio.sleep(SLOW_S)

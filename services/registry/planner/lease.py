"""Who plans: one process at a time. In doubt nobody does, since a pool that stays as it is harms no one."""

from __future__ import annotations

from typing import Protocol

from services.registry.planner.store import PlannerStore

TURNS = 3
"""How many looks long a lease is: a leader may miss one, and whoever follows waits for no more than these."""


class Lease(Protocol):
    """A right that one holder has until it stops to renew it. Both methods raise Unavailable."""

    async def hold(self) -> bool:
        """Take or renew it; False when somebody else has it. To be called again within its time."""
        ...

    async def drop(self) -> None:
        """Give it back, if it is ours. Idempotent."""
        ...


class RedisLease:
    """A lease in the registry's Redis."""

    def __init__(self, store: PlannerStore, owner: str, ttl_s: float) -> None:
        self._store = store
        self._owner = owner
        self._ttl_s = ttl_s

    async def hold(self) -> bool:
        return await self._store.hold_lease(self._owner, self._ttl_s)

    async def drop(self) -> None:
        await self._store.drop_lease(self._owner)

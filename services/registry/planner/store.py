"""The planner's part of the registry's Redis: specs of pools, the last plans, and who leads.

Layout: `ifx:{registry}:pools` a JSON array of specs, `ifx:{registry}:pools:revision` a number, `ifx:{registry}:plans`
what the leader found, as JSON, `ifx:{registry}:planner-lease` the leader's name, which Redis forgets in time. Every
failure of Redis, slow answers included, is Unavailable.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from redis.exceptions import WatchError

from inferflux.errors import InvalidRequest
from inferflux.store import Pipe, RedisStore, read_revision
from services.registry.planner import book
from services.registry.planner.book import PoolBook

log = logging.getLogger(__name__)

POOLS = "ifx:{registry}:pools"
REVISION = "ifx:{registry}:pools:revision"
PLANS = "ifx:{registry}:plans"
LEASE = "ifx:{registry}:planner-lease"


class PlannerStore(RedisStore):
    """Connects on demand; safe to use concurrently. Raises ConfigError for a bad URL."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "registry")

    async def read(self) -> PoolBook:
        """Return the stored book; an empty one when there is none. Raises Unavailable."""
        with self._answering():
            revision, text = await self._redis.mget(REVISION, POOLS)
        return _decode(revision, text)

    async def update(self, edit: Callable[[PoolBook], PoolBook]) -> PoolBook:
        """Replace the stored book by what `edit` makes of it. `edit` may run several times, and may raise.

        Raises Unavailable.
        """
        return await self._transact(lambda pipe: _try_update(pipe, edit))

    async def write_plans(self, plans: dict[str, Any]) -> None:
        """Replace what the leader found. Raises Unavailable."""
        with self._answering():
            await self._redis.set(PLANS, json.dumps(plans))

    async def read_plans(self) -> dict[str, Any]:
        """Return what the leader found last; empty when there is nothing. Raises Unavailable."""
        with self._answering():
            text = await self._redis.get(PLANS)
        try:
            plans = json.loads(text or "{}")
        except ValueError:
            return {}
        return plans if isinstance(plans, dict) else {}

    async def hold_lease(self, owner: str, ttl_s: float) -> bool:
        """Take the lease or renew it; False when somebody else has it. Raises Unavailable."""
        ttl_ms = int(ttl_s * 1000)
        with self._answering():
            if await self._redis.set(LEASE, owner, nx=True, px=ttl_ms):
                return True
            return await self._if_mine(owner, lambda pipe: pipe.pexpire(LEASE, ttl_ms))

    async def drop_lease(self, owner: str) -> None:
        """Give the lease back, if it is ours. Raises Unavailable."""
        with self._answering():
            await self._if_mine(owner, lambda pipe: pipe.delete(LEASE))

    async def _if_mine(self, owner: str, action: Callable[[Pipe], object]) -> bool:
        """Do something with the lease, unless it is, or meanwhile becomes, somebody else's."""
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(LEASE)
            if await pipe.get(LEASE) != owner:
                return False
            pipe.multi()
            action(pipe)
            try:
                await pipe.execute()
            except WatchError:
                return False
            return True


async def _try_update(pipe: Pipe, edit: Callable[[PoolBook], PoolBook]) -> PoolBook:
    await pipe.watch(REVISION, POOLS)
    new = edit(_decode(await pipe.get(REVISION), await pipe.get(POOLS)))
    pipe.multi()
    pipe.set(POOLS, new.encode())
    pipe.set(REVISION, new.revision)
    await pipe.execute()
    return new


def _decode(revision: str | None, text: str | None) -> PoolBook:
    """Read a book; specs that cannot be read are no specs, so that nothing acts on them."""
    try:
        return PoolBook(read_revision(revision), book.decode(text or "[]"))
    except InvalidRequest as e:
        log.warning("ignoring specs of pools that cannot be read", extra={"reason": e.message})
        return PoolBook(read_revision(revision))

"""The actuator of a cluster on one machine: its supervisor, which starts processes and lets them go."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from inferflux.cli import control
from inferflux.errors import Unavailable
from services.registry.planner.pool import Member
from services.registry.planner.spec import PoolSpec

TIMEOUT_S = 2.0


class LocalActuator:
    """Speaks to the supervisor of this home. A worker that is retired is not started again when it ends."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def size(self, spec: PoolSpec) -> int:
        return int((await self._ask("sizes", model=spec.model))["sizes"].get(spec.role, 0))

    async def doomed(self, spec: PoolSpec, size: int) -> Collection[str] | None:
        return None

    async def grow(self, spec: PoolSpec, size: int) -> None:
        await self._ask("grow", role=spec.role, model=spec.model, size=size)

    async def shrink(self, spec: PoolSpec, size: int, victims: Sequence[Member]) -> None:
        first = [victim.worker.worker_id for victim in victims]
        await self._ask("shrink", role=spec.role, model=spec.model, size=size, first=first)

    async def _ask(self, op: str, **fields: object) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(lambda: control.ask(self._socket, op, timeout_s=TIMEOUT_S, **fields))
        except (control.NotRunning, ValueError) as e:
            raise Unavailable(f"the supervisor: {e}") from e

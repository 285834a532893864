"""What starts and stops the workers of a deployment: on one machine, the supervisor of this home."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from inferflux.cli import control
from inferflux.errors import Unavailable
from services.registry.deployments.deployment import ModelSpec

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class HostWorker:
    """A worker's process. `error`: why it will never be ready; empty: it may be. `is_wanted` False: it goes."""

    worker_id: str
    role: str
    revision: int
    state: str
    reason: str
    error: str
    is_wanted: bool


@dataclass(frozen=True, slots=True)
class HostStatus:
    """How far a model is. `step`, `fraction`: of what precedes its workers; `error`: why there won't be any."""

    revision: int = 0
    step: str = ""
    fraction: float | None = None
    error: str = ""
    workers: tuple[HostWorker, ...] = ()

    def of(self, revision: int) -> list[HostWorker]:
        """List the workers that a revision should have."""
        return [worker for worker in self.workers if worker.revision == revision and worker.is_wanted]


class Host(Protocol):
    """Starts and stops workers. All methods may be called again without harm, and raise Unavailable."""

    async def deploy(self, spec: ModelSpec) -> None:
        """Prepare a model and start its workers, beside those that it has."""
        ...

    async def status(self, model: str) -> HostStatus:
        """Say how far that is."""
        ...

    async def retire(self, model: str, *, keep: int | None = None, only: int | None = None) -> list[str]:
        """Start no worker of a model again: but for those of a revision, or only those of one; returns their ids."""
        ...

    async def end(self, ids: Sequence[str]) -> None:
        """Stop retired workers that can't be told to drain."""
        ...


class LocalHost:
    """Speaks to the supervisor of this home."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def deploy(self, spec: ModelSpec) -> None:
        await self._ask("deploy", spec=spec.to_json())

    async def status(self, model: str) -> HostStatus:
        answer = await self._ask("deployment", model=model)
        return HostStatus(**answer["deployment"], workers=tuple(map(_worker, answer["workers"])))

    async def retire(self, model: str, *, keep: int | None = None, only: int | None = None) -> list[str]:
        answer = await self._ask("retire", model=model, keep=keep, only=only)
        return list(answer["retired"])

    async def end(self, ids: Sequence[str]) -> None:
        await self._ask("end", ids=list(ids))

    async def _ask(self, op: str, **fields: object) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(lambda: control.ask(self._socket, op, timeout_s=TIMEOUT_S, **fields))
        except (control.NotRunning, ValueError) as e:
            raise Unavailable(f"the supervisor: {e}") from e


def _worker(process: dict[str, Any]) -> HostWorker:
    has_failed = process["state"] == "failed"
    return HostWorker(
        worker_id=process["id"],
        role=process["role"],
        revision=process["revision"],
        state="ready" if process["ready"] else process["state"] or "starting",
        reason=process["reason"],
        error=process["reason"] if has_failed else "" if process["ready"] else process["why"],
        is_wanted=process["wanted"],
    )

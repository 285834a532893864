"""What a planner can do to a pool. `local` and `k8s` are the two that do something."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from services.registry.planner.pool import Member
from services.registry.planner.spec import PoolSpec


class Actuator(Protocol):
    """Changes the number of workers of a pool. All methods raise Unavailable, or NotFound for a pool that is not there.

    Sizes are absolute, so that doing the same again changes nothing.
    """

    async def size(self, spec: PoolSpec) -> int:
        """Return how many workers are asked for now, those that still start included."""
        ...

    async def doomed(self, spec: PoolSpec, size: int) -> Collection[str] | None:
        """Name the workers that go when there are only `size`; None: those that `shrink` is told."""
        ...

    async def grow(self, spec: PoolSpec, size: int) -> None:
        """Ask for so many workers, more than there are."""
        ...

    async def shrink(self, spec: PoolSpec, size: int, victims: Sequence[Member]) -> None:
        """Ask for so many workers, fewer than there are, and for the victims to go first.

        The victims are told to drain right afterwards.
        """
        ...

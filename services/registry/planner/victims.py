"""Which workers a pool that shrinks can do without best. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from inferflux.types import State
from services.registry.planner.pool import Member

UNKNOWN_S = math.inf


def choose(members: Sequence[Member], num: int) -> list[Member]:
    """Return at most `num` workers, those first whose drain costs least.

    What never served costs nothing; then it is how long what runs would hold the worker, then how much runs on it.
    Workers that leave anyhow are not chosen: they are gone already for whoever counts.
    """
    return sorted(staying(members), key=_drain_cost)[: max(0, num)]


def staying(members: Sequence[Member]) -> list[Member]:
    """List the workers that serve or will."""
    return [member for member in members if member.state not in (State.DRAINING, State.FAILED)]


def _drain_cost(member: Member) -> tuple[bool, float, int, str]:
    report = member.report
    if report is None:
        return member.state is State.READY, UNKNOWN_S, 0, member.worker.worker_id
    held_s = UNKNOWN_S if report.eta_s is None else report.eta_s
    num_held = report.num_requests + report.pulse.num_live_tickets
    is_serving = member.state is State.READY
    return is_serving, held_s if num_held else 0.0, num_held, member.worker.worker_id

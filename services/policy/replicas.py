"""Which gateway uses which revision, and how far behind it is: what gateways report to this replica, in memory.

Gateways report every few seconds and at once when they use a new revision; one that is silent for longer is forgotten.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from inferflux.clock import Clock
from inferflux.telemetry.metrics import POLICY_LAG
from services.policy.trial import Outcomes

FORGET_S = 30.0
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Report:
    """What one gateway uses. Outcomes are counted since its candidate came."""

    gateway_id: str
    revision: int
    policy_revision: int = 0
    candidate_revision: int = 0
    is_candidate_refused: bool = False
    live: Outcomes = field(default_factory=Outcomes)
    candidate: Outcomes = field(default_factory=Outcomes)


@dataclass(frozen=True, slots=True)
class Replica:
    """One gateway now. `lag_s`: for how long there has been a newer revision than its own."""

    report: Report
    age_s: float
    lag_s: float


class Replicas:
    """All gateways of this replica. Used from one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Report]] = {}
        self._published: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def published(self, revision: int) -> None:
        """Note that gateways could have a revision from now on."""
        self._published.append((revision, self._clock.monotonic()))

    def take(self, report: Report) -> None:
        """Take a report in place of the gateway's last one."""
        self._reports[report.gateway_id] = self._clock.monotonic(), report
        self.all()

    def all(self) -> list[Replica]:
        """List gateways by id, and renew the gauge of their lags."""
        now = self._clock.monotonic()
        for gateway_id in [i for i, (at, _) in self._reports.items() if now - at > FORGET_S]:
            del self._reports[gateway_id]
            POLICY_LAG.remove(gateway_id)
        replicas = [Replica(r, now - at, self._lag_s(r.revision, now)) for _, (at, r) in sorted(self._reports.items())]
        for replica in replicas:
            POLICY_LAG.labels(replica.report.gateway_id).set(replica.lag_s)
        return replicas

    def of_candidate(self, revision: int) -> list[Report]:
        """List the reports of gateways that have a candidate."""
        return [r.report for r in self.all() if r.report.candidate_revision == revision]

    def _lag_s(self, revision: int, now: float) -> float:
        return next((now - at for newer, at in self._published if newer > revision), 0.0)

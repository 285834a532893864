"""One pool over time: from what its workers report to the size it should have. Pure but for its memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from services.registry.planner.arrivals import Arrivals
from services.registry.planner.hysteresis import Hysteresis
from services.registry.planner.scaling import Load, Slo, Verdict, explain
from services.registry.planner.spec import PoolSpec

SUSTAINED_S = 120.0
"""A goal that was missed for less than that was missed in a burst, which the replay of arrivals knows better."""
LEARNING = 0.2
"""Weight of a new observation of what a replica can do; faster ones count at once, since idle moments hide speed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A look at a pool. `num_starting`: asked for and not ready yet. `arrived_tokens`: since the look before.

    `busy_tokens_per_s`: what a replica with a queue computed since then, on average; None: none had one all the time.
    `max_sequences`: what the workers themselves say they can run at a time.
    """

    load: Load
    num_starting: int = 0
    arrived_tokens: float = 0.0
    busy_tokens_per_s: float | None = None
    max_sequences: int = 0

    @property
    def num_replicas(self) -> int:
        """All that are paid for."""
        return self.load.num_ready + self.num_starting


@dataclass(frozen=True, slots=True)
class Outlook:
    """What came of a look: the load as it was judged, what it needs, and the size to have, which holds longer."""

    current: int
    target: int
    load: Load
    slo: Slo
    verdict: Verdict


@dataclass(slots=True)
class Scaler:
    """The memory of one pool. Instants are seconds of any clock that never goes back."""

    _arrivals: Arrivals = field(default_factory=Arrivals)
    _hysteresis: Hysteresis = field(default_factory=Hysteresis)
    _tokens_per_s: float = 0.0
    _num_ready: int = -1
    _missed_since: float | None = None

    def look(self, now: float, reading: Reading, spec: PoolSpec) -> Outlook:
        """Judge one reading; call it every few seconds."""
        self._arrivals.add(now, reading.arrived_tokens)
        self._learn(reading)
        slo = self._slo(reading, spec)
        load = self._load(now, reading, slo)
        verdict = explain(load, slo, spec.cost)
        target = self._hysteresis.target(now, reading.num_replicas, verdict.desired, spec.hold_s)
        target = min(max(target, spec.min_replicas), spec.max_replicas)
        return Outlook(reading.num_replicas, target, load, slo, verdict)

    def _learn(self, reading: Reading) -> None:
        if reading.busy_tokens_per_s is not None:
            slower = self._tokens_per_s + LEARNING * (reading.busy_tokens_per_s - self._tokens_per_s)
            self._tokens_per_s = max(reading.busy_tokens_per_s, slower)

    def _load(self, now: float, reading: Reading, slo: Slo) -> Load:
        """Add what only time tells."""
        latency_s = reading.load.latency_s if self._is_missed(now, reading, slo) else None
        return replace(reading.load, arrivals=self._arrivals.spans(), latency_s=latency_s)

    def _is_missed(self, now: float, reading: Reading, slo: Slo) -> bool:
        """Whether the goal was missed all the time lately, with as many replicas as now."""
        latency_s, num_ready = reading.load.latency_s, reading.load.num_ready
        is_same, self._num_ready = num_ready == self._num_ready and not reading.num_starting, num_ready
        if latency_s is None or latency_s <= slo.latency_s or not is_same:
            self._missed_since = None
            return False
        self._missed_since = now if self._missed_since is None else self._missed_since
        return now - self._missed_since >= SUSTAINED_S

    def _slo(self, reading: Reading, spec: PoolSpec) -> Slo:
        """Fill in what the operator left to be learned."""
        slo = spec.slo
        return replace(
            slo,
            tokens_per_s=slo.tokens_per_s or self._tokens_per_s,
            num_sequences=slo.num_sequences or reading.max_sequences,
        )

"""What arrived at a pool in the last hour, span by span, from looks at its counters. Pure but for its memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MEMORY_S = 3600.0
"""Bursts come again: of 6 hours of recorded traffic an hour's memory served most with the same replicas (10 minutes
needed 15% more of them for as many requests in time, and changed the size twice as often; bench/planner.py)."""


@dataclass(slots=True)
class Arrivals:
    """The memory of one pool. Instants are seconds of any clock that never goes back."""

    _spans: deque[tuple[float, float]] = field(default_factory=deque)
    _looked_at: float | None = None
    _length_s: float = 0.0

    def add(self, now: float, num_tokens: float) -> None:
        """Take in what arrived since the last look; the first look begins the first span."""
        if self._looked_at is not None and now > self._looked_at:
            self._spans.append((now - self._looked_at, num_tokens))
            self._length_s += now - self._looked_at
            while self._length_s - self._spans[0][0] >= MEMORY_S:
                self._length_s -= self._spans.popleft()[0]
        self._looked_at = now

    def spans(self) -> tuple[tuple[float, float], ...]:
        """List spans in seconds and the tokens in them, the oldest first."""
        return tuple(self._spans)

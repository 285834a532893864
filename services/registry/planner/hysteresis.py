"""From what a pool needs at this moment to the size it should have: grow at once, shrink late. Pure but for its memory.

A pool grows as soon as it must, and shrinks only to the largest size that was needed in the last `hold_s`. So a burst
that comes again within that time finds its replicas, and two changes of direction are at least so far apart, unless
demand grows beyond everything seen meanwhile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Hysteresis:
    """The memory of one pool. Instants are seconds of any clock that never goes back."""

    _needs: deque[tuple[float, int]] = field(default_factory=deque)
    _began_at: float | None = None

    def target(self, now: float, current: int, needed: int, hold_s: float) -> int:
        """Return the size to have now; remembers what was needed.

        Whoever has not watched for `hold_s` yet, like a new leader, does not know what was needed, and lets nothing
        shrink.
        """
        self._began_at = now if self._began_at is None else self._began_at
        self._remember(now, needed, hold_s)
        if needed >= current:
            return needed
        if now - self._began_at < hold_s:
            return current
        return min(current, self._needs[0][1])

    def _remember(self, now: float, needed: int, hold_s: float) -> None:
        """Keep what may still be the largest: sizes fall from the left to the right, instants grow."""
        while self._needs and self._needs[-1][1] <= needed:
            self._needs.pop()
        self._needs.append((now, needed))
        while self._needs[0][0] <= now - hold_s and len(self._needs) > 1:
            self._needs.popleft()

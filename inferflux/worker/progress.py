"""Health means progress: an engine that has work and makes no step is dead, whatever else answers."""

from __future__ import annotations

from inferflux.clock import Clock
from inferflux.engine.base import EngineLoad

# Of a process that was itself stopped for an hour, its engine has not been stuck for an hour.
MAX_GAP_S = 1.0


class Progress:
    """Judges an engine by its step counter. Pure over the clock; `observe` at least once a second."""

    def __init__(self, clock: Clock, wedged_after_s: float) -> None:
        self._clock = clock
        self._wedged_after_s = wedged_after_s
        self._step = -1
        self._seen_at = clock.monotonic()
        self._stalled_s = 0.0
        self.objection: str | None = None

    @property
    def is_hopeless(self) -> bool:
        """Whether the engine has been wedged for as long again as it took to be called so."""
        return self._stalled_s > 2 * self._wedged_after_s

    def observe(self, load: EngineLoad) -> str | None:
        """Why the engine is not fit to serve; None when it is. Kept as `objection`."""
        self.objection = self._judge(load)
        return self.objection

    def _judge(self, load: EngineLoad) -> str | None:
        now = self._clock.monotonic()
        gap_s, self._seen_at = min(now - self._seen_at, MAX_GAP_S), now
        is_idle = load.num_running + load.num_waiting == 0
        # An engine that was called wedged gets no more work; only a step says that it is well again.
        if load.step != self._step or (is_idle and self.objection is None):
            self._step, self._stalled_s = load.step, 0.0
        else:
            self._stalled_s += gap_s
        if not load.is_alive:
            return "the engine is dead"
        return f"work but no step for {self._stalled_s:.1f} s" if self._stalled_s > self._wedged_after_s else None

"""Health means progress: an engine that has work and makes no step is dead, whatever else answers."""

from __future__ import annotations

from inferflux.clock import Clock
from inferflux.engine.base import EngineLoad


class Progress:
    """Judges an engine by its step counter. Pure over the clock; `observe` at least once a second."""

    def __init__(self, clock: Clock, wedged_after_s: float) -> None:
        self._clock = clock
        self._wedged_after_s = wedged_after_s
        self._step = -1
        self._since = clock.monotonic()

    def observe(self, load: EngineLoad) -> str | None:
        """Why the engine is not fit to serve; None when it is."""
        now = self._clock.monotonic()
        if load.step != self._step or load.num_running + load.num_waiting == 0:
            self._step, self._since = load.step, now
        if not load.is_alive:
            return "the engine is dead"
        stalled_s = now - self._since
        return f"work but no step for {stalled_s:.1f} s" if stalled_s > self._wedged_after_s else None

"""Whether a worker makes progress, judged by the pulses on its stream.

Silence is counted in ticks of this process's own loop, not in seconds: when the gateway itself was stopped for a while,
no worker looks dead afterwards.
"""

from __future__ import annotations

from dataclasses import replace

from inferflux.types import Pulse, State

TICK_S = 0.25
SUSPECT_TICKS = 4
# guess: 5 s until a worker that has just come has filled its caches.
WARM_TICKS = 20


class Heart:
    """The pulses of one worker. Down until the first pulse of a stream, and again when the stream ends."""

    def __init__(self, dead_ticks: int) -> None:
        self.pulse: Pulse | None = None
        self._dead_ticks = dead_ticks
        self._num_silent_ticks = 0
        self._num_ticks_up = 0

    def beat(self, pulse: Pulse) -> None:
        """Take a pulse."""
        self.pulse = pulse
        self._num_silent_ticks = 0

    def tick(self) -> None:
        """Let one TICK_S pass."""
        self._num_silent_ticks += 1
        self._num_ticks_up += self.is_up

    def refuse(self) -> None:
        """Hear from the worker, before its next pulse, that it takes nothing new."""
        if self.is_ready and self.pulse is not None:
            self.pulse = replace(self.pulse, state=State.DRAINING)

    def stop(self) -> None:
        """The stream is gone."""
        self.pulse = None
        self._num_silent_ticks = self._num_ticks_up = 0

    @property
    def is_up(self) -> bool:
        """Whether requests can be sent to the worker at all."""
        return self.pulse is not None

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes new requests."""
        return self.pulse is not None and self.pulse.state is State.READY

    @property
    def has_failed(self) -> bool:
        """Whether the worker says that it is beyond help, and so is what it has: e.g. its engine hangs."""
        return self.pulse is not None and self.pulse.state is State.FAILED

    @property
    def warmth(self) -> float:
        """How much of its capacity a worker that has just come should be given, in (0, 1]."""
        return min(1.0, (self._num_ticks_up + 1) / WARM_TICKS)

    @property
    def is_fresh(self) -> bool:
        """Whether the last pulse came on time."""
        return self._num_silent_ticks < SUSPECT_TICKS

    @property
    def is_dead(self) -> bool:
        """Whether the silence lasts so long that the stream must be given up."""
        return self._num_silent_ticks >= self._dead_ticks

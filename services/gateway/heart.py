"""Whether a worker makes progress, judged by the pulses on its stream.

Silence is counted in ticks of this process's own loop, not in seconds: when the gateway itself was stopped for a while,
no worker looks dead afterwards.
"""

from __future__ import annotations

from inferflux.types import Pulse, State

TICK_S = 0.25
SUSPECT_TICKS = 4


class Heart:
    """The pulses of one worker. Down until the first pulse of a stream, and again when the stream ends."""

    def __init__(self, dead_ticks: int) -> None:
        self.pulse: Pulse | None = None
        self._dead_ticks = dead_ticks
        self._num_silent_ticks = 0

    def beat(self, pulse: Pulse) -> None:
        """Take a pulse."""
        self.pulse = pulse
        self._num_silent_ticks = 0

    def tick(self) -> None:
        """Let one TICK_S pass."""
        self._num_silent_ticks += 1

    def stop(self) -> None:
        """The stream is gone."""
        self.pulse = None
        self._num_silent_ticks = 0

    @property
    def is_up(self) -> bool:
        """Whether requests can be sent to the worker at all."""
        return self.pulse is not None

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes new requests."""
        return self.pulse is not None and self.pulse.state is State.READY

    @property
    def is_fresh(self) -> bool:
        """Whether the last pulse came on time."""
        return self._num_silent_ticks < SUSPECT_TICKS

    @property
    def is_dead(self) -> bool:
        """Whether the silence lasts so long that the stream must be given up."""
        return self._num_silent_ticks >= self._dead_ticks

"""What a worker did, for whoever sizes its pool: tokens since its start, and how fast the last minute was."""

from __future__ import annotations

import time
from collections import deque

from inferflux.clock import Clock
from inferflux.types import Frame

WINDOW_S = 60.0
MAX_SAMPLES = 512
MIN_SAMPLES = 5


class Meter:
    """Counts what is over. Latency is time to the first token in the engine (prefill), or per output token (decode)."""

    def __init__(self, clock: Clock) -> None:
        self.num_tokens = 0
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, num_tokens: int, latency_s: float | None) -> None:
        """Note one request; `latency_s` None: it has none."""
        self.num_tokens += num_tokens
        if latency_s is not None:
            self._samples.append((self._clock.monotonic(), latency_s))

    def latency_s(self) -> float | None:
        """What 9 of 10 requests of the last minute got or better; None when there were too few to tell."""
        since = self._clock.monotonic() - WINDOW_S
        latencies = sorted(latency_s for at, latency_s in self._samples if at >= since)
        if len(latencies) < MIN_SAMPLES:
            return None
        return latencies[int(0.9 * (len(latencies) - 1))]


class Pace:
    """How fast the tokens of one response come, from its first frame with tokens to its last."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._num_first = 0
        self._first_at = 0.0

    def see(self, frame: Frame) -> None:
        """Let a frame pass."""
        if frame.choices:
            self.num_tokens += sum(len(choice.token_ids) for choice in frame.choices)
            if not self._num_first:
                self._num_first, self._first_at = self.num_tokens, time.perf_counter()

    def s_per_token(self) -> float | None:
        """Seconds per token after the first ones, now at the end; None when there were no others."""
        num_later = self.num_tokens - self._num_first
        return (time.perf_counter() - self._first_at) / num_later if num_later else None

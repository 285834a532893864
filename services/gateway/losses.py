"""The workers that one request has lost on its way, and whether it may go on to another."""

from __future__ import annotations

from dataclasses import dataclass, field

from inferflux.clock import Clock
from inferflux.errors import Draining, InferfluxError, Internal, KvTransportDegraded, WorkerLost
from inferflux.telemetry import metrics

MAX_MOVES = 2
SHARE = 0.1
"""Moves per request that comes in."""
# guess: of a busy gateway, the moves that the last thousand requests have paid for.
MAX_SAVED = 100.0
FLOOR = 10.0
"""Moves that a quiet gateway has after `FLOOR` seconds, whatever its traffic."""


@dataclass(slots=True)
class Losses:
    """What happened to one request. Workers by their ids, their starts by incarnations, instants in monotonic time.

    `counted`: starts whose loss counts against its limit of moves. `deaths`: starts that died while they had it, and it
    got no further since the first of them; the last one at `died_at`. `lost_at`: since when it waits; 0 = it doesn't.
    `pardoned`: starts whose loss doesn't count after all. `verdict`: set once it is found to be what they died of.
    """

    workers: set[str] = field(default_factory=set)
    counted: list[str] = field(default_factory=list)
    deaths: set[str] = field(default_factory=set)
    pardoned: set[str] = field(default_factory=set)
    died_at: float = 0.0
    lost_at: float = 0.0
    verdict: InferfluxError | None = None


class RetryBudget:
    """Moves that traffic has paid for: one for ten requests, so that failing workers are not flooded with retries."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._num_saved = FLOOR
        self._seen_at = clock.monotonic()

    def deposit(self) -> None:
        """Let one request pay its share."""
        self._num_saved = min(MAX_SAVED, self._num_saved + SHARE)

    def take(self) -> bool:
        """Pay for one move; tells whether there was enough."""
        now = self._clock.monotonic()
        refill, self._seen_at = now - self._seen_at, now
        if self._num_saved < FLOOR:
            self._num_saved = min(FLOOR, self._num_saved + refill)
        if self._num_saved < 1:
            return False
        self._num_saved -= 1
        return True


class Moves:
    """Decides which requests may move. A request that leaves a draining worker always may: that is no failure.

    The first worker that a request loses is not its fault, and moving all requests of a lost worker at once is the
    point of having another; so only what comes after it is paid from the budget.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._budget = RetryBudget(clock)

    def begin(self) -> None:
        """Count a request that comes in."""
        self._budget.deposit()

    @staticmethod
    def are_spent(losses: Losses) -> bool:
        """Whether a request has moved as often as it may."""
        return len(losses.counted) >= MAX_MOVES

    def permit(self, losses: Losses, error: InferfluxError, start: str) -> None:
        """Return if the request may move after `error` of the worker with the start `start`, else raise the error."""
        if not error.is_retryable or isinstance(error, KvTransportDegraded):
            raise error
        if not isinstance(error, Draining) and start not in losses.pardoned:
            if why := self._objection(losses, error):
                metrics.RESUME_REFUSED.labels(why).inc()
                raise error
            losses.counted.append(start)
        losses.lost_at = losses.lost_at or self._clock.monotonic()

    def _objection(self, losses: Losses, error: InferfluxError) -> str | None:
        if self.are_spent(losses):
            return "moves"
        is_free = isinstance(error, WorkerLost) and not losses.counted
        return None if is_free or self._budget.take() else "budget"


def not_continued() -> Internal:
    """Make the error of a response that the next worker answers differently."""
    metrics.RESUME_REFUSED.labels("answer").inc()
    return Internal("the response could not be continued on another worker")

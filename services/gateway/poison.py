"""Which request killed the worker? An inquest at each death, so that one request can't take down the cluster.

A request is *suspect* from the moment a worker dies under it until it gets further on another (its first new event, or
PROBATION_S of running there). The rule, applied to all requests of a worker at the moment of its death:

- A suspect under which a second worker dies is accused if it is the only one, and guilty if none of its workers is back
  after EVIDENCE_S: it ends with PoisonRequest, and its tenant may not send the same again for QUARANTINE_S. Its
  neighbours' losses with those workers are forgiven.
- If there are several of them, none is. From then on each is *on trial*: it runs only where no other suspect does, and
  after a pause, so the next death has one of them at most.

To keep those apart that are easily told apart, a suspect that had received nothing yet (a request of death mostly kills
in its first step) pauses for PAUSE_S, and lets those go first that had: for at most PRECEDENCE_S, until they have all
got further. So a request that kills at its start kills two workers; one that kills later kills three.

A worker that hangs, drains or is cut off accuses nobody; one that comes back as the same start had not died at all. A
death that follows another one within TOGETHER_S has the same cause, most likely: requests that had moved from there
to here just then are not accused, and have lost one worker rather than two.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from weakref import WeakSet

from inferflux.clock import Clock
from inferflux.errors import PoisonRequest
from inferflux.telemetry import metrics
from services.gateway.call import Call
from services.gateway.news import News

QUARANTINE_S = 600.0
# guess: a step of a slow engine takes this long; who runs longer is not what kills at its start.
PROBATION_S = 1.0
PRECEDENCE_S = 1.0
TOGETHER_S, PAUSE_S = 0.25, 0.3
# A connection that broke between two living processes is there again in a tenth of this.
EVIDENCE_S = 0.5
MAX_DEATHS = 64
MAX_POISONS = 1024
_log = logging.getLogger(__name__)


class Inquest:
    """Remembers the last deaths and their suspects, and what was found guilty. `news` rings when it matters."""

    def __init__(self, clock: Clock, news: News) -> None:
        self.news = news
        self._clock = clock
        self._key = secrets.token_bytes(16)
        self._deaths: OrderedDict[str, WeakSet[Call]] = OrderedDict()
        self._last_death_at = -TOGETHER_S
        self._accused: set[Call] = set()
        self._guilty: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def admit(self, call: Call) -> None:
        """Raise PoisonRequest if workers died of the same request of the same tenant a short while ago."""
        if self._guilty and self._clock.monotonic() < self._guilty.get(self._fingerprint(call), 0.0):
            raise _verdict()

    def died(self, start: str, calls: Collection[Call]) -> None:
        """Hold the inquest for a worker's death: `calls` ran on it."""
        self._deaths[start] = WeakSet(calls)
        if len(self._deaths) > MAX_DEATHS:
            self._deaths.popitem(last=False)
        now = self._clock.monotonic()
        for call in calls:
            call.losses.deaths.add(start)
            call.losses.died_at = now
        suspects = [call for call in calls if self.is_on_trial(call)]
        is_alone, self._last_death_at = now - self._last_death_at > TOGETHER_S, now
        if not is_alone:
            self._pardon(start, suspects)
        elif len(suspects) == 1:
            self._accused.add(suspects[0])
            self._after(EVIDENCE_S, self._judge, suspects[0])
        for pause_s in (PAUSE_S, PRECEDENCE_S):
            self._after(pause_s + 0.05, self.news.ring)

    def came_back(self, start: str) -> None:
        """Hear that a worker had not died: only its connection was lost."""
        for call in self._deaths.pop(start, ()):
            call.losses.deaths.discard(start)

    async def settle(self, call: Call) -> None:
        """Wait until nobody is accused of the deaths that a request has seen. Raises PoisonRequest if it is guilty."""
        while any(accused.losses.deaths & call.losses.deaths for accused in self._accused):
            await self.news.next()
        if call.losses.verdict is not None:
            raise call.losses.verdict

    def watch(self, call: Call) -> None:
        """Let a suspect that has just been started prove itself by running for a while."""
        self._after(PROBATION_S, self._end_probation, call, len(call.losses.deaths))

    def clear(self, call: Call) -> None:
        """Hear that a suspect got further."""
        call.losses.deaths.clear()
        self.news.ring()

    def gives_way(self, call: Call) -> bool:
        """Whether a suspect must not go on yet: it pauses, or others go first which are less so."""
        losses, is_on_trial = call.losses, self.is_on_trial(call)
        if not losses.deaths or (call.journal.num_events and not is_on_trial):
            return False
        waited_s = self._clock.monotonic() - losses.died_at
        if is_on_trial or waited_s < PAUSE_S:
            return waited_s < PAUSE_S
        others = (other for start in losses.deaths for other in self._deaths.get(start, ()))
        return waited_s < PRECEDENCE_S and any(other.journal.num_events and other.losses.deaths for other in others)

    @staticmethod
    def is_on_trial(call: Call) -> bool:
        """Whether a request may only run where no other suspect does."""
        return len(call.losses.deaths) > 1

    def _end_probation(self, call: Call, num_deaths: int) -> None:
        # Another death since then has begun another probation.
        if len(call.losses.deaths) == num_deaths:
            self.clear(call)

    @staticmethod
    def _after(delay_s: float, then: Callable[..., None], *arguments: object) -> None:
        asyncio.get_running_loop().call_later(delay_s, then, *arguments)

    @staticmethod
    def _pardon(start: str, calls: Iterable[Call]) -> None:
        """Forgive requests their second loss, not a third: many that kill at the same time are no accident either."""
        for call in calls:
            if len(call.losses.deaths) == 2:
                call.losses.pardoned.add(start)

    def _judge(self, call: Call) -> None:
        self._accused.discard(call)
        if self.is_on_trial(call):
            self._convict(call)
        self.news.ring()

    def _convict(self, call: Call) -> None:
        losses = call.losses
        _log.error("request found to kill workers", extra={"request_id": call.request_id, "num": len(losses.deaths)})
        metrics.RESUME_REFUSED.labels("poison").inc()
        self._guilty[self._fingerprint(call)] = self._clock.monotonic() + QUARANTINE_S
        if len(self._guilty) > MAX_POISONS:
            self._guilty.popitem(last=False)
        losses.verdict = _verdict()
        for start in tuple(losses.deaths):
            for other in self._deaths.pop(start, ()):
                other.losses.deaths.discard(start)
                other.losses.pardoned.add(start)
                other.losses.counted = [lost for lost in other.losses.counted if lost != start]

    def _fingerprint(self, call: Call) -> tuple[str, bytes]:
        digest = hashlib.blake2b(call.http.path.encode() + b"\0" + call.http.body, key=self._key, digest_size=16)
        return call.principal.tenant, digest.digest()


def _verdict() -> PoisonRequest:
    return PoisonRequest("workers died of this request")

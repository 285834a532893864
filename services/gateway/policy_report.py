"""Tells the policy service which revisions this gateway uses, and how requests fare under a canary.

At once when something changes, each second while a candidate is being tried, else every few seconds: that is also how a
gateway knows for how long it has not heard of the policy service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from inferflux.clock import Clock
from inferflux.errors import InferfluxError, Unavailable
from inferflux.telemetry import metrics
from services.gateway.policy import Policies
from services.gateway.snapshots import Snapshot

INTERVAL_S, TRIAL_INTERVAL_S = 5.0, 1.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcomes:
    """Requests that ended, and those of them that ended in an error."""

    num_requests: int = 0
    num_failures: int = 0

    def count(self, *, is_failure: bool) -> None:
        self.num_requests += 1
        self.num_failures += is_failure


class Trial:
    """How requests fare under the live policy and the candidate, since the candidate came."""

    def __init__(self) -> None:
        self.candidate_revision = 0
        self.live = Outcomes()
        self.candidate = Outcomes()

    def begin(self, policies: Policies) -> None:
        """Count from the beginning when the candidate is another one."""
        if policies.candidate_revision != self.candidate_revision:
            self.candidate_revision = policies.candidate_revision
            self.live, self.candidate = Outcomes(), Outcomes()

    def count(self, policy_revision: int, *, is_failure: bool) -> None:
        """Count a request that ended under a revision."""
        if self.candidate_revision:
            is_tried = policy_revision == self.candidate_revision
            (self.candidate if is_tried else self.live).count(is_failure=is_failure)


class Contact:
    """When the policy service was last heard of, and for how long its word holds without it.

    `max_age_s` 0: for ever. Also the gauge of the snapshot's age, which is rendered on each scrape.
    """

    def __init__(self, clock: Clock, max_age_s: float = 0.0) -> None:
        self._clock = clock
        self._max_age_s = max_age_s
        self._at = clock.monotonic()
        metrics.POLICY_SNAPSHOT_AGE.set_function(self.age_s)

    def age_s(self) -> float:
        return self._clock.monotonic() - self._at

    def renew(self) -> None:
        """Note that the policy service has answered."""
        self._at = self._clock.monotonic()

    def require(self) -> None:
        """Raise Unavailable when what is known here is too old to let anybody in."""
        if self._max_age_s and (age_s := self.age_s()) > self._max_age_s:
            message = f"no word of the policy service for {age_s:.0f} s; its last one holds for {self._max_age_s:g} s"
            raise Unavailable(message, retry_after_s=INTERVAL_S)


Send = Callable[[Policies, Trial], Awaitable[None]]


class PolicyReporter:
    """Sends the reports."""

    def __init__(self, policies: Snapshot[Policies], trial: Trial, send: Send, contact: Contact) -> None:
        self._policies = policies
        self._trial = trial
        self._send = send
        self._contact = contact

    async def run(self) -> None:
        """Report for ever."""
        while True:
            seen = self._policies.value
            if seen is not None:
                await self._report(seen)
            is_trial = seen is not None and bool(seen.candidate_revision)
            await self._policies.changed(seen, TRIAL_INTERVAL_S if is_trial else INTERVAL_S)

    async def _report(self, policies: Policies) -> None:
        try:
            await self._send(policies, self._trial)
            self._contact.renew()
        except InferfluxError as e:
            _log.debug("policy report failed", extra={"reason": e.reason})
            await asyncio.sleep(TRIAL_INTERVAL_S)

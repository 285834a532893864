"""What gateways tell the policy service, and when."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import Unavailable
from inferflux.telemetry import metrics
from services.gateway.auth import KeyRing
from services.gateway.policy import Policies, Policy
from services.gateway.policy_report import Contact, PolicyReporter, Trial
from services.gateway.snapshots import Snapshot

KEYS = KeyRing(1, {})


def policies(revision: int, candidate: int = 0) -> Policies:
    return Policies(revision, KEYS, Policy(1), Policy(candidate) if candidate else None, 0.5, candidate)


def test_requests_are_counted_under_both_policies_since_the_candidate_came():
    """And not at all while nothing is being tried; another candidate begins at zero."""
    trial = Trial()
    trial.begin(policies(1))
    trial.count(1, is_failure=True)
    assert trial.live.num_requests == 0

    trial.begin(policies(2, candidate=2))
    for revision, is_failure in ((1, False), (1, True), (2, True)):
        trial.count(revision, is_failure=is_failure)
    trial.begin(policies(3, candidate=2))
    assert (trial.live.num_requests, trial.live.num_failures) == (2, 1)
    assert (trial.candidate.num_requests, trial.candidate.num_failures) == (1, 1)

    trial.begin(policies(4, candidate=4))
    assert trial.candidate.num_requests == 0


@pytest.mark.looptime
async def test_changes_are_reported_at_once_and_silence_shows_in_the_age():
    """Nothing before the first snapshot; a service that does not answer does not stop the reports."""
    clock, sent = ManualClock(), []
    snapshot = Snapshot[Policies]("policy")

    async def send(seen: Policies, trial: Trial) -> None:
        sent.append((seen.revision, asyncio.get_running_loop().time()))
        if seen.revision == 2:
            raise Unavailable("away")

    task = asyncio.create_task(PolicyReporter(snapshot, Trial(), send, Contact(clock)).run())
    await asyncio.sleep(7)
    assert sent == []
    for revision in (1, 2, 3):
        snapshot.offer(policies(revision))
        clock.advance(3)
        await asyncio.sleep(3)
    age = metrics.POLICY_SNAPSHOT_AGE.collect()[0].samples[0].value
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

    assert list(dict.fromkeys(revision for revision, _ in sent)) == [1, 2, 3]
    assert sent[0][1] < 7.5
    assert age == 0


def test_the_last_policy_holds_for_as_long_as_is_configured():
    """Then nobody is let in until the policy service is heard of again; 0 means for ever."""
    clock = ManualClock()
    contact, patient = Contact(clock, 60), Contact(clock)
    clock.advance(60)
    contact.require()
    clock.advance(1)
    with pytest.raises(Unavailable, match="for 61 s; its last one holds for 60 s") as raised:
        contact.require()
    assert raised.value.is_retryable
    patient.require()

    contact.renew()
    contact.require()

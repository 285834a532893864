"""Leases live as long as workers renew them, and incarnations never come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.clock import ManualClock
from inferflux.errors import Conflict
from inferflux.types import State
from services.registry.leases import GONE_LEASES, LeaseTable
from tests.unit.registry.records import worker

LEASE_S = 3.0


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def leases(clock):
    return LeaseTable(clock, LEASE_S)


def run(clock, *tables, seconds):
    """Let time pass in the steps in which the service looks at its leases; returns the ids that expired."""
    expired = []
    for _ in range(int(seconds / 0.5)):
        clock.advance(0.5)
        for table in tables:
            expired += [ended.worker_id for ended in table.expire()]
    return expired


def test_a_worker_lives_one_lease_after_its_last_renewal(leases, clock):
    """Not shorter and, apart from the step between looks, not longer."""
    leases.renew(worker())
    assert run(clock, leases, seconds=2.5) == []
    leases.renew(worker())
    assert run(clock, leases, seconds=2.5) == []

    assert run(clock, leases, seconds=0.5) == ["decode-0"]
    assert leases.workers() == ()


def test_a_renewal_brings_the_newest_record(leases):
    """State changes travel with it."""
    leases.renew(worker(state=State.STARTING))
    leases.renew(worker(state=State.READY))

    assert [known.state for known in leases.workers()] == [State.READY]


def test_workers_are_listed_by_id(leases):
    """Snapshots do not depend on the order of registrations."""
    for name in ("prefill-0", "decode-1", "decode-0"):
        leases.renew(worker(name))

    assert [known.worker_id for known in leases.workers()] == ["decode-0", "decode-1", "prefill-0"]


def test_a_newer_incarnation_replaces_an_older_one_for_good(leases):
    """A zombie that wakes up cannot take its place back."""
    leases.renew(worker(incarnation="001-a"))
    leases.renew(worker(incarnation="002-a"))

    with pytest.raises(Conflict, match="001-a"):
        leases.renew(worker(incarnation="001-a"))
    leases.adopt(worker(incarnation="001-a"))
    assert [known.incarnation for known in leases.workers()] == ["002-a"]


def test_a_dropped_incarnation_stays_away(leases, clock):
    """A late renewal of it is refused, its mirror image ignored, its next start is welcome."""
    leases.renew(worker(incarnation="001-a"))
    leases.drop("decode-0", "001-a")
    leases.drop("decode-0", "001-a")

    with pytest.raises(Conflict):
        leases.renew(worker(incarnation="001-a"))
    leases.adopt(worker(incarnation="001-a"))
    assert leases.workers() == ()
    assert leases.gone() == {"decode-0": "001-a"}

    leases.renew(worker(incarnation="002-a"))
    assert len(leases.workers()) == 1


def test_dropping_an_older_incarnation_leaves_the_newer_one(leases):
    """The order of a worker's restart and its last message does not matter."""
    leases.renew(worker(incarnation="002-a"))
    leases.drop("decode-0", "001-a")

    assert len(leases.workers()) == 1


def test_dropped_incarnations_are_forgotten_in_the_end(leases, clock):
    """The memory of the gone is bounded."""
    leases.drop("decode-0", "001-a")
    run(clock, leases, seconds=GONE_LEASES * LEASE_S + 1)

    assert leases.gone() == {}


def test_nobody_expires_for_time_in_which_the_registry_itself_stood_still(leases, clock):
    """A registry that was stopped for a minute did not hear renewals; workers get the rest of their lease."""
    leases.renew(worker())
    run(clock, leases, seconds=1)
    clock.advance(60)

    assert leases.expire() == []
    assert run(clock, leases, seconds=1) == []
    assert run(clock, leases, seconds=1) == ["decode-0"]


def test_an_adopted_worker_lives_as_long_as_it_is_seen(leases, clock):
    """What another replica mirrors is alive, but not ours to mirror."""
    leases.adopt(worker())

    assert leases.direct() == ()
    assert run(clock, leases, seconds=2.5) == []
    leases.adopt(worker(state=State.DRAINING))
    assert run(clock, leases, seconds=2.5) == []
    assert [known.state for known in leases.workers()] == [State.DRAINING]
    assert run(clock, leases, seconds=0.5) == ["decode-0"]


def test_a_worker_that_moved_to_another_replica_does_not_flap(leases, clock):
    """Its lease here ends while the mirror shows it alive there."""
    leases.renew(worker(reason="ours"))
    run(clock, leases, seconds=2)
    leases.adopt(worker(reason="theirs, older"))

    assert leases.workers()[0].reason == "ours"
    assert run(clock, leases, seconds=2) == []
    leases.adopt(worker(reason="theirs"))
    assert leases.workers()[0].reason == "theirs"
    assert leases.direct() == ()


def test_adopted_workers_are_held_while_the_mirror_is_away_and_others_are_not(leases, clock):
    """Without Redis nobody can say that they died; our own workers still can."""
    leases.adopt(worker("decode-1"))
    leases.renew(worker("decode-0"))

    for _ in range(20):
        run(clock, leases, seconds=0.5)
        leases.hold_adopted()
    assert [known.worker_id for known in leases.workers()] == ["decode-1"]


@given(st.lists(st.sampled_from(["one", "two", "none"]), max_size=30))
def test_two_replicas_do_not_keep_a_dead_worker_alive_for_each_other(path):
    """However a worker moved between them, three leases after its last renewal both have forgotten it."""
    clock = ManualClock()
    tables = {"one": LeaseTable(clock, LEASE_S), "two": LeaseTable(clock, LEASE_S)}

    for place in path + ["none"] * int(3 * LEASE_S):
        if place in tables:
            tables[place].renew(worker())
        for mirrored in tables["one"].direct():
            tables["two"].adopt(mirrored)
        for mirrored in tables["two"].direct():
            tables["one"].adopt(mirrored)
        run(clock, *tables.values(), seconds=1)

    assert [table.workers() for table in tables.values()] == [(), ()]

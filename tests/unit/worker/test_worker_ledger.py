from __future__ import annotations

from collections.abc import Iterator

import pytest

from inferflux.telemetry import metrics
from inferflux.tickets import LEAK_AGE_S, ORPHAN_AGE_S, Claimant
from inferflux.worker.ledger import Ledger
from tests.support.books import SmallBook


@pytest.fixture
def small() -> Iterator[SmallBook]:
    with SmallBook.of() as small:
        yield small


def test_tickets_within_their_lease_and_session_have_not_leaked(small: SmallBook) -> None:
    small.issue()

    audit = Ledger(small.book, lambda session_id: session_id == "s").audit()

    assert (audit.counts.live, audit.leaked, audit.num_leaked_slots) == (1, frozenset(), 0)
    assert audit.counts.is_balanced


def test_a_ticket_whose_session_ended_without_it_has_leaked(small: SmallBook) -> None:
    leaked, kept = small.issue("gone"), small.issue("s")

    audit = Ledger(small.book, lambda session_id: session_id == "s").audit()

    assert audit.leaked == {leaked}
    assert {record.ticket_id for record in audit.live} == {leaked, kept}


def test_a_ticket_that_the_sweeper_passed_by_has_leaked(small: SmallBook) -> None:
    ticket_id = small.issue(time_left_s=0)
    ledger = Ledger(small.book, lambda _: True)
    small.clock.advance(30 + LEAK_AGE_S)
    assert not ledger.audit().leaked

    small.clock.advance(0.1)
    assert ledger.audit().leaked == {ticket_id}

    small.book.sweep()
    audit = ledger.audit()
    assert (audit.leaked, audit.counts.expired, audit.counts.live) == (frozenset(), 1, 0)
    assert [record.ticket_id for record in audit.ended] == [ticket_id]


def test_slots_without_a_ticket_are_seen(small: SmallBook) -> None:
    small.compute()
    small.clock.advance(ORPHAN_AGE_S + LEAK_AGE_S + 0.1)

    assert Ledger(small.book, lambda _: True).audit().num_leaked_slots == 1


def test_each_stage_is_measured(small: SmallBook) -> None:
    def value(name: str, **labels: str) -> float:
        return metrics.REGISTRY.get_sample_value(name, labels) or 0.0

    before = {event: value("inferflux_tickets_total", event=event) for event in ("claimed", "committed", "released")}
    ages = value("inferflux_ticket_age_seconds_sum", event="released")
    reader = Claimant("decode-0", "1")

    ticket_id = small.issue()
    small.book.claim(ticket_id, reader, "one")
    small.book.commit(ticket_id, reader, "one")
    small.clock.advance(7)
    small.book.release([ticket_id], "committed")

    assert {event: value("inferflux_tickets_total", event=event) - n for event, n in before.items()} == {
        "claimed": 1,
        "committed": 1,
        "released": 1,
    }
    assert value("inferflux_ticket_age_seconds_sum", event="released") - ages == pytest.approx(7)
    assert value("inferflux_release_total", why="committed") >= 1

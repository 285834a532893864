"""When a canary is worse than what it would replace, and which gateways are behind."""

from __future__ import annotations

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import ConfigError
from services.policy.book import KeyBook
from services.policy.configured import read_configured
from services.policy.history import CONFIG, Stage, draft
from services.policy.replicas import FORGET_S, Replicas, Report
from services.policy.trial import MIN_REQUESTS, Outcomes, objection

NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize(
    ("candidate", "live", "is_bad"),
    [
        (Outcomes(MIN_REQUESTS - 1, MIN_REQUESTS - 1), Outcomes(), False),
        (Outcomes(MIN_REQUESTS, MIN_REQUESTS), Outcomes(), True),
        (Outcomes(20, 1), Outcomes(100, 0), False),
        (Outcomes(20, 8), Outcomes(100, 0), True),
        (Outcomes(1000, 60), Outcomes(9000, 0), False),
        (Outcomes(1000, 80), Outcomes(9000, 0), True),
        (Outcomes(1000, 300), Outcomes(9000, 2700), False),
        (Outcomes(1000, 0), Outcomes(9000, 9000), False),
    ],
)
def test_a_canary_is_bad_when_its_failures_exceed_the_others_beyond_chance(candidate, live, is_bad):
    """With 5% allowed; what fails anyway does not count against it."""
    assert bool(objection(candidate, live, 0.05)) == is_bad


def test_a_revert_puts_the_live_document_back_and_touches_nothing_else():
    """Only the candidate that was judged."""
    book = KeyBook().apply(draft(b"{}", "a", ""), NOW_MS)
    tried = book.apply(draft(b'{"audit":{}}', "a", "", Stage.CANARY, share=0.5), NOW_MS)
    reverted = tried.revert(tried.revision, "bad", NOW_MS)

    assert (reverted.history.live.document, reverted.history.candidate) == (b"{}", None)
    assert (reverted.history.live.author, reverted.history.live.reason) == ("policy", "bad")
    assert reverted.revert(tried.revision, "bad", NOW_MS) is reverted
    assert tried.revert(book.revision, "bad", NOW_MS) is tried


def test_a_change_that_was_answered_as_failed_is_undone_unless_others_have_built_on_it():
    """By a revision that says so."""
    book = KeyBook().apply(draft(b"{}", "a", ""), NOW_MS)
    failed = book.apply(draft(b'{"audit":{}}', "a", ""), NOW_MS)
    later = failed.apply(draft(b'{"limits":{}}', "b", ""), NOW_MS)

    assert failed.undo(failed.revision, NOW_MS).history.live.document == b"{}"
    assert later.undo(failed.revision, NOW_MS) is later


def test_gateways_are_behind_since_the_first_revision_that_they_lack():
    """And forgotten when they are silent."""
    clock = ManualClock()
    replicas = Replicas(clock)
    for revision in (1, 2, 3):
        replicas.published(revision)
        clock.advance(1)
    replicas.take(Report("gateway-0", 3))
    replicas.take(Report("gateway-1", 1))

    assert [(r.report.gateway_id, r.lag_s) for r in replicas.all()] == [("gateway-0", 0.0), ("gateway-1", 2.0)]
    clock.advance(FORGET_S)
    replicas.take(Report("gateway-1", 3))
    clock.advance(1)
    assert [r.report.gateway_id for r in replicas.all()] == ["gateway-1"]


def test_sections_of_the_environment_take_the_place_of_the_files(tmp_path):
    """Whole sections; JSON and TOML files; nothing given is no document."""
    file = tmp_path / "policy.toml"
    file.write_text("[audit]\nsample = 0.5\n[limits]\n")

    assert read_configured(file, "") == b'{"audit":{"sample":0.5},"limits":{}}'
    assert read_configured(file, '{"audit": {"debug_mode": true}}') == b'{"audit":{"debug_mode":true},"limits":{}}'
    assert read_configured(tmp_path.__class__(), "") is None
    for bad in ("{", '{"audit": {"sample": 2}}', "[]"):
        with pytest.raises(ConfigError, match="INFERFLUX_POLICY"):
            read_configured(file, bad)
    with pytest.raises(ConfigError, match="cannot read"):
        read_configured(tmp_path / "nowhere.json", "")


def test_the_configured_document_is_in_force_until_an_administrator_changes_it():
    """And is renewed by the next start as long as nobody has."""
    book = KeyBook().configure(b"{}", NOW_MS)
    changed = book.configure(b'{"audit":{}}', NOW_MS)
    by_admin = changed.apply(draft(b'{"limits":{}}', "key_1", ""), NOW_MS)

    assert changed.history.live.author == CONFIG
    assert changed.configure(b'{"audit":{}}', NOW_MS) is changed
    assert by_admin.configure(b"{}", NOW_MS) is by_admin
    assert KeyBook().configure(None, NOW_MS) == KeyBook()

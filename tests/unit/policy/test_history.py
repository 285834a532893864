"""Histories merge like sets; the newest revision says what decides and what is being tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.errors import Conflict, InvalidRequest, NotFound
from services.policy.book import KeyBook
from services.policy.history import KEPT, NONE_YET, History, Revision, Stage, decode_revision, draft, encode_revision

NOW_MS = 1_700_000_000_000

revisions = st.builds(
    lambda number, stage, document: Revision(document, "a", "", stage, revision=number),
    st.integers(1, 300),
    st.sampled_from(Stage),
    st.sampled_from([b"{}", b'{"audit":{}}']),
)
histories = st.lists(revisions, max_size=2 * KEPT).map(
    lambda some: History({revision.revision: revision for revision in some}).pruned()
)


def of(stage: Stage = Stage.LIVE, document: bytes = b"{}") -> Revision:
    return draft(document, "key_1", "why", stage, share=0.1 if stage is Stage.CANARY else 0)


@given(histories, histories, histories)
def test_merging_is_independent_of_order_and_repetition(one, two, three):
    """Also of what is forgotten on the way."""
    assert one.merge(two) == two.merge(one)
    assert one.merge(two).merge(three) == one.merge(two.merge(three))
    assert one.merge(one) == one


@given(histories, histories)
def test_merging_never_loses_what_decides(one, two):
    """However many canaries were tried since."""
    merged = one.merge(two)

    assert merged.live.revision == max(one.live.revision, two.live.revision)
    assert merged.newest.revision == max(one.newest.revision, two.newest.revision)
    assert len(merged.revisions) <= KEPT + 1


def test_without_a_revision_the_empty_document_decides():
    """As revision 0."""
    assert (History().live, History().candidate, History().newest) == (NONE_YET, None, NONE_YET)


def test_a_candidate_stands_beside_the_live_revision_until_the_next_live_one():
    """Shadow, canary, live: three revisions of one document."""
    book = KeyBook().apply(of(document=b'{"audit":{}}'), NOW_MS)
    live = book.history.live
    for stage in (Stage.SHADOW, Stage.CANARY):
        book = book.apply(of(stage), NOW_MS)
        assert book.history.live == live
        assert book.history.candidate is not None
        assert book.history.candidate.stage is stage
    promoted = book.apply(of(), NOW_MS).history

    assert (promoted.live.document, promoted.candidate) == (book.history.tried(), None)
    assert [revision.stage for revision in promoted.list()] == [Stage.LIVE, Stage.CANARY, Stage.SHADOW, Stage.LIVE]


def test_a_revision_has_the_number_and_time_of_the_book_that_got_it():
    """So it is the revision of the first snapshot that has it."""
    book = KeyBook().apply(of(), NOW_MS)

    assert book.history.live == replace(of(), revision=book.revision, created_at_ms=NOW_MS)


def test_only_who_knows_the_newest_revision_may_change_it_if_he_says_so():
    """A candidate counts too."""
    book = KeyBook().apply(of(), NOW_MS, expected=0)
    tried = book.apply(of(Stage.SHADOW), NOW_MS, expected=book.revision)

    for expected in (0, book.revision):
        with pytest.raises(Conflict, match=str(tried.revision)):
            tried.apply(of(), NOW_MS, expected)
    assert tried.apply(of(), NOW_MS).revision > tried.revision


def test_what_never_was_can_be_neither_read_nor_promoted():
    """Not found, and a conflict."""
    with pytest.raises(NotFound, match="7"):
        History().get(7)
    with pytest.raises(Conflict):
        History().tried()


@pytest.mark.parametrize(
    "terms",
    [
        {"author": ""},
        {"author": "a" * 65},
        {"reason": "a" * 513},
        {"stage": Stage.CANARY},
        {"stage": Stage.CANARY, "share": 1.0},
        {"stage": Stage.CANARY, "share": 0.5, "max_error_excess": 1.5},
    ],
)
def test_drafts_that_make_no_sense_are_refused(terms):
    """With the name of what is wrong."""
    with pytest.raises(InvalidRequest):
        draft(**{"document": b"{}", "author": "a", "reason": ""} | terms)


def test_an_emptied_store_gets_its_revisions_back():
    """And an old copy of it gets the newer ones."""
    old = KeyBook().apply(of(), NOW_MS)
    memory = old.apply(of(document=b'{"audit":{}}'), NOW_MS)

    for stored in (KeyBook(), old):
        repaired = stored.restore(memory, NOW_MS)
        assert repaired.history == memory.history
        assert repaired.revision > memory.revision


def test_records_make_the_round_trip():
    """Whatever the stage."""
    for stage in Stage:
        revision = replace(of(stage), revision=5, created_at_ms=NOW_MS)
        assert decode_revision(encode_revision(revision)) == revision

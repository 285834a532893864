from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferflux.journal import Journal

parts = st.lists(st.tuples(st.integers(0, 20_000), st.lists(st.integers(0, 2**32 - 1), max_size=5)))


@given(parts, st.integers(0, 2**32 - 1))
def test_the_next_worker_gets_what_the_last_one_sent(parts, num_events):
    """Tokens in their order and grouping, choice by choice, and the number of events."""
    journal = Journal()
    for index, token_ids in parts:
        journal.take(index, token_ids)
    journal.num_events = num_events

    assert [(index, list(ids)) for index, ids in journal.groups()] == parts
    assert journal.num_events == num_events
    assert journal.num_tokens == sum(len(ids) for _, ids in parts)


def test_a_forgotten_journal_is_a_new_one():
    """The response is begun again."""
    journal = Journal()
    journal.take(0, [1, 2])
    journal.num_events = 3
    journal.forget()

    assert list(journal.groups()) == []
    assert (journal.num_tokens, journal.num_events) == (0, 0)

"""Books merge like sets, revocations win, revisions only grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.errors import Conflict, NotFound
from inferflux.policy.identity import Scope, key_id
from services.policy.book import KeyBook
from services.policy.keys import Key

NOW_MS = 1_700_000_000_000

keys = st.builds(
    lambda number, revision, scope: Key(f"key_{number}", b"h", "n", frozenset({scope}), revision=revision),
    st.integers(0, 5),
    st.integers(1, 4),
    st.sampled_from(Scope),
)
books = st.builds(
    lambda revision, some, revoked: KeyBook(
        revision, {key.key_id: key for key in some if key.key_id not in revoked}, frozenset(revoked)
    ),
    st.integers(0, 9),
    st.lists(keys),
    st.sets(st.sampled_from([f"key_{number}" for number in range(6)]), max_size=2),
)


def key(name="key_1", **changes):
    fields = {"secret_hash": f"hash of {name}".encode(), "name": "name", "scopes": frozenset({Scope.READ})}
    return Key(key_id=name, **fields | changes)


@given(books, books, books)
def test_merging_is_independent_of_order_and_repetition(one, two, three):
    """Replicas end with equal books whatever they learn first."""
    assert one.merge(two) == two.merge(one)
    assert one.merge(two).merge(three) == one.merge(two.merge(three))
    assert one.merge(one) == one


@given(books, books)
def test_a_revoked_key_never_comes_back_by_merging(one, two):
    """A revocation on either side wins over every version of the key on the other."""
    merged = one.merge(two)

    assert not merged.keys.keys() & (one.revoked | two.revoked)


@given(books, books, st.integers(0, 20))
def test_restoring_loses_nothing_and_never_goes_back(stored, memory, floor):
    """The repaired book has all of both sides, at or above every revision anyone has seen."""
    repaired = stored.restore(memory, now_ms=0, floor=floor)

    assert repaired.keys == stored.merge(memory).keys
    assert repaired.revision >= max(stored.revision, memory.revision, floor, 1)
    assert repaired.restore(memory, now_ms=0, floor=floor) is repaired


@given(books, books)
def test_a_book_with_new_contents_has_a_new_revision(stored, memory):
    """Equal revisions mean equal contents: a repair is above both sides."""
    repaired = stored.restore(memory, now_ms=0)

    if repaired is not stored:
        assert repaired.revision > max(stored.revision, memory.revision)


def test_an_emptied_store_gets_everything_back():
    """FLUSHALL, as seen by a service that runs."""
    memory = KeyBook().add(key(), NOW_MS).add(key("key_2"), NOW_MS).revoke("key_2", NOW_MS)

    repaired = KeyBook().restore(memory, NOW_MS)

    assert (repaired.keys, repaired.revoked) == (memory.keys, memory.revoked)
    assert repaired.revision > memory.revision


def test_an_old_copy_of_the_store_does_not_bring_back_a_revoked_key():
    """A failover that lost the revocation, as seen by a service that made it."""
    old = KeyBook().add(key(), NOW_MS)
    memory = old.revoke("key_1", NOW_MS)

    assert old.restore(memory, NOW_MS).keys == {}


def test_revisions_are_unix_milliseconds_unless_the_clock_went_back():
    """They grow without any memory of the last one, and with one even when the clock is wrong."""
    assert KeyBook().advance(NOW_MS).revision == NOW_MS
    assert KeyBook(NOW_MS + 5).advance(NOW_MS).revision == NOW_MS + 6
    assert KeyBook().advance(NOW_MS, floor=NOW_MS + 9).revision == NOW_MS + 10


def test_a_secret_cannot_be_added_twice_nor_after_its_revocation():
    """Both are conflicts, with different reasons."""
    book = KeyBook().add(key(), NOW_MS)

    with pytest.raises(Conflict, match="exists"):
        book.add(key(), NOW_MS)
    with pytest.raises(Conflict, match="revoked"):
        book.revoke("key_1", NOW_MS).add(key(), NOW_MS)


def test_revoking_is_idempotent_and_knows_what_never_was():
    """Twice is fine and changes nothing; a stranger is not found."""
    book = KeyBook().add(key(), NOW_MS).revoke("key_1", NOW_MS)

    assert book.revoke("key_1", NOW_MS) is book
    with pytest.raises(NotFound):
        book.revoke("key_2", NOW_MS)


def test_upserting_changes_grants_once_and_respects_revocations():
    """What the environment says wins over older grants, not over a revocation."""
    book = KeyBook().add(key(created_at_ms=5), NOW_MS).add(key("key_2"), NOW_MS).revoke("key_2", NOW_MS)
    wanted = [key(scopes=frozenset({Scope.ADMIN})), key("key_2"), key("key_3")]

    updated = book.upsert(wanted, NOW_MS)

    assert updated.keys.keys() == {"key_1", "key_3"}
    assert updated.keys["key_1"].scopes == {Scope.ADMIN}
    assert updated.keys["key_1"].created_at_ms == 5
    assert updated.upsert(wanted, NOW_MS) is updated


def test_expired_keys_are_not_live_and_leave_with_the_next_write():
    """Expiry needs no timer."""
    book = KeyBook().add(key(expires_at_ms=NOW_MS + 1), NOW_MS)

    assert book.live(NOW_MS) == list(book.keys.values())
    assert book.live(NOW_MS + 1) == []
    assert book.restore(book, NOW_MS + 1).keys == {}


def test_live_keys_are_listed_oldest_first():
    """The order of lists is stable."""
    book = KeyBook().add(key("key_b", created_at_ms=1), 1).add(key("key_a", created_at_ms=2), 2)
    book = book.put(replace(key("key_0"), created_at_ms=1), 3)

    assert [live.key_id for live in book.live(NOW_MS)] == ["key_0", "key_b", "key_a"]


# --- rotation


def secret(number: int) -> bytes:
    return bytes([number]) * 32


def rotated() -> KeyBook:
    """A key with its second secret."""
    return (
        KeyBook()
        .add(key(key_id(secret(1)), secret_hash=secret(1)), NOW_MS)
        .rotate(key_id(secret(1)), secret(2), NOW_MS + 5, NOW_MS)
    )


def test_a_rotated_key_keeps_its_id_and_its_old_secret_for_a_while():
    """And no older one."""
    book = rotated()
    (record,) = book.keys.values()
    assert (record.secret_hash, record.previous_hash, record.previous_until_ms) == (secret(2), secret(1), NOW_MS + 5)

    again = book.rotate(record.key_id, secret(3), NOW_MS, NOW_MS).keys[record.key_id]
    assert again.hashes == {secret(3), secret(2)}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_secret_that_a_key_ever_had_becomes_another_keys(number):
    """Whether it is in use, in grace, or long gone; also not after the key was revoked."""
    (name,) = rotated().keys
    book = rotated().rotate(name, secret(3), NOW_MS, NOW_MS)
    wanted = key(key_id(secret(number)), secret_hash=secret(number))

    for stage in (book, book.revoke(name, NOW_MS)):
        with pytest.raises(Conflict):
            stage.add(wanted, NOW_MS)
    with pytest.raises(Conflict):
        book.rotate(name, secret(number), NOW_MS, NOW_MS)


def test_only_keys_that_are_there_can_be_rotated():
    """Neither strangers nor revoked ones."""
    (name,) = rotated().keys
    for book in (KeyBook(), rotated().revoke(name, NOW_MS)):
        with pytest.raises(NotFound):
            book.rotate(name, secret(4), NOW_MS, NOW_MS)


def test_a_store_that_lost_a_rotation_gets_it_back():
    """From a service that made it: the secret that was to go stays gone."""
    (name,) = rotated().keys
    before = KeyBook().add(key(name, secret_hash=secret(1)), NOW_MS)
    after = before.rotate(name, secret(2), NOW_MS, NOW_MS)

    assert before.restore(after, NOW_MS).keys == after.keys
    assert after.restore(before, NOW_MS).keys == after.keys


def test_the_environment_does_not_undo_a_rotation():
    """The secret in INFERFLUX_API_KEYS named the key once; what it may do is still said there."""
    (name,) = rotated().keys
    first = key(name, secret_hash=secret(1))
    wanted = replace(first, scopes=frozenset({Scope.ADMIN}))
    book = rotated()

    assert book.upsert([first], NOW_MS) is book
    updated = book.upsert([wanted], NOW_MS).keys[name]
    assert (updated.secret_hash, updated.scopes) == (secret(2), {Scope.ADMIN})

"""All keys, all revocations and the policy's revisions: the whole state of the policy service, as a value.

Books merge like sets: a key that either side has is in the result, newest version first, unless either side has revoked
it. So it does not matter in which order replicas learn of writes, and a store that lost its last writes, or all of
them, gets back what a service still knows; only a revocation or an expiry takes a key away, and nothing brings it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from inferflux.errors import Conflict, NotFound
from inferflux.policy.identity import key_id as key_id_of
from services.policy.history import CONFIG, MAX_REASON, SERVICE, History, Revision, draft
from services.policy.keys import Key


@dataclass(frozen=True, slots=True)
class KeyBook:
    """A state of the policy. Equal revisions mean equal contents; 0 is a book that was never stored.

    `damage`: what a store lacks of it, in words; only a service that knows the rest may build on it.
    """

    revision: int = 0
    keys: Mapping[str, Key] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    history: History = field(default_factory=History)
    damage: str = field(default="", compare=False)

    def live(self, now_ms: int) -> list[Key]:
        """List the keys that open something, oldest first."""
        keys = [key for key in self.keys.values() if not key.is_expired(now_ms)]
        return sorted(keys, key=lambda key: (key.created_at_ms, key.key_id))

    def merge(self, other: KeyBook) -> KeyBook:
        """Join two books; associative, commutative and idempotent."""
        revoked = self.revoked | other.revoked
        keys = {key.key_id: key for key in self.keys.values()}
        for key in other.keys.values():
            keys[key.key_id] = max(key, keys.get(key.key_id, key), key=_version)
        kept = {key_id: key for key_id, key in keys.items() if key_id not in revoked}
        return KeyBook(max(self.revision, other.revision), kept, revoked, self.history.merge(other.history))

    def restore(self, memory: KeyBook, now_ms: int, floor: int = 0) -> KeyBook:
        """Return the stored book (self), or its repair when it lacks something of memory or is below `floor`."""
        merged = self.merge(memory).without_expired(now_ms)
        is_whole = (merged.keys, merged.revoked, merged.history) == (self.keys, self.revoked, self.history)
        if is_whole and self.revision >= max(memory.revision, floor, 1):
            return self
        return merged.advance(now_ms, floor)

    def advance(self, now_ms: int, floor: int = 0) -> KeyBook:
        """Give the book its next revision.

        Revisions are unix milliseconds where the clock allows: they grow even when every copy of the last was lost.
        """
        return replace(self, revision=max(self.revision + 1, floor + 1, now_ms))

    def add(self, key: Key, now_ms: int) -> KeyBook:
        """Add a new key. Raises Conflict when its secret is or was in use."""
        self._require_unused(key.key_id, key.secret_hash)
        return self.put(key, now_ms)

    def rotate(self, key_id: str, secret_hash: bytes, until_ms: int, now_ms: int) -> KeyBook:
        """Give a key another secret; the one it has now is good until then.

        The secret before that one is dead, and none of them is ever another key's. Raises NotFound, Conflict.
        """
        if (key := self.keys.get(key_id)) is None:
            raise NotFound(f"no key {key_id!r}")
        self._require_unused(key_id_of(secret_hash), secret_hash)
        return self._retire(key, key.secret_hash).put(key.rotated(secret_hash, until_ms), now_ms)

    def _require_unused(self, key_id: str, secret_hash: bytes) -> None:
        if key_id in self.revoked:
            raise Conflict(f"{key_id} was revoked; a revoked secret stays revoked")
        if key_id in self.keys or any(secret_hash in key.hashes for key in self.keys.values()):
            raise Conflict(f"{key_id} exists already")

    def _retire(self, key: Key, *secret_hashes: bytes) -> KeyBook:
        """Keep secrets of a key from ever being another's. The first one gave it its id, and is taken by that."""
        return replace(self, revoked=self.revoked | {key_id_of(h) for h in secret_hashes} - {key.key_id})

    def upsert(self, keys: Iterable[Key], now_ms: int) -> KeyBook:
        """Add keys or change what they grant; revoked ones stay revoked. Idempotent."""
        book = self
        for key in keys:
            known = book.keys.get(key.key_id)
            wanted = known.granting(key) if known else key
            if key.key_id not in book.revoked and wanted != known:
                book = book.put(wanted, now_ms)
        return book

    def revoke(self, key_id: str, now_ms: int) -> KeyBook:
        """Take a key out for ever. Idempotent. Raises NotFound for a key that never was."""
        if key_id in self.revoked:
            return self
        if key_id not in self.keys:
            raise NotFound(f"no key {key_id!r}")
        kept = {known_id: key for known_id, key in self.keys.items() if known_id != key_id}
        book = self._retire(self.keys[key_id], *self.keys[key_id].hashes)
        return replace(book, keys=kept, revoked=book.revoked | {key_id}).advance(now_ms)

    def apply(self, draft: Revision, now_ms: int, expected: int | None = None) -> KeyBook:
        """Make a document the newest revision. Raises Conflict, see History.expect."""
        self.history.expect(expected)
        book = self.advance(now_ms)
        revision = replace(draft, revision=book.revision, created_at_ms=now_ms)
        return replace(book, history=self.history.add(revision))

    def configure(self, document: bytes | None, now_ms: int) -> KeyBook:
        """Put in the configured document unless an administrator has ever changed the policy. Idempotent."""
        newest = self.history.newest
        if document is None or newest.author not in ("", CONFIG) or newest.document == document:
            return self
        return self.apply(draft(document, CONFIG, "as configured"), now_ms)

    def revert(self, number: int, reason: str, now_ms: int) -> KeyBook:
        """Take a candidate back: the live document is live again. Idempotent."""
        candidate = self.history.candidate
        if candidate is None or candidate.revision != number:
            return self
        return self.apply(draft(self.history.live.document, SERVICE, reason[:MAX_REASON]), now_ms)

    def undo(self, number: int, now_ms: int) -> KeyBook:
        """Take the newest revision back, if it is this one, since its author was told that it failed. Idempotent."""
        if self.history.newest.revision != number:
            return self
        reason = f"revision {number} was answered as failed, though the store had taken it"
        return self.apply(draft(self.history.before(number).live.document, SERVICE, reason), now_ms)

    def without_expired(self, now_ms: int) -> KeyBook:
        return replace(self, keys={i: key for i, key in self.keys.items() if not key.is_expired(now_ms)})

    def put(self, key: Key, now_ms: int) -> KeyBook:
        """Add a key or replace its record."""
        book = self.advance(now_ms)
        return replace(book, keys={**self.keys, key.key_id: replace(key, revision=book.revision)})


def _version(key: Key) -> tuple[int, str]:
    return key.revision, repr(key)

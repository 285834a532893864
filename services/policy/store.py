"""The policy's Redis: one book, read and written atomically, and a channel that tells replicas of writes.

Layout: `ifx:{policy}:revision` a number, `ifx:{policy}:keys` and `ifx:{policy}:revisions` hashes of records (API keys
by id, revisions of the document by number), `ifx:{policy}:revoked` a set of key ids, `ifx:{policy}:seal` what the
newest revisions and the revoked keys are; records and seal are encrypted. WATCH and MULTI instead of scripts, so that
the service's Redis user needs no EVAL. Every failure of Redis, slow answers included, is Unavailable: a write that
failed so may still have happened, and then the next read shows it.

A record that does not open is as good as lost: a service that knows it writes it again, and a key that nobody knows
opens nothing. A policy or revocation that nobody knows is another matter, since without it more would be allowed: the
book says then that it is damaged. Records of an old key of the ring are written again with the first one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeVar

from inferflux.store import Pipe, RedisStore, read_revision
from services.policy.book import KeyBook
from services.policy.history import History, Revision, decode_revision, encode_revision
from services.policy.keys import Key, decode_key, encode_key
from services.policy.vault import Vault

log = logging.getLogger(__name__)

REVISION = "ifx:{policy}:revision"
KEYS = "ifx:{policy}:keys"
REVOKED = "ifx:{policy}:revoked"
REVISIONS = "ifx:{policy}:revisions"
SEAL = "ifx:{policy}:seal"
CHANNEL = "ifx:{policy}:changes"

R = TypeVar("R")


class PolicyStore(RedisStore):
    """A book in Redis; connects on demand. Safe to use concurrently. Raises ConfigError for a URL that is none."""

    def __init__(self, url: str, vault: Vault) -> None:
        self._vault = vault
        super().__init__(url, "policy")

    async def revision(self) -> int:
        """Return the stored revision; 0 when there is none. Raises Unavailable."""
        with self._answering():
            return read_revision(await self._redis.get(REVISION))

    async def update(self, edit: Callable[[KeyBook], KeyBook]) -> KeyBook:
        """Replace the stored book by what `edit` makes of it and tell the replicas, or do nothing at all.

        `edit` may run several times, and may raise. A book of the same revision is not written. Raises Unavailable.
        """
        return await self._transact(lambda pipe: self._try_update(pipe, edit))

    def subscribe(self) -> AbstractAsyncContextManager[Callable[[float], Awaitable[None]]]:
        """Give a function that waits for the next write of any replica, at most so many seconds. Raises Unavailable."""
        return self._subscribe(CHANNEL)

    async def _try_update(self, pipe: Pipe, edit: Callable[[KeyBook], KeyBook]) -> KeyBook:
        await pipe.watch(REVISION, KEYS, REVOKED, REVISIONS, SEAL)
        stored, stale = await self._read(pipe)
        book = edit(stored)
        pipe.multi()
        if book.revision == stored.revision and not stale:
            pipe.get(REVISION)  # EXEC proves that nothing moved between the reads
        else:
            self._write(pipe, stored, book, stale)
        await pipe.execute()
        return book

    async def _read(self, pipe: Pipe) -> tuple[KeyBook, set[str]]:
        """Read the book, and the names of records that must be encrypted anew."""
        revision = read_revision(await pipe.get(REVISION))
        sealed_keys, sealed_revisions = await pipe.hgetall(KEYS), await pipe.hgetall(REVISIONS)
        revoked = frozenset(await pipe.smembers(REVOKED))
        seal = await pipe.get(SEAL)
        keys = {i: key for i, text in sealed_keys.items() if (key := self._key(i, text))}
        revisions = {r.revision: r for n, text in sealed_revisions.items() if (r := self._revision(n, text))}
        book = KeyBook(revision, keys, revoked, History(revisions))
        damage = self._damage(seal, book) if keys or sealed_revisions or seal else ""
        stale = {_name(KEYS, i) for i in keys if not self._vault.is_current(sealed_keys[i])}
        stale |= {_name(REVISIONS, str(n)) for n in revisions if not self._vault.is_current(sealed_revisions[str(n)])}
        if damage or (seal and not self._vault.is_current(seal)):
            stale.add(SEAL)
        return replace(book, damage=damage), stale

    def _write(self, pipe: Pipe, stored: KeyBook, book: KeyBook, stale: set[str]) -> None:
        keys = {i: encode_key(k) for i, k in book.keys.items() if stored.keys.get(i) != k or _name(KEYS, i) in stale}
        self._replace(pipe, KEYS, keys, stored.keys.keys() - book.keys.keys())
        old, new = stored.history.revisions, book.history.revisions
        revisions = {
            str(n): encode_revision(r) for n, r in new.items() if old.get(n) != r or _name(REVISIONS, str(n)) in stale
        }
        self._replace(pipe, REVISIONS, revisions, map(str, old.keys() - new.keys()))
        if revoked := book.revoked - stored.revoked:
            pipe.sadd(REVOKED, *revoked)
        pipe.set(SEAL, self._vault.seal(SEAL, _sealed(book)))
        pipe.set(REVISION, book.revision)
        pipe.publish(CHANNEL, book.revision)

    def _replace(self, pipe: Pipe, kind: str, changed: dict[str, str], gone: Iterable[str]) -> None:
        if changed:
            pipe.hset(kind, mapping={i: self._vault.seal(_name(kind, i), text) for i, text in changed.items()})
        if names := list(gone):
            pipe.hdel(kind, *names)

    def _key(self, key_id: str, text: str) -> Key | None:
        return self._opened(_name(KEYS, key_id), text, decode_key)

    def _revision(self, number: str, text: str) -> Revision | None:
        return self._opened(_name(REVISIONS, number), text, decode_revision)

    def _opened(self, name: str, text: str, decode: Callable[[str], R]) -> R | None:
        """Read a record; None when it is not ours: then a service that knows a good one writes it again."""
        try:
            return decode(self._vault.open(name, text))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.error("ignoring a policy record that does not open", extra={"record": name})  # noqa: TRY400 - all said
            return None

    def _damage(self, seal: str | None, book: KeyBook) -> str:
        """Say what a stored book lacks of what the seal knows; empty: nothing. More than that does no harm."""
        if seal is None or (sealed := self._opened(SEAL, seal, json.loads)) is None:
            return "the policy store has records and no good seal"
        revisions, revoked = {*book.history.revisions, 0}, book.revoked
        is_whole = revisions.issuperset(sealed["revisions"]) and revoked.issuperset(sealed["revoked"])
        return "" if is_whole else "the policy store lacks its newest policy or a revocation"


def _name(kind: str, name: str) -> str:
    """Name a record of a hash: what its encryption is bound to."""
    return f"{kind}:{name}"


def _sealed(book: KeyBook) -> str:
    """Write down what must not be missing from a book, or else more would be allowed."""
    revisions = [book.history.newest.revision, book.history.live.revision]
    return json.dumps({"revisions": revisions, "revoked": sorted(book.revoked)})

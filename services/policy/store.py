"""The policy's Redis: one book, read and written atomically, and a channel that tells replicas of writes.

Layout: `ifx:{policy}:revision` a number, `ifx:{policy}:keys` and `ifx:{policy}:revisions` hashes of sealed records (API
keys by id, revisions of the document by number), `ifx:{policy}:revoked` a set of key ids. WATCH and MULTI instead of
scripts, so that the service's Redis user needs no EVAL. Every failure of Redis, slow answers included, is Unavailable:
a write that failed so may still have happened, and then the next read shows it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, WatchError

from inferflux.errors import ConfigError, Unavailable
from services.policy.book import KeyBook
from services.policy.history import History, Revision, decode_revision, encode_revision
from services.policy.keys import Key, decode_key, encode_key
from services.policy.pepper import Pepper

log = logging.getLogger(__name__)

REVISION = "ifx:{policy}:revision"
KEYS = "ifx:{policy}:keys"
REVOKED = "ifx:{policy}:revoked"
REVISIONS = "ifx:{policy}:revisions"
CHANNEL = "ifx:{policy}:changes"

ANSWER_TIMEOUT_S = 1.0
UPDATE_TIMEOUT_S = 5.0
MAX_REVISION = 2**62
"""Far above any clock, far below the end of uint64: what claims more is broken."""

# redis-py's own types say bytes and text, coroutine and value, all at once.
Client = Any
Pipe = Any


class PolicyStore:
    """A book in Redis; connects on demand. Safe to use concurrently. Raises ConfigError for a URL that is none."""

    def __init__(self, url: str, pepper: Pepper) -> None:
        self._pepper = pepper
        try:
            self._redis: Client = _client(url)
        except ValueError as e:
            raise ConfigError("INFERFLUX_REDIS_URL: must be a redis://, rediss:// or unix:// URL") from e

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def revision(self) -> int:
        """Return the stored revision; 0 when there is none. Raises Unavailable."""
        with _unavailable():
            return _number(await self._redis.get(REVISION))

    async def update(self, edit: Callable[[KeyBook], KeyBook]) -> KeyBook:
        """Replace the stored book by what `edit` makes of it and tell the replicas, or do nothing at all.

        `edit` may run several times, and may raise. A book of the same revision is not written. Raises Unavailable.
        """
        with _unavailable():
            async with asyncio.timeout(UPDATE_TIMEOUT_S), self._redis.pipeline(transaction=True) as pipe:
                while True:
                    try:
                        return await self._try_update(pipe, edit)
                    except WatchError:  # another replica was faster
                        continue

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
        """Give a function that waits for the next write of any replica, at most so many seconds. Raises Unavailable."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            with _unavailable():
                await pubsub.subscribe(CHANNEL)

            async def wait(timeout_s: float) -> None:
                with _unavailable():
                    await pubsub.get_message(timeout=timeout_s)

            yield wait

    async def _try_update(self, pipe: Pipe, edit: Callable[[KeyBook], KeyBook]) -> KeyBook:
        await pipe.watch(REVISION, KEYS, REVOKED, REVISIONS)
        stored = await self._read(pipe)
        book = edit(stored)
        pipe.multi()
        if book.revision == stored.revision:
            pipe.get(REVISION)  # EXEC proves that nothing moved between the reads
        else:
            self._write(pipe, stored, book)
        await pipe.execute()
        return book

    async def _read(self, pipe: Pipe) -> KeyBook:
        revision = _number(await pipe.get(REVISION))
        records = await pipe.hgetall(KEYS)
        revoked = await pipe.smembers(REVOKED)
        keys = {key.key_id: key for key_id, text in records.items() if (key := self._decode(key_id, text))}
        return KeyBook(revision, keys, frozenset(revoked), self._history(await pipe.hgetall(REVISIONS)))

    def _write(self, pipe: Pipe, stored: KeyBook, book: KeyBook) -> None:
        changed = {i: encode_key(k, self._pepper) for i, k in book.keys.items() if stored.keys.get(i) != k}
        if changed:
            pipe.hset(KEYS, mapping=changed)
        if gone := stored.keys.keys() - book.keys.keys():
            pipe.hdel(KEYS, *gone)
        if revoked := book.revoked - stored.revoked:
            pipe.sadd(REVOKED, *revoked)
        self._write_history(pipe, stored.history, book.history)
        pipe.set(REVISION, book.revision)
        pipe.publish(CHANNEL, book.revision)

    def _write_history(self, pipe: Pipe, stored: History, history: History) -> None:
        changed = {n: r for n, r in history.revisions.items() if stored.revisions.get(n) != r}
        if changed:
            pipe.hset(REVISIONS, mapping={n: self._pepper.seal(encode_revision(r)) for n, r in changed.items()})
        if gone := stored.revisions.keys() - history.revisions.keys():
            pipe.hdel(REVISIONS, *gone)

    def _history(self, records: dict[str, str]) -> History:
        revisions = (self._decode_revision(number, text) for number, text in records.items())
        return History({revision.revision: revision for revision in revisions if revision})

    def _decode_revision(self, number: str, text: str) -> Revision | None:
        try:
            revision = decode_revision(self._pepper.open(text))
            if str(revision.revision) == number:
                return revision
        except (ValueError, KeyError, TypeError):
            pass
        log.error("ignoring a policy revision that this pepper did not seal", extra={"policy_revision": number})
        return None

    def _decode(self, key_id: str, text: str) -> Key | None:
        """Read a record; None when it is not ours: then a service that knows a good one writes it again."""
        try:
            key = decode_key(text, self._pepper)
            if key.key_id == key_id:
                return key
        except (ValueError, KeyError, TypeError):
            pass
        log.error("ignoring a policy record that this pepper did not seal", extra={"key_id": key_id})
        return None


def _client(url: str) -> Client:
    """Make a client without retries: the service reconnects itself, and a write must not happen twice."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        decode_responses=True,
        socket_timeout=ANSWER_TIMEOUT_S,
        socket_connect_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as e:
        raise Unavailable(f"policy store: {type(e).__name__}", retry_after_s=1.0) from e


def _number(text: str | None) -> int:
    """Read a revision; what is none counts as missing, and is then written anew."""
    if text is None or not text.isdecimal() or len(text) > len(str(MAX_REVISION)):
        return 0
    return int(text) if int(text) < MAX_REVISION else 0

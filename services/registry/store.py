"""The registry's Redis: model records, and a mirror of each replica's leases.

Layout: `ifx:{registry}:revision` a number, `ifx:{registry}:models` a hash of records, `ifx:{registry}:rosters` a hash
of one roster per replica. Models are written under WATCH and MULTI; a roster has one writer. Every failure of Redis,
slow answers included, is Unavailable.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, WatchError

from inferflux.errors import ConfigError, InvalidRequest, Unavailable
from services.registry.models import Model, ModelBook
from services.registry.roster import Roster

log = logging.getLogger(__name__)

REVISION = "ifx:{registry}:revision"
MODELS = "ifx:{registry}:models"
ROSTERS = "ifx:{registry}:rosters"
CHANNEL = "ifx:{registry}:changes"

ANSWER_TIMEOUT_S = 1.0
UPDATE_TIMEOUT_S = 5.0
MAX_REVISION = 2**62
"""Far above any clock, far below the end of uint64: what claims more is broken."""

# redis-py's own types say bytes and text, coroutine and value, all at once.
Client = Any
Pipe = Any


class RegistryStore:
    """Models and rosters in Redis; connects on demand. Safe to use concurrently. Raises ConfigError for a bad URL."""

    def __init__(self, url: str) -> None:
        try:
            self._redis: Client = connect(url)
        except ValueError as e:
            raise ConfigError("INFERFLUX_REDIS_URL: must be a redis://, rediss:// or unix:// URL") from e

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def write_roster(self, owner: str, roster: Roster, *, announce: bool) -> None:
        """Replace the owner's roster; `announce` makes the other replicas read it now. Raises Unavailable."""
        with unavailable():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(ROSTERS, owner, roster.encode())
                if announce:
                    pipe.publish(CHANNEL, owner)
                await pipe.execute()

    async def read(self) -> tuple[int, dict[str, Roster]]:
        """Return the revision of the models and the rosters by owner. Raises Unavailable."""
        with unavailable():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.get(REVISION)
                pipe.hgetall(ROSTERS)
                revision, texts = await pipe.execute()
        rosters = {owner: roster for owner, text in texts.items() if (roster := Roster.decode(text))}
        return read_revision(revision), rosters

    async def forget(self, owner: str) -> None:
        """Remove the roster of a replica that is gone. Raises Unavailable."""
        with unavailable():
            await self._redis.hdel(ROSTERS, owner)

    async def update(self, edit: Callable[[ModelBook], ModelBook]) -> ModelBook:
        """Replace the stored models by what `edit` makes of them and tell the replicas, or do nothing at all.

        `edit` may run several times, and may raise. A book of the same revision is not written. Raises Unavailable.
        """
        with unavailable():
            async with asyncio.timeout(UPDATE_TIMEOUT_S), self._redis.pipeline(transaction=True) as pipe:
                while True:
                    try:
                        return await _try_update(pipe, edit)
                    except WatchError:  # another replica was faster
                        continue

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
        """Give a function that waits for the next write of any replica, at most so many seconds. Raises Unavailable."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            with unavailable():
                await pubsub.subscribe(CHANNEL)

            async def wait(timeout_s: float) -> None:
                with unavailable():
                    await pubsub.get_message(timeout=timeout_s)

            yield wait


async def _try_update(pipe: Pipe, edit: Callable[[ModelBook], ModelBook]) -> ModelBook:
    await pipe.watch(REVISION, MODELS)
    revision, texts = read_revision(await pipe.get(REVISION)), await pipe.hgetall(MODELS)
    stored = ModelBook(revision, {name: model for name, text in texts.items() if (model := _decode(name, text))})
    book = edit(stored)
    pipe.multi()
    if book.revision == stored.revision:
        pipe.get(REVISION)  # EXEC proves that nothing moved between the reads
    else:
        _write(pipe, stored, book)
    await pipe.execute()
    return book


def _write(pipe: Pipe, stored: ModelBook, book: ModelBook) -> None:
    changed = {name: json.dumps(m.to_json()) for name, m in book.models.items() if stored.models.get(name) != m}
    if changed:
        pipe.hset(MODELS, mapping=changed)
    if gone := stored.models.keys() - book.models.keys():
        pipe.hdel(MODELS, *gone)
    pipe.set(REVISION, book.revision)
    pipe.publish(CHANNEL, "models")


def _decode(name: str, text: str) -> Model | None:
    """Read a record; None when it is none: workers tell their models again."""
    try:
        model = Model.from_json(json.loads(text))
        if model.name == name:
            return model
    except (InvalidRequest, ValueError, KeyError, TypeError):
        pass
    log.error("ignoring a model record that cannot be read", extra={"model": name})
    return None


def connect(url: str) -> Client:
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
def unavailable() -> Iterator[None]:
    """Raise Unavailable for every failure of Redis inside the block."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as e:
        raise Unavailable(f"registry store: {type(e).__name__}", retry_after_s=1.0) from e


def read_revision(text: str | None) -> int:
    """Read a revision; what is none counts as missing, and is then written anew."""
    if text is None or not text.isdecimal() or len(text) > len(str(MAX_REVISION)):
        return 0
    return int(text) if int(text) < MAX_REVISION else 0

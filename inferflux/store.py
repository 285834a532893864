"""What all stores in Redis have in common: a connection that fails fast, and one error for every failure.

Each service's store is a subclass and says how its records lie there. A write that failed may still have happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, WatchError

from inferflux.errors import ConfigError, Unavailable

ANSWER_TIMEOUT_S = 1.0
UPDATE_TIMEOUT_S = 5.0
MAX_REVISION = 2**62
"""Far above any clock, far below the end of uint64: what claims more is broken."""

# redis-py's own types say bytes and text, coroutine and value, all at once.
Client = Any
Pipe = Any
T = TypeVar("T")


class RedisStore:
    """Connects on demand; safe to use concurrently. `name`: for messages. Raises ConfigError for a URL that is none.

    `max_connections`: who needs one more waits for it; 0 = no bound.
    """

    def __init__(self, url: str, name: str, max_connections: int = 0) -> None:
        self._name = name
        try:
            self._redis: Client = _connect(url, max_connections)
        except ValueError as e:
            raise ConfigError("INFERFLUX_REDIS_URL: must be a redis://, rediss:// or unix:// URL") from e

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Raise Unavailable for every failure of Redis inside the block, slow answers included."""
        try:
            yield
        except (RedisError, OSError, TimeoutError) as e:
            raise Unavailable(f"{self._name} store: {type(e).__name__}", retry_after_s=1.0) from e

    async def _transact(self, attempt: Callable[[Pipe], Awaitable[T]]) -> T:
        """Let `attempt` watch, read and write, again as long as somebody else was faster. Raises Unavailable."""
        with self._answering():
            async with asyncio.timeout(UPDATE_TIMEOUT_S), self._redis.pipeline(transaction=True) as pipe:
                while True:
                    try:
                        return await attempt(pipe)
                    except WatchError:
                        continue

    @asynccontextmanager
    async def _subscribe(self, channel: str) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
        """Give a function that waits for the next message, at most so many seconds. Raises Unavailable."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            with self._answering():
                await pubsub.subscribe(channel)

            async def wait(timeout_s: float) -> None:
                with self._answering():
                    await pubsub.get_message(timeout=timeout_s)

            yield wait


def read_revision(text: str | None) -> int:
    """Read a revision; what is none counts as missing, and is then written anew."""
    if text is None or not text.isdecimal() or len(text) > len(str(MAX_REVISION)):
        return 0
    return int(text) if int(text) < MAX_REVISION else 0


def _connect(url: str, max_connections: int) -> Client:
    """Make a client without retries: the service reconnects itself, and a write must not happen twice."""
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": True,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_connect_timeout": ANSWER_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    if not max_connections:
        return redis.Redis.from_url(url, **options)
    pool = redis.BlockingConnectionPool.from_url(
        url, max_connections=max_connections, timeout=ANSWER_TIMEOUT_S, **options
    )
    return redis.Redis.from_pool(pool)

"""Keeps the book in memory equal to the one in Redis, in both directions, and feeds it to watchers.

The store is the truth for what was added; memory is a witness of what the store may have lost (a failover, FLUSHALL, a
truncated file): it is merged in again before anything is published, so an emptied Redis never empties the policy of
a running service. A service that starts on an empty store has no witness: then nobody has a key, everybody is denied,
and it says so in its log. While the store is away the last book stays in force and writes are refused; a service that
has not read the store since its start publishes nothing at all, so that gateways keep what they have.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Collection

from inferflux.clock import Clock, until_tick
from inferflux.errors import InvalidRequest, PolicyPersistFailed, Unavailable
from inferflux.feed import Feed
from inferflux.store import MAX_REVISION
from inferflux.telemetry.metrics import SNAPSHOT_REVISION, STORE_UP
from services.policy.book import KeyBook
from services.policy.history import History, Revision
from services.policy.keys import Key
from services.policy.store import PolicyStore

log = logging.getLogger(__name__)

RECHECK_S = 1.0
"""Notices what no message tells: FLUSHALL, a message lost with its connection."""
MAX_BACKOFF_S = 1.0
KEY_ID = re.compile(r"key_[0-9a-f]{16}")


class Keeper:
    """Owns the policy's state in this process. Used from one event loop."""

    def __init__(self, store: PolicyStore, clock: Clock, initial: list[Key], configured: bytes | None = None) -> None:
        self.feed: Feed[KeyBook] = Feed()
        self._store = store
        self._clock = clock
        self._initial = initial
        self._configured = configured
        self._abandoned: set[int] = set()
        self._memory = KeyBook()
        self._floor = 0
        self._is_up: bool | None = None

    @property
    def is_loaded(self) -> bool:
        return self.feed.revision > 0

    def book(self) -> KeyBook:
        """Return the last known state. Raises Unavailable when there is none yet."""
        if not self.is_loaded:
            raise Unavailable("policy has not been loaded yet", retry_after_s=1.0)
        return self._memory

    def now_ms(self) -> int:
        return int(self._clock.time() * 1000)

    async def change(self, edit: Callable[[KeyBook], KeyBook]) -> KeyBook:
        """Apply `edit` to the store, then to memory and all watchers. Raises Unavailable and what `edit` raises."""
        was_loaded = self.is_loaded
        book = await self._store.update(lambda stored: edit(self._repaired(stored)))
        self._adopt(book)
        if not was_loaded:
            self._log_start(book)
        return book

    async def apply(self, make: Callable[[History], Revision], expected: int | None) -> Revision:
        """Make what `make` makes of the history the newest revision of the document.

        Raises PolicyPersistFailed: nothing has changed; should the store have taken it all the same, it is taken back
        as soon as that is seen. Raises Conflict and what `make` raises.
        """
        number = 0

        def edit(stored: KeyBook) -> KeyBook:
            nonlocal number
            book = stored.apply(make(stored.history), self.now_ms(), expected)
            number = book.revision
            return book

        try:
            book = await self.change(edit)
        except Unavailable as e:
            if number:  # the store was there when it was asked, so it may have taken it
                self._abandoned.add(number)
            raise PolicyPersistFailed(f"the policy was not changed: {e.message}", retry_after_s=1.0) from e
        return book.history.get(number)

    async def refresh(self) -> None:
        """Take over what the store has, and give it what it lacks. Raises Unavailable."""
        is_high_enough = self.is_loaded and self._memory.revision >= self._floor
        if not is_high_enough or self._memory.revision != await self._store.revision():
            await self.change(lambda book: book)

    async def overtake(self, revision: int, revoked: Collection[str] = ()) -> None:
        """Get up to a revision that a gateway has, and to its revocations, as soon as the store has been read again.

        A gateway can be ahead of a replica that missed a write, or of a cluster that lost its state; the first must not
        be answered with old contents under a new number. Raises InvalidRequest.
        """
        if revision >= MAX_REVISION:
            raise InvalidRequest(f"revision {revision} is not one of ours", param="revision")
        if not all(map(KEY_ID.fullmatch, revoked)):
            raise InvalidRequest("what is revoked must be ids of keys", param="revoked")
        forgotten = frozenset(revoked) - self._memory.revoked
        if not forgotten and revision <= max(self._floor, self._memory.revision):
            return
        self._memory = self._memory.merge(KeyBook(revoked=forgotten))
        self._floor = max(self._floor, revision, self._memory.revision + bool(forgotten))
        try:
            await self.refresh()
        except Unavailable:
            log.warning("a gateway is ahead of us and the store is away", extra={"gateway_revision": revision})

    async def run(self) -> None:
        """Follow the store for ever, through all its absences."""
        backoff_s = 0.05
        while True:
            try:
                async with self._store.subscribe() as wait:
                    await self.refresh()
                    self._note(is_up=True)
                    backoff_s = 0.05
                    while True:
                        await wait(until_tick(RECHECK_S))
                        await self.refresh()
            except Unavailable as e:
                self._note(is_up=False, reason=e.message)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  -- jitter
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _log_start(self, book: KeyBook) -> None:
        if refused := [key.key_id for key in self._initial if key.key_id in book.revoked]:
            log.warning("keys of INFERFLUX_API_KEYS stay revoked", extra={"key_ids": refused})
        if not book.keys:
            log.warning("no keys in the policy store: every request will be denied until one is created")
        log.info("policy loaded", extra={"revision": book.revision, "num_keys": len(book.keys)})

    def _repaired(self, stored: KeyBook) -> KeyBook:
        """Put back what the store has lost and, the first time, put in what the environment says.

        Raises Unavailable as long as it is not known here what a damaged store has lost: gateways keep what they have.
        """
        if stored.damage and not self.is_loaded:
            raise Unavailable(stored.damage, retry_after_s=1.0)
        if stored.revision < self._memory.revision:
            log.error("the policy store went back and is repaired from memory", extra={"revision": stored.revision})
        book = stored.restore(self._memory, self.now_ms(), self._floor)
        for number in self._abandoned:
            book = book.undo(number, self.now_ms())
        if self.is_loaded:
            return book
        return book.upsert(self._initial, self.now_ms()).configure(self._configured, self.now_ms())

    def _adopt(self, book: KeyBook) -> None:
        """Merge instead of replacing: writes may come back in another order than they were made."""
        self._memory = self._memory.merge(book)
        self.feed.publish(self._memory.revision, self._memory)
        SNAPSHOT_REVISION.labels("policy").set(self._memory.revision)

    def _note(self, *, is_up: bool, reason: str = "") -> None:
        STORE_UP.labels("policy").set(is_up)
        if is_up is not self._is_up:
            self._is_up = is_up
            level = logging.INFO if is_up else logging.ERROR
            log.log(level, "policy store is %s", "up" if is_up else "away", extra={"reason": reason})

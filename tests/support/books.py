"""A ticket book on a small arena, and what an engine would publish into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from inferflux.clock import ManualClock
from inferflux.engine.base import ComputedPrompt, PublishedKv
from inferflux.kv.arena import PAGE, Arena
from inferflux.kv.digests import block_digest, prompt_digest
from inferflux.tickets import Issuer, TicketBook
from inferflux.types import ModelFingerprint, RequestContext
from inferflux.worker.ledger import measure

BLOCK_SIZE = 16
KEY = b"k" * 32
FINGERPRINT = ModelFingerprint("weights", "float32", "layout", BLOCK_SIZE)


class SmallBook:
    """`book`, with its arena and its clock."""

    def __init__(self, arena: Arena, incarnation: str) -> None:
        self.arena = arena
        self.clock = ManualClock()
        issuer = Issuer("prefill-0", incarnation, FINGERPRINT, "/run/a.sock", "host", KEY)
        self.book = TicketBook(arena, self.clock, issuer, measure)

    @classmethod
    @contextmanager
    def of(cls, num_slots: int = 16, incarnation: str = "one") -> Iterator[SmallBook]:
        with closing(Arena.create((2 + num_slots) * PAGE)) as arena:
            arena.format(PAGE)
            yield cls(arena, incarnation)

    def compute(self) -> ComputedPrompt:
        """Publish one block."""
        slots = self.arena.allocate(1)
        self.arena.publish(slots, round(self.clock.monotonic() * 1e9))
        kv = PublishedKv(slots, (block_digest([self.arena.slot(slots[0])]),), BLOCK_SIZE)
        return ComputedPrompt(prompt_digest([1]), BLOCK_SIZE, (5,), kv)

    def issue(self, session_id: str = "s", time_left_s: float = 60) -> str:
        """Make a ticket; returns its id."""
        context = RequestContext("r", "acme", time_left_s=time_left_s)
        return self.book.issue(context, session_id, self.compute()).ticket_id

"""Tickets: the right to read the KV blocks of one prompt, and the book that owns the blocks until the right ends.

A prefill worker's `TicketBook` takes over the arena slots of a computed prompt and issues a signed ticket for them. The
ticket passes through the gateway, which can't read it, to a decode worker, which verifies it (`verify`: is it ours and
whole; `check`: is it for this request, this model, this host) and turns it into a `KvSource` for its engine.

    issued -> claimed -> committed                  live: the book owns the slots
       |         |           |
       +---------+-----------+--> released          ended by its gateway
                             |--> expired           ended by its lease, or with its gateway session
                             +--> revoked           ended by an operator or a fault

A ticket ends once and frees its slots at that moment: issued = released + expired + revoked + live. A reader that comes
late finds another generation or digest in the slots, never wrong tokens.
"""

from __future__ import annotations

import hmac
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from google.protobuf.message import DecodeError

from inferflux.clock import Clock
from inferflux.engine.base import ComputedPrompt, KvSource, PublishedKv
from inferflux.errors import (
    Conflict,
    KvIncompatible,
    KvStale,
    KvUnreachable,
    TicketExpired,
    TicketForeign,
    TicketInvalid,
)
from inferflux.kv.arena import Arena
from inferflux.kv.digests import DIGEST_BYTES
from inferflux.types import ModelFingerprint, RequestContext, SignedTicket
from inferflux.v1 import types_pb2 as pb

KEY_BYTES = 32

# A ticket outlives its request's deadline by this much: clocks differ, and so does the time on the way.
LEASE_MARGIN_S = 30.0
MAX_LEASE_S = 600.0
# A published slot is on its way from the engine to the book for milliseconds.
ORPHAN_AGE_S = 5.0
ORPHANED = "orphaned"


@dataclass(frozen=True, slots=True)
class KvTicket:
    """What a ticket says. `generations`, `digests`: one per slot; `lease_s`: its longest life, from its issue."""

    ticket_id: str
    request_id: str
    tenant: str
    worker_id: str
    incarnation: str
    session_id: str
    fingerprint: ModelFingerprint
    prompt_digest: bytes
    num_tokens: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[bytes, ...]
    slot_bytes: int
    socket_path: str
    host_id: str
    lease_s: float

    def to_proto(self) -> pb.KvTicket:
        message = pb.KvTicket(
            ticket_id=self.ticket_id,
            request_id=self.request_id,
            tenant=self.tenant,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            session_id=self.session_id,
            fingerprint=self.fingerprint.to_proto(),
            prompt_digest=self.prompt_digest,
            num_tokens=self.num_tokens,
            slots=self.slots,
            generations=self.generations,
            digests=b"".join(self.digests),
            slot_bytes=self.slot_bytes,
            shm=pb.ShmLocation(socket_path=self.socket_path, host_id=self.host_id),
        )
        message.lease.FromTimedelta(timedelta(seconds=self.lease_s))
        return message

    @classmethod
    def from_proto(cls, message: pb.KvTicket) -> KvTicket:
        digests = message.digests
        return cls(
            message.ticket_id,
            message.request_id,
            message.tenant,
            message.worker_id,
            message.incarnation,
            message.session_id,
            ModelFingerprint.from_proto(message.fingerprint),
            message.prompt_digest,
            message.num_tokens,
            tuple(message.slots),
            tuple(message.generations),
            tuple(digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)),
            message.slot_bytes,
            message.shm.socket_path,
            message.shm.host_id,
            message.lease.ToTimedelta().total_seconds(),
        )

    def to_source(self, first_token_ids: tuple[int, ...]) -> KvSource:
        """Describe the blocks to an engine; only for a ticket that went through `verify` and `check`."""
        return KvSource(
            ticket_id=self.ticket_id,
            prompt_digest=self.prompt_digest,
            num_tokens=self.num_tokens,
            slots=self.slots,
            digests=self.digests,
            slot_bytes=self.slot_bytes,
            socket_path=self.socket_path,
            incarnation=self.incarnation,
            first_token_ids=first_token_ids,
            generations=self.generations,
        )


def sign(ticket: KvTicket, key: bytes) -> SignedTicket:
    """Serialize and authenticate a ticket with the cluster's ticket key."""
    payload = ticket.to_proto().SerializeToString()
    return SignedTicket(ticket.ticket_id, payload, _mac(payload, key))


def verify(signed: SignedTicket, key: bytes) -> KvTicket:
    """Return the ticket if it is whole and was signed with `key`. Raises TicketInvalid; says nothing of for whom."""
    if not hmac.compare_digest(_mac(signed.payload, key), signed.mac):
        raise TicketInvalid(f"ticket {signed.ticket_id[:64]}: wrong MAC")
    try:
        ticket = KvTicket.from_proto(pb.KvTicket.FromString(signed.payload))
    except DecodeError as e:
        raise TicketInvalid(f"ticket {signed.ticket_id[:64]}: not a ticket") from e
    if ticket.ticket_id != signed.ticket_id or not _is_well_formed(ticket):
        raise TicketInvalid(f"ticket {signed.ticket_id[:64]}: its parts do not fit together")
    return ticket


def check(
    ticket: KvTicket,
    *,
    request_id: str,
    tenant: str,
    prompt_digest: bytes,
    fingerprint: ModelFingerprint,
    host_id: str,
) -> None:
    """Return if this reader may use a verified ticket for this prompt.

    Raises TicketForeign (another request, tenant or prompt), KvIncompatible (another model or layout), KvUnreachable
    (memory of another host).
    """
    if (ticket.request_id, ticket.tenant, ticket.prompt_digest) != (request_id, tenant, prompt_digest):
        raise TicketForeign(f"ticket {ticket.ticket_id} is not for request {request_id}")
    if ticket.fingerprint != fingerprint:
        raise KvIncompatible(f"ticket {ticket.ticket_id}: blocks of {ticket.fingerprint}, not {fingerprint}")
    if ticket.host_id != host_id:
        raise KvUnreachable(f"ticket {ticket.ticket_id}: blocks on host {ticket.host_id}, not {host_id}")


def _mac(payload: bytes, key: bytes) -> bytes:
    if len(key) < KEY_BYTES:
        raise ValueError(f"the ticket key has {len(key)} bytes, not at least {KEY_BYTES}")
    return hmac.digest(key, payload, "sha256")


def _is_well_formed(ticket: KvTicket) -> bool:
    num_slots = len(ticket.slots)
    return (
        0 < ticket.num_tokens <= num_slots * ticket.fingerprint.block_size
        and len(ticket.generations) == len(ticket.digests) == num_slots
        and all(len(digest) == DIGEST_BYTES for digest in (ticket.prompt_digest, *ticket.digests))
        and ticket.slot_bytes > 0
    )


class TicketState(StrEnum):
    """Where a ticket is in its life; the last three are its ends."""

    ISSUED = "issued"
    CLAIMED = "claimed"
    COMMITTED = "committed"
    RELEASED = "released"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Issuer:
    """What all tickets of one start of a worker have in common. `key` signs them."""

    worker_id: str
    incarnation: str
    fingerprint: ModelFingerprint
    socket_path: str
    host_id: str
    key: bytes


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A live ticket, for people."""

    ticket_id: str
    request_id: str
    tenant: str
    state: TicketState
    num_bytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class TicketCounts:
    """Tickets since start: issued = released + expired + revoked + live. `orphans` counts slots, not tickets."""

    issued: int
    released: int
    expired: int
    revoked: int
    live: int
    orphans: int


@dataclass(slots=True)
class _Entry:
    ticket: KvTicket
    issued_at: float
    state: TicketState = TicketState.ISSUED
    claimant: str = ""

    @property
    def expires_at(self) -> float:
        return self.issued_at + self.ticket.lease_s


class TicketBook:
    """The one owner of the tickets of a prefill worker, and through them of its arena's published slots.

    Pure: no I/O, no timers; the worker calls `sweep` on its own timer. Not safe across threads. `on_event` gets each
    event's name (a TicketState, or ORPHANED for slots) and how often it happened.
    """

    def __init__(
        self, arena: Arena, clock: Clock, issuer: Issuer, on_event: Callable[[str, int], None] | None = None
    ) -> None:
        self._arena = arena
        self._clock = clock
        self._issuer = issuer
        self._on_event = on_event
        self._live: dict[str, _Entry] = {}
        self._slots: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._prefills: dict[object, float] = {}

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Wrap everything from the engine's prefill to `issue`: what it publishes meanwhile is no orphan."""
        token = object()
        self._prefills[token] = self._clock.monotonic()
        try:
            yield
        finally:
            del self._prefills[token]

    def issue(self, context: RequestContext, session_id: str, prompt: ComputedPrompt) -> SignedTicket:
        """Take over the prompt's slots and return a ticket for them.

        Raises KvStale when the slots are not the prompt's any more, ValueError when it has none.
        """
        kv = prompt.kv
        if kv is None:
            raise ValueError(f"request {context.request_id}: the prompt was not published")
        self._require_unowned(kv.slots)
        ticket = self._ticket(context, session_id, prompt, kv)
        signed = sign(ticket, self._issuer.key)
        self._live[ticket.ticket_id] = _Entry(ticket, self._clock.monotonic())
        self._slots.update(ticket.slots)
        self._count(TicketState.ISSUED)
        return signed

    def claim(self, ticket_id: str, claimant: str) -> KvTicket:
        """Reserve a ticket for one reader; the same reader may ask again until it commits.

        Raises TicketExpired when the ticket is not live, Conflict when another reader was first or it was read.
        """
        entry = self._require_live(ticket_id)
        if entry.state is TicketState.ISSUED:
            entry.state, entry.claimant = TicketState.CLAIMED, claimant
            self._count(TicketState.CLAIMED)
        elif entry.state is not TicketState.CLAIMED or entry.claimant != claimant:
            raise Conflict(f"ticket {ticket_id} is {entry.state} by {entry.claimant}, not for {claimant}")
        return entry.ticket

    def commit(self, ticket_id: str, claimant: str) -> None:
        """Note that the claimant has read everything. Idempotent. Raises as `claim` does."""
        entry = self._require_live(ticket_id)
        if entry.state is TicketState.ISSUED or entry.claimant != claimant:
            raise Conflict(f"ticket {ticket_id} is not claimed by {claimant}")
        self._mark_committed(entry)

    def release(self, ticket_ids: Sequence[str], why: str = "") -> int:
        """End tickets for their gateway and return how many were live. Idempotent; unknown ids are ignored.

        `why` committed says that a reader has everything; other reasons make no difference here.
        """
        if why == TicketState.COMMITTED:
            for entry in self._entries(ticket_ids):
                self._mark_committed(entry)
        return self._end(ticket_ids, TicketState.RELEASED)

    def revoke(self, ticket_ids: Sequence[str]) -> int:
        """End tickets for an operator or after a fault; otherwise as `release`."""
        return self._end(ticket_ids, TicketState.REVOKED)

    def expire_session(self, session_id: str) -> int:
        """End all tickets of a gateway session that was lost for longer than its grace, and return how many."""
        lost = [e.ticket.ticket_id for e in self._live.values() if e.ticket.session_id == session_id]
        return self._end(lost, TicketState.EXPIRED)

    def sweep(self) -> int:
        """End tickets whose lease is over, free orphans, and return how many tickets ended. Call twice a second."""
        now = self._clock.monotonic()
        self._free_orphans(now)
        over = [e.ticket.ticket_id for e in self._live.values() if e.expires_at <= now]
        return self._end(over, TicketState.EXPIRED)

    def counts(self) -> TicketCounts:
        """Return the conserved counts."""
        return TicketCounts(
            issued=self._counts[TicketState.ISSUED],
            released=self._counts[TicketState.RELEASED],
            expired=self._counts[TicketState.EXPIRED],
            revoked=self._counts[TicketState.REVOKED],
            live=len(self._live),
            orphans=self._counts[ORPHANED],
        )

    def list(self) -> tuple[TicketRecord, ...]:
        """Return the live tickets, oldest first."""
        now = self._clock.monotonic()
        return tuple(_record(entry, now) for entry in self._live.values())

    def _ticket(self, context: RequestContext, session_id: str, prompt: ComputedPrompt, kv: PublishedKv) -> KvTicket:
        return KvTicket(
            ticket_id=uuid.uuid4().hex,
            request_id=context.request_id,
            tenant=context.tenant,
            worker_id=self._issuer.worker_id,
            incarnation=self._issuer.incarnation,
            session_id=session_id,
            fingerprint=self._issuer.fingerprint,
            prompt_digest=prompt.prompt_digest,
            num_tokens=kv.num_tokens,
            slots=kv.slots,
            generations=self._arena.generations(kv.slots),
            digests=kv.digests,
            slot_bytes=self._arena.slot_bytes,
            socket_path=self._issuer.socket_path,
            host_id=self._issuer.host_id,
            lease_s=_lease_s(context),
        )

    def _require_unowned(self, slots: tuple[int, ...]) -> None:
        """Two owners of a slot would free it twice; whoever comes second has lost it."""
        if not self._slots.isdisjoint(slots) or not self._arena.are_published(slots):
            raise KvStale(f"slots {list(slots)} are not those that the engine published")

    def _require_live(self, ticket_id: str) -> _Entry:
        entry = self._live.get(ticket_id)
        if entry is None or entry.expires_at <= self._clock.monotonic():
            raise TicketExpired(f"ticket {ticket_id[:64]} is not live")
        return entry

    def _entries(self, ticket_ids: Iterable[str]) -> Iterator[_Entry]:
        return (self._live[ticket_id] for ticket_id in ticket_ids if ticket_id in self._live)

    def _mark_committed(self, entry: _Entry) -> None:
        if entry.state is not TicketState.COMMITTED:
            entry.state = TicketState.COMMITTED
            self._count(TicketState.COMMITTED)

    def _end(self, ticket_ids: Iterable[str], state: TicketState) -> int:
        entries = [e for e in (self._live.pop(ticket_id, None) for ticket_id in ticket_ids) if e is not None]
        for entry in entries:
            self._slots.difference_update(entry.ticket.slots)
            self._arena.free(entry.ticket.slots)
        self._count(state, len(entries))
        return len(entries)

    def _free_orphans(self, now: float) -> None:
        """Free what was published and got lost on its way here, e.g. by a cancel that came too late for the engine.

        Only a prefill that began before a slot was published can still bring it.
        """
        before_s = min([now - ORPHAN_AGE_S, *self._prefills.values()])
        published = self._arena.published()
        orphans = [slot for slot, at_ns in published if at_ns < before_s * 1e9 and slot not in self._slots]
        self._arena.free(orphans)
        self._count(ORPHANED, len(orphans))

    def _count(self, event: str, n: int = 1) -> None:
        self._counts[event] += n
        if n and self._on_event is not None:
            self._on_event(event, n)


def _lease_s(context: RequestContext) -> float:
    if context.time_left_s is None:
        return MAX_LEASE_S
    return min(max(context.time_left_s, 0.0) + LEASE_MARGIN_S, MAX_LEASE_S)


def _record(entry: _Entry, now: float) -> TicketRecord:
    ticket = entry.ticket
    num_bytes = len(ticket.slots) * ticket.slot_bytes
    age_s = now - entry.issued_at
    return TicketRecord(ticket.ticket_id, ticket.request_id, ticket.tenant, entry.state, num_bytes, age_s)

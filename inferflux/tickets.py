"""Tickets: the right to read the KV blocks of one prompt, and the book that owns the blocks until the right ends.

A prefill worker's `TicketBook` takes over the arena slots of a computed prompt and issues a signed ticket for them. The
ticket passes through the gateway, which can't read it, to a decode worker, which verifies it (`verify`: is it ours and
whole; `check`: is it for this request and this model) and turns it into a `KvSource` for its engine.

    issued -> claimed -> committed                  live: the book owns the slots
       |         |           |
       +---------+-----------+--> released          ended by its gateway
                             |--> expired           ended by its lease, or with its gateway session
                             +--> revoked           ended by an operator or a fault

A ticket ends once and lets go of its slots at that moment, whoever reads: issued = released + expired + revoked + live.
They are free then, unless other tickets hold them too or the prefix store keeps their blocks (inferflux.kv.prefixes). A
reader that comes late, or that is still copying, finds another generation or digest in the slots, never wrong tokens.
A claim makes sure of something else: that of several readers one wins, and the owner knows which.
"""

from __future__ import annotations

import hmac
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import NoReturn

from google.protobuf.message import DecodeError

from inferflux.clock import Clock
from inferflux.engine.base import ComputedPrompt, KvSource, PublishedKv
from inferflux.errors import (
    KvIncompatible,
    KvStale,
    TicketConflict,
    TicketExpired,
    TicketForeign,
    TicketInvalid,
)
from inferflux.kv.arena import Arena
from inferflux.kv.digests import DIGEST_BYTES
from inferflux.kv.prefixes import PrefixStore
from inferflux.types import ModelFingerprint, RequestContext, SignedTicket
from inferflux.v1 import types_pb2 as pb

KEY_BYTES = 32

# A ticket outlives its request's deadline by this much: clocks differ, and so does the time on the way.
LEASE_MARGIN_S = 30.0
MAX_LEASE_S = 600.0
# A published slot is on its way from the engine to the book for milliseconds.
ORPHAN_AGE_S = 5.0
# What the sweeper has not ended after so long, it never will.
LEAK_AGE_S = 2.0
MAX_ENDED = 256
CONFLICT = "conflict"
ORPHANED = "orphaned"
RECOMPUTED = "recomputed"
# What ends a ticket, for metrics: gateways choose the text of a release.
RELEASES = ("committed", RECOMPUTED, "unneeded", "cancelled", "rejected", "failed", "other")
LEASE, SESSION = "lease", "session"


@dataclass(frozen=True, slots=True)
class KvTicket:
    """What a ticket says. `generations`, `digests`: one per slot; `lease_s`: its longest life, from its issue.

    `socket_path`: where its worker offers shm; empty: it does not. `address`: where readers claim it and shake hands.
    """

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
    address: str = ""

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
            address=self.address,
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
            message.address,
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
            worker_id=self.worker_id,
            host_id=self.host_id,
            address=self.address,
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
) -> None:
    """Return if this reader may use a verified ticket for this prompt.

    Raises TicketForeign (another request, tenant or prompt), KvIncompatible (another model or layout).
    """
    if (ticket.request_id, ticket.tenant, ticket.prompt_digest) != (request_id, tenant, prompt_digest):
        raise TicketForeign(f"ticket {ticket.ticket_id} is not for request {request_id}")
    if ticket.fingerprint != fingerprint:
        raise KvIncompatible(f"ticket {ticket.ticket_id}: blocks of {ticket.fingerprint}, not {fingerprint}")


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
    """What all tickets of one start of a worker have in common. `key` signs them. For empty paths see KvTicket."""

    worker_id: str
    incarnation: str
    fingerprint: ModelFingerprint
    socket_path: str
    host_id: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who reads: a decode worker, and its start."""

    worker_id: str
    incarnation: str

    def may_follow(self, earlier: Claimant) -> bool:
        """Whether what `earlier` had is now this claimant's: the same one, or a later start of the same worker."""
        return self.worker_id == earlier.worker_id and self.incarnation >= earlier.incarnation


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket, for people. `age_s`: from its issue to now or to its end; `overdue_s`: since its lease was over."""

    ticket_id: str
    request_id: str
    tenant: str
    session_id: str
    state: TicketState
    claimant: str
    num_bytes: int
    age_s: float
    overdue_s: float


@dataclass(frozen=True, slots=True)
class TicketCounts:
    """Tickets since start. `orphans` counts slots, not tickets."""

    issued: int
    released: int
    expired: int
    revoked: int
    live: int
    orphans: int

    @property
    def is_balanced(self) -> bool:
        """Whether every ticket is accounted for."""
        return self.issued == self.released + self.expired + self.revoked + self.live


@dataclass(slots=True)
class _Entry:
    ticket: KvTicket
    issued_at: float
    state: TicketState = TicketState.ISSUED
    claimant: Claimant | None = None

    @property
    def expires_at(self) -> float:
        return self.issued_at + self.ticket.lease_s

    def record(self, now: float) -> TicketRecord:
        ticket, claimant = self.ticket, self.claimant.worker_id if self.claimant else ""
        return TicketRecord(
            ticket_id=ticket.ticket_id,
            request_id=ticket.request_id,
            tenant=ticket.tenant,
            session_id=ticket.session_id,
            state=self.state,
            claimant=claimant,
            num_bytes=len(ticket.slots) * ticket.slot_bytes,
            age_s=now - self.issued_at,
            overdue_s=max(0.0, now - self.expires_at),
        )


@dataclass(frozen=True, slots=True)
class TicketEvent:
    """What happened to tickets, for metrics. `name`: a TicketState, CONFLICT, or ORPHANED for slots.

    `why`: what ended them, or who held what was claimed twice. `ages_s`: from the issue of each to now.
    """

    name: str
    ages_s: Sequence[float]
    why: str = ""


class TicketBook:
    """The one owner of the tickets of a prefill worker, and through `prefixes` of its arena's published slots.

    Pure: no I/O, no timers; the worker calls `sweep` on its own timer. Not safe across threads. `address`: where
    readers claim what is issued from now on.
    """

    def __init__(
        self,
        arena: Arena,
        clock: Clock,
        issuer: Issuer,
        on_event: Callable[[TicketEvent], None] | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        self.address = ""
        self._arena = arena
        self._prefixes = prefixes or PrefixStore(arena)
        self._clock = clock
        self._issuer = issuer
        self._on_event = on_event
        self._live: dict[str, _Entry] = {}
        self._ended: deque[TicketRecord] = deque(maxlen=MAX_ENDED)
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
        self._prefixes.adopt(kv.slots, kv.block_hashes, kv.num_shared)
        ticket = self._ticket(context, session_id, prompt, kv)
        signed = sign(ticket, self._issuer.key)
        self._live[ticket.ticket_id] = _Entry(ticket, self._clock.monotonic())
        self._count(TicketState.ISSUED, [0.0])
        return signed

    def claim(self, ticket_id: str, claimant: Claimant, incarnation: str) -> KvTicket:
        """Reserve a ticket of the start `incarnation` for one reader, who may ask again until it commits.

        A later start of the same reader takes over. Raises KvStale when another start of this worker issued it,
        TicketExpired when it is not live, TicketConflict when another reader was first or it was read.
        """
        entry = self._require_live(ticket_id, incarnation)
        if entry.state is TicketState.ISSUED:
            self._count(TicketState.CLAIMED, [self._age_s(entry)])
        elif entry.state is not TicketState.CLAIMED or not _may_follow(claimant, entry.claimant):
            self._refuse(entry, claimant)
        entry.state, entry.claimant = TicketState.CLAIMED, claimant
        return entry.ticket

    def commit(self, ticket_id: str, claimant: Claimant, incarnation: str) -> None:
        """Note that the claimant has read everything. Idempotent. Raises as `claim` does."""
        entry = self._require_live(ticket_id, incarnation)
        if entry.claimant != claimant:
            self._refuse(entry, claimant)
        self._mark_committed(entry)

    def release(self, ticket_ids: Sequence[str], why: str = "") -> int:
        """End tickets for their gateway and return how many were live. Idempotent; unknown ids are ignored.

        `why` committed says that a reader has everything; recomputed, that a reader could not use the blocks: they are
        never offered again. Other reasons make no difference here.
        """
        for entry in self._entries(ticket_ids):
            if why == TicketState.COMMITTED:
                self._mark_committed(entry)
            elif why == RECOMPUTED:
                self._prefixes.forget(entry.ticket.slots)
        return self._end(ticket_ids, TicketState.RELEASED, why if why in RELEASES else "other")

    def revoke(self, ticket_ids: Sequence[str]) -> int:
        """End tickets for an operator or after a fault; otherwise as `release`."""
        return self._end(ticket_ids, TicketState.REVOKED, "")

    def expire_session(self, session_id: str) -> int:
        """End all tickets of a gateway session that was lost for longer than its grace, and return how many."""
        lost = [e.ticket.ticket_id for e in self._live.values() if e.ticket.session_id == session_id]
        return self._end(lost, TicketState.EXPIRED, SESSION)

    def sweep(self) -> int:
        """End tickets whose lease is over, free orphans, and return how many tickets ended. Call twice a second."""
        now = self._clock.monotonic()
        self._free_orphans(now)
        over = [e.ticket.ticket_id for e in self._live.values() if e.expires_at <= now]
        return self._end(over, TicketState.EXPIRED, LEASE)

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
        return tuple(entry.record(now) for entry in self._live.values())

    def ended(self) -> tuple[TicketRecord, ...]:
        """Return the last MAX_ENDED tickets that ended, newest first."""
        return tuple(self._ended)

    def num_leaked_slots(self) -> int:
        """Count published slots that no ticket and no running prefill accounts for, and that no sweep has freed."""
        return len(self._orphans(self._clock.monotonic() - LEAK_AGE_S))

    def _ticket(self, context: RequestContext, session_id: str, prompt: ComputedPrompt, kv: PublishedKv) -> KvTicket:
        return KvTicket(
            ticket_id=uuid.uuid4().hex,
            request_id=context.request_id,
            tenant=context.tenant,
            worker_id=self._issuer.worker_id,
            incarnation=self._issuer.incarnation,
            session_id=session_id,
            fingerprint=replace(self._issuer.fingerprint, adapter=context.adapter_digest),
            prompt_digest=prompt.prompt_digest,
            num_tokens=kv.num_tokens,
            slots=kv.slots,
            generations=self._arena.generations(kv.slots),
            digests=kv.digests,
            slot_bytes=self._arena.slot_bytes,
            socket_path=self._issuer.socket_path,
            host_id=self._issuer.host_id,
            lease_s=_lease_s(context),
            address=self.address,
        )

    def _require_live(self, ticket_id: str, incarnation: str) -> _Entry:
        if incarnation != self._issuer.incarnation:
            self._tell(TicketEvent(CONFLICT, [0.0], "stale"))
            raise KvStale(f"ticket {ticket_id[:64]} is of {incarnation[:64]}, not of {self._issuer.incarnation}")
        entry = self._live.get(ticket_id)
        if entry is None or entry.expires_at <= self._clock.monotonic():
            raise TicketExpired(f"ticket {ticket_id[:64]} is not live")
        return entry

    def _refuse(self, entry: _Entry, claimant: Claimant) -> NoReturn:
        self._tell(TicketEvent(CONFLICT, [self._age_s(entry)], entry.state))
        holder = entry.claimant.worker_id if entry.claimant else "nobody"
        raise TicketConflict(
            f"ticket {entry.ticket.ticket_id} is {entry.state} for {holder}, not for {claimant.worker_id[:64]}"
        )

    def _age_s(self, entry: _Entry) -> float:
        return self._clock.monotonic() - entry.issued_at

    def _entries(self, ticket_ids: Iterable[str]) -> Iterator[_Entry]:
        return (self._live[ticket_id] for ticket_id in ticket_ids if ticket_id in self._live)

    def _mark_committed(self, entry: _Entry) -> None:
        if entry.state is not TicketState.COMMITTED:
            entry.state = TicketState.COMMITTED
            self._count(TicketState.COMMITTED, [self._age_s(entry)])

    def _end(self, ticket_ids: Iterable[str], state: TicketState, why: str) -> int:
        now = self._clock.monotonic()
        entries = [e for e in (self._live.pop(ticket_id, None) for ticket_id in ticket_ids) if e is not None]
        for entry in entries:
            self._prefixes.release(entry.ticket.slots)
            entry.state = state
            self._ended.appendleft(entry.record(now))
        self._count(state, [now - entry.issued_at for entry in entries], why)
        return len(entries)

    def _free_orphans(self, now: float) -> None:
        """Free what was published and got lost on its way here, e.g. by a cancel that came too late for the engine."""
        orphans = self._orphans(now)
        self._arena.free([slot for slot, _ in orphans])
        self._count(ORPHANED, [now - at_s for _, at_s in orphans])

    def _orphans(self, now: float) -> tuple[tuple[int, float], ...]:
        """Slots under no ticket, with the time of their publication; too old to be on their way.

        Only a prefill that began before a slot was published can still bring it.
        """
        before_ns = round(min([now - ORPHAN_AGE_S, *self._prefills.values()]) * 1e9)
        published = ((slot, at_ns) for slot, at_ns in self._arena.published() if slot not in self._prefixes)
        return tuple((slot, at_ns / 1e9) for slot, at_ns in published if at_ns < before_ns)

    def _count(self, event: str, ages_s: Sequence[float], why: str = "") -> None:
        self._counts[event] += len(ages_s)
        if ages_s:
            self._tell(TicketEvent(event, ages_s, why))

    def _tell(self, event: TicketEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)


def _may_follow(claimant: Claimant, holder: Claimant | None) -> bool:
    return holder is not None and claimant.may_follow(holder)


def _lease_s(context: RequestContext) -> float:
    if context.time_left_s is None:
        return MAX_LEASE_S
    return min(max(context.time_left_s, 0.0) + LEASE_MARGIN_S, MAX_LEASE_S)

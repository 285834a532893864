from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from inferflux.clock import ManualClock
from inferflux.engine.base import ComputedPrompt, PublishedKv
from inferflux.errors import (
    InferfluxError,
    KvError,
    KvIncompatible,
    KvStale,
    TicketConflict,
    TicketExpired,
    TicketForeign,
    TicketInvalid,
)
from inferflux.kv.arena import PAGE, Arena
from inferflux.kv.digests import block_digest, prompt_digest
from inferflux.tickets import (
    CONFLICT,
    LEAK_AGE_S,
    MAX_ENDED,
    MAX_LEASE_S,
    ORPHAN_AGE_S,
    ORPHANED,
    Claimant,
    Issuer,
    KvTicket,
    TicketBook,
    TicketEvent,
    TicketState,
    check,
    sign,
    verify,
)
from inferflux.types import ModelFingerprint, RequestContext, SignedTicket
from inferflux.v1 import types_pb2 as pb

KEY = secrets.token_bytes(32)
NUM_SLOTS = 12
BLOCK_SIZE = 16
FINGERPRINT = ModelFingerprint("ab" * 32, "float32", "sim/1", BLOCK_SIZE)
ISSUER = Issuer("prefill-0", "one", FINGERPRINT, "/run/kv.sock", "host-0", KEY)
TICKET = KvTicket(
    ticket_id="0123456789abcdef",
    request_id="req-1",
    tenant="acme",
    worker_id="prefill-0",
    incarnation="one",
    session_id="session-0",
    fingerprint=FINGERPRINT,
    prompt_digest=prompt_digest([1, 2, 3]),
    num_tokens=20,
    slots=(4, 2),
    generations=(0, 7),
    digests=(block_digest([b"a"]), block_digest([b"b"])),
    slot_bytes=PAGE,
    socket_path="/run/kv.sock",
    host_id="host-0",
    lease_s=42.5,
    address="unix:/run/prefill-0.sock",
)
READER_0, READER_1 = Claimant("decode-0", "one"), Claimant("decode-1", "one")
READER = {
    "request_id": "req-1",
    "tenant": "acme",
    "prompt_digest": TICKET.prompt_digest,
    "fingerprint": FINGERPRINT,
}


@pytest.fixture
def arena() -> Iterator[Arena]:
    with closing(make_arena()) as arena:
        yield arena


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def events() -> Counter[str]:
    return Counter()


@pytest.fixture
def book(arena: Arena, clock: ManualClock, events: Counter[str]) -> TicketBook:
    """A book whose events are counted by name, and by name and reason."""

    def count(event: TicketEvent) -> None:
        n = len(event.ages_s)
        events.update(dict.fromkeys({str(event.name), f"{event.name} {event.why}".rstrip()}, n))

    return TicketBook(arena, clock, ISSUER, count)


def make_arena() -> Arena:
    arena = Arena.create((2 + NUM_SLOTS) * PAGE)
    assert arena.format(PAGE) == NUM_SLOTS
    return arena


def compute(arena: Arena, clock: ManualClock, num_slots: int = 3) -> ComputedPrompt:
    """Do what an engine does for one prompt."""
    slots = arena.allocate(num_slots)
    for slot in slots:
        arena.slot(slot)[:] = slot
        arena.set_digest(slot, block_digest([arena.slot(slot)]))
    arena.publish(slots, now_ns=round(clock.monotonic() * 1e9))
    kv = PublishedKv(slots, tuple(arena.digest(slot) for slot in slots), num_slots * BLOCK_SIZE - 1)
    return ComputedPrompt(prompt_digest(range(kv.num_tokens)), kv.num_tokens, (5,), kv)


def context(time_left_s: float | None = 60.0, request_id: str = "req-1") -> RequestContext:
    return RequestContext(request_id, tenant="acme", time_left_s=time_left_s)


# -- what a ticket says ---------------------------------------------------------------------------------------------


def test_a_signed_ticket_comes_back_as_it_was() -> None:
    """Nothing is lost on the way through the gateway."""
    signed = SignedTicket.from_proto(pb.SignedTicket.FromString(sign(TICKET, KEY).to_proto().SerializeToString()))

    assert verify(signed, KEY) == TICKET


def test_every_flipped_bit_of_a_ticket_is_found() -> None:
    """Forged, altered, extended: none of it verifies, whichever byte is hit."""
    signed = sign(TICKET, KEY)

    for field in ("payload", "mac"):
        original = getattr(signed, field)
        for i in range(8 * len(original)):
            flipped = bytearray(original)
            flipped[i // 8] ^= 1 << i % 8
            with pytest.raises(TicketInvalid):
                verify(replace(signed, **{field: bytes(flipped)}), KEY)


@given(junk=st.binary(max_size=200), mac=st.binary(max_size=40))
def test_junk_is_no_ticket(junk: bytes, mac: bytes) -> None:
    """Any bytes may arrive; the answer is always TicketInvalid."""
    with pytest.raises(TicketInvalid):
        verify(SignedTicket("x", junk, mac), KEY)


def test_a_ticket_of_another_cluster_is_invalid() -> None:
    """Its key is not ours."""
    with pytest.raises(TicketInvalid, match="MAC"):
        verify(sign(TICKET, secrets.token_bytes(32)), KEY)


def test_a_ticket_cut_or_extended_is_invalid() -> None:
    """Protobuf would accept both."""
    signed = sign(TICKET, KEY)

    for payload in (signed.payload[:-2], signed.payload + pb.KvTicket(num_tokens=2**31).SerializeToString(), b""):
        with pytest.raises(TicketInvalid):
            verify(replace(signed, payload=payload), KEY)


def test_the_envelope_names_the_ticket_inside() -> None:
    """A gateway releases by the envelope's id; it must be the real one."""
    with pytest.raises(TicketInvalid, match="do not fit"):
        verify(replace(sign(TICKET, KEY), ticket_id="another"), KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": (1,)},
        {"digests": TICKET.digests[:1]},
        {"digests": (*TICKET.digests, b"short")},
        {"generations": ()},
        {"num_tokens": 0},
        {"num_tokens": 2 * BLOCK_SIZE + 1},
        {"prompt_digest": b""},
        {"slot_bytes": 0},
        {"slots": (), "digests": (), "generations": ()},
    ],
    ids=str,
)
def test_a_ticket_whose_parts_do_not_fit_is_invalid(wrong: dict[str, object]) -> None:
    """A bug of the issuer, found before an engine indexes with it."""
    with pytest.raises(TicketInvalid, match="do not fit"):
        verify(sign(replace(TICKET, **wrong), KEY), KEY)


def test_a_short_key_is_refused() -> None:
    """An empty secrets file must not make forgeable tickets."""
    with pytest.raises(ValueError, match="ticket key"):
        sign(TICKET, b"short")


def test_the_right_reader_may_use_a_ticket() -> None:
    """The one request of the one tenant on a worker with the same model."""
    check(TICKET, **READER)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("request_id", "req-2", TicketForeign),
        ("tenant", "evil", TicketForeign),
        ("prompt_digest", prompt_digest([9]), TicketForeign),
        ("fingerprint", replace(FINGERPRINT, weights_digest="cd" * 32), KvIncompatible),
        ("fingerprint", replace(FINGERPRINT, dtype="bfloat16"), KvIncompatible),
        ("fingerprint", replace(FINGERPRINT, layout="sim/2"), KvIncompatible),
        ("fingerprint", replace(FINGERPRINT, block_size=32), KvIncompatible),
    ],
)
def test_a_captured_ticket_is_useless_elsewhere(field: str, value: object, error: type[InferfluxError]) -> None:
    """Another tenant, request, prompt, model or layout: refused before anything is read."""
    with pytest.raises(error):
        check(TICKET, **{**READER, field: value})


def test_a_source_says_what_the_ticket_says() -> None:
    """The engine sees blocks and where they are; not whose."""
    source = TICKET.to_source((5,))

    assert (source.slots, source.generations, source.digests) == (TICKET.slots, TICKET.generations, TICKET.digests)
    assert (source.incarnation, source.socket_path, source.first_token_ids) == ("one", "/run/kv.sock", (5,))
    assert (source.worker_id, source.host_id, source.address) == (TICKET.worker_id, "host-0", TICKET.address)


# -- the book -------------------------------------------------------------------------------------------------------


def test_a_ticket_describes_the_prompt_it_was_issued_for(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """Request, blocks, generations and place, ready for a decode worker."""
    arena.free(arena.allocate(3))
    arena._cursor = 0
    prompt = compute(arena, clock)
    assert prompt.kv is not None
    ticket = verify(book.issue(context(), "session-0", prompt), KEY)

    check(ticket, **{**READER, "prompt_digest": prompt.prompt_digest})
    assert (ticket.slots, ticket.digests, ticket.generations) == (prompt.kv.slots, prompt.kv.digests, (1, 1, 1))
    assert (ticket.session_id, ticket.lease_s) == ("session-0", 90.0)


def test_a_released_ticket_gives_its_slots_back(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """At once, once, and whoever else names it changes nothing."""
    signed = book.issue(context(), "session-0", compute(arena, clock))
    assert arena.num_free == NUM_SLOTS - 3

    assert book.release([signed.ticket_id, signed.ticket_id, "unknown"], "committed") == 1
    assert book.release([signed.ticket_id], "cancelled") == 0
    assert arena.num_free == NUM_SLOTS
    assert book.list() == ()


def test_slots_serve_one_ticket_after_another(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """Many rounds of the arena, nothing wears out."""
    for _ in range(5 * NUM_SLOTS):
        signed = book.issue(context(), "session-0", compute(arena, clock, 5))
        book.release([signed.ticket_id])

    assert (arena.num_free, book.counts().released) == (NUM_SLOTS, 5 * NUM_SLOTS)


def test_a_lease_ends_a_ticket(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """Its gateway may be gone; the request's deadline and a margin bound its life."""
    book.issue(context(time_left_s=10), "session-0", compute(arena, clock))
    clock.advance(39.9)
    assert book.sweep() == 0
    clock.advance(0.1)

    assert book.sweep() == 1
    assert (book.counts().expired, arena.num_free) == (1, NUM_SLOTS)


@pytest.mark.parametrize(
    ("time_left_s", "lease_s"), [(None, MAX_LEASE_S), (1e9, MAX_LEASE_S), (-5.0, 30.0), (0.0, 30.0)]
)
def test_a_lease_is_bounded(
    book: TicketBook, arena: Arena, clock: ManualClock, time_left_s: float | None, lease_s: float
) -> None:
    """Whatever deadline the request came with."""
    ticket = verify(book.issue(context(time_left_s), "session-0", compute(arena, clock)), KEY)

    assert ticket.lease_s == lease_s


def test_a_lost_session_ends_its_tickets_only(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """A gateway that died takes its own requests with it."""
    book.issue(context(), "session-0", compute(arena, clock))
    other = book.issue(context(), "session-1", compute(arena, clock))

    assert (book.expire_session("session-0"), book.expire_session("session-0")) == (1, 0)
    assert [record.ticket_id for record in book.list()] == [other.ticket_id]


def test_revoked_tickets_are_counted_apart(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """An operator's doing is not a gateway's."""
    signed = book.issue(context(), "session-0", compute(arena, clock))

    assert book.revoke([signed.ticket_id, "unknown"]) == 1
    assert (book.counts().revoked, book.counts().released) == (1, 0)


def test_live_tickets_are_listed(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """For people who ask what holds the arena."""
    book.issue(context(), "session-0", compute(arena, clock))
    clock.advance(2)

    (record,) = book.list()
    assert (record.request_id, record.tenant, record.state) == ("req-1", "acme", TicketState.ISSUED)
    assert (record.num_bytes, record.age_s) == (3 * PAGE, 2)


def test_events_are_told_with_their_number(
    book: TicketBook, arena: Arena, clock: ManualClock, events: Counter[str]
) -> None:
    """Metrics count what the book counts."""
    a, b = (book.issue(context(), "session-0", compute(arena, clock)) for _ in range(2))
    compute(arena, clock)
    clock.advance(ORPHAN_AGE_S + 1)
    book.sweep()
    book.claim(a.ticket_id, READER_0, "one")
    book.release([a.ticket_id], "committed")
    book.release([b.ticket_id], "because")

    numbers = {"issued": 2, "claimed": 1, "committed": 1, "released": 2, ORPHANED: 3}
    assert events == numbers | {"released committed": 1, "released other": 1}


def test_a_prompt_without_blocks_has_no_ticket(book: TicketBook) -> None:
    """The arena was full; decode computes the prompt."""
    with pytest.raises(ValueError, match="not published"):
        book.issue(context(), "session-0", ComputedPrompt(prompt_digest([1]), 1, (5,), None))


def test_slots_have_one_owner(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """A second ticket for the same slots, or one for slots that were freed, is refused."""
    prompt = compute(arena, clock)
    signed = book.issue(context(), "session-0", prompt)
    with pytest.raises(KvStale):
        book.issue(context(), "session-0", prompt)
    book.release([signed.ticket_id])
    with pytest.raises(KvStale):
        book.issue(context(), "session-0", prompt)

    assert (book.counts().issued, arena.num_free) == (1, NUM_SLOTS)


# -- claims ---------------------------------------------------------------------------------------------------------


def test_one_of_many_claimants_wins(arena: Arena, clock: ManualClock, book: TicketBook, events: Counter[str]) -> None:
    """64 racers for each of 1,000 tickets: losers hear of a conflict and compute the prompt themselves."""
    racers = [Claimant(f"decode-{i}", "one") for i in range(64)]
    winners: Counter[str] = Counter()

    for i in range(1000):
        signed = book.issue(context(), "session-0", compute(arena, clock, 1))
        order = racers[i % 64 :] + racers[: i % 64]
        won = [racer.worker_id for racer in order if is_granted(book, signed, racer)]
        assert len(won) == 1
        winners.update(won)
        book.release([signed.ticket_id], "committed")

    assert winners.total() == 1000
    assert events[f"{CONFLICT} claimed"] == 63 * 1000
    assert events["claimed"] == events["committed"] == events["released committed"] == 1000


def is_granted(book: TicketBook, signed: SignedTicket, claimant: Claimant) -> bool:
    try:
        book.claim(signed.ticket_id, claimant, "one")
    except TicketConflict:
        return False
    return True


def test_a_claim_is_repeatable_until_it_is_committed(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """A lost answer may be asked for again; a replay after the end of reading may not."""
    signed = book.issue(context(), "session-0", compute(arena, clock))
    book.claim(signed.ticket_id, READER_0, "one")
    book.claim(signed.ticket_id, READER_0, "one")
    with pytest.raises(TicketConflict):
        book.commit(signed.ticket_id, READER_1, "one")
    book.commit(signed.ticket_id, READER_0, "one")
    book.commit(signed.ticket_id, READER_0, "one")

    for claimant in (READER_0, READER_1):
        with pytest.raises(TicketConflict):
            book.claim(signed.ticket_id, claimant, "one")
    assert (book.list()[0].state, book.list()[0].claimant) == (TicketState.COMMITTED, "decode-0")


def test_a_reader_that_was_started_anew_takes_over(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """Its earlier start is gone; should it wake up, what it says changes nothing."""
    signed = book.issue(context(), "session-0", compute(arena, clock))
    later = replace(READER_0, incarnation="two")
    book.claim(signed.ticket_id, READER_0, "one")
    book.claim(signed.ticket_id, later, "one")

    with pytest.raises(TicketConflict):
        book.claim(signed.ticket_id, READER_0, "one")
    with pytest.raises(TicketConflict):
        book.commit(signed.ticket_id, READER_0, "one")
    book.commit(signed.ticket_id, later, "one")


def test_nothing_is_committed_without_a_claim(
    book: TicketBook, arena: Arena, clock: ManualClock, events: Counter[str]
) -> None:
    """Whoever says so."""
    signed = book.issue(context(), "session-0", compute(arena, clock))

    with pytest.raises(TicketConflict):
        book.commit(signed.ticket_id, READER_0, "one")
    assert (events[f"{CONFLICT} issued"], events["committed"]) == (1, 0)


@pytest.mark.parametrize("incarnation", ["", "zero", "two"])
def test_another_start_of_the_owner_grants_nothing(
    book: TicketBook, arena: Arena, clock: ManualClock, events: Counter[str], incarnation: str
) -> None:
    """Ticket ids do not carry over; a worker does not speak for the one before it, nor for the one after."""
    signed = book.issue(context(), "session-0", compute(arena, clock))

    for act in (book.claim, book.commit):
        with pytest.raises(KvStale):
            act(signed.ticket_id, READER_0, incarnation)
    assert (events[f"{CONFLICT} stale"], book.list()[0].state) == (2, TicketState.ISSUED)


def test_a_ticket_that_is_over_cannot_be_claimed(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """Also in the moment between its end and the next sweep."""
    signed = book.issue(context(time_left_s=0), "session-0", compute(arena, clock))
    clock.advance(30)

    for ticket_id in (signed.ticket_id, "unknown"):
        with pytest.raises(TicketExpired):
            book.claim(ticket_id, READER_0, "one")


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_claim_does_not_outlive_its_gateways_session(
    book: TicketBook, arena: Arena, clock: ManualClock, events: Counter[str], is_committed: bool
) -> None:
    """Whoever reads then finds other generations, and its commit is refused."""
    signed = book.issue(context(), "session-0", compute(arena, clock))
    ticket = book.claim(signed.ticket_id, READER_0, "one")
    if is_committed:
        book.commit(signed.ticket_id, READER_0, "one")

    assert book.expire_session("session-0") == 1

    assert arena.num_free == NUM_SLOTS
    assert arena.generations(ticket.slots) != ticket.generations
    assert events["expired session"] == 1
    with pytest.raises(TicketExpired):
        book.commit(signed.ticket_id, READER_0, "one")


def test_a_release_does_not_wait_for_the_reader(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """A reader that died must not hold memory; one that lives finds that the slots are not the ticket's any more."""
    signed = book.issue(context(), "session-0", compute(arena, clock))
    ticket = book.claim(signed.ticket_id, READER_0, "one")

    assert book.release([signed.ticket_id], "cancelled") == 1

    assert arena.num_free == NUM_SLOTS
    assert arena.generations(ticket.slots) != ticket.generations


# -- what operators see ---------------------------------------------------------------------------------------------


def test_tickets_that_ended_are_remembered_for_a_while(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """Newest first, with how they ended and how old they became."""
    first, second = (book.issue(context(), "session-0", compute(arena, clock)) for _ in range(2))
    book.claim(first.ticket_id, READER_0, "one")
    clock.advance(2)
    book.release([first.ticket_id])
    book.revoke([second.ticket_id])

    newest, oldest = book.ended()

    assert (newest.ticket_id, newest.state, newest.claimant) == (second.ticket_id, TicketState.REVOKED, "")
    assert (oldest.ticket_id, oldest.state, oldest.claimant) == (first.ticket_id, TicketState.RELEASED, "decode-0")
    assert oldest.age_s == 2
    for _ in range(MAX_ENDED):
        book.release([book.issue(context(), "s", compute(arena, clock)).ticket_id])
    assert len(book.ended()) == MAX_ENDED


def test_slots_that_no_sweep_frees_have_leaked(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """As long as the sweeper has had no chance, they are only late."""
    compute(arena, clock)
    clock.advance(ORPHAN_AGE_S + LEAK_AGE_S)
    assert book.num_leaked_slots() == 0
    clock.advance(0.1)
    assert book.num_leaked_slots() == 3

    book.sweep()

    assert book.num_leaked_slots() == 0


# -- orphans --------------------------------------------------------------------------------------------------------


def test_published_slots_that_nobody_brings_are_freed(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """A cancel that came too late for the engine must not cost memory for ever."""
    compute(arena, clock)
    clock.advance(ORPHAN_AGE_S)
    book.sweep()
    assert arena.num_free == NUM_SLOTS - 3

    clock.advance(0.1)
    book.sweep()
    assert (arena.num_free, book.counts().orphans, book.counts().issued) == (NUM_SLOTS, 3, 0)


def test_slots_of_a_prefill_that_still_runs_are_no_orphans(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """The first prompt of a long call waits for the last one."""
    with book.prefilling():
        prompt = compute(arena, clock)
        clock.advance(100)
        book.sweep()
        book.issue(context(), "session-0", prompt)

    assert book.counts().orphans == 0


def test_a_prefill_that_began_later_does_not_protect_orphans(
    book: TicketBook, arena: Arena, clock: ManualClock
) -> None:
    """Or a busy worker would never get its memory back."""
    compute(arena, clock)
    clock.advance(1)
    with book.prefilling():
        clock.advance(100)
        book.sweep()

    assert (arena.num_free, book.counts().orphans) == (NUM_SLOTS, 3)


def test_the_reclaim_works_while_the_arena_is_full(book: TicketBook, arena: Arena, clock: ManualClock) -> None:
    """It depends on nothing that is exhausted."""
    book.issue(context(time_left_s=0), "session-0", compute(arena, clock, NUM_SLOTS))
    clock.advance(30)
    book.sweep()

    assert arena.num_free == NUM_SLOTS


# -- any order of events --------------------------------------------------------------------------------------------


class Prefill:
    """One prefill on its way: slots at the engine, then a published prompt, then a ticket."""

    def __init__(self, stack: ExitStack, slots: tuple[int, ...]) -> None:
        self.stack = stack
        self.slots = slots
        self.prompt: ComputedPrompt | None = None


CLAIMANTS = st.builds(Claimant, st.sampled_from(["x", "y"]), st.sampled_from("12"))


def verdict(action: Callable[[], object]) -> str:
    try:
        action()
    except KvError as e:
        return e.kv_reason
    return ""


class TicketLife(RuleBasedStateMachine):
    """Real book on a real arena under any order of prefills, cancels, claims, releases, leases and sweeps.

    The model is where each slot should be: free, at the engine, on its way (published), lost, or under a ticket.
    """

    prefills = Bundle("prefills")
    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.arena = make_arena()
        self.clock = ManualClock()
        self.book = TicketBook(self.arena, self.clock, ISSUER)
        self.at_engine: set[int] = set()
        self.on_the_way: set[int] = set()
        self.lost: set[int] = set()
        self.live: dict[str, tuple[KvTicket, float]] = {}
        self.claimants: dict[str, Claimant] = {}
        self.committed: set[str] = set()
        self.num_issued = 0
        self.running: list[Prefill] = []

    @rule(target=prefills, n=st.integers(1, 5))
    def begin(self, n: int) -> object:
        if n > self.arena.num_free:
            return multiple()
        stack = ExitStack()
        stack.enter_context(self.book.prefilling())
        prefill = Prefill(stack, self.arena.allocate(n))
        assert self.owned.isdisjoint(prefill.slots)
        self.at_engine.update(prefill.slots)
        self.running.append(prefill)
        return prefill

    @rule(prefill=prefills)
    def publish(self, prefill: Prefill) -> None:
        if prefill in self.running and prefill.prompt is None:
            self.arena.publish(prefill.slots, round(self.clock.monotonic() * 1e9))
            digests = tuple(block_digest([self.arena.slot(slot)]) for slot in prefill.slots)
            kv = PublishedKv(prefill.slots, digests, len(prefill.slots) * BLOCK_SIZE)
            prefill.prompt = ComputedPrompt(prompt_digest([1]), kv.num_tokens, (5,), kv)
            self.at_engine.difference_update(prefill.slots)
            self.on_the_way.update(prefill.slots)

    @rule(target=tickets, prefill=consumes(prefills), session=st.sampled_from("ab"), left=st.integers(0, 60))
    def end(self, prefill: Prefill, session: str, left: int) -> object:
        """Issue what was published; abort what was not."""
        self._leave(prefill)
        with prefill.stack:
            if prefill.prompt is None:
                self.arena.free(prefill.slots)
                self.at_engine.difference_update(prefill.slots)
                return multiple()
            signed = self.book.issue(context(left), session, prefill.prompt)
        self.on_the_way.difference_update(prefill.slots)
        self.num_issued += 1
        self.live[signed.ticket_id] = verify(signed, KEY), self.clock.monotonic()
        return signed.ticket_id

    @rule(target=tickets, n=st.integers(1, 5), session=st.sampled_from("ab"), left=st.integers(0, 60))
    def serve(self, n: int, session: str, left: int) -> object:
        """Most prefills are begun, published and issued without anything in between."""
        prefill = self.begin(n)
        if not isinstance(prefill, Prefill):
            return multiple()
        self.publish(prefill)
        return self.end(prefill, session, left)

    @rule(prefill=consumes(prefills))
    def lose(self, prefill: Prefill) -> None:
        """The caller is cancelled: the engine frees what it holds, and what it has published is lost."""
        self._leave(prefill)
        with prefill.stack:
            if prefill.prompt is None:
                self.arena.free(prefill.slots)
        self.lost.update(self.on_the_way.intersection(prefill.slots))
        self.on_the_way.difference_update(prefill.slots)
        self.at_engine.difference_update(prefill.slots)

    @rule(ticket=tickets, claimant=CLAIMANTS, incarnation=st.sampled_from(["one", "one", "one", "zero"]))
    def claim(self, ticket: str, claimant: Claimant, incarnation: str) -> None:
        """One reader wins; a later start of the same reader may take over, until the ticket was read."""
        holder = self.claimants.get(ticket)
        is_free = holder is None or (
            claimant.worker_id == holder.worker_id and claimant.incarnation >= holder.incarnation
        )
        wanted = self._verdict(ticket, incarnation, is_fine=is_free and ticket not in self.committed)

        assert verdict(lambda: self.book.claim(ticket, claimant, incarnation)) == wanted
        if wanted == "":
            self.claimants[ticket] = claimant

    @rule(ticket=tickets, claimant=CLAIMANTS, incarnation=st.sampled_from(["one", "one", "one", "zero"]))
    def commit(self, ticket: str, claimant: Claimant, incarnation: str) -> None:
        """Only who holds a ticket can have read it."""
        wanted = self._verdict(ticket, incarnation, is_fine=self.claimants.get(ticket) == claimant)

        assert verdict(lambda: self.book.commit(ticket, claimant, incarnation)) == wanted
        if wanted == "":
            self.committed.add(ticket)

    def _verdict(self, ticket: str, incarnation: str, *, is_fine: bool) -> str:
        if incarnation != "one":
            return "stale"
        if ticket not in self.live or self._expires_at(ticket) <= self.clock.monotonic():
            return "expired"
        return "" if is_fine else "conflict"

    @rule(chosen=st.lists(tickets, max_size=4), why=st.sampled_from(["committed", "cancelled"]))
    def release(self, chosen: list[str], why: str) -> None:
        assert self.book.release([*chosen, "unknown"], why) == self._end(chosen)

    @rule(chosen=st.lists(tickets, max_size=4))
    def revoke(self, chosen: list[str]) -> None:
        assert self.book.revoke(chosen) == self._end(chosen)

    @rule(session=st.sampled_from("abc"))
    def lose_session(self, session: str) -> None:
        chosen = [ticket_id for ticket_id, (ticket, _) in self.live.items() if ticket.session_id == session]
        assert self.book.expire_session(session) == self._end(chosen)

    @rule(span_s=st.sampled_from([0.1, 1.0, 6.0, 40.0]))
    def pass_time(self, span_s: float) -> None:
        self.clock.advance(span_s)

    @rule()
    def sweep(self) -> None:
        over = [ticket_id for ticket_id in self.live if self._expires_at(ticket_id) <= self.clock.monotonic()]
        assert self.book.sweep() == self._end(over)
        self.lost = {slot for slot, _ in self.arena.published() if slot in self.lost}

    @precondition(lambda self: not self.running)
    @rule()
    def rest(self) -> None:
        """When nothing is on its way, only live tickets hold memory."""
        self.clock.advance(ORPHAN_AGE_S + 0.1)
        self.sweep()
        assert not self.lost

    @invariant()
    def tickets_are_conserved(self) -> None:
        counts = self.book.counts()
        assert counts.issued == self.num_issued
        assert counts.issued == counts.released + counts.expired + counts.revoked + counts.live
        assert counts.is_balanced
        assert {record.ticket_id for record in self.book.list()} == set(self.live)

    @invariant()
    def states_are_those_of_the_last_event(self) -> None:
        for record in self.book.list():
            claimant = self.claimants.get(record.ticket_id)
            assert record.claimant == (claimant.worker_id if claimant else "")
            is_committed = record.ticket_id in self.committed
            assert record.state == ("committed" if is_committed else "claimed" if claimant else "issued")

    @invariant()
    def slots_are_conserved(self) -> None:
        under_tickets = [slot for ticket, _ in self.live.values() for slot in ticket.slots]
        assert len(under_tickets) == len(set(under_tickets))
        assert self.arena.num_free + len(self.owned) == self.arena.num_slots

    @invariant()
    def live_tickets_name_what_they_were_issued_for(self) -> None:
        for ticket, _ in self.live.values():
            assert self.arena.are_published(ticket.slots)
            assert self.arena.generations(ticket.slots) == ticket.generations

    def teardown(self) -> None:
        """After everything has ended, in whatever way, the arena is all free."""
        for prefill in list(self.running):
            self.end(prefill, "a", 0)
        self.clock.advance(MAX_LEASE_S + ORPHAN_AGE_S + 1)
        self.book.sweep()
        assert self.arena.num_free == self.arena.num_slots
        assert self.book.counts().live == 0
        self.arena.close()

    @property
    def owned(self) -> set[int]:
        under_tickets = {slot for ticket, _ in self.live.values() for slot in ticket.slots}
        parts = [self.at_engine, self.on_the_way, self.lost, under_tickets]
        assert sum(map(len, parts)) == len(set().union(*parts))
        return set().union(*parts)

    def _leave(self, prefill: Prefill) -> None:
        if prefill in self.running:
            self.running.remove(prefill)

    def _expires_at(self, ticket_id: str) -> float:
        ticket, issued_at = self.live[ticket_id]
        return issued_at + ticket.lease_s

    def _end(self, chosen: list[str]) -> int:
        return len([self.live.pop(ticket_id) for ticket_id in set(chosen) if ticket_id in self.live])


TestTicketLife = TicketLife.TestCase
TestTicketLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

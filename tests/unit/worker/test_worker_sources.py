from __future__ import annotations

from dataclasses import replace

import pytest

from inferflux.tickets import KvTicket, sign
from inferflux.types import ModelFingerprint, PrefilledPrompt, RequestContext
from inferflux.worker.sources import TicketGate

KEY = b"k" * 32
FINGERPRINT = ModelFingerprint("weights", "float32", "layout", 16)
CONTEXT = RequestContext("r-1", tenant="acme")
TICKET = KvTicket(
    ticket_id="t-1",
    request_id="r-1",
    tenant="acme",
    worker_id="prefill-0",
    incarnation="inc-1",
    session_id="s",
    fingerprint=FINGERPRINT,
    prompt_digest=b"p" * 16,
    num_tokens=20,
    slots=(4, 5),
    generations=(0, 1),
    digests=(b"a" * 16, b"b" * 16),
    slot_bytes=4096,
    socket_path="/run/a.sock",
    host_id="host",
    lease_s=30,
)
GATE = TicketGate(KEY, FINGERPRINT)


def prompt(ticket: KvTicket, key: bytes = KEY) -> PrefilledPrompt:
    return PrefilledPrompt(TICKET.prompt_digest, 20, (7,), sign(ticket, key))


def test_a_good_ticket_becomes_a_source() -> None:
    (source,), refused = GATE.admit(CONTEXT, [prompt(TICKET)])

    assert refused == []
    assert (source.ticket_id, source.slots, source.digests, source.incarnation) == (
        "t-1",
        (4, 5),
        TICKET.digests,
        "inc-1",
    )
    assert source.first_token_ids == (7,)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (prompt(TICKET, b"x" * 32), "mac"),
        (prompt(replace(TICKET, tenant="evil")), "audience"),
        (prompt(replace(TICKET, request_id="r-2")), "audience"),
        (prompt(replace(TICKET, fingerprint=replace(FINGERPRINT, dtype="bfloat16"))), "fingerprint"),
    ],
    ids=["mac", "tenant", "request", "fingerprint"],
)
def test_a_bad_ticket_is_refused_and_the_others_are_used(bad: PrefilledPrompt, reason: str) -> None:
    sources, (report,) = GATE.admit(CONTEXT, [bad, prompt(TICKET)])

    assert len(sources) == 1
    assert (report.ticket_id, report.result, report.reason) == ("t-1", "recomputed", reason)


def test_a_prompt_without_a_ticket_is_computed_again() -> None:
    assert GATE.admit(CONTEXT, [replace(prompt(TICKET), ticket=None)]) == ([], [])

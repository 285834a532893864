"""What a policy would have done: with recorded requests, and in shadow beside the one that decides."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import pytest

from inferflux.errors import ContentPolicyViolation, RateLimited
from inferflux.telemetry import metrics
from services.gateway.auth import KeyRing
from services.gateway.guardrails.referees import Referees
from services.gateway.policy import Policies, Policy, Source, compile_policy
from services.gateway.policy_report import Trial
from services.gateway.rehearsal import MAX_WAITING, MAX_WAITING_BYTES, Opinion, Recorded, Rehearsal, Shadow
from services.gateway.rehearsal_api import Record

CHAT = "/v1/chat/completions"
BLOCK = {"rules": [{"name": "words", "kind": "blocklist", "phrases": ["bluebird"], "action": "block"}]}


def policy(**sections: Any) -> Policy:
    return compile_policy(Source(7, orjson.dumps(sections)))


def request(text: str = "hello", **fields: Any) -> Recorded:
    body = orjson.dumps({"messages": [{"role": "user", "content": text}]})
    return Recorded(**{"path": CHAT, "body": body, "model": "tiny", "tenant": "acme", "key_id": "key_1"} | fields)


async def opinions(made: Policy, *requests: Recorded) -> list[Opinion]:
    rehearsal = Rehearsal(made, Referees())
    return [await rehearsal.judge(each) for each in requests]


async def test_guardrails_look_at_prompts_and_count_nothing():
    """Blocked, redacted or let through; what has no text is let through."""
    cards = {"name": "cards", "kind": "pii", "types": ["credit_card"], "action": "redact"}
    made = policy(guardrails={"rules": [*BLOCK["rules"], cards]})
    before = metrics.GUARDRAIL_VERDICTS.labels("words", "block", "input")._value.get()
    asked = request("project bluebird"), request("card 4111111111111111"), request(), replace(request(), body=b"")
    found = await opinions(made, *asked)

    assert [(o.refusal, o.is_redacted, o.rules) for o in found] == [
        ("CONTENT_POLICY_VIOLATION", False, ("words",)),
        ("", True, ("cards",)),
        ("", False, ()),
        ("", False, ()),
    ]
    assert metrics.GUARDRAIL_VERDICTS.labels("words", "block", "input")._value.get() == before


async def test_models_must_be_on_the_lists_of_tenant_and_team():
    """As for real requests, but for the list of the key, which no document changes."""
    section = {"tenants": {"acme": {"models": ["tiny", "big"], "teams": {"red": {"models": ["big"]}}}}}
    asked = request(), request(team="red"), request(model="other"), request(tenant="globex", model="other")
    found = await opinions(policy(identity=section), *asked)

    assert [o.refusal for o in found] == ["", "MODEL_NOT_FOUND", "MODEL_NOT_FOUND", ""]


async def test_limits_are_counted_at_the_time_of_the_requests():
    """What was refused counts for nothing, a window passes, a budget does not; tenants have their own."""
    limits = {
        "rate_limit": {"defaults": {"key": {"requests_per_minute": 2, "concurrent_requests": 1}}},
        "budgets": {"tenants": {"acme": {"tokens_per_day": 100}}},
    }
    times = [(100.0, 10), (101.0, 10), (102.0, 10), (170.0, 10), (171.0, 90)]
    asked = [request(at=at, prompt_tokens=tokens) for at, tokens in times]
    found = await opinions(policy(limits=limits), *asked, request(at=172.0, tenant="globex", prompt_tokens=1000))

    assert [o.refusal for o in found] == ["", "", "RATE_LIMITED", "", "BUDGET_EXHAUSTED", ""]
    assert found[2].message == "requests_per_minute of key key_1"
    assert found[4].message == "tokens_per_day of tenant acme"


def test_records_of_the_audit_log_are_taken_as_they_are():
    """Times and tokens; a prompt that is a hash, or was cut, is no text."""
    record = {"path": CHAT, "at": "2026-01-02T00:00:00+00:00", "prompt_tokens": 3, "prompt": '{"a": 1}', "status": 200}
    whole = Record.model_validate(record).recorded()
    cut = Record.model_validate(record | {"prompt": '{"a": ', "at": "soon"}).recorded()

    assert (whole.body, whole.at, whole.prompt_tokens) == (b'{"a": 1}', 1767312000.0, 3)
    assert (cut.body, cut.at) == (b"", 0.0)


def in_shadow(share: float = 0.0) -> Policies:
    return Policies(9, KeyRing(1), Policy(1), policy(guardrails=BLOCK), share, 7)


def count(outcome: str) -> float:
    return metrics.POLICY_SHADOW.labels(outcome)._value.get()


@pytest.mark.looptime
async def test_a_policy_in_shadow_is_asked_about_what_the_live_one_decided():
    """Only its own refusals are differences; what failed for other reasons is not asked about, nor are long bodies."""
    trial = Trial()
    trial.begin(in_shadow())
    shadow = Shadow(in_shadow, Referees(), trial)
    names = ("same", "refuse", "allow")
    before = {name: count(name) for name in names}
    blocked = ContentPolicyViolation("no")
    for text, error in (("hi", None), ("bluebird", None), ("hi", blocked), ("bluebird", blocked)):
        shadow.take(request(text), error)
    shadow.take(request("bluebird"), RateLimited("slow down"))
    shadow.take(request("bluebird" * MAX_WAITING_BYTES), None)
    task = asyncio.create_task(shadow.run())
    await asyncio.sleep(1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

    assert {name: count(name) - before[name] for name in names} == {"same": 2, "refuse": 1, "allow": 1}
    assert (trial.candidate.num_requests, trial.candidate.num_failures) == (4, 1)


@pytest.mark.looptime
async def test_what_comes_faster_than_it_is_judged_is_left_out():
    """Memory is bounded, and a candidate that has become a canary is not asked any more."""
    shadow = Shadow(in_shadow, Referees(), Trial())
    before = count("same")
    for _ in range(3 * MAX_WAITING):
        shadow.take(request(), None)
    task = asyncio.create_task(shadow.run())
    await asyncio.sleep(1)
    task.cancel()

    assert shadow.is_wanted
    assert not Shadow(lambda: in_shadow(0.5), Referees(), Trial()).is_wanted
    assert not Shadow(lambda: None, Referees(), Trial()).is_wanted
    assert count("same") - before == MAX_WAITING

"""The section `limits`: which limits a request has, and how they are counted."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from inferflux.errors import PolicyInvalid
from inferflux.policy.counting import Ask, Booking, Counters, Exchange, Refusal, counts_until, slot_at
from inferflux.policy.document import parse
from inferflux.policy.limits import Kind, Limit, LimitsSection, Name, Scope, Span, compile_limits

NOW_S = datetime(2026, 12, 31, 23, 59, 30, 500_000, UTC).timestamp()
NAME = Name(Scope.KEY, "key_1", Kind.REQUESTS_PER_MINUTE)


def limits(**section):
    return compile_limits(LimitsSection.model_validate(section))


def test_a_request_has_the_limits_of_its_key_team_and_tenant():
    """Entries where there are some, else the default of the scope; an empty entry lifts it."""
    made = limits(
        rate_limit={
            "defaults": {"key": {"requests_per_minute": 5, "concurrent_requests": 2}},
            "keys": {"key_2": {"requests_per_minute": 9}, "key_3": {}},
            "tenants": {"acme": {"tokens_per_minute": 100}},
        },
        budgets={"teams": {"acme/lab": {"usd_per_day": 0.5}}},
    )

    assert made.of("acme", "lab", "key_2") == (
        Limit(Name(Scope.KEY, "key_2", Kind.REQUESTS_PER_MINUTE), 9),
        Limit(Name(Scope.TEAM, "acme/lab", Kind.USD_PER_DAY), 500_000),
        Limit(Name(Scope.TENANT, "acme", Kind.TOKENS_PER_MINUTE), 100),
    )
    assert [limit.kind for limit in made.of("blue", "", "key_1")] == ["requests_per_minute", "concurrent_requests"]
    assert made.of("blue", "lab", "key_3") == ()


def test_without_a_section_nothing_is_limited():
    """Not even counted."""
    assert compile_limits(None) is None
    assert limits().of("acme", "lab", "key_1") == ()


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ('{"limits": {"rate_limit": {"keys": {"k": {"requests_per_minute": 0}}}}}', "$.limits.rate_limit.keys.k"),
        ('{"limits": {"rate_limit": {"teams": {"lab": {}}}}}', "$.limits.rate_limit.teams.lab"),
        ('{"limits": {"budgets": {"tenants": {"a b": {}}}}}', "$.limits.budgets.tenants.a b"),
        ('{"limits": {"budgets": {"defaults": {"key": {"usd_per_day": -1}}}}}', "$.limits.budgets.defaults.key"),
        ('{"limits": {"budgets": {"prices": {"m": {"input": 1}}}}}', "$.limits.budgets.prices.m.output"),
        ('{"limits": {"away_share": 2}}', "$.limits.away_share"),
        ('{"limits": {"when_store_is_away": "hope"}}', "$.limits.when_store_is_away"),
    ],
)
def test_a_wrong_section_is_refused_with_its_place(document, path):
    """As any other part of the document."""
    with pytest.raises(PolicyInvalid) as caught:
        parse(document.encode())

    assert path in caught.value.message


@pytest.mark.parametrize(("span", "seconds"), [(Span.MINUTE, 61), (Span.DAY, 30), (Span.MONTH, 30)])
def test_entries_count_until_their_span_is_over(span, seconds):
    """Days and months of UTC, also over the end of a year; a minute is any 60 seconds."""
    until = counts_until(span, slot_at(span, NOW_S), NOW_S)

    assert until - NOW_S == seconds - 0.5


def test_who_must_wait_is_told_for_how_long():
    """Until enough of what counts is old, and no longer."""
    counters = Counters()
    for at_s, need in ((0, 3), (10, 3), (20, 4)):
        counters.exchange(NOW_S + at_s, Exchange("t", "g", asks=[Ask(NAME, 10, need, 0)]))
    waits = [counters.exchange(NOW_S + 30, Exchange("t", "g", asks=[Ask(NAME, 10, need, 0)])) for need in (1, 4, 10)]

    assert [type(wait) for wait in waits] == [Refusal] * 3
    assert [wait.wait_s for wait in waits] == [30.5, 40.5, 50.5]


def test_shares_shrink_to_nothing_near_the_limit():
    """An eighth of what is left, so that the last requests are counted by themselves."""
    counters, extras = Counters(), []
    for _ in range(20):
        (share,) = counters.exchange(NOW_S, Exchange("t", "g", asks=[Ask(NAME, 100, 1, 100)]))
        extras.append(share.extra)

    assert extras[0] == 12
    assert extras == sorted(extras, reverse=True)
    assert extras[-1] <= 1


def test_nothing_is_ever_less_than_nothing():
    """Whatever is booked back."""
    counters = Counters()
    counters.book(NOW_S, "g", Booking(NAME, slot_at(Span.MINUTE, NOW_S), -5))

    assert counters.used(NAME, NOW_S) == 0

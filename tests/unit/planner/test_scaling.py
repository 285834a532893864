"""How many replicas: bounds, monotony, and what each limit asks for."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.registry.planner.scaling import Cost, Load, Slo, desired_replicas, explain

SLO = Slo(latency_s=2.0, tokens_per_s=1000.0, num_sequences=10, utilization=0.8, kv_utilization=0.9, warm_up_s=58.0)
WIDE = Cost(1, 1000)
amounts = st.floats(0, 1e7)
spans = st.lists(st.tuples(st.floats(0.5, 30), amounts), max_size=20).map(tuple)
loads = st.builds(
    Load,
    num_ready=st.integers(0, 200),
    num_running=st.integers(0, 10_000),
    num_waiting=st.integers(0, 10_000),
    queued_tokens=amounts,
    arrivals=spans,
    kv_demand=st.floats(0, 20),
    latency_s=st.none() | st.floats(0, 1000),
)
slos = st.builds(
    Slo,
    latency_s=st.floats(0.01, 60),
    tokens_per_s=st.just(0.0) | st.floats(1, 1e5),
    num_sequences=st.just(0) | st.integers(1, 512),
    utilization=st.floats(0.1, 1),
    warm_up_s=st.floats(0, 600),
)


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    low = draw(st.integers(1, 50))
    prices = st.just(0.0) | st.floats(0.01, 1000)
    return Cost(low, draw(st.integers(low, 500)), draw(prices), draw(prices), draw(prices))


@given(loads, slos, costs())
def test_never_outside_the_bounds(load: Load, slo: Slo, cost: Cost) -> None:
    assert cost.min_replicas <= desired_replicas(load, slo, cost) <= cost.max_replicas


@given(loads, slos, costs())
def test_the_budget_is_kept_unless_the_minimum_is_dearer(load: Load, slo: Slo, cost: Cost) -> None:
    desired = desired_replicas(load, slo, cost)

    if cost.per_hour and cost.max_per_hour and desired > cost.min_replicas:
        assert desired * cost.per_hour <= cost.max_per_hour * (1 + 1e-6)


@given(loads, slos, costs(), st.data())
def test_more_load_never_asks_for_fewer(load: Load, slo: Slo, cost: Cost, data: st.DataObject) -> None:
    """Whatever grows: requests, queue, traffic as a whole, need of KV room, latency."""
    more, times = st.floats(0, 1e5), data.draw(st.floats(1, 10))
    longer = None if load.latency_s is None else load.latency_s + data.draw(more)
    heavier = replace(
        load,
        num_running=load.num_running + data.draw(st.integers(0, 1000)),
        num_waiting=load.num_waiting + data.draw(st.integers(0, 1000)),
        queued_tokens=load.queued_tokens + data.draw(more),
        arrivals=tuple((span_s, tokens * times) for span_s, tokens in load.arrivals),
        kv_demand=load.kv_demand + data.draw(st.floats(0, 10)),
        latency_s=longer,
    )

    assert desired_replicas(heavier, slo, cost) >= desired_replicas(load, slo, cost)


@given(loads, slos)
def test_the_explanation_leads_to_the_number(load: Load, slo: Slo) -> None:
    """The largest term, rounded up, is what is wanted where no bound is in the way."""
    verdict = explain(load, slo, Cost(1, 10**9))

    largest = max((term.replicas for term in verdict.terms), default=0)
    assert largest - 1e-6 <= verdict.desired < max(1, largest) + 1


def test_an_idle_pool_is_as_small_as_it_may_be() -> None:
    assert desired_replicas(Load(num_ready=5), SLO, Cost(2, 9)) == 2


def test_steady_arrivals_need_their_rate() -> None:
    """4,000 tokens/s at 800 tokens/s each."""
    assert desired_replicas(Load(arrivals=((5.0, 20_000.0),) * 30), SLO, WIDE) == 5


def test_a_burst_that_a_queue_may_absorb_needs_less_than_its_rate() -> None:
    """20,000 tokens in one span of 5 s: 6 s for 95% of them when one second may be spent waiting, else 20 s."""
    burst = (*((5.0, 0.0),) * 10, (5.0, 20_000.0), *((5.0, 0.0),) * 10)

    assert desired_replicas(Load(arrivals=burst), SLO, WIDE) == 4
    assert desired_replicas(Load(arrivals=burst), replace(SLO, share=1.0), WIDE) == 5
    assert desired_replicas(Load(arrivals=burst), replace(SLO, latency_s=30.0), WIDE) == 2


def test_a_backlog_is_to_be_gone_when_a_new_replica_can_have_helped() -> None:
    """600,000 tokens within a minute at 1,000 tokens/s."""
    assert desired_replicas(Load(queued_tokens=600_000), SLO, WIDE) == 10


def test_each_request_needs_a_place_in_a_batch() -> None:
    """20 requests, 8 on each."""
    assert desired_replicas(Load(num_running=15, num_waiting=5), SLO, WIDE) == 3


def test_kv_room_that_runs_out_asks_for_more() -> None:
    verdict = explain(Load(num_ready=4, kv_demand=1.35), SLO, WIDE)

    assert verdict.desired == 6
    assert max(verdict.terms, key=lambda term: term.replicas).name == "kv"


def test_a_missed_goal_asks_for_a_quarter_more() -> None:
    assert desired_replicas(Load(num_ready=8, latency_s=2.1), SLO, WIDE) == 9
    assert desired_replicas(Load(num_ready=4, latency_s=60.0), SLO, WIDE) == 5
    assert desired_replicas(Load(num_ready=4, latency_s=1.9), SLO, WIDE) == 1


def test_what_a_replica_can_do_may_be_unknown() -> None:
    """Then only what users get, and room for KV, count."""
    unknown = Slo(latency_s=2.0)

    assert desired_replicas(Load(queued_tokens=1e6, arrivals=((5.0, 1e6),)), unknown, WIDE) == 1
    assert desired_replicas(Load(num_ready=3, latency_s=4.0), unknown, WIDE) == 4


def test_the_budget_says_when_it_is_what_limits() -> None:
    load = Load(num_running=100)

    assert explain(load, SLO, Cost(1, 10)).bound == "max_replicas"
    hourly = explain(load, SLO, Cost(1, 100, per_hour=2.0, max_per_hour=10.0))
    assert (hourly.desired, hourly.bound) == (5, "max_per_hour")


def test_cost_per_token_allows_what_the_traffic_pays_for() -> None:
    """At 1,000 tokens/s 3.6 million an hour: 2 per million pay for 3 replicas at 2.4."""
    load = Load(num_running=100, arrivals=((5.0, 5000.0),))

    verdict = explain(load, SLO, Cost(1, 100, per_hour=2.4, max_per_million_tokens=2.0))

    assert (verdict.desired, verdict.bound) == (3, "max_per_million_tokens")

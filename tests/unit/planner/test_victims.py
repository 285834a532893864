from __future__ import annotations

from inferflux.types import Pulse, Role, State
from services.registry.planner.pool import Counters, Member, Report, group
from services.registry.planner.victims import choose
from tests.unit.registry.records import worker


def member(name: str, num_requests: int = 0, eta_s: float | None = 0.0, state: State = State.READY, **pulse) -> Member:
    report = Report(Pulse("i", state, **pulse), num_requests, eta_s=eta_s)
    return Member(worker(name, state=state), report)


def names(members: list[Member]) -> list[str]:
    return [each.worker.worker_id for each in members]


def test_the_cheapest_drains_go_first() -> None:
    """What does not serve yet, what is idle, what is over soon, what nobody knows."""
    members = [
        member("unknown", 1, None),
        member("long", 2, 60.0),
        member("short", 3, 1.0),
        member("idle"),
        member("starting", state=State.STARTING),
        member("holding", 0, 2.0, num_live_tickets=1),
    ]

    assert names(choose(members, 9)) == ["starting", "idle", "short", "holding", "long", "unknown"]


def test_who_leaves_anyhow_is_no_victim() -> None:
    members = [member("a", state=State.DRAINING), member("b", state=State.FAILED), member("c")]

    assert names(choose(members, 3)) == ["c"]
    assert choose(members, 0) == []
    assert choose(members, -1) == []


def test_who_does_not_answer_goes_last() -> None:
    assert names(choose([Member(worker("mute"), None), member("busy", 5, 100.0)], 1)) == ["busy"]


def reading(counters: Counters, at: float, role: Role = Role.PREFILL, wanted: int = 0, **pulses: Report):
    members = [Member(worker(name, role=role), report) for name, report in pulses.items()]
    return counters.read(at, members, wanted, role)


def report(num_tokens: int = 0, incarnation: str = "i", **pulse) -> Report:
    return Report(Pulse(incarnation, State.READY, **pulse), num_tokens=num_tokens)


def test_arrivals_are_what_was_accepted_since_the_look_before() -> None:
    """Queued tokens count when they come, not again when they are done; a new start counts from zero."""
    counters = Counters()

    first = reading(counters, 0, a=report(1000, num_queued_tokens=500), b=report(50))
    second = reading(counters, 5, a=report(1400, num_queued_tokens=200), b=report(10, "j"))

    assert first.arrived_tokens == 0
    assert second.arrived_tokens == 100 + 10


def test_what_a_busy_worker_does_is_learned_and_what_an_idle_one_does_is_not() -> None:
    counters = Counters()
    reading(counters, 0, a=report(0, num_queued_tokens=9000), b=report(0))

    busy = reading(counters, 5, a=report(5000, num_queued_tokens=4000), b=report(100))
    idle = reading(counters, 10, a=report(9000), b=report(200))

    assert busy.busy_tokens_per_s == 1000
    assert idle.busy_tokens_per_s is None


def test_what_was_asked_for_and_is_not_there_is_starting() -> None:
    assert reading(Counters(), 0, wanted=3, a=report()).num_starting == 2
    assert reading(Counters(), 0, wanted=0, a=report()).num_starting == 0


def test_kv_need_counts_those_that_wait() -> None:
    full = report(num_running=8, num_waiting=4, num_blocks=100, num_free_blocks=10)

    load = reading(Counters(), 0, Role.DECODE, a=full).load

    assert round(load.kv_demand, 6) == 1.35
    assert (load.num_running, load.num_waiting) == (8, 4)


def test_workers_are_sorted_into_pools() -> None:
    members = [member("a"), Member(worker("p", role=Role.PREFILL), None), Member(worker("x", model="other"), None)]

    assert {key: names(pool) for key, pool in group(members).items()} == {
        (Role.DECODE, "tiny"): ["a"],
        (Role.PREFILL, "tiny"): ["p"],
        (Role.DECODE, "other"): ["x"],
    }

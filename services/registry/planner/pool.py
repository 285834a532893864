"""What a planner sees of the workers of one model and role, and what it read of them before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from inferflux.types import Pulse, Role, State
from services.registry.planner.scaler import Reading
from services.registry.planner.scaling import Load
from services.registry.workers import Worker


@dataclass(frozen=True, slots=True)
class Report:
    """A worker's answer about itself. `eta_s`, `latency_s` None: not known. `num_gateways`: that are connected."""

    pulse: Pulse
    num_requests: int = 0
    num_tokens: int = 0
    eta_s: float | None = None
    latency_s: float | None = None
    num_gateways: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker and its report; None: it did not answer."""

    worker: Worker
    report: Report | None

    @property
    def state(self) -> State:
        """By its own word, which is newer, or the registry's."""
        return self.report.pulse.state if self.report else self.worker.state


@dataclass(frozen=True, slots=True)
class Counter:
    """What one start of a worker had accepted at an instant. Prompt tokens count when they are accepted."""

    at: float
    incarnation: str
    accepted: int
    done: int
    is_queued: bool


@dataclass(slots=True)
class Counters:
    """The memory of one pool's counters, by worker."""

    _counters: dict[str, Counter] = field(default_factory=dict)

    def read(self, now: float, members: Sequence[Member], num_wanted: int, role: Role) -> Reading:
        """Sum up a pool. `num_wanted`: workers that were asked for and not taken back, if that is known."""
        before, self._counters = self._counters, {m.worker.worker_id: c for m in members if (c := _counter(now, m))}
        pairs = [(before.get(worker_id), counter) for worker_id, counter in self._counters.items()]
        speeds = [s for a, b in pairs if role is Role.PREFILL and (s := _busy_speed(a, b)) is not None]
        ready = [m for m in members if m.state is State.READY]
        num_leaving = sum(m.state in (State.DRAINING, State.FAILED) for m in members)
        num_starting = max(len(members) - len(ready) - num_leaving, num_wanted - len(ready))
        return Reading(
            load=_load(ready, role),
            num_starting=num_starting,
            arrived_tokens=sum(_arrived(a, b) for a, b in pairs),
            busy_tokens_per_s=sum(speeds) / len(speeds) if speeds else None,
            max_sequences=min((m.worker.max_num_seqs for m in ready), default=0) if role is Role.DECODE else 0,
        )


def _load(ready: Sequence[Member], role: Role) -> Load:
    reports = [member.report for member in ready if member.report is not None]
    pulses = [report.pulse for report in reports]
    num_running, num_waiting = sum(p.num_running for p in pulses), sum(p.num_waiting for p in pulses)
    shares = [_kv_used(pulse, role) for pulse in pulses]
    kv_used = sum(shares) / len(shares) if shares else 0.0
    return Load(
        num_ready=len(ready),
        num_running=num_running,
        num_waiting=num_waiting,
        queued_tokens=sum(p.num_queued_tokens for p in pulses),
        # Those that wait will need about as much as those that run.
        kv_demand=kv_used * (1 + num_waiting / num_running) if num_running else kv_used,
        latency_s=_latency_s(reports),
    )


def _kv_used(pulse: Pulse, role: Role) -> float:
    free, room = (
        (pulse.num_free_slots, pulse.num_slots) if role is Role.PREFILL else (pulse.num_free_blocks, pulse.num_blocks)
    )
    return 1 - free / room if room else 0.0


def _latency_s(reports: Sequence[Report]) -> float | None:
    """The median of what workers say: one slow worker is no reason for more of them."""
    latencies = sorted(report.latency_s for report in reports if report.latency_s is not None)
    return latencies[len(latencies) // 2] if latencies else None


def _counter(now: float, member: Member) -> Counter | None:
    if member.report is None:
        return None
    pulse = member.report.pulse
    accepted = member.report.num_tokens + pulse.num_queued_tokens
    return Counter(now, pulse.incarnation, accepted, member.report.num_tokens, pulse.num_queued_tokens > 0)


def _arrived(before: Counter | None, now: Counter) -> float:
    """Tokens since the look before; a new start counts from zero, a worker that was never seen not at all."""
    if before is None:
        return 0.0
    return max(0, now.accepted - (before.accepted if before.incarnation == now.incarnation else 0))


def _busy_speed(before: Counter | None, now: Counter) -> float | None:
    """What a worker did per second, if it had a queue at both looks."""
    if before is None or before.incarnation != now.incarnation or not (before.is_queued and now.is_queued):
        return None
    return (now.done - before.done) / (now.at - before.at) if now.done > before.done else None


def group(members: Sequence[Member]) -> Mapping[tuple[Role, str], list[Member]]:
    """Sort workers into their pools."""
    pools: dict[tuple[Role, str], list[Member]] = {}
    for member in members:
        pools.setdefault((member.worker.role, member.worker.model), []).append(member)
    return pools

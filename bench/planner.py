"""Measure replica-hours and requests in time of recorded loads, under each way of scaling.

    python -m bench.planner                                   # a synthetic hour, made here
    python -m bench.planner --trace azure_llm_2023_code.csv --ttft 2
    python -m bench.planner --trace azure_llm_2023_code.csv --ttft 2 --day
    python -m bench.planner --trace mooncake_trace.jsonl --ttft 30

A discrete-event simulation in virtual time. The planner is the real one (services/registry/planner); the others are a
fixed size, the algorithm of Kubernetes' HorizontalPodAutoscaler on CPU, and the same on the length of the queue. Each
of the others gets the setting with which it is cheapest, found by trying all of them on the very same trace, as long as
it meets the goals of as many requests as the planner does: hindsight that no operator has.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from inferflux.types import Role
from services.registry.planner.scaler import Reading, Scaler
from services.registry.planner.scaling import Load
from services.registry.planner.spec import PoolSpec

PERIOD_S = 5.0
HPA_PERIOD_S, HPA_TOLERANCE, HPA_STABILIZATION_S = 15.0, 0.1, 300.0
CPU_WINDOW_S = 60.0
MAX_REPLICAS = 200


@dataclass(frozen=True, slots=True)
class Profile:
    """What one replica does. guess: the order of magnitude of an 8-billion-parameter model on one data-centre GPU.

    A prompt takes `prefill_base_s` and its tokens over `prefill_tokens_per_s`; a decode step of k sequences takes
    `step_s + k * step_per_sequence_s`; a decode replica has room for `kv_tokens` and `max_sequences`.
    """

    prefill_base_s: float = 0.02
    prefill_tokens_per_s: float = 8000.0
    step_s: float = 0.012
    step_per_sequence_s: float = 0.0005
    max_sequences: int = 64
    kv_tokens: int = 400_000
    warm_up_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Goals:
    """What a request must get: seconds to its first token, and per token after it."""

    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Request:
    """One request of a trace, and what became of it."""

    at: float
    num_prompt: int
    num_output: int
    first_at: float = math.inf
    done_at: float = math.inf

    def is_in_time(self, role: Role, goals: Goals) -> bool:
        """Whether a pool did its part."""
        if role is Role.PREFILL:
            return self.first_at - self.at <= goals.ttft_s
        return (self.done_at - self.first_at) / max(1, self.num_output - 1) <= goals.tpot_s


@dataclass(slots=True)
class View:
    """What a way of scaling may know. `cpu`: share of the last minute that each ready replica was busy."""

    now: float
    num_starting: int
    load: Load
    arrived_tokens: float
    busy_tokens_per_s: float | None
    cpu: list[float]


Controller = Callable[[View], int]


@dataclass(slots=True, eq=False)
class Replica:
    """One worker in the simulation; `log` are the times it began and ended to be busy, in the last minute or so."""

    ready_at: float
    began_at: float
    is_draining: bool = False
    is_gone: bool = False
    log: deque[tuple[float, float]] = field(default_factory=deque)
    busy_since: float | None = None
    running: list[tuple[float, int, Request]] = field(default_factory=list)
    tokens_done: float = 0.0
    looked_at: float = 0.0
    version: int = 0

    def set_busy(self, now: float, *, is_busy: bool) -> None:
        """Note a change."""
        if is_busy and self.busy_since is None:
            self.busy_since = now
        elif not is_busy and self.busy_since is not None:
            self.log.append((self.busy_since, now))
            self.busy_since = None

    def busy_share(self, now: float) -> float:
        """Busy share of the last minute, or of its life if that is shorter."""
        since = max(now - CPU_WINDOW_S, self.ready_at)
        while self.log and self.log[0][1] <= since:
            self.log.popleft()
        busy_s = sum(end - max(begin, since) for begin, end in self.log)
        busy_s += now - max(self.busy_since, since) if self.busy_since is not None else 0.0
        return busy_s / max(1e-9, now - since)


class Pool:
    """One pool in virtual time: a queue, replicas that start, serve and drain, and someone who decides how many."""

    def __init__(self, profile: Profile, size: int, controller: Controller | None, period_s: float) -> None:
        self.profile = profile
        self.sizes: list[tuple[float, int]] = [(0.0, size)]
        self.replica_s = 0.0
        self.arrived_tokens = 0.0
        self.latencies: deque[tuple[float, float]] = deque()
        self.queue: deque[Request] = deque()
        self._controller = controller
        self._period_s = period_s
        self._was_queued = False
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._replicas = [Replica(0.0, 0.0) for _ in range(size)]

    def run(self, requests: Sequence[Request], until: float) -> None:
        """Serve all requests; the controller looks until the end of the trace."""
        for request, at in self.arrivals(requests):
            self.at(at, lambda now, request=request: self.arrive(now, request))
        if self._controller is not None:
            for i in range(1, int(until / self._period_s) + 1):
                self.at(i * self._period_s, self.look)
        while self._events:
            now, _, action = heapq.heappop(self._events)
            action(now)
        for replica in self._replicas:
            if not replica.is_gone:
                self.replica_s += until - replica.began_at

    def at(self, when: float, action: Callable[[float], None]) -> None:
        """Have something done later."""
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, action))

    def arrivals(self, requests: Sequence[Request]) -> Iterator[tuple[Request, float]]:
        """When each request comes here."""
        raise NotImplementedError

    def arrive(self, now: float, request: Request) -> None:
        """Take a request in."""
        self.queue.append(request)
        self.dispatch(now)

    def dispatch(self, now: float) -> None:
        """Give waiting requests to replicas that have room."""
        raise NotImplementedError

    def load(self, now: float) -> tuple[Load, float | None]:
        """Say what the pool has to do, and how fast a replica is, if that shows."""
        raise NotImplementedError

    def ready(self, now: float) -> list[Replica]:
        """List the replicas that take requests."""
        return [r for r in self._replicas if r.ready_at <= now and not r.is_draining]

    def p90(self, now: float) -> float | None:
        """What 9 of 10 requests of the last minute got."""
        while self.latencies and self.latencies[0][0] < now - 60:
            self.latencies.popleft()
        values = sorted(value for _, value in self.latencies)
        return values[int(0.9 * (len(values) - 1))] if len(values) >= 5 else None

    def look(self, now: float) -> None:
        """Let the controller decide, and do it."""
        assert self._controller is not None
        load, busy = self.load(now)
        starting = [r for r in self._replicas if r.ready_at > now and not r.is_draining]
        view = View(now, len(starting), load, self.arrived_tokens, busy, [r.busy_share(now) for r in self.ready(now)])
        self.arrived_tokens = 0.0
        size, wanted = load.num_ready + len(starting), min(MAX_REPLICAS, self._controller(view))
        if wanted != size:
            self.sizes.append((now, wanted))
        for _ in range(wanted - size):
            replica = Replica(now + self.profile.warm_up_s, now)
            self._replicas.append(replica)
            self.at(replica.ready_at, self.dispatch)
        victims = starting + sorted(self.ready(now), key=lambda r: len(r.running))
        for replica in victims[: max(0, size - wanted)]:
            replica.is_draining = True
            self.retire(now, replica)

    def retire(self, now: float, replica: Replica) -> None:
        """Stop paying for a draining replica that has nothing left to do."""
        if replica.is_draining and not replica.running and not replica.is_gone:
            replica.is_gone = True
            self.replica_s += now - replica.began_at
            self._replicas.remove(replica)


class PrefillPool(Pool):
    """Each replica computes one prompt after the other."""

    def arrivals(self, requests: Sequence[Request]) -> Iterator[tuple[Request, float]]:
        return ((request, request.at) for request in requests)

    def arrive(self, now: float, request: Request) -> None:
        self.arrived_tokens += request.num_prompt
        super().arrive(now, request)

    def dispatch(self, now: float) -> None:
        idle = [r for r in self.ready(now) if not r.running]
        while self.queue and idle:
            replica, request = idle.pop(), self.queue.popleft()
            span_s = self.profile.prefill_base_s + request.num_prompt / self.profile.prefill_tokens_per_s
            replica.running.append((now, 0, request))
            replica.set_busy(now, is_busy=True)
            self.at(now + span_s, lambda at, replica=replica, request=request: self.finish(at, replica, request))

    def finish(self, now: float, replica: Replica, request: Request) -> None:
        request.first_at = now
        self.latencies.append((now, now - request.at))
        replica.running.clear()
        replica.tokens_done += request.num_prompt
        self.dispatch(now)
        if not replica.running:
            replica.set_busy(now, is_busy=False)
        self.retire(now, replica)

    def load(self, now: float) -> tuple[Load, float | None]:
        ready = self.ready(now)
        running = [r.running[0] for r in self._replicas if r.running]
        rate = self.profile.prefill_tokens_per_s
        left = sum(max(0.0, request.num_prompt - (now - began_at) * rate) for began_at, _, request in running)
        queued = left + sum(request.num_prompt for request in self.queue)
        is_queued = bool(self.queue)
        busy = rate if is_queued and self._was_queued else None
        self._was_queued = is_queued
        return Load(len(ready), len(running), len(self.queue), queued, latency_s=self.p90(now)), busy


class DecodePool(Pool):
    """Each replica runs a batch; every step gives each sequence one token and takes longer the more there are.

    A replica's `tokens_done` is how many steps it made; a sequence ends at the step it is listed with.
    """

    def arrivals(self, requests: Sequence[Request]) -> Iterator[tuple[Request, float]]:
        return ((request, request.first_at) for request in requests)

    def dispatch(self, now: float) -> None:
        while self.queue:
            request = self.queue[0]
            able = [r for r in self.ready(now) if self.has_room(r, request)]
            if not able:
                return
            self.queue.popleft()
            replica = min(able, key=lambda r: len(r.running))
            self.advance(now, replica)
            end = replica.tokens_done + max(1, request.num_output - 1)
            heapq.heappush(replica.running, (end, id(request), request))
            replica.set_busy(now, is_busy=True)
            self.expect(now, replica)

    def has_room(self, replica: Replica, request: Request) -> bool:
        used = sum(r.num_prompt + r.num_output for _, _, r in replica.running)
        fits = used + request.num_prompt + request.num_output <= self.profile.kv_tokens
        return not replica.running or (fits and len(replica.running) < self.profile.max_sequences)

    def advance(self, now: float, replica: Replica) -> None:
        """Bring a replica's steps up to now."""
        replica.tokens_done += (now - replica.looked_at) / self.step_s(len(replica.running)) if replica.running else 0
        replica.looked_at = now

    def step_s(self, num_sequences: int) -> float:
        return self.profile.step_s + num_sequences * self.profile.step_per_sequence_s

    def expect(self, now: float, replica: Replica) -> None:
        """Plan the end of the sequence that ends first; what was planned before no longer holds."""
        replica.version += 1
        if replica.running:
            left_s = (replica.running[0][0] - replica.tokens_done) * self.step_s(len(replica.running))
            version = replica.version
            self.at(now + max(0.0, left_s), lambda at: self.finish(at, replica, version))

    def finish(self, now: float, replica: Replica, version: int) -> None:
        if version != replica.version:
            return
        self.advance(now, replica)
        while replica.running and replica.running[0][0] <= replica.tokens_done + 1e-6:
            _, _, request = heapq.heappop(replica.running)
            request.done_at = now
            self.arrived_tokens += request.num_output
            self.latencies.append((now, (now - request.first_at) / max(1, request.num_output - 1)))
        if not replica.running:
            replica.set_busy(now, is_busy=False)
        self.expect(now, replica)
        self.dispatch(now)
        self.retire(now, replica)

    def load(self, now: float) -> tuple[Load, float | None]:
        ready = self.ready(now)
        running = [entry[2] for r in ready for entry in r.running]
        used = sum(r.num_prompt + r.num_output for r in (*running, *self.queue))
        kv_demand = used / (max(1, len(ready)) * self.profile.kv_tokens)
        load = Load(len(ready), len(running), len(self.queue), kv_demand=kv_demand, latency_s=self.p90(now))
        return load, None


def planner(profile: Profile, role: Role, goals: Goals) -> Controller:
    """The real one, with nothing given but the goal: what a replica can do it learns."""
    scaler = Scaler()
    spec = PoolSpec(
        model="m",
        role=role,
        min_replicas=1,
        max_replicas=MAX_REPLICAS,
        slo_ms=1000 * (goals.ttft_s if role is Role.PREFILL else goals.tpot_s),
        warm_up_s=profile.warm_up_s,
    )
    max_sequences = profile.max_sequences if role is Role.DECODE else 0

    def decide(view: View) -> int:
        reading = Reading(view.load, view.num_starting, view.arrived_tokens, view.busy_tokens_per_s, max_sequences)
        return scaler.look(view.now, reading, spec).target

    return decide


class Hpa:
    """The HorizontalPodAutoscaler's algorithm: the ratio of a measure to its target, tolerance, rates, stabilization.

    `ratio(view)` is the measure over the target for the pods that are ready; see kubernetes.io, "Horizontal Pod
    Autoscaling", algorithm details.
    """

    def __init__(self, ratio: Callable[[View], float]) -> None:
        self._ratio = ratio
        self._recommended: deque[tuple[float, int]] = deque()

    def __call__(self, view: View) -> int:
        current = view.load.num_ready + view.num_starting
        wanted = min(max(1, self._wanted(view, current)), max(2 * current, current + 4), MAX_REPLICAS)
        self._recommended.append((view.now, wanted))
        while self._recommended[0][0] <= view.now - HPA_STABILIZATION_S:
            self._recommended.popleft()
        return wanted if wanted >= current else min(current, max(n for _, n in self._recommended))

    def _wanted(self, view: View, current: int) -> int:
        ratio = self._ratio(view)
        if abs(ratio - 1) <= HPA_TOLERANCE:
            return current
        if ratio > 1 and view.num_starting:  # pods that are not ready count as if they used nothing
            ratio = ratio * view.load.num_ready / current
            if ratio <= 1 + HPA_TOLERANCE:
                return current
            return math.ceil(ratio * current - 1e-9)
        return math.ceil(ratio * view.load.num_ready - 1e-9)


def on_cpu(target: float) -> Controller:
    """Scale on the average busy share of the replicas: an engine's process computes or polls while it has work."""
    return Hpa(lambda view: (sum(view.cpu) / max(1, len(view.cpu))) / target)


def on_queue(target: float) -> Controller:
    """Scale on the number of waiting requests per replica (an AverageValue metric; unready pods are no matter)."""

    def decide(view: View) -> float:
        return view.load.num_waiting / target / max(1, view.load.num_ready)

    return Hpa(decide)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One pool under one way of scaling. `worst`: most changes of direction within any 10 minutes."""

    role: Role
    way: str
    setting: str
    attainment: float
    replica_hours: float
    smallest: int
    largest: int
    reversals: int
    worst: int


@dataclass(frozen=True, slots=True)
class Study:
    """A trace, what serves it, and what is promised."""

    trace: Sequence[Request]
    profile: Profile
    goals: Goals

    @property
    def hours(self) -> float:
        """Length of the trace."""
        return self.trace[-1].at / 3600

    def first_size(self, role: Role) -> int:
        """How big a pool that scales begins: as its first five minutes need it, on average."""
        first, profile = [request for request in self.trace if request.at < 300], self.profile
        if role is Role.PREFILL:
            busy_s = sum(request.num_prompt for request in first) / profile.prefill_tokens_per_s
        else:
            step_s = profile.step_s + profile.max_sequences / 2 * profile.step_per_sequence_s
            busy_s = sum(r.num_output * step_s * (r.num_prompt + r.num_output) for r in first) / profile.kv_tokens
        return max(1, math.ceil(busy_s / 300 / 0.85))

    def run(self, role: Role, way: str, setting: float) -> Outcome:
        """Run one pool over the trace. Prefill writes `first_at` into the requests, decode starts from there."""
        size = int(setting) if way == "fixed" else self.first_size(role)
        kind = PrefillPool if role is Role.PREFILL else DecodePool
        pool = kind(
            self.profile, size, self.controller(role, way, setting), PERIOD_S if way == "planner" else HPA_PERIOD_S
        )
        pool.run(self.trace, self.trace[-1].at)
        turns = reversals(pool.sizes)
        sizes = [size for _, size in pool.sizes]
        return Outcome(
            role=role,
            way=way,
            setting=f"{setting:g}" if way != "planner" else "",
            attainment=sum(request.is_in_time(role, self.goals) for request in self.trace) / len(self.trace),
            replica_hours=pool.replica_s / 3600,
            smallest=min(sizes),
            largest=max(sizes),
            reversals=len(turns),
            worst=max((sum(begin <= at < begin + 600 for at in turns) for begin in turns), default=0),
        )

    def controller(self, role: Role, way: str, setting: float) -> Controller | None:
        """Make one way of scaling."""
        match way:
            case "planner":
                return planner(self.profile, role, self.goals)
            case "HPA on CPU":
                return on_cpu(setting)
            case "queue":
                return on_queue(setting)
            case _:
                return None

    def cheapest(self, role: Role, way: str, settings: Sequence[float], attainment: float) -> Outcome:
        """Find the cheapest setting that is as good; if none is, the best one. `settings`: the dearest last."""
        low, high = 0, len(settings) - 1
        best = self.run(role, way, settings[high])
        while low < high:
            middle = (low + high) // 2
            outcome = self.run(role, way, settings[middle])
            if outcome.attainment >= attainment - TIE:
                best, high = outcome, middle
            else:
                low = middle + 1
        return best


WAYS: dict[str, Sequence[float]] = {
    "fixed": range(1, MAX_REPLICAS + 1),
    "HPA on CPU": [percent / 100 for percent in range(95, 5, -5)],
    "queue": [32, 16, 8, 4, 2, 1, 0.5, 0.25, 0.1, 0.05],
}
TIE = 0.001


def reversals(sizes: Sequence[tuple[float, int]]) -> list[float]:
    """List when the size changed its direction."""
    moves = [(at, after - before) for (_, before), (at, after) in pairwise(sizes) if after != before]
    return [at for (_, before), (at, after) in pairwise(moves) if before * after < 0]


def compare(study: Study) -> list[Outcome]:
    """Run the planner, then the others with the settings that make them as good."""
    outcomes = []
    for role in (Role.PREFILL, Role.DECODE):
        ours = study.run(role, "planner", 0)
        first = [request.first_at for request in study.trace]
        outcomes.append(ours)
        outcomes += [study.cheapest(role, way, settings, ours.attainment) for way, settings in WAYS.items()]
        for request, first_at in zip(study.trace, first, strict=True):
            request.first_at = first_at  # decode begins where the planner's prefill pool ended
    return outcomes


def read(path: Path) -> list[Request]:
    """Read a trace: Mooncake's JSON lines or Azure's CSV."""
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            rows = map(json.loads, file)
            return [Request(row["timestamp"] / 1000, row["input_length"], row["output_length"]) for row in rows]
        records = list(csv.DictReader(file))
    times = [datetime.fromisoformat(record["TIMESTAMP"][:26]).timestamp() for record in records]
    pairs = zip(times, records, strict=True)
    return [Request(at - times[0], int(r["ContextTokens"]), max(1, int(r["GeneratedTokens"]))) for at, r in pairs]


def synthetic(seed: int = 7, span_s: float = 3600.0) -> list[Request]:
    """Make an hour: a swell of traffic, bursts on top of it, log-normal lengths. Poisson arrivals."""
    rng, now, requests = random.Random(seed), 0.0, []
    while now < span_s:
        swell = 4 + 12 * math.sin(math.pi * now / span_s) ** 2
        burst = 2.0 if now % 600 < 60 else 1.0
        now += rng.expovariate(swell * burst)
        num_prompt = min(16_000, int(rng.lognormvariate(7.0, 1.0)) + 1)
        requests.append(Request(now, num_prompt, min(2000, int(rng.lognormvariate(4.5, 0.8)) + 1)))
    return requests


def multiply(trace: Sequence[Request], times: int, seed: int = 1) -> list[Request]:
    """Let so many times as many users do the same, within 5 s of each other: a bigger service with the same bursts."""
    rng = random.Random(seed)
    copies = [
        Request(max(0.0, request.at + (rng.uniform(-5, 5) if i else 0)), request.num_prompt, request.num_output)
        for request in trace
        for i in range(times)
    ]
    return sorted(copies, key=lambda request: request.at)


def day(trace: Sequence[Request], seed: int = 3) -> list[Request]:
    """Make a day of a recorded hour: each hour is the recorded one again, with the share of its users that is awake.

    The share follows a cosine from 10% at 4:00 to 100% at 16:00; users are dropped at random.
    """
    rng, span_s = random.Random(seed), trace[-1].at
    requests = []
    for hour in range(max(1, round(24 * 3600 / span_s))):
        for request in trace:
            at = hour * span_s + request.at
            share = 0.55 - 0.45 * math.cos(2 * math.pi * (at / 3600 - 4) / 24)
            if rng.random() < share:
                requests.append(Request(at, request.num_prompt, request.num_output))
    return requests


def show(study: Study, outcomes: Sequence[Outcome]) -> None:
    """Print the table, the sum over both pools, and JSON."""
    print(f"{len(study.trace)} requests in {study.hours:.1f} h; goals {study.goals}; {study.profile}")
    heads = f"{'setting':>8} {'in time':>8} {'hours':>8} {'sizes':>8} {'reversals':>9} {'in 10 min':>9}"
    print(f"{'pool':8} {'way':11} {heads}")
    for o in outcomes:
        sizes = f"{o.smallest}-{o.largest}"
        print(
            f"{o.role:8} {o.way:11} {o.setting:>8} {o.attainment:8.2%} {o.replica_hours:8.2f} {sizes:>8}"
            f" {o.reversals:9} {o.worst:9}"
        )
    savings = summary(outcomes)
    for way, saving in savings.items():
        print(f"both pools: {saving['saved']:.0%} fewer replica-hours than {way}" + saving["note"])
    turns = sum(o.reversals for o in outcomes if o.way == "planner") / 2
    print(f"planner: {turns / (study.hours * 6):.2f} reversals per 10 minutes and pool")
    print(json.dumps({"outcomes": [asdict(o) for o in outcomes], "saved": savings}))


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Compare the replica-hours of both pools; says where a way never became as good."""
    ours = {o.role: o for o in outcomes if o.way == "planner"}
    result = {}
    for way in WAYS:
        theirs = [o for o in outcomes if o.way == way]
        worse = [o.role for o in theirs if o.attainment < ours[o.role].attainment - TIE]
        note = f" (whose {', '.join(worse)} pool never was as good)" if worse else ""
        spent = sum(o.replica_hours for o in theirs)
        result[way] = {"saved": 1 - sum(o.replica_hours for o in ours.values()) / spent, "note": note}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake's JSON lines or Azure's CSV; default: synthetic")
    parser.add_argument("--times", type=int, default=1, help="so many times as many users")
    parser.add_argument("--day", action="store_true", help="make a day of it")
    parser.add_argument("--ttft", type=float, default=5.0, help="goal for the first token, in seconds")
    parser.add_argument("--tpot", type=float, default=0.05, help="goal per output token, in seconds")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds until a new replica serves")
    options = parser.parse_args()
    trace = multiply(read(options.trace) if options.trace else synthetic(), options.times)
    trace = day(trace) if options.day else trace
    study = Study(trace, Profile(warm_up_s=options.warm_up), Goals(options.ttft, options.tpot))
    show(study, compare(study))


if __name__ == "__main__":
    main()

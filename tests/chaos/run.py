"""One run of chaos: rounds of load, one proven fault, and judgement, until enough faults have happened."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inferflux.cli import control, operator
from inferflux.paths import Home
from services.gateway.auth import cache_salt
from tests.chaos.client import Clients, Outcome, Verdict, send_all
from tests.chaos.faults import Fault, Injector, Process, Void, catalogue
from tests.chaos.probe import WORKERS, Holdings, Probe
from tests.chaos.reference import Reference, ReplayReference, SimReference
from tests.chaos.report import Report, Round
from tests.chaos.workload import Workload
from tests.support.cluster import Cluster, new_home

RIVAL = "rival"
SIM_PROFILE = {"step_ms": 4.0, "slot_bytes": 65536, "block_size": 16}
RECLAIM_LIMIT_S = 10.0
READY_S = {"sim": 30.0, "vllm": 180.0}
HURRY_AFTER_S = 0.6
"""The supervisor waits longer after each death of a young process; here deaths are no reason to be careful."""
SETTLED_S = 0.5
"""Two pulses: a gateway may know a new worker and not yet that it is ready."""
POLL_S = 0.05
Disturbance = Callable[[], Awaitable[list[str]]]
Tell = Callable[[Round], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What to do. `seconds`: no new round after that. `only`: faults whose name has one of these texts, by comma."""

    engine: str = "sim"
    faults: int = 200
    seconds: float = 720.0
    seed: int = 1
    prefill: int = 2
    decode: int = 2
    gateways: int = 2
    requests: int = 8
    only: str = ""


class Chaos:
    """A cluster, its clients and its judge. Use in `async with`, then `run`."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._rng = random.Random(options.seed)
        self._stack = AsyncExitStack()
        self._home = new_home()
        self._report = Report(options.engine, options.seed)
        num_tokens = 60 if options.engine == "sim" else 24
        self._workload = Workload(options.engine, options.seed, num_tokens=num_tokens)
        wanted = options.only.split(",")
        self._faults = [f for f in catalogue(has_peers=options.gateways > 1) if any(text in f.name for text in wanted)]
        self._recoveries: dict[str, asyncio.Task[None]] = {}
        self._usable_since: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._set_up()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _set_up(self) -> None:
        options = self._options
        profile = self._home / "sim_profile.json"
        profile.write_text(json.dumps(SIM_PROFILE))
        folder, log = self._home / "failpoints", self._home / "failpoints.log"
        folder.mkdir()
        env = {"IFX_FAILPOINTS_DIR": str(folder), "IFX_FAILPOINTS_LOG": str(log)}
        env |= {"INFERFLUX_SIM_PROFILE": str(profile)} if options.engine == "sim" else {}
        self.cluster = Cluster.start(
            engine=options.engine,
            prefill=options.prefill,
            decode=options.decode,
            gateways=options.gateways,
            options=["--dtype", "float32"] if options.engine == "vllm" else [],
            env=env,
            home=self._home,
        )
        await self._stack.enter_async_context(self.cluster)
        rival, tenant = await asyncio.to_thread(self._create_rival)
        self._clients = Clients(self.cluster.urls, (self.cluster.api_key, rival))
        self._stack.push_async_callback(self._clients.close)
        self._probe = Probe(self.cluster)
        self._stack.push_async_callback(self._probe.close)
        self._injector = Injector(folder, log, self._rng)
        self._reference = self._make_reference(profile, tenant)
        await self._reference.start()
        self._stack.push_async_callback(self._reference.close)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._recoveries.values():
            task.cancel()
        await asyncio.gather(*self._recoveries.values(), return_exceptions=True)
        await self._stack.aclose()

    async def run(self, tell: Tell = lambda _: None) -> Report:
        """Run all rounds, telling of each. Raises AssertionError when even the undisturbed cluster is not exact."""
        started_at = time.monotonic()
        await self.calibrate()
        while len(self._report.faults) < self._options.faults and time.monotonic() - started_at < self._options.seconds:
            fault, targets = await self._draw()
            self._report.rounds.append(await self._round(fault, targets))
            tell(self._report.rounds[-1])
        await self._close_books()
        self._report.seconds = time.monotonic() - started_at
        return self._report

    # Rounds

    async def calibrate(self) -> None:
        """Ask for everything once, with nobody disturbing: all must be exact, and what is held then is normal."""
        await self.until_connected()
        outcomes = await asyncio.gather(
            *(self._clients.ask(ask, i) for i, ask in enumerate(self._workload.everything()))
        )
        calm = Round(0, "none")
        await self._judge(calm, outcomes)
        if calm.violations:
            raise AssertionError(f"not exact even undisturbed: {calm.violations}")
        await self._check_tenants()
        processes = list((await self._probe.processes()).values())
        await self._probe.learn(processes)
        self._probe.open_files(processes)

    async def _check_tenants(self) -> None:
        """Require that tenants' answers to equal requests differ: then exactness also says whose KV was read."""
        if self._options.engine == "sim":
            ask = self._workload.everything()[0]
            answers = [await self._reference.answer(replace(ask, tenant=tenant)) for tenant in range(2)]
            assert answers[0] != answers[1], "tenants can't be told apart"

    async def disturb(self, name: str, disturbance: Disturbance) -> Round:
        """Run one round with a disturbance of the caller's own, which returns its evidence."""
        return await self._round(Fault(name, ()), [], disturbance)

    async def _round(self, fault: Fault, targets: list[Process], disturbance: Disturbance | None = None) -> Round:
        record = Round(len(self._report.rounds) + 1, fault.name)
        asks = self._workload.draw(self._options.requests)
        leaves = {ask.number: self._rng.uniform(0.01, 0.8) for ask in asks[::2]} if fault.action == "leave" else {}
        spread_s = 0.4 if self._options.engine == "sim" else 2.0
        tasks = await send_all(self._clients, asks, self._rng, spread_s, leaves)
        # A failpoint waits for its site, everything else for the middle of the load.
        await asyncio.sleep(0 if fault.action == "failpoint" else self._rng.uniform(0.1, 1.5) * spread_s)
        fault_at = time.monotonic()
        try:
            if disturbance is not None:
                record.evidence = await disturbance()
            elif targets:
                record.evidence = await self._injector.inject(fault, targets)
        except (Void, ProcessLookupError) as e:
            record.is_void, record.evidence = True, [str(e)]
        if fault.action == "failpoint":
            fault_at = time.monotonic()
        if fault.is_deadly and not record.is_void:
            for target in targets:
                self._recover(target, record)
        over_at = time.monotonic()  # a process that is stopped can give nothing back
        outcomes = await asyncio.gather(*tasks)
        await self._judge_holdings(record, max(over_at, *(o.ended_at for o in outcomes)))
        await self._judge(record, outcomes)
        self._judge_books(record, fault, outcomes)
        record.gaps = [gap for o in outcomes if o.ask.is_streamed and (gap := _gap_at(o, fault_at)) > 0]
        return record

    async def _draw(self) -> tuple[Fault, list[Process]]:
        """Draw a fault that leaves a usable path, waiting until there is one."""
        deadline = time.monotonic() + READY_S[self._options.engine]
        while time.monotonic() < deadline:
            possible = await self._possible()
            if possible:
                fault = self._rng.choices(list(possible), [fault.weight for fault in possible])[0]
                return fault, [self._rng.choice(possible[fault][role]) for role in fault.roles]
            await asyncio.sleep(POLL_S)
        raise AssertionError("no fault leaves a usable path: some process is not back")

    async def _possible(self) -> dict[Fault, dict[str, list[Process]]]:
        processes = await self._probe.processes()
        gateways = [p for p in processes.values() if p["role"] == "gateway"]
        views = await asyncio.gather(*(self._probe.up(g["id"]) for g in gateways))
        ready = {id_ for id_, p in processes.items() if p["ready"] and id_ not in self._recoveries}
        connected = frozenset.intersection(*(view for view in views if view)) if any(views) else frozenset()
        usable = {id_ for id_ in ready if processes[id_]["role"] not in WORKERS or id_ in connected}
        if any(not view for g, view in zip(gateways, views, strict=True) if g["id"] in ready):
            usable -= {g["id"] for g in gateways}
        now = time.monotonic()
        self._usable_since = {id_: self._usable_since.get(id_, now) for id_ in usable}
        by_role: dict[str, list[Process]] = {}
        for id_ in sorted(id_ for id_, since in self._usable_since.items() if now - since >= SETTLED_S):
            by_role.setdefault(processes[id_]["role"], []).append(processes[id_])
        return {fault: by_role for fault in self._faults if _leaves_a_path(fault, by_role)}

    async def until_connected(self) -> None:
        """Wait until every gateway has a stream to every worker."""
        deadline = time.monotonic() + READY_S[self._options.engine]
        wanted = {f"{role}-{i}" for role in WORKERS for i in range(getattr(self._options, role))}
        while time.monotonic() < deadline:
            views = [await self._probe.up(f"gateway-{i}") for i in range(self._options.gateways)]
            if all(wanted <= view for view in views):
                return
            await asyncio.sleep(POLL_S)
        raise AssertionError("the gateways do not see all workers")

    # Recovery

    def _recover(self, target: Process, record: Round) -> None:
        task = asyncio.create_task(self._until_back(target, record), name=f"back-{target['id']}")
        self._recoveries[target["id"]] = task
        task.add_done_callback(lambda _: self._recoveries.pop(target["id"], None))

    async def _until_back(self, target: Process, record: Round) -> None:
        died_at = time.monotonic()
        deadline = died_at + READY_S[self._options.engine]
        is_hurried = False
        while time.monotonic() < deadline:
            now = (await self._probe.processes())[target["id"]]
            if now["ready"] and now["pid"] != target["pid"]:
                record.recovery_s = time.monotonic() - died_at
                return
            if now["pid"] is None and time.monotonic() - died_at > HURRY_AFTER_S and not is_hurried:
                is_hurried = True
                await asyncio.to_thread(self._hurry, target["id"])
            await asyncio.sleep(2 * POLL_S)
        record.violations.append(f"{target['id']} is not back")

    def _hurry(self, name: str) -> None:
        socket = Home(self._home).supervisor_socket
        control.ask(socket, "restart", timeout_s=READY_S[self._options.engine], name=name)

    # Oracles

    async def _judge(self, record: Round, outcomes: Sequence[Outcome]) -> None:
        """Each request ended once, as it should, with exactly what it would have said undisturbed."""
        record.num_requests = len(outcomes)
        record.verdicts = dict(Counter(str(o.verdict) for o in outcomes))
        record.num_resent = sum(o.num_attempts - 1 for o in outcomes)
        if self._options.engine == "vllm":
            await self._until_calm()
        for outcome in outcomes:
            who = f"{outcome.ask.mode} {outcome.request_id}"
            record.violations += [f"{who}: {flaw}" for flaw in outcome.transcript.flaws]
            if outcome.verdict not in {Verdict.OK, Verdict.LEFT}:
                record.violations.append(f"{who}: lost: {outcome.verdict} {outcome.status} {outcome.detail[:200]}")
            else:
                self._compare(record, outcome, await self._reference.answer(outcome.ask))

    @staticmethod
    def _compare(record: Round, outcome: Outcome, wanted: Any) -> None:
        who = f"{outcome.ask.mode} {outcome.request_id}"
        if outcome.verdict is Verdict.OK and outcome.transcript != wanted:
            record.violations.append(f"{who}: inexact: {outcome.transcript} is not {wanted}")
        attempts = [outcome] if outcome.verdict is Verdict.LEFT else []
        while (outcome := outcome.earlier) is not None:  # type: ignore[assignment]
            attempts.append(outcome)
        for attempt in attempts:
            if not attempt.transcript.is_beginning_of(wanted):
                record.violations.append(f"{who}: inexact beginning: {attempt.transcript.said}")

    def _judge_books(self, record: Round, fault: Fault, outcomes: Sequence[Outcome]) -> None:
        """What the gateways wrote down agrees with what clients saw: each request once, with the same status."""
        lines = [line for i in range(self._options.gateways) for line in self._probe.new_lines(f"gateway-{i}")]
        written = Counter((line["request_id"], line["status"]) for line in lines if line.get("msg") == "request")
        for outcome in outcomes:
            if outcome.verdict in {Verdict.LEFT, Verdict.TIMEOUT, Verdict.RESET} or not outcome.request_id:
                continue
            num = written[outcome.request_id, outcome.status]
            if num != 1 and outcome.num_attempts == 1:
                record.violations.append(
                    f"{outcome.request_id}: {num} lines with {outcome.status} in the gateway's log"
                )
        if fault.action == "leave":
            num_left = sum(o.verdict is Verdict.LEFT for o in outcomes)
            num_seen = sum(n for (_, status), n in written.items() if status == 499)
            record.evidence = [f"{num_left} clients hung up, the gateways noticed {num_seen}"]
            record.is_void = num_left == 0
            # Who left in the instant of the end may pass for one who stayed.
            if num_seen > num_left:
                record.violations.append(record.evidence[0])

    async def _judge_holdings(self, record: Round, idle_at: float) -> None:
        """Wait until idle workers hold nothing; what takes too long is a leak."""
        while holdings := await self._holdings():
            if time.monotonic() - idle_at > RECLAIM_LIMIT_S:
                record.leaked_blocks, record.leaked_slots = holdings.blocks, holdings.slots
                record.leaked_tickets = holdings.tickets
                record.violations.append(f"leak: {holdings}")
                break
            await asyncio.sleep(POLL_S)
        record.reclaim_s = time.monotonic() - idle_at

    async def _holdings(self) -> Holdings:
        processes = await self._probe.processes()
        return await self._probe.held(p for p in processes.values() if p["id"] not in self._recoveries)

    async def _until_calm(self) -> None:
        """Wait until everything is back, so that the undisturbed run really is."""
        await asyncio.gather(*self._recoveries.values(), return_exceptions=True)
        await self.until_connected()

    async def _close_books(self) -> None:
        """Look for what only a whole run can leak: files, and arenas of workers that are long dead."""
        await self._until_calm()
        for _ in range(4):  # a reader lets go of a dead arena when it meets the new one
            outcomes = await asyncio.gather(*(self._clients.ask(ask, 0) for ask in self._workload.draw(12)))
            await self._judge(last := Round(0, "after all"), outcomes)
            self._report.violations += last.violations
        processes = list((await self._probe.processes()).values())
        self._report.leaked_fds = self._probe.open_files(processes)
        self._report.live_arena_bytes, self._report.leaked_arena_bytes = self._probe.arenas()

    # Set-up

    def _create_rival(self) -> tuple[str, str]:
        """Make a key of another tenant; returns it, and the tenant that the first key belongs to."""
        home = Home(self._home)
        [first] = operator.list_keys(home)
        return operator.create_key(home, RIVAL, ["generate"], RIVAL)["secret"], first["tenant"]

    def _make_reference(self, profile: Path, tenant: str) -> Reference:
        if self._options.engine == "vllm":
            return ReplayReference(self._clients)
        key = (Home(self._home).secrets / "tenant.key").read_bytes()
        salts = [cache_salt(key, tenant) for tenant in (tenant, RIVAL)]
        return SimReference(self.cluster.model, salts, profile, self._home)


def _leaves_a_path(fault: Fault, by_role: dict[str, list[Process]]) -> bool:
    """Whether all targets are there, and another decode worker and gateway that could take over."""
    is_lasting = fault.action != "stall"
    for role in fault.roles:
        needed = 2 if role in {"decode", "gateway"} and is_lasting else 1
        if len(by_role.get(role, ())) < needed:
            return False
    return len(by_role.get("decode", ())) >= 1 and len(by_role.get("gateway", ())) >= 1


def _gap_at(outcome: Outcome, at: float) -> float:
    """The gap of a stream that an instant fell into; 0 when it was not running then."""
    for before, after in zip(outcome.arrivals, outcome.arrivals[1:], strict=False):
        if before <= at + 0.02 and after >= at:
            return after - before
    return 0.0

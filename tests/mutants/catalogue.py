"""The mutants. Each changes the product in the process that applies it, and names what must notice it.

A killer is `simulation`, `corruption`, or a pytest path. What can't be put into the present code is in NOT_YET.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inferflux.engine.sim import hydration
from inferflux.engine.sim.scheduler import Scheduler
from inferflux.kv import shm
from inferflux.kv.arena import ArenaReader
from inferflux.tickets import TicketBook
from inferflux.types import KvReport
from inferflux.worker import sources
from inferflux.worker.leases import SessionLeases
from services.gateway import flow
from services.gateway.heart import Heart
from services.gateway.lifeline import Lifeline
from services.gateway.pool import Pool
from services.gateway.prefill import PrefillLink, Tickets
from services.gateway.reply import Reply
from services.gateway.session import DecodeSession
from services.prefill.__main__ import PrefillPart
from tests.simulation import engine as ghost

SIMULATION, CORRUPTION = "simulation", "corruption"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One failure. `history`: where it happened to others."""

    name: str
    history: str
    apply: Callable[[], None]
    killers: tuple[str, ...]


def stale_kv_accepted() -> None:
    """Blocks are used without a look at generation and digest."""
    ArenaReader.check = lambda *_: None  # type: ignore[method-assign]

    def copy(self: Any, reader: ArenaReader, source: Any, i: int, block: int) -> None:
        self._kv.block(block)[:] = reader.slot(source.slots[i])

    hydration.Hydrator._copy_block = copy  # type: ignore[method-assign]
    vars(ghost)["block_digest"] = lambda _: b"same"


def early_error_swallowed() -> None:
    """An error before the first byte becomes an empty 200."""

    async def fail(self: Reply, error: Any) -> None:
        self.error = error
        if not self.has_started:
            await self._send({"type": "http.response.start", "status": 200, "headers": []})
            self.status = 200
        await self._end(b"")

    Reply.fail = fail  # type: ignore[method-assign]


def dead_handle_reused() -> None:
    """A restarted worker's arena is looked for in the mapping of its predecessor."""
    original = hydration.Hydrator._reader

    def reader(self: Any, source: Any) -> ArenaReader:
        known = self._readers.get(source.socket_path)
        return known[1] if known else original(self, source)

    hydration.Hydrator._reader = reader  # type: ignore[method-assign]


def no_deadline_on_silence() -> None:
    """A peer that says nothing is waited for."""
    Heart.is_dead = property(lambda _: False)  # type: ignore[method-assign,assignment]


def rejection_keeps_ticket() -> None:
    """What ends without a report gives no ticket back."""
    Tickets.__exit__ = lambda *_: None  # type: ignore[method-assign,assignment]


def abort_races_finish() -> None:
    """A prefill that is given up may already have an answer on its way, and nobody asks for it."""
    PrefillLink.disown = lambda *_: None  # type: ignore[method-assign]


def full_hit_not_reported() -> None:
    """A transfer that turns out to be unneeded is never reported as done."""
    original = Scheduler._start

    def start(self: Scheduler, job: Any, report: KvReport | None = None) -> None:
        job.source = job.source if report is not None else None
        original(self, job, report)

    Scheduler._start = start  # type: ignore[method-assign]


def no_negative_completion() -> None:
    """A ticket that is refused is dropped in silence."""
    original = sources.TicketGate.admit

    def admit(self: Any, *args: Any) -> Any:
        return original(self, *args)[0], []

    sources.TicketGate.admit = admit  # type: ignore[method-assign]


def heartbeat_with_wrong_id() -> None:
    """The stream that should renew the lease names another session."""
    original = PrefillLink._converse

    async def converse(self: PrefillLink) -> None:
        hello = self._hello
        self._hello = type(hello)(session_id="another", gateway_id=hello.gateway_id)
        try:
            conversation = asyncio.ensure_future(original(self))
            await asyncio.sleep(0)  # the stream is open, under the wrong name
        finally:
            self._hello = hello
        await conversation

    PrefillLink._converse = converse  # type: ignore[method-assign]


def incarnation_ignored() -> None:
    """Any start of a worker is as good as any other."""

    def answer(self: Any, peer: Any, request: bytes) -> None:
        shm.socket.send_fds(peer, [request], [self._arena.fd])

    shm.ArenaServer._answer = answer  # type: ignore[method-assign]


def silent_recompute() -> None:
    """Recomputed prompts are not counted."""
    original = Tickets.settle

    def settle(self: Tickets, report: KvReport) -> None:
        if report.result != "recomputed":
            original(self, report)
        elif report.ticket_id in self._held:
            self._held.discard(report.ticket_id)
            self._give_back({report.ticket_id}, report.result)

    Tickets.settle = settle  # type: ignore[method-assign]


def sleeps_until_traffic() -> None:
    """A request whose blocks have come does not wake an idle engine."""
    original = Scheduler._end_loading

    def end_loading(self: Scheduler, job: Any, done: Any) -> None:
        wake, self._wake = self._wake, asyncio.Event()
        original(self, job, done)
        self._wake = wake

    Scheduler._end_loading = end_loading  # type: ignore[method-assign]


def cleanup_only_on_new_work() -> None:
    """What is lost is reclaimed when the next prompt comes, if one comes."""
    original = TicketBook.issue

    async def run(self: PrefillPart) -> None:
        await asyncio.Event().wait()

    def issue(self: TicketBook, *args: Any) -> Any:
        self.sweep()
        return original(self, *args)

    PrefillPart.run = run  # type: ignore[method-assign]
    TicketBook.issue = issue  # type: ignore[method-assign]
    SessionLeases._lose = lambda *_: None  # type: ignore[method-assign]


def freed_under_a_transfer() -> None:
    """Aborting a request frees the blocks that a copy is writing into."""
    original = Scheduler.abort

    def abort(self: Scheduler, job: Any) -> None:
        if job in self._loading:
            self._drop(job)
        original(self, job)

    Scheduler.abort = abort  # type: ignore[method-assign]


def legs_not_coupled() -> None:
    """A prefill worker that fails takes its request with it."""

    async def prefill(call: Any, route: Any) -> Any:
        if route.prefill is None:
            return Tickets()
        with call.span("prefill") as span:
            return await route.prefill.prefill(call, span)

    flow.prefill = prefill


def restarted_peer_unusable() -> None:
    """A worker that was lost once is never connected to again."""

    async def run(self: Any) -> None:
        await self._converse_once()
        await asyncio.Event().wait()

    PrefillLink.run = run  # type: ignore[method-assign]
    DecodeSession.run = run  # type: ignore[method-assign]


def disconnect_not_delivered() -> None:
    """A client that leaves is not noticed before the end."""

    async def until_gone(self: Lifeline) -> None:
        await asyncio.Event().wait()

    Lifeline._until_gone = until_gone  # type: ignore[method-assign]


def registry_trouble_stops_all() -> None:
    """Workers that the registry does not know are let go at once, living streams or not."""

    def forget_lost(self: Pool) -> None:
        for peer in [peer for peer in self._peers() if not peer.is_registered]:
            self._drop(peer)

    Pool._forget_lost = forget_lost  # type: ignore[method-assign]


def lost_release_forgotten() -> None:
    """A ticket whose return failed is not given back again."""
    original = PrefillLink._return_all

    async def return_all(self: PrefillLink) -> None:
        await original(self)
        self._returns.clear()

    PrefillLink._return_all = return_all  # type: ignore[method-assign]


FLOW = "tests/integration/test_gateway_flow.py"
MUTANTS = (
    Mutant("stale KV accepted", "vllm#52234", stale_kv_accepted, (CORRUPTION,)),
    Mutant(
        "error before the first token swallowed",
        "vllm#52232",
        early_error_swallowed,
        ("tests/unit/gateway/test_sse.py",),
    ),
    Mutant("dead handle reused", "vllm-backport#33", dead_handle_reused, (CORRUPTION,)),
    Mutant("no deadline on silence", "vllm#46283", no_deadline_on_silence, (SIMULATION,)),
    Mutant("release not sent on reject", "vllm#41269", rejection_keeps_ticket, (SIMULATION,)),
    Mutant("abort racing finish", "vllm#29906", abort_races_finish, (SIMULATION, FLOW)),
    Mutant("full hit not reported", "vllm#56640", full_hit_not_reported, ("tests/unit/sim/test_sim_engine.py",)),
    Mutant(
        "no negative completion", "vllm#48633", no_negative_completion, ("tests/unit/worker/test_worker_sources.py",)
    ),
    Mutant("heartbeat with the wrong id", "vllm#53244", heartbeat_with_wrong_id, (SIMULATION,)),
    Mutant("incarnation ignored", "vllm#49238", incarnation_ignored, ("tests/unit/test_shm.py",)),
    Mutant("silent recompute", "vllm#32200", silent_recompute, ("tests/unit/gateway/test_tickets.py",)),
    Mutant(
        "asleep until traffic comes",
        "local-inference-lab/vllm#191",
        sleeps_until_traffic,
        ("tests/unit/sim/test_sim_engine.py",),
    ),
    Mutant(
        "cleanup only on new work",
        "TensorRT-LLM#12313",
        cleanup_only_on_new_work,
        (SIMULATION, "tests/integration/test_workers.py"),
    ),
    Mutant(
        "freed under a live transfer",
        "TensorRT-LLM#14565",
        freed_under_a_transfer,
        ("tests/unit/sim/test_sim_engine.py",),
    ),
    Mutant("legs not coupled", "sglang#29017", legs_not_coupled, (SIMULATION,)),
    Mutant("restarted peer unusable", "nixl#795", restarted_peer_unusable, (SIMULATION,)),
    Mutant("disconnect not delivered", "dynamo#13855", disconnect_not_delivered, (SIMULATION,)),
    Mutant("registry trouble stops all", "dynamo#3493", registry_trouble_stops_all, (SIMULATION,)),
    Mutant("lost release forgotten", "ours: found by the simulation", lost_release_forgotten, (SIMULATION,)),
)
NOT_YET = {
    "evicted before the send (TensorRT-LLM#12542)": "a ticket pins its slots; there is no eviction to race with yet",
    "guided output restarts on migration (dynamo#7930)": "the simulator has no grammars; vLLM has its own tests",
}

"""Prefill and decode workers as real processes with the simulated engine, driven over mTLS gRPC, with faults."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from inferflux.engine.reference import NumericsReference, save
from inferflux.errors import Conflict, DeadlineExceeded, Draining, InvalidRequest, PermissionDenied, Unavailable
from inferflux.rpc.client import translated_errors
from inferflux.types import SignedTicket, State
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from inferflux.v1 import registry_service_pb2 as registry_pb
from inferflux.v1 import types_pb2
from inferflux.v1 import worker_admin_service_pb2 as admin_pb
from inferflux.v1.decode_service_pb2_grpc import DecodeServiceStub
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceStub
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.leaks import Traces, unfinished_tasks
from tests.support.redis_server import RedisServer
from tests.support.service import Service, Watcher, temporary_home, until
from tests.support.small_gateway import SmallGateway, completion, context, tickets

CANARY = "cantaloupe"
PROMPTS = count(1)
SETTINGS = {"engine": "sim", "model": "m", "kv_cache_bytes": str(32 << 20), "kv_arena_bytes": str(8 << 20)}


def prompt() -> str:
    """Some blocks' worth of text that no worker has cached."""
    return f"{CANARY} {next(PROMPTS)} " * 6


@dataclass
class Workers:
    """One prefill and one decode worker, and how to start more."""

    home: Path
    stack: ExitStack
    prefill: Service
    decode: Service

    @classmethod
    def start(cls, stack: ExitStack) -> Workers:
        home = stack.enter_context(temporary_home())
        (home / "run").mkdir()
        workers = cls(home, stack, None, None)  # type: ignore[arg-type]
        workers.prefill, workers.decode = workers.worker("prefill-0"), workers.worker("decode-0")
        return workers

    def worker(self, name: str, **settings: str) -> Service:
        """Start a worker; its role is in its name."""
        service = Service(f"services.{name.partition('-')[0]}", name, self.home, SETTINGS | settings)
        self.stack.callback(service.kill)
        return service.start()

    async def ready(self) -> Workers:
        await until(lambda: self.prefill.is_ready() and self.decode.is_ready())
        return self

    async def tickets(self, which: int = admin_pb.TICKET_FILTER_UNSPECIFIED) -> admin_pb.ListTicketsResponse:
        async with admin(self.prefill) as stub:
            return await stub.ListTickets(admin_pb.ListTicketsRequest(filter=which))

    @staticmethod
    def pause(service: Service) -> None:
        """Stop a process in its tracks, and prove it."""
        os.kill(service.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{service.pid}/stat")
        deadline = time.monotonic() + 5
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline

    async def pulse(self, service: Service) -> types_pb2.Pulse:
        async with admin(service) as stub:
            return (await stub.GetStatus(admin_pb.GetStatusRequest())).pulse

    async def is_clean(self) -> bool:
        """Whether nothing is held anywhere."""
        prefill, decode = await self.pulse(self.prefill), await self.pulse(self.decode)
        return (
            prefill.num_free_slots == prefill.num_slots
            and prefill.num_live_tickets == 0
            and all(
                p.num_free_blocks == p.num_blocks and p.num_running == p.num_waiting == 0 for p in (prefill, decode)
            )
        )

    async def until_clean(self, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not await self.is_clean():
            assert time.monotonic() < deadline, (await self.pulse(self.prefill), await self.pulse(self.decode))
            await asyncio.sleep(0.02)


@asynccontextmanager
async def admin(service: Service, role: str = "operator") -> AsyncIterator[Any]:
    async with service.channel(role) as channel:
        yield WorkerAdminServiceStub(channel)


@pytest.fixture(scope="module")
def shared() -> Iterator[Workers]:
    """For tests that hurt nobody."""
    with ExitStack() as stack:
        yield Workers.start(stack)


@pytest.fixture
async def workers(shared: Workers) -> AsyncIterator[Workers]:
    yield await shared.ready()
    await shared.until_clean()
    assert await unfinished_tasks() == []


@pytest.fixture
async def own() -> AsyncIterator[Workers]:
    """For tests that kill."""
    with ExitStack() as stack:
        yield await Workers.start(stack).ready()
        assert await unfinished_tasks() == []


# --- the way of a request ---------------------------------------------------------------------------------------------


async def test_a_ticket_carries_a_prompt_from_prefill_to_decode(workers: Workers) -> None:
    call = completion(prompt())
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway, gateway.watching():
        session, ctx = await gateway.session(), context()

        prompts = await gateway.prefill(call, ctx)
        from_ticket = await (await session.start(call, prompts, ctx)).wait()
        num_released = await gateway.release(tickets(prompts))
        alone = await (await session.start(call)).wait()

    assert from_ticket.reports == [("committed", "")]
    assert from_ticket.token_ids == alone.token_ids
    assert from_ticket.token_ids[0] == prompts[0].token_ids[0]
    assert from_ticket.end == replace(alone.end, usage=from_ticket.end.usage)
    assert num_released == 1


async def test_the_ticket_of_another_tenant_or_request_is_not_read(workers: Workers) -> None:
    call = completion(prompt())
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway, gateway.watching():
        session, ctx = await gateway.session(), context()
        prompts = await gateway.prefill(call, ctx)

        for thief in (replace(ctx, tenant="evil"), replace(ctx, request_id="another")):
            answer = await (await session.start(call, prompts, thief)).wait()
            assert answer.reports == [("recomputed", "audience")]
            assert len(answer.token_ids) == 10
        await gateway.release(tickets(prompts))


async def test_a_bad_request_is_answered_by_both_workers(workers: Workers) -> None:
    call = completion("x", max_tokens=-1)
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway:
        response = await gateway.call_prefill(call, context())
        answer = await (await (await gateway.session()).start(call)).wait()

    assert response.answer.head.status == answer.frames[0].head.status == 400
    assert json.loads(response.answer.body) == json.loads(b"".join(frame.data for frame in answer.frames))


async def test_steps_of_many_requests_travel_together(workers: Workers) -> None:
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway:
        session = await gateway.session()
        answers = [await session.start(completion(prompt(), max_tokens=50, seed=i)) for i in range(24)]
        for answer in answers:
            await answer.wait()

    # 50 steps would do; requests arrive over some steps, and a batch may split when the machine is busy.
    assert session.num_batches < 24 * 50 / 4


async def test_pulses_tell_where_both_workers_stand(workers: Workers) -> None:
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway, gateway.watching() as pulses:
        session = await gateway.session()
        prompts = await gateway.prefill(completion(prompt()))
        await until(lambda: bool(pulses) and pulses[-1].num_live_tickets == 1)
        assert pulses[-1].num_free_slots < pulses[-1].num_slots

        answer = await session.start(completion(prompt(), max_tokens=500))
        await until(lambda: session.pulse is not None and session.pulse.num_running == 1)
        first = session.pulse.step
        await until(lambda: session.pulse.step > first)

        await session.cancel(answer)
        await answer.wait()
        await gateway.release(tickets(prompts))

    assert answer.end.finish_reason == "abort"


async def test_a_warmed_prefix_is_found_by_the_next_prefill(workers: Workers) -> None:
    text = prompt() * 4
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway:
        num_tokens = await gateway.warm(completion(text))
        first = await workers.pulse(workers.prefill)

    assert num_tokens >= len(text) / 2
    assert first.num_free_slots == first.num_slots


# --- prefixes ---------------------------------------------------------------------------------------------------------


async def test_a_later_prompt_that_begins_alike_shares_blocks(workers: Workers) -> None:
    text = prompt() * 4
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway, gateway.watching():
        session = await gateway.session()
        before = (await gateway.cache()).requests["hit"]
        answers = []
        for ending in ("and so", "but then"):
            ctx = context()
            prompts = await gateway.prefill(completion(text + ending), ctx)
            answers.append(await (await session.start(completion(text + ending), prompts, ctx)).wait())
            await gateway.release(tickets(prompts))
        cache = await gateway.cache()

    assert [answer.reports for answer in answers] == [[("committed", "")]] * 2
    assert cache.num_kept_slots == cache.num_cached_slots >= len(text) // cache.block_size
    assert (cache.num_pinned_slots, cache.requests["hit"] - before) == (0, 1)


async def test_another_worker_reads_the_prefix_instead_of_computing_it(own: Workers) -> None:
    text = prompt() * 4
    other = own.worker("prefill-1")
    await until(other.is_ready)
    async with (
        SmallGateway.to(own.prefill, own.decode) as first,
        SmallGateway.to(other, own.decode, "session-2") as second,
        first.watching(),
        second.watching(),
    ):
        await until_peers(second, 1)
        await first.release(tickets(await first.prefill(completion(text + "and so"))))
        ctx = context()
        (mine,) = await second.prefill(completion(text + "but then"), ctx)
        cache = await second.cache()
        session = await second.session()
        disaggregated = await (await session.start(completion(text + "but then"), [mine], ctx)).wait()
        alone = await (await session.start(completion(text + "but then"))).wait()
        own.prefill.kill()
        await until_peers(second, 0)
        await second.release(tickets([mine]))

    whole = len(text) // cache.block_size * cache.block_size
    assert cache.tokens["peer"] >= whole
    assert (cache.requests["hit"], mine.num_cached_tokens) == (1, cache.tokens["peer"])
    assert disaggregated.reports == [("committed", "")]
    assert disaggregated.token_ids == alone.token_ids


async def until_peers(gateway: SmallGateway, num_peers: int) -> None:
    deadline = time.monotonic() + 10
    while (await gateway.cache()).num_peers != num_peers:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_pinned_prefixes_stay_within_their_quota(workers: Workers) -> None:
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway:
        num_tokens = await gateway.warm(completion(prompt()), pin="system")
        cache = await gateway.cache()
        with pytest.raises(Conflict, match="the limit is"):
            await gateway.warm(completion(prompt() * 20), pin="too much")
        with pytest.raises(InvalidRequest, match="nothing to pin"):
            await gateway.warm(completion("short"), pin="too little")
        was_pinned = [await gateway.unpin("system") for _ in range(2)]
        after = await gateway.cache()

    assert [(pin.name, pin.num_tokens) for pin in cache.pins] == [("system", num_tokens)]
    assert cache.num_pinned_slots * cache.block_size == num_tokens
    assert was_pinned == [True, False]
    assert (len(after.pins), after.num_pinned_slots) == (0, 0)


# --- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode", "operator", "policy"])
async def test_only_gateways_may_ask_for_work(workers: Workers, role: str) -> None:
    async with workers.prefill.channel(role) as prefill, workers.decode.channel(role) as decode:
        gateway = SmallGateway(AsyncExitStack(), PrefillServiceStub(prefill), None, "s")
        with pytest.raises(PermissionDenied):
            await gateway.prefill(completion("x"))
        with pytest.raises(PermissionDenied):
            await gateway.release(request_ids=["request-1"])
        with pytest.raises(PermissionDenied), translated_errors():
            await DecodeServiceStub(decode).Session().read()


async def test_only_operators_registry_and_gateways_may_drain(workers: Workers) -> None:
    async with admin(workers.decode, "prefill") as stub:
        with pytest.raises(PermissionDenied), translated_errors():
            await stub.Drain(admin_pb.DrainRequest())


@pytest.mark.parametrize(
    "commands",
    [
        [decode_pb.SessionCommand(cancel=decode_pb.Cancel(handle=1))],
        [decode_pb.SessionCommand(hello=decode_pb.Hello())],
        [decode_pb.SessionCommand(hello=decode_pb.Hello(session_id="x")), decode_pb.SessionCommand()],
    ],
    ids=["no hello", "no session id", "no command"],
)
async def test_a_session_that_makes_no_sense_is_refused(workers: Workers, commands: list[Any]) -> None:
    async with workers.decode.channel("gateway") as channel:
        call = DecodeServiceStub(channel).Session()
        for command in commands:
            await call.write(command)
        with pytest.raises(InvalidRequest), translated_errors():
            await _read_to_its_end(call)


# --- leaving early ----------------------------------------------------------------------------------------------------


async def test_a_prefill_whose_deadline_is_over_fails(workers: Workers) -> None:
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway:
        with pytest.raises(DeadlineExceeded):
            await gateway.prefill(completion(prompt() * 40), context(time_left_s=0.001))


async def test_prefills_cancelled_at_any_moment_leave_nothing(workers: Workers) -> None:
    """Also when the answer was already on its way: then the gateway gives back what it never saw, by request."""
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway, gateway.watching():
        ids = []
        for i in range(40):
            ctx = context()
            ids.append(ctx.request_id)
            call = gateway.call_prefill(completion(prompt()), ctx)
            asyncio.get_running_loop().call_later(random.Random(i).uniform(0, 0.02), call.cancel)
            await asyncio.wait([asyncio.ensure_future(_settled(call))])
        await gateway.release(request_ids=ids)
        await workers.until_clean()
        counts = await workers.tickets()

    assert counts.num_issued == counts.num_released + counts.num_expired


async def _read_to_its_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _settled(call: Any) -> None:
    with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await call


async def test_tickets_of_a_watch_that_is_lost_expire_after_the_grace(workers: Workers) -> None:
    before = await workers.tickets()
    async with SmallGateway.to(workers.prefill, workers.decode, "lost-watch") as gateway:
        async with gateway.watching():
            await gateway.prefill(completion(prompt()))
        lost_at = time.monotonic()
        assert not await workers.is_clean()

        await workers.until_clean()

    assert 2.5 < time.monotonic() - lost_at < 8
    assert (await workers.tickets()).num_expired == before.num_expired + 1


async def test_tickets_of_a_session_that_never_watches_expire_after_the_grace(workers: Workers) -> None:
    before = await workers.tickets()
    async with SmallGateway.to(workers.prefill, workers.decode, "never-watches") as gateway:
        await gateway.prefill(completion(prompt()))

        await workers.until_clean()

    assert (await workers.tickets()).num_expired == before.num_expired + 1


async def test_a_gateway_killed_in_mid_stream_frees_everything(workers: Workers) -> None:
    async with SmallGateway.to(workers.prefill, workers.decode, "lost-session") as gateway:
        async with gateway.watching():
            session, ctx, call = await gateway.session(), context(), completion(prompt(), max_tokens=1500)
            prompts = await gateway.prefill(call, ctx)
            answers = [
                await session.start(call, prompts, ctx),
                await session.start(completion(prompt(), max_tokens=1500)),
            ]
            await until(lambda: all(len(answer.token_ids) > 2 for answer in answers))

            session.break_off()

        await workers.until_clean()
    assert all(answer.end is None for answer in answers)


async def test_a_cancelled_request_is_gone_at_once(workers: Workers) -> None:
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway:
        session = await gateway.session()
        answer = await session.start(completion(prompt(), max_tokens=1500))
        await until(lambda: len(answer.token_ids) > 2)

        cancelled_at = time.monotonic()
        await session.cancel(answer)
        await workers.until_clean()

    assert time.monotonic() - cancelled_at < 1
    assert answer.end.finish_reason == "abort"


# --- dying workers ----------------------------------------------------------------------------------------------------


async def test_blocks_that_a_dead_worker_left_are_read_or_computed_again_never_wrong(own: Workers) -> None:
    known, unknown = completion(prompt()), completion(prompt())
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        session = await gateway.session()
        contexts = [context(), context()]
        prompts = [await gateway.prefill(call, ctx) for call, ctx in zip((known, unknown), contexts, strict=True)]
        expected = [await (await session.start(call)).wait() for call in (known, unknown)]
        # Other words, the same length: nothing of them is cached.
        fresh, fresh_context = completion(prompt()), context()
        fresh_prompts = await gateway.prefill(fresh, fresh_context)

        own.prefill.kill()
        answers = [
            await (await session.start(call, prefilled, ctx)).wait()
            for call, prefilled, ctx in zip((known, unknown), prompts, contexts, strict=True)
        ]
        never_mapped = await (await session.start(fresh, fresh_prompts, fresh_context)).wait()

        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert never_mapped.reports == [("recomputed", "unreachable")]

        own.prefill.start()
        await until(own.prefill.is_ready)
        again = await (await session.start(replace(fresh, body=fresh.body), fresh_prompts, fresh_context)).wait()
        assert again.token_ids == never_mapped.token_ids


async def test_a_restarted_worker_does_not_honour_the_tickets_of_its_last_life(own: Workers) -> None:
    call, ctx = completion(prompt()), context()
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        prompts = await gateway.prefill(call, ctx)
        own.prefill.restart()
        await until(own.prefill.is_ready)

        answer = await (await (await gateway.session()).start(call, prompts, ctx)).wait()

    assert answer.reports == [("recomputed", "stale")]
    assert len(answer.token_ids) == 10


async def test_a_killed_worker_leaves_no_files_in_shared_memory(own: Workers) -> None:
    before = Traces.now().shm
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        await gateway.prefill(completion(prompt()))

    own.prefill.kill()

    assert Traces.now().shm <= before


# --- claims -----------------------------------------------------------------------------------------------------------


def ref(ticket: SignedTicket) -> prefill_pb.TicketRef:
    payload = types_pb2.KvTicket.FromString(ticket.payload)
    return prefill_pb.TicketRef(ticket_id=ticket.ticket_id, incarnation=payload.incarnation)


def claim(worker_id: str, *refs: prefill_pb.TicketRef) -> prefill_pb.ClaimRequest:
    return prefill_pb.ClaimRequest(claimant=prefill_pb.Claimant(worker_id=worker_id, incarnation="1"), tickets=refs)


def metric(service: Service, series: str) -> float:
    """One number of a process; 0 as long as it has none."""
    lines = service.get("/metrics").splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))


async def test_a_ticket_is_claimed_before_it_is_read_and_committed_after(workers: Workers) -> None:
    call, ctx = completion(prompt()), context()
    num_claimed = metric(workers.prefill, 'inferflux_tickets_total{event="claimed"}')
    async with SmallGateway.to(workers.prefill, workers.decode) as gateway, gateway.watching():
        prompts = await gateway.prefill(call, ctx)
        (issued,) = (await workers.tickets(admin_pb.TICKET_FILTER_LIVE)).tickets
        answer = await (await (await gateway.session()).start(call, prompts, ctx)).wait()
        await until(lambda: metric(workers.prefill, 'inferflux_tickets_live{state="committed"}') == 1)
        (committed,) = (await workers.tickets(admin_pb.TICKET_FILTER_LIVE)).tickets
        await gateway.release(tickets(prompts))

    assert answer.reports == [("committed", "")]
    assert (issued.state, issued.claimant) == (admin_pb.TICKET_STATE_ISSUED, "")
    assert (committed.state, committed.claimant) == (admin_pb.TICKET_STATE_COMMITTED, "decode-0")
    assert metric(workers.prefill, 'inferflux_tickets_total{event="claimed"}') == num_claimed + 1
    assert metric(workers.decode, 'inferflux_claim_seconds_count{result="granted"}') >= 1


async def test_of_many_readers_one_wins_and_the_others_compute_the_prompt(workers: Workers) -> None:
    num_conflicts = metric(workers.prefill, "inferflux_ticket_conflict_total")
    async with (
        SmallGateway.to(workers.prefill, workers.decode) as gateway,
        gateway.watching(),
        workers.prefill.channel("decode") as channel,
    ):
        stub = PrefillServiceStub(channel)
        calls, contexts = [completion(prompt()) for _ in range(4)], [context() for _ in range(4)]
        prompts = [await gateway.prefill(call, ctx) for call, ctx in zip(calls, contexts, strict=True)]
        refs = [ref(ticket) for prompt in prompts for ticket in tickets(prompt)]

        responses = await asyncio.gather(*(stub.Claim(claim(f"racer-{i}", *refs)) for i in range(64)))
        session = await gateway.session()
        loser = await (await session.start(calls[0], prompts[0], contexts[0])).wait()
        alone = await (await session.start(calls[0])).wait()
        await gateway.release([ticket for prompt in prompts for ticket in tickets(prompt)])

    by_ticket = zip(*(response.verdicts for response in responses), strict=True)
    wanted = {prefill_pb.CLAIM_VERDICT_GRANTED: 1, prefill_pb.CLAIM_VERDICT_CONFLICT: 63}
    assert [Counter(verdicts) for verdicts in by_ticket] == [wanted] * 4
    assert loser.reports == [("recomputed", "conflict")]
    assert loser.token_ids == alone.token_ids
    assert metric(workers.prefill, "inferflux_ticket_conflict_total") == num_conflicts + 4 * 63 + 1
    assert metric(workers.decode, 'inferflux_kv_rejected_total{reason="conflict"}') >= 1


async def test_claims_of_other_starts_are_stale_and_of_nobody_invalid(workers: Workers) -> None:
    async with workers.prefill.channel("decode") as channel:
        stub = PrefillServiceStub(channel)
        other = prefill_pb.TicketRef(ticket_id="t", incarnation="0")
        gone = prefill_pb.TicketRef(ticket_id="t", incarnation=(await workers.pulse(workers.prefill)).incarnation)

        response = await stub.Claim(claim("decode-9", other, gone))
        with pytest.raises(InvalidRequest, match="claimant"), translated_errors():
            await stub.Claim(claim("", other))

    assert list(response.verdicts) == [prefill_pb.CLAIM_VERDICT_STALE, prefill_pb.CLAIM_VERDICT_EXPIRED]
    assert response.incarnation == gone.incarnation


@pytest.mark.parametrize("role", ["gateway", "operator", "prefill"])
async def test_only_decode_workers_may_claim(workers: Workers, role: str) -> None:
    async with workers.prefill.channel(role) as channel:
        stub = PrefillServiceStub(channel)
        for method, request in ((stub.Claim, claim("x")), (stub.Commit, prefill_pb.CommitRequest())):
            with pytest.raises(PermissionDenied), translated_errors():
                await method(request)


async def test_an_owner_that_hangs_delays_nobody_for_long(own: Workers) -> None:
    """Its memory is mapped already, so it is read without a claim; when it wakes up, nothing has changed."""
    calls, contexts = [completion(prompt()) for _ in range(2)], [context() for _ in range(2)]
    async with SmallGateway.to(own.prefill, own.decode) as gateway, gateway.watching():
        session = await gateway.session()
        prompts = [await gateway.prefill(call, ctx) for call, ctx in zip(calls, contexts, strict=True)]
        await (await session.start(calls[0], prompts[0], contexts[0])).wait()
        own.pause(own.prefill)

        began_at = time.monotonic()
        answer = await session.start(calls[1], prompts[1], contexts[1])
        await until(lambda: bool(answer.token_ids))
        ttft_s = time.monotonic() - began_at
        await answer.wait()
        os.kill(own.prefill.pid, signal.SIGCONT)
        alone = await (await session.start(calls[1])).wait()
        await gateway.release([ticket for prompt in prompts for ticket in tickets(prompt)])
        await own.until_clean()

    assert answer.reports == [("committed", "")]
    assert answer.token_ids == alone.token_ids
    assert metric(own.decode, "inferflux_ticket_orphan_total") == 1
    assert ttft_s < 1


async def test_blocks_of_an_owner_that_died_are_read_without_a_claim(own: Workers) -> None:
    """Its sealed memory is mapped already and outlives it: no second prefill."""
    calls, contexts = [completion(prompt()) for _ in range(2)], [context() for _ in range(2)]
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        session = await gateway.session()
        prompts = [await gateway.prefill(call, ctx) for call, ctx in zip(calls, contexts, strict=True)]
        await (await session.start(calls[0], prompts[0], contexts[0])).wait()

        own.prefill.kill()
        answer = await (await session.start(calls[1], prompts[1], contexts[1])).wait()
        alone = await (await session.start(calls[1])).wait()

    assert answer.reports == [("committed", "")]
    assert answer.token_ids == alone.token_ids
    assert metric(own.decode, "inferflux_ticket_orphan_total") == 1


async def test_a_ticket_claimed_for_a_gateway_that_is_lost_ends_with_its_session(workers: Workers) -> None:
    before = await workers.tickets()
    async with (
        SmallGateway.to(workers.prefill, workers.decode, "lost-claim") as gateway,
        workers.prefill.channel("decode") as channel,
    ):
        async with gateway.watching():
            (ticket,) = tickets(await gateway.prefill(completion(prompt())))
            await PrefillServiceStub(channel).Claim(claim("decode-9", ref(ticket)))

        await workers.until_clean()
        response = await PrefillServiceStub(channel).Claim(claim("decode-9", ref(ticket)))
    after = await workers.tickets()

    assert list(response.verdicts) == [prefill_pb.CLAIM_VERDICT_EXPIRED]
    assert after.num_expired == before.num_expired + 1
    assert (after.tickets[0].ticket_id, after.tickets[0].state) == (ticket.ticket_id, admin_pb.TICKET_STATE_EXPIRED)
    assert after.num_issued == after.num_released + after.num_expired + after.num_revoked + after.num_live
    assert (after.num_live, after.num_leaked, after.num_leaked_slots) == (0, 0, 0)
    assert metric(workers.prefill, 'inferflux_ticket_expired_total{cause="session"}') >= 1


# --- draining ---------------------------------------------------------------------------------------------------------


async def test_a_draining_decode_worker_finishes_what_runs_and_takes_nothing_new(own: Workers) -> None:
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        session = await gateway.session()
        running = await session.start(completion(prompt(), max_tokens=400))
        await until(lambda: len(running.token_ids) > 2)

        os.kill(own.decode.pid, signal.SIGTERM)
        await until(lambda: own.decode.readiness().get("state") == "draining")
        late = await (await session.start(completion(prompt()))).wait()

        assert (late.end.error.reason, late.end.error.is_retryable) == ("DRAINING", True)
        assert (await running.wait()).end.error is None
        assert len(running.token_ids) == 400
    assert own.decode.wait() == 0


async def test_a_draining_prefill_worker_stays_until_its_tickets_are_over(own: Workers) -> None:
    async with SmallGateway.to(own.prefill, own.decode) as gateway, gateway.watching() as pulses:
        call, ctx = completion(prompt()), context()
        prompts = await gateway.prefill(call, ctx)
        async with admin(own.prefill) as stub:
            await stub.Drain(admin_pb.DrainRequest())
        await until(lambda: own.prefill.readiness().get("state") == "draining")
        with pytest.raises(Draining):
            await gateway.prefill(completion(prompt()))

        answer = await (await (await gateway.session()).start(call, prompts, ctx)).wait()
        assert answer.reports == [("committed", "")]
        await until(lambda: (pulses[-1].state, pulses[-1].num_live_tickets) == (State.DRAINING, 1))
        await gateway.release(tickets(prompts))
        assert own.prefill.wait() == 0


async def test_a_drain_is_over_when_its_budget_is(own: Workers) -> None:
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        session = await gateway.session()
        running = await session.start(completion(prompt(), max_tokens=7000))
        await until(lambda: len(running.token_ids) > 2)

        request = admin_pb.DrainRequest()
        request.budget.FromMilliseconds(200)
        async with admin(own.decode) as stub:
            assert (await stub.Drain(request)).num_running == 1

        await running.wait()
        assert (running.end.error.reason, running.end.error.is_retryable) == ("DRAINING", True)
    assert own.decode.wait() == 0


async def test_a_later_drain_may_shorten_the_budget_of_the_first(own: Workers) -> None:
    async with SmallGateway.to(own.prefill, own.decode) as gateway:
        session = await gateway.session()
        running = await session.start(completion(prompt(), max_tokens=7000))
        await until(lambda: len(running.token_ids) > 2)

        responses = []
        async with admin(own.decode) as stub:
            for budget_s in (30, 60, 0):
                request = admin_pb.DrainRequest()
                request.budget.FromSeconds(budget_s)
                responses.append(await stub.Drain(request))

        await running.wait()
        assert running.end.error.reason == "DRAINING"
    assert [30 - response.time_left.ToSeconds() in range(3) for response in responses] == [True, True, False]
    assert own.decode.wait() == 0


async def test_a_drain_with_a_negative_budget_is_refused(workers: Workers) -> None:
    request = admin_pb.DrainRequest()
    request.budget.FromSeconds(-1)
    async with admin(workers.decode) as stub:
        with pytest.raises(InvalidRequest, match="budget"), translated_errors():
            await stub.Drain(request)


# --- health -----------------------------------------------------------------------------------------------------------


async def test_a_worker_whose_engine_makes_no_steps_is_not_ready_and_then_exits(shared: Workers) -> None:
    profile = shared.home / "wedged.json"
    profile.write_text('{"step_ms": 3600000}')
    worker = shared.worker("decode-wedged", sim_profile=str(profile), wedge_s="1")
    await until(worker.is_ready)
    async with SmallGateway.to(shared.prefill, worker) as gateway:
        session = await gateway.session()
        answer = await session.start(completion(prompt()))

        await until(lambda: not worker.readiness().get("ready", True))
        assert (worker.readiness()["state"], "no step" in worker.readiness()["reason"]) == ("ready", True)
        await until(lambda: session.pulse.state is State.FAILED)
        assert answer.end is None

        await answer.wait()
        assert (answer.end.error.reason, answer.end.error.is_retryable) == ("WORKER_LOST", True)
    assert worker.wait() == 1
    assert "the engine is wedged: work but no step for" in worker.log()


@pytest.mark.parametrize("how", ["dies", "dies and hangs"])
async def test_a_worker_whose_engine_dies_exits(shared: Workers, how: str) -> None:
    """Also when something of the engine never ends."""
    name = f"decode-{how.replace(' ', '-')}"
    worker = Service("tests.support.mortal_decode", name, shared.home, SETTINGS | {"model": how})
    worker.role = "decode"
    shared.stack.callback(worker.kill)
    worker.start()
    await until(worker.is_ready)
    async with SmallGateway.to(shared.prefill, worker) as gateway:
        answer = await (await gateway.session()).start(completion(prompt(), model=how))
        await answer.wait()
        assert (answer.end.error.reason, answer.end.error.is_retryable) == ("WORKER_LOST", True)

    assert worker.wait() == 1
    assert "engine lost, the worker exits" in worker.log()
    assert "the engine is dead" in worker.log()


async def test_a_worker_whose_numbers_are_wrong_stays_up_and_out(shared: Workers) -> None:
    path, ids = shared.home / "reference.json", tuple(b"a reference")
    n = len(ids)
    save(NumericsReference("d", ids, (1,) * n, (0.0,) * n, (0.0,) * (n - 1), (1,)), path)
    worker = shared.worker("prefill-wrong", numerics_reference=str(path))

    await until(lambda: worker.readiness().get("state") == "failed")
    assert "greedy tokens" in worker.readiness()["reason"]
    async with SmallGateway.to(worker, shared.decode) as gateway:
        with pytest.raises(Unavailable, match="failed"):
            await gateway.prefill(completion(prompt()))
    assert worker.terminate() == 0


async def test_bad_settings_end_a_worker_with_one_clear_line(shared: Workers) -> None:
    worker = shared.worker("decode-bad", dtype="float32", block_size="7", kv_cache_bytes="many")

    assert worker.wait() == 2
    assert "INFERFLUX_KV_CACHE_BYTES: must be an integer" in worker.log()


def test_no_prompt_text_is_logged(shared: Workers) -> None:
    assert CANARY not in shared.prefill.log() + shared.decode.log()
    assert "session opened" in shared.decode.log()


# --- the registry -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def registered(shared: Workers, name: str, **settings: str) -> AsyncIterator[tuple[Service, Service, Watcher]]:
    """A registry, a worker that is registered with it, and a gateway's view of both."""
    with RedisServer() as redis, ExitStack() as stack:
        registry = Service("services.registry", f"registry-{name}", shared.home, {"redis_url": redis.url}).start()
        stack.callback(registry.kill)
        await until(registry.is_ready)
        worker = shared.worker(name, registry_address=registry.address, **settings)
        async with registry.channel("gateway") as channel:
            stub = RegistryServiceStub(channel)
            watcher = Watcher(
                lambda r: stub.WatchSnapshot(registry_pb.WatchRegistryRequest(gateway_id="g", revision=r))
            )
            async with watcher.running():
                await watcher.until(lambda s: state_of(s) == types_pb2.WORKER_STATE_READY)
                yield registry, worker, watcher


async def test_workers_register_announce_their_drain_and_leave(workers: Workers) -> None:
    async with registered(workers, "decode-7") as (_, worker, watcher):
        (record,), (model,) = watcher.newest.workers, watcher.newest.models
        assert (record.address, record.engine, record.role) == (worker.address, "sim", types_pb2.WORKER_ROLE_DECODE)
        assert model.digest == record.fingerprint.weights_digest

        async with SmallGateway.to(workers.prefill, worker) as gateway:
            answer = await (await gateway.session()).start(completion(prompt(), max_tokens=500))
            await until(lambda: len(answer.token_ids) > 2)
            os.kill(worker.pid, signal.SIGTERM)
            await watcher.until(lambda s: state_of(s) == types_pb2.WORKER_STATE_DRAINING)
            assert (await answer.wait()).end.error is None
        await watcher.until(lambda s: state_of(s) is None)
        assert worker.wait() == 0


async def test_the_registry_hears_that_an_engine_is_wedged(workers: Workers) -> None:
    profile = workers.home / "slow.json"
    profile.write_text('{"step_ms": 3600000}')
    async with registered(workers, "decode-9", sim_profile=str(profile), wedge_s="3") as (_, worker, watcher):
        async with SmallGateway.to(workers.prefill, worker) as gateway:
            await (await gateway.session()).start(completion(prompt()))
            await watcher.until(lambda s: state_of(s) == types_pb2.WORKER_STATE_FAILED)
        worker.kill()


async def test_the_death_of_the_registry_disturbs_nobody(workers: Workers) -> None:
    async with registered(workers, "decode-8") as (registry, worker, _):
        async with SmallGateway.to(workers.prefill, worker) as gateway:
            session = await gateway.session()
            running = await session.start(completion(prompt(), max_tokens=300))
            registry.kill()
            await until(lambda: "registry lost" in worker.log())

            assert (await (await session.start(completion(prompt()))).wait()).end.error is None
            assert (await running.wait()).end.error is None
            assert worker.is_ready()
        registry.start()
        await until(lambda: worker.log().count('"registered"') == 2)
        assert worker.terminate() == 0


def state_of(snapshot: registry_pb.RegistrySnapshot) -> int | None:
    return next((worker.state for worker in snapshot.workers), None)

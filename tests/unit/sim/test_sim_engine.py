"""What the simulated engine promises beyond the contract of all engines."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferflux.engine import create
from inferflux.engine.base import Engine, KvSource, Prefilled
from inferflux.engine.options import EngineOptions
from inferflux.engine.reference import NumericsReference, save
from inferflux.engine.sim.profile import INSTANT
from inferflux.errors import ConfigError, Internal, InvalidRequest, NumericsMismatch, WorkerLost
from inferflux.kv.arena import Arena
from inferflux.kv.prefixes import Place, PrefixStore
from inferflux.kv.shm import ArenaServer
from inferflux.types import ChoiceTokens, Delivered, Frame, HttpCall, RequestContext, Role
from tests.support.service import until

OPTIONS = EngineOptions("m", Role.DECODE, kv_cache_bytes=4 << 20, sim_profile=INSTANT)
CONTEXT = RequestContext("r-1", cache_salt="5a17")
PROMPT = "a prompt that fills more than two blocks"


@asynccontextmanager
async def running(options: EngineOptions = OPTIONS, arena: Arena | None = None) -> AsyncIterator[Engine]:
    engine = create("sim", options, arena)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def pair(tmp_path: Path, num_slots: int = 16) -> AsyncIterator[tuple[Engine, Engine, Arena]]:
    """A prefill engine whose arena is served, and a decode engine."""
    arena = Arena.create(num_slots * 16384 + 8192)
    async with running(replace(OPTIONS, role=Role.PREFILL), arena) as prefill, running() as decode:
        arena.seal()
        server = ArenaServer(arena, tmp_path / "a", "inc-1")
        await server.start()
        try:
            yield prefill, decode, arena
        finally:
            await server.close()
            arena.close()


async def source_of(prefill: Engine, arena: Arena, body: HttpCall, tmp_path: Path) -> KvSource:
    result = await prefill.prefill(CONTEXT, body)
    assert isinstance(result, Prefilled)
    (prompt,) = result.prompts
    assert prompt.kv is not None
    return KvSource(
        ticket_id="t-1",
        prompt_digest=prompt.prompt_digest,
        num_tokens=prompt.kv.num_tokens,
        slots=prompt.kv.slots,
        digests=prompt.kv.digests,
        slot_bytes=arena.slot_bytes,
        socket_path=str(tmp_path / "a"),
        incarnation="inc-1",
        first_token_ids=prompt.token_ids,
        generations=arena.generations(prompt.kv.slots),
    )


def call(path: str = "/v1/completions", **fields: Any) -> HttpCall:
    prompt = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    return HttpCall("POST", path, json.dumps({"model": "m", "max_tokens": 8, **prompt, **fields}).encode())


async def frames_of(
    engine: Engine,
    body: HttpCall,
    sources: Sequence[KvSource] = (),
    delivered: Delivered | None = None,
    context: RequestContext = CONTEXT,
) -> list[Frame]:
    async with aclosing(engine.generate(context, body, sources, delivered)) as frames:
        return [frame async for frame in frames]


def tokens(frames: Sequence[Frame], index: int = 0) -> list[int]:
    return [i for f in frames for choice in f.choices if choice.index == index for i in choice.token_ids]


def body(frames: Sequence[Frame]) -> bytes:
    return b"".join(frame.data for frame in frames)


# --- determinism ------------------------------------------------------------------------------------------------------


async def test_the_same_call_gets_the_same_tokens_on_any_engine() -> None:
    async with running() as one, running() as another:
        assert tokens(await frames_of(one, call())) == tokens(await frames_of(another, call()))


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0}, {"prompt": PROMPT + "."}])
async def test_another_call_gets_other_tokens(change: dict[str, Any]) -> None:
    async with running() as engine:
        assert tokens(await frames_of(engine, call(**change))) != tokens(await frames_of(engine, call()))


async def test_another_tenant_gets_other_tokens() -> None:
    """So that a block that crosses from tenant to tenant shows."""
    async with running() as engine:
        mine, theirs = await frames_of(engine, call()), await frames_of(engine, call(), context=RequestContext("r-2"))

        assert tokens(mine) != tokens(theirs)


async def test_neighbours_change_nothing() -> None:
    async with running() as engine:
        alone = tokens(await frames_of(engine, call(seed=3)))
        crowd = await asyncio.gather(*(frames_of(engine, call(seed=seed)) for seed in range(8)))

        assert tokens(crowd[3]) == alone


# --- resuming ---------------------------------------------------------------------------------------------------------


RESUMED = {
    "greedy": {"temperature": 0},
    "seed": {"seed": 5},
    "held-back": {"stop": [" zz", "u"], "max_tokens": 16},
    "choices": {"n": 3, "stop": ["zuz", "a"], "max_tokens": 16},
}


@pytest.mark.parametrize("fields", RESUMED.values(), ids=RESUMED)
async def test_a_stream_cut_anywhere_goes_on_to_the_byte(fields: dict[str, Any]) -> None:
    cut_call = call("/v1/chat/completions", stream=True, stream_options={"include_usage": True}, **fields)
    context = replace(CONTEXT, created_s=1_700_000_000)
    async with running() as engine:
        whole = await frames_of(engine, cut_call, context=context)
    for cut in range(1, len(whole)):
        past = whole[:cut]
        async with running() as other:
            rest = await frames_of(other, cut_call, delivered=journal(past), context=context)

        assert body(past) + body(rest) == body(whole)
        assert journal(past).tokens + journal(rest).tokens == journal(whole).tokens
        assert rest[-1].end == whole[-1].end


def journal(frames: Sequence[Frame]) -> Delivered:
    return Delivered(tuple(c for frame in frames for c in frame.choices), sum(bool(frame.data) for frame in frames))


async def test_each_part_is_an_event_and_so_are_the_opening_and_the_closing() -> None:
    async with running() as engine:
        frames = await frames_of(engine, call("/v1/chat/completions", stream=True, n=2, max_tokens=3))

    assert [len(frame.choices) for frame in frames if frame.data] == [0, *[1] * 6, 0]


async def test_a_resumed_whole_response_is_whole() -> None:
    async with running() as engine:
        whole = await frames_of(engine, call())

        resumed = await frames_of(engine, call(), delivered=Delivered((ChoiceTokens(0, tuple(tokens(whole)[:3])),)))

        assert json.loads(body(resumed))["choices"] == json.loads(body(whole))["choices"]
        assert tokens(resumed) == tokens(whole)[3:]


async def test_delivered_tokens_after_the_end_are_refused() -> None:
    async with running() as engine:
        with pytest.raises(InvalidRequest, match="after its end"):
            await frames_of(engine, call(max_tokens=2), delivered=Delivered((ChoiceTokens(0, (300,) * 3),)))


# --- tickets ----------------------------------------------------------------------------------------------------------


async def test_the_first_token_does_not_wait_for_the_transfer(tmp_path: Path) -> None:
    async with pair(tmp_path) as (prefill, decode, arena):
        source = await source_of(prefill, arena, call(stream=True), tmp_path)

        frames = await frames_of(decode, call(stream=True), [source])

        first_token = next(i for i, frame in enumerate(frames) if frame.choices)
        report = next(i for i, frame in enumerate(frames) if frame.kv)
        assert first_token <= report
        assert frames[report].kv[0].result == "committed"
        arena.free(source.slots)


async def test_a_first_token_that_does_not_follow_from_the_kv_fails_the_request(tmp_path: Path) -> None:
    async with pair(tmp_path) as (prefill, decode, arena):
        source = await source_of(prefill, arena, call(), tmp_path)

        with pytest.raises(Internal, match="first token"):
            await frames_of(decode, call(), [replace(source, first_token_ids=(300,))])

        assert decode.load().num_free_blocks == decode.load().num_blocks
        arena.free(source.slots)


async def test_a_ticket_for_something_else_is_reported_unneeded(tmp_path: Path) -> None:
    async with pair(tmp_path) as (prefill, decode, arena):
        source = await source_of(prefill, arena, call(), tmp_path)

        for other in (call(prompt="another prompt"), call(max_tokens=0), replace(call(), path="/tokenize")):
            frames = await frames_of(decode, other, [source])
            assert [report.result for frame in frames for report in frame.kv] == ["unneeded"]
        arena.free(source.slots)


async def test_a_ticket_for_a_prompt_that_is_cached_whole_is_reported_unneeded(tmp_path: Path) -> None:
    async with pair(tmp_path) as (prefill, decode, arena):
        whole_blocks = call(prompt=list(range(1, 33)))
        source = await source_of(prefill, arena, whole_blocks, tmp_path)
        await frames_of(decode, whole_blocks)

        frames = await frames_of(decode, whole_blocks, [source])

        assert [report.result for frame in frames for report in frame.kv] == ["unneeded"]
        arena.free(source.slots)


async def test_blocks_of_an_aborted_request_are_not_free_while_a_copy_writes_into_them(tmp_path: Path) -> None:
    async with pair(tmp_path) as (prefill, decode, arena):
        source = await source_of(prefill, arena, call(), tmp_path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:  # the copy waits for its answer
            silent.bind(str(tmp_path / "silent"))
            silent.listen()
            task = asyncio.create_task(
                frames_of(decode, call(), [replace(source, socket_path=str(tmp_path / "silent"))])
            )
            await until(lambda: decode.load().num_free_blocks < decode.load().num_blocks)
            task.cancel()
            await asyncio.wait([task])

            assert decode.load().num_free_blocks < decode.load().num_blocks
            await until(lambda: decode.load().num_free_blocks == decode.load().num_blocks)
        arena.free(source.slots)


@pytest.mark.parametrize("change", [{"slot_bytes": 1}, {"num_tokens": 3}, {"generations": ()}, {"digests": ()}])
async def test_a_ticket_that_does_not_fit_is_not_read(tmp_path: Path, change: dict[str, Any]) -> None:
    async with pair(tmp_path) as (prefill, decode, arena):
        source = await source_of(prefill, arena, call(), tmp_path)

        frames = await frames_of(decode, call(), [replace(source, **change)])

        (report,) = [report for frame in frames for report in frame.kv]
        assert (report.result, report.reason) == ("recomputed", "fingerprint")
        assert tokens(frames) == tokens(await frames_of(prefill, call()))
        arena.free(source.slots)


async def test_without_room_in_the_arena_prefill_gives_no_blocks(tmp_path: Path) -> None:
    async with pair(tmp_path, num_slots=2) as (prefill, _, arena):
        result = await prefill.prefill(CONTEXT, call())

        assert isinstance(result, Prefilled)
        assert result.prompts[0].kv is None
        assert len(result.prompts[0].token_ids) == 1
        assert arena.num_free == arena.num_slots


async def test_cancelling_at_any_moment_frees_everything(tmp_path: Path) -> None:
    """Waiting, loading, running: whatever a request does when its reader goes away."""
    async with pair(tmp_path) as (prefill, decode, arena):
        source = await source_of(prefill, arena, call(), tmp_path)
        for num_turns in range(40):
            task = asyncio.create_task(frames_of(decode, call(stream=True, max_tokens=100), [source]))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: decode.load().num_free_blocks == decode.load().num_blocks)

        assert (decode.load().num_running, decode.load().num_waiting) == (0, 0)
        arena.free(source.slots)


async def test_a_cancelled_prefill_frees_its_slots(tmp_path: Path) -> None:
    async with pair(tmp_path) as (prefill, _, arena):
        for num_turns in range(12):
            task = asyncio.create_task(prefill.prefill(CONTEXT, call()))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, Prefilled):
                arena.free(result.prompts[0].kv.slots)

        assert arena.num_free == arena.num_slots
        assert prefill.load().num_free_blocks == prefill.load().num_blocks


async def test_a_cancelled_prefill_lets_go_of_what_it_shares(tmp_path: Path) -> None:
    arena = Arena.create(16 * 16384)
    store = PrefixStore(arena, Place(str(tmp_path / "a"), "inc-1"))
    engine = create("sim", replace(OPTIONS, role=Role.PREFILL), arena, store)
    await engine.start()
    for num_turns in range(12):
        task = asyncio.create_task(engine.prefill(CONTEXT, call()))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, Prefilled):
            kv = result.prompts[0].kv
            assert kv is not None
            store.adopt(kv.slots, kv.block_hashes, kv.num_shared)
            store.release(kv.slots)

        assert arena.num_free + store.num_kept == arena.num_slots
    assert store.num_kept == 2
    await engine.close()
    arena.close()


async def test_published_slots_hold_nothing_of_their_last_holder() -> None:
    """The end of a partly filled block could otherwise carry another tenant's KV."""
    arena = Arena.create(16 * 16384)
    async with running(replace(OPTIONS, role=Role.PREFILL, kv_cache_bytes=3 * 16384), arena) as prefill:
        for text, salt in (("x" * 39, "mine"), ("y" * 17, "theirs")):
            result = await prefill.prefill(RequestContext("r-2", cache_salt=salt), call(prompt=text))
            arena.free(result.prompts[0].kv.slots)

        last = arena.slot(result.prompts[0].kv.slots[-1])
        entry_bytes = arena.slot_bytes // 16
        assert last[:entry_bytes].any()
        assert not last[entry_bytes:].any()
    arena.close()


async def test_what_blocks_held_before_changes_nothing() -> None:
    """Also for further choices, which get their own copy of the prompt's last block."""
    two = call(n=2, prompt="x" * 21)
    async with running() as fresh, running(replace(OPTIONS, kv_cache_bytes=8 * 16384)) as used:
        for i in range(8):
            await frames_of(used, call(prompt=str(i) * 60))

        from_used, from_fresh = await frames_of(used, two), await frames_of(fresh, two)

        assert [tokens(from_used, i) for i in (0, 1)] == [tokens(from_fresh, i) for i in (0, 1)]


# --- scheduling -------------------------------------------------------------------------------------------------------


async def test_what_has_no_room_waits_and_lower_priorities_go_first() -> None:
    async with running(replace(OPTIONS, max_num_seqs=1)) as engine:
        order: list[str] = []

        async def run(name: str, priority: int) -> None:
            await frames_of(engine, call(max_tokens=3), context=RequestContext(name, priority=priority))
            order.append(name)

        first = asyncio.create_task(run("first", 5))
        await asyncio.sleep(0)
        await asyncio.gather(first, run("normal", 0), run("urgent", -1), run("normal too", 0))

        assert order == ["first", "urgent", "normal", "normal too"]


async def test_all_sequences_of_a_step_advance_together() -> None:
    async with running() as engine:
        before = engine.load().step

        await asyncio.gather(*(frames_of(engine, call(max_tokens=20, seed=i)) for i in range(10)))

        assert engine.load().step - before <= 22


async def test_blocks_are_found_again_and_counted_as_cached() -> None:
    async with running() as engine:
        first, second = await frames_of(engine, call()), await frames_of(engine, call())

        assert tokens(first) == tokens(second)
        assert (first[-1].end.usage.cached_tokens, second[-1].end.usage.cached_tokens) == (0, 32)


async def test_an_unlimited_answer_has_a_natural_end() -> None:
    async with running() as engine:
        frames = await frames_of(engine, call("/v1/chat/completions", max_tokens=None))

        assert frames[-1].end.finish_reason == "stop"
        assert frames[-1].end.usage.completion_tokens == 64


async def test_a_dead_engine_fails_its_requests_and_says_so() -> None:
    async with running() as engine:
        task = asyncio.create_task(frames_of(engine, call(max_tokens=1000)))
        await until(lambda: engine.load().num_running == 1)

        await engine.close()

        with pytest.raises(WorkerLost):
            await task
        assert not engine.load().is_alive


async def test_what_could_never_run_is_refused_instead_of_waiting_for_ever() -> None:
    async with running(replace(OPTIONS, max_num_seqs=2)) as engine:
        with pytest.raises(InvalidRequest, match="3 choices"):
            await frames_of(engine, call(n=3))

    async with running(replace(OPTIONS, kv_cache_bytes=6 * 16384)) as engine:
        with pytest.raises(InvalidRequest, match="blocks"):
            await frames_of(engine, call(n=8))


def test_a_cache_smaller_than_a_block_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        create("sim", replace(OPTIONS, kv_cache_bytes=1), None)


# --- numerics ---------------------------------------------------------------------------------------------------------


async def test_numerics_are_compared_with_the_reference(tmp_path: Path) -> None:
    prompt = tuple(b"a reference")
    async with running() as engine:
        greedy = call(prompt=list(prompt), temperature=0, max_tokens=4)
        right = tuple(tokens(await frames_of(engine, greedy, context=RequestContext("numerics"))))

    for greedy_ids, is_right in ((right, True), ((*right[:-1], right[-1] ^ 1), False)):
        path = tmp_path / f"{is_right}.json"
        n = len(prompt)
        save(NumericsReference("d", prompt, (greedy_ids[0],) * n, (0.0,) * n, (0.0,) * (n - 1), greedy_ids), path)
        async with running(replace(OPTIONS, numerics_reference=path)) as engine:
            if is_right:
                await engine.check_numerics()
            else:
                with pytest.raises(NumericsMismatch):
                    await engine.check_numerics()

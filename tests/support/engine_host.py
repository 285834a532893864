"""An engine in a process of its own, so that the contract suite can drive real ones side by side.

    python -m tests.support.engine_host CONFIG

Tests talk to it over a unix socket: one connection per call, closed to cancel, carrying pickles between the test run
and its own child. A prefill engine comes with an arena and its server.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from inferflux.cli.pdeathsig import die_with_parent
from inferflux.engine import create
from inferflux.engine.base import Adapter, ComputedPrompt, Engine, EngineInfo, EngineLoad, KvSource, Prefilled
from inferflux.engine.options import EngineOptions, GrammarLimits, Parallelism
from inferflux.engine.sim import SimEngine
from inferflux.kv.arena import Arena
from inferflux.kv.prefixes import Place, PrefixStore
from inferflux.kv.shm import ArenaServer
from inferflux.telemetry import metrics
from inferflux.types import Delivered, Frame, HttpAnswer, HttpCall, RequestContext, Role

REPOSITORY = Path(__file__).parents[2]
INCARNATION = "incarnation-1"
ARENA_BYTES = 96 << 20
START_S = 400.0
DONE = "done"


# --- in the child -----------------------------------------------------------------------------------------------------


class Host:
    """Answers calls of the test run."""

    def __init__(self, engine: Engine, info: EngineInfo, arena: Arena | None, prefixes: PrefixStore | None) -> None:
        self._engine = engine
        self._info = info
        self._arena = arena
        self._prefixes = prefixes

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; its end cancels the call."""
        name, args = pickle.loads(await _read(reader))  # noqa: S301 - from our parent
        call = asyncio.create_task(self._answer(name, args, writer))
        gone = asyncio.create_task(reader.read())
        await asyncio.wait({call, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in (call, gone):
            task.cancel()
        await asyncio.gather(call, gone, return_exceptions=True)
        writer.close()

    async def _answer(self, name: str, args: tuple[Any, ...], writer: asyncio.StreamWriter) -> None:
        try:
            if name == "generate":
                async with aclosing(self._engine.generate(*args)) as frames:
                    async for frame in frames:
                        await _write(writer, frame)
                await _write(writer, DONE)
            else:
                await _write(writer, await getattr(self, name)(*args))
        except Exception as e:  # noqa: BLE001 - the test run judges it
            await _write(writer, e)

    async def info(self) -> EngineInfo:
        return self._info

    async def load(self) -> EngineLoad:
        return self._engine.load()

    async def prefill(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        """Compute; what is published is held, as a ticket would, until `free`."""
        result = await self._engine.prefill(context, call)
        if isinstance(result, Prefilled) and self._prefixes is not None:
            for prompt in result.prompts:
                if prompt.kv is not None:
                    self._prefixes.adopt(prompt.kv.slots, prompt.kv.block_hashes, prompt.kv.num_shared)
        return result

    async def check_numerics(self) -> None:
        await self._engine.check_numerics()

    async def load_adapter(self, adapter: Adapter) -> None:
        await self._engine.load_adapter(adapter)

    async def drop_adapter(self, adapter: Adapter, is_last: bool) -> None:
        await self._engine.drop_adapter(adapter, is_last=is_last)

    async def slots(self) -> tuple[int, int]:
        return self._own_arena.num_free + self._own_prefixes.num_kept, self._own_arena.num_slots

    async def generations(self, slots: Sequence[int]) -> tuple[int, ...]:
        return self._own_arena.generations(slots)

    async def free(self, slots: Sequence[int]) -> None:
        self._own_prefixes.release(slots)

    async def corrupt(self, slot: int, at: int) -> None:
        self._own_arena.slot(slot)[at] ^= 1

    async def expert_tokens(self) -> list[int]:
        """What the metric says, by expert."""
        samples = [s for s in next(iter(metrics.EXPERT_TOKENS.collect())).samples if s.name.endswith("_total")]
        return [round(s.value) for s in sorted(samples, key=lambda s: int(s.labels["expert"]))]

    async def lose_cache(self) -> None:
        """Empty the engine's own prefix cache, as other requests would in time."""
        if isinstance(self._engine, SimEngine):
            pool = self._engine._pool
            pool.drop(pool.take(pool.num_free))
        else:
            await self._engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]

    @property
    def _own_arena(self) -> Arena:
        assert self._arena is not None
        return self._arena

    @property
    def _own_prefixes(self) -> PrefixStore:
        assert self._prefixes is not None
        return self._prefixes


async def host(config: dict[str, Any]) -> None:
    """Run the engine until the parent ends."""
    options = EngineOptions(
        **{
            **config["options"],
            **_paths(config["options"]),
            "role": Role(config["options"]["role"]),
            "parallelism": Parallelism(**config["options"]["parallelism"]),
            "grammar_limits": GrammarLimits(**config["options"]["grammar_limits"]),
        }
    )
    arena = Arena.create(ARENA_BYTES) if options.role is Role.PREFILL else None
    prefixes = PrefixStore(arena, Place(config["arena"], INCARNATION)) if arena is not None else None
    engine = create(config["engine"], options, arena, prefixes)
    try:
        info = await engine.start()
        if arena is not None:
            arena.seal()
            await ArenaServer(arena, config["arena"], INCARNATION).start()
        await asyncio.start_unix_server(Host(engine, info, arena, prefixes).serve, config["socket"])
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    finally:
        await engine.close()


def _paths(options: dict[str, Any]) -> dict[str, Path | None]:
    names = ("model_dir", "numerics_reference", "sim_profile")
    return {name: Path(options[name]) for name in names if options.get(name)}


# --- on both sides ----------------------------------------------------------------------------------------------------


async def _read(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))


async def _write(writer: asyncio.StreamWriter, message: object) -> None:
    payload = pickle.dumps(message)
    writer.write(len(payload).to_bytes(4, "little") + payload)
    await writer.drain()


# --- in the test run --------------------------------------------------------------------------------------------------


class HostedEngine:
    """An engine in its process, as the tests see it."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self._directory = directory
        self._process = process

    @property
    def arena_socket(self) -> Path:
        return self._directory / "arena.sock"

    def is_up(self) -> bool:
        assert self._process.poll() is None, self.log()[-4000:]
        return (self._directory / "host.sock").exists()

    def ranks(self) -> list[psutil.Process]:
        """The processes that its engine core has forked."""
        host = psutil.Process(self._process.pid)
        return [child for child in host.children(recursive=True) if child.ppid() != host.pid]

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    async def info(self) -> EngineInfo:
        return await self._one("info")

    async def load(self) -> EngineLoad:
        return await self._one("load")

    async def check_numerics(self) -> None:
        await self._one("check_numerics")

    async def load_adapter(self, adapter: Adapter) -> None:
        await self._one("load_adapter", adapter)

    async def drop_adapter(self, adapter: Adapter, *, is_last: bool) -> None:
        await self._one("drop_adapter", adapter, is_last)

    async def num_free_slots(self) -> int:
        return (await self._one("slots"))[0]

    async def num_slots(self) -> int:
        return (await self._one("slots"))[1]

    async def corrupt(self, slot: int, at: int) -> None:
        """Flip a bit of a published slot."""
        await self._one("corrupt", slot, at)

    async def free(self, slots: Sequence[int]) -> None:
        await self._one("free", slots)

    async def expert_tokens(self) -> list[int]:
        """Tokens that went to each expert; empty: nothing is counted."""
        counts: list[int] = await self._one("expert_tokens")
        return counts

    async def lose_cache(self) -> None:
        """Empty the engine's own prefix cache, not the arena."""
        await self._one("lose_cache")

    async def prefill(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        return await self._one("prefill", context, call)

    async def source(self, prompt: ComputedPrompt, ticket_id: str) -> KvSource:
        """What a worker makes of a prompt for another worker's engine."""
        assert prompt.kv is not None
        return KvSource(
            ticket_id=ticket_id,
            prompt_digest=prompt.prompt_digest,
            num_tokens=prompt.kv.num_tokens,
            slots=prompt.kv.slots,
            digests=prompt.kv.digests,
            slot_bytes=(await self.info()).slot_bytes,
            socket_path=str(self.arena_socket),
            incarnation=INCARNATION,
            first_token_ids=prompt.token_ids,
            generations=await self._one("generations", prompt.kv.slots),
        )

    async def generate(
        self,
        context: RequestContext,
        call: HttpCall,
        sources: Sequence[KvSource] = (),
        delivered: Delivered | None = None,
    ) -> AsyncIterator[Frame]:
        """Close the generator to cancel."""
        async with self._call("generate", context, call, tuple(sources), delivered) as reader:
            while (message := pickle.loads(await _read(reader))) != DONE:  # noqa: S301 - from our child
                if isinstance(message, Exception):
                    raise message
                yield message

    async def _one(self, name: str, *args: Any) -> Any:
        async with self._call(name, *args) as reader:
            answer = pickle.loads(await _read(reader))  # noqa: S301 - from our child
        if isinstance(answer, Exception):
            raise answer
        return answer

    @asynccontextmanager
    async def _call(self, name: str, *args: Any) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_unix_connection(self._directory / "host.sock", limit=64 << 20)
        try:
            await _write(writer, (name, args))
            yield reader
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@contextmanager
def hosted(engine: str, *all_options: EngineOptions) -> Iterator[list[HostedEngine]]:
    """Start one engine for each of the options, at the same time; wait until all can compute."""
    with ExitStack() as stack:
        engines = [stack.enter_context(_started(engine, options)) for options in all_options]
        deadline = time.monotonic() + START_S
        while not all(hosted_engine.is_up() for hosted_engine in engines):
            assert time.monotonic() < deadline, [e.log()[-2000:] for e in engines]
            time.sleep(0.02)
        yield engines


@contextmanager
def _started(engine: str, options: EngineOptions) -> Iterator[HostedEngine]:
    directory = Path(tempfile.mkdtemp(prefix="ifx-engine-", dir="/tmp"))
    config = {
        "engine": engine,
        "options": {name: _plain(getattr(options, name)) for name in options.__dataclass_fields__},
        "socket": str(directory / "host.sock"),
        "arena": str(directory / "arena.sock"),
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.engine_host", json.dumps(config)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - one thread
        )
    try:
        yield HostedEngine(directory, process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def _plain(value: Any) -> Any:
    if isinstance(value, Parallelism | GrammarLimits):
        return asdict(value)
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    asyncio.run(host(json.loads(sys.argv[1])))

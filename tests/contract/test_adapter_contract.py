"""Adapters on vLLM: each request gets exactly its own, whatever else is in the batch, in the caches or being changed.

In float32, against transformers on weights to which the adapters were added.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from inferflux.engine.base import Adapter
from inferflux.engine.options import MIB, EngineOptions
from inferflux.errors import Conflict, InferfluxError, InvalidRequest
from inferflux.models.adapters import take
from inferflux.types import HttpCall, RequestContext, Role
from inferflux.worker.adapters import salted
from tests.support.engine_calls import Engines, Response, completion, context, settle, ticketed
from tests.support.engine_host import HostedEngine, hosted
from tests.support.tiny_adapters import Said, make
from tests.support.tiny_models import LLAMA, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_TOKENS = 12
LENGTHS = (5, 40, 300)


@dataclass(frozen=True)
class Bench:
    """An engine, two adapters that it holds and one that it does not, and what must be said."""

    engine: HostedEngine
    adapters: dict[str, Adapter]
    said: Said

    def call(self, name: str, number: int) -> tuple[RequestContext, HttpCall]:
        """Ask prompt `number`; as its worker does, an adapter's request brings its digest and a salt of its own."""
        about, call = context(), completion(PROMPTS[number], max_tokens=NUM_TOKENS, **({"model": name} if name else {}))
        if not name:
            return about, call
        digest = self.adapters[name].digest
        salt = salted(about.cache_salt, digest)
        return replace(about, adapter=name, adapter_digest=digest, cache_salt=salt), call

    async def ask(self, name: str, number: int) -> list[int]:
        about, call = self.call(name, number)
        async with aclosing(self.engine.generate(about, call)) as frames:
            return Response([frame async for frame in frames]).token_ids()


def prompt(length: int, seed: int) -> list[int]:
    return [(7919 * i + 104729 * seed) % 40000 + 100 for i in range(length)]


PROMPTS = [prompt(length, seed) for seed, length in enumerate(LENGTHS, 1)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home, model = tmp_path_factory.mktemp("adapters"), tiny_model(LLAMA)
    options = EngineOptions("m", Role.PREFILL, kv_cache_bytes=24 * MIB, max_model_len=1024, max_num_seqs=16)
    options = replace(options, **model, dtype="float32", block_size=32, max_adapters=2, max_adapter_rank=8)
    with hosted("vllm", options) as (engine,):
        folders = {home / name: seed for seed, name in enumerate(("red", "blue", "green"), 1)}
        said = make(Path(model["model_dir"]), folders, PROMPTS, NUM_TOKENS)
        taken = {folder.name: take(folder, home / "taken", lambda _: None) for folder in folders}
        adapters = {name: Adapter(name, folder, digest) for name, (folder, digest) in taken.items()}
        for name in ("red", "blue"):
            asyncio.run(engine.load_adapter(adapters[name]))
        yield Bench(engine, adapters, said)


async def test_each_request_of_a_mixed_batch_gets_its_own_adapter_or_none(bench: Bench) -> None:
    """Twice, so that the second time everything that may be cached is."""
    asked = [(name, number) for number in range(len(PROMPTS)) for name in ("", "red", "blue")]

    for _ in range(2):
        got = await asyncio.gather(*(bench.ask(name, number) for name, number in asked))
        assert got == [bench.said[name][number] for name, number in asked]
    assert len({tuple(ids) for ids in got}) == len(asked), "the adapters make no difference: this proves nothing"


async def test_a_ticket_brings_the_blocks_of_its_adapter(bench: Bench) -> None:
    """Read, not computed again, after the engine has lost its own cache."""
    for name in ("red", ""):
        about, call = bench.call(name, 2)
        async with ticketed(Engines("vllm", "m", bench.engine, bench.engine), call, about) as sources:
            await settle(bench.engine)
            await bench.engine.lose_cache()
            async with aclosing(bench.engine.generate(about, call, sources)) as frames:
                response = Response([frame async for frame in frames])
        assert (response.token_ids(), response.report.result) == (bench.said[name][2], "committed")


async def test_a_changed_adapter_serves_new_requests_and_the_old_one_those_that_run(bench: Bench) -> None:
    """Two versions of one name in one batch; the old one then goes, and comes back."""
    old, new = bench.adapters["red"], replace(bench.adapters["green"], name="red")
    changed = replace(bench, adapters={**bench.adapters, "red": new})
    running = [asyncio.create_task(bench.ask("red", number)) for number in range(len(PROMPTS))]
    await bench.engine.load_adapter(new)

    got = await asyncio.gather(*(changed.ask("red", number) for number in range(len(PROMPTS))), bench.ask("", 1))
    assert got == [*bench.said["green"], bench.said[""][1]]
    assert [await task for task in running] == bench.said["red"]

    await bench.engine.drop_adapter(old, is_last=False)
    with pytest.raises(InferfluxError, match="is not in this engine"):
        await bench.ask("red", 0)
    assert await changed.ask("red", 0) == bench.said["green"][0]
    await bench.engine.load_adapter(old)
    await bench.engine.drop_adapter(new, is_last=False)
    assert await bench.ask("red", 0) == bench.said["red"][0]


async def test_what_does_not_fit_is_refused_and_the_engine_lives(bench: Bench, tmp_path: Path) -> None:
    """Files that are no adapter, another name than the call's, and no room."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InvalidRequest, match="adapter broken does not fit"):
        await bench.engine.load_adapter(Adapter("broken", tmp_path, "00" * 32))
    about, _ = bench.call("red", 0)
    _, call = bench.call("blue", 0)
    with pytest.raises(InvalidRequest, match="it was routed for 'red'"):
        async for _ in bench.engine.generate(about, call):
            pass
    copies = [replace(bench.adapters["green"], name=f"green-{i}") for i in range(3)]
    for adapter in copies[:2]:
        await bench.engine.load_adapter(adapter)
    with pytest.raises(Conflict, match="at most 4"):
        await bench.engine.load_adapter(copies[2])
    for adapter in copies[:2]:
        await bench.engine.drop_adapter(adapter, is_last=True)

    assert await bench.ask("blue", 1) == bench.said["blue"][1]

"""A decode worker whose ranks are on two Ray nodes, in a whole cluster: the death of a rank costs no stream a token."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from inferflux.cli.child import Child, Spawned
from inferflux.cli.plan import ClusterOptions, ProcessSpec, plan
from inferflux.paths import Home
from tests.support.cluster import Cluster, environment
from tests.support.ray_nodes import RayCluster
from tests.support.tiny_models import LLAMA, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODEL = f"tiny-{LLAMA}"
SMALL = {"INFERFLUX_KV_ARENA_BYTES": str(32 << 20), "INFERFLUX_KV_CACHE_BYTES": str(48 << 20)}
START_S, UNREADY_S, POLL_S = 300.0, 2.0, 0.02
RANK = "ray::CpuRank"
NIXL_BYTES = 'inferflux_kv_transfer_bytes_total{transport="nixl"}'
PROMPTS = ("The first town lies", "Another town is")


class SpreadWorker:
    """decode-1, kept alive by the supervisor's own means."""

    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec

    async def is_ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return (await self._get("/readyz")).status_code == 200
        return False

    async def num_running(self) -> int:
        return (await self._get("/metrics")).text.count('inflight{role="decode"} 1.0')

    async def num_bytes_by_nixl(self) -> float:
        """Of KV, read by its ranks."""
        lines = [line for line in (await self._get("/metrics")).text.splitlines() if NIXL_BYTES in line]
        return float(lines[0].split()[-1]) if lines else 0.0

    async def wait(self, timeout_s: float, *, is_ready: bool) -> float:
        """Wait until it is ready, or until it is not; returns the seconds."""
        began_at = time.monotonic()
        while await self.is_ready() is not is_ready:
            assert time.monotonic() < began_at + timeout_s, self._spec.log.read_text()[-3000:]
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began_at

    async def _get(self, path: str) -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(self._spec.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://ops") as client:
            return await client.get(path)


@asynccontextmanager
async def spread_worker(cluster: Cluster, ray_nodes: RayCluster) -> AsyncIterator[SpreadWorker]:
    fields = {name: str(value) for name, value in tiny_model(LLAMA).items()}
    options = ClusterOptions("vllm", MODEL, decode=2, dtype="float32", **fields)
    environ = environment(cluster.home, {**SMALL, **ray_nodes.environ, "PYTHONPATH": os.environ["PYTHONPATH"]})
    spec = next(spec for spec in plan(options, Home(cluster.home), [], environ) if spec.id == "decode-1")
    spread = {
        "INFERFLUX_TENSOR_PARALLEL": "2",
        "INFERFLUX_NODES": "2",
        "INFERFLUX_KV_TRANSPORT": "nixl",  # as on two hosts
        "INFERFLUX_RAY_ADDRESS": ray_nodes.address,
    }
    spec = replace(spec, env={**spec.env, **spread})

    async def start(spec: ProcessSpec) -> Spawned:
        return Spawned(spec)

    child = Child(spec, start)
    child.start()
    try:
        yield SpreadWorker(spec)
    finally:
        await child.stop(grace_s=30)


async def stream(cluster: Cluster, prompt: str, events: list[int]) -> str:
    """The text of a streamed completion; `events` gets the time of each."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 500, "temperature": 0, "stream": True, "ignore_eos": True}
    text: list[str] = []
    async with (
        httpx.AsyncClient(timeout=180, trust_env=False) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=cluster.headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(1)
                text.append(line.removeprefix("data: "))
    assert text[-1] == "[DONE]", text[-1]
    return "".join(_said(event) for event in text[:-1])


def _said(event: str) -> str:
    document: dict[str, Any] = httpx.Response(200, text=event).json()
    assert "error" not in document, document
    return "".join(choice["text"] for choice in document["choices"])


async def until_both_stream(worker: SpreadWorker, events: list[list[int]]) -> None:
    """Both streams flow, one of them from the worker on Ray."""
    deadline = time.monotonic() + 60
    while min(map(len, events)) < 6 or not await worker.num_running():
        assert time.monotonic() < deadline, ("no stream reached the worker on Ray", [len(e) for e in events])
        await asyncio.sleep(POLL_S)


def ranks() -> list[psutil.Process]:
    """The processes that are ranks of the one engine on Ray."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(RANK):
                found.append(process)
    return found


async def test_a_killed_rank_costs_no_stream_a_token(ray_nodes: RayCluster) -> None:
    tiny_model(LLAMA)
    with Cluster.start(engine="vllm", model=MODEL, options=["--dtype", "float32"], env=SMALL) as cluster:
        whole = [await stream(cluster, prompt, []) for prompt in PROMPTS]
        async with spread_worker(cluster, ray_nodes) as worker:
            await worker.wait(START_S, is_ready=True)
            events: list[list[int]] = [[], []]
            streams = [asyncio.create_task(stream(cluster, p, e)) for p, e in zip(PROMPTS, events, strict=True)]
            await until_both_stream(worker, events)
            before = ranks()
            assert len(before) == 2
            assert await worker.num_bytes_by_nixl() > 0
            before[1].kill()

            assert await worker.wait(UNREADY_S, is_ready=False) <= UNREADY_S
            assert await asyncio.gather(*streams) == whole
            await worker.wait(START_S, is_ready=True)
            assert len(ranks()) == 2
            assert {rank.pid for rank in ranks()}.isdisjoint(rank.pid for rank in before)
    await until_gone()


async def until_gone() -> None:
    """Ray ends what its driver leaves."""
    deadline = time.monotonic() + 20
    while left := ranks():
        assert time.monotonic() < deadline, left
        await asyncio.sleep(POLL_S)


def test_nobody_without_the_token_may_use_the_cluster(ray_nodes: RayCluster, tmp_path: Path) -> None:
    """Ray runs what it is sent, so it must know by whom."""
    code = f"import ray; ray.init(address={ray_nodes.address!r}, log_to_driver=False); print('in')"
    environ = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    script = tmp_path / "intruder.py"
    script.write_text(code)
    for token, is_in in ((None, False), ("0" * 64, False), (ray_nodes.environ["RAY_AUTH_TOKEN"], True)):
        result = _run(script, environ | ({"RAY_AUTH_TOKEN": token} if token else {}))
        assert ("in" in result.split()) == is_in


def _run(script: Path, environ: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout

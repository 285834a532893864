"""What makes it a disaggregated cluster: tickets, exact tokens, no waiting, no leaks, no need for a control plane."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time

import httpx

from bench import exactness
from bench.load import Server
from bench.peers import vllm_server
from inferflux.paths import models_dir
from tests.support.cluster import Cluster, poll

MODEL = "smollm2-135m"
BODY = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}


def metrics(cluster: Cluster, role: str = "gateway") -> dict[str, float]:
    """One process's metrics: series -> value."""
    text = cluster.metrics(role)
    return {m[1]: float(m[2]) for m in re.finditer(r"^(\w[^ ]*) ([-+.\deE]+)$", text, re.MULTILINE)}


def total(values: dict[str, float], name: str) -> float:
    """Sum of a metric over its labels."""
    return sum(value for series, value in values.items() if series.split("{")[0] == name)


def ask(cluster: Cluster, **changes: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {cluster.api_key}"}
    return httpx.post(f"{cluster.url}/v1/completions", json=BODY | changes, headers=headers, timeout=120)


def test_metrics_prove_the_walk(vllm_cluster: Cluster) -> None:
    """Prefill ran on a prefill worker, KV moved by ticket, decode ran on a decode worker."""
    before = metrics(vllm_cluster)
    ask(vllm_cluster, prompt="A prompt that nobody sent before: " + time.ctime()).raise_for_status()
    after = metrics(vllm_cluster)
    grown = {name: total(after, name) - total(before, name) for name in (
        "inferflux_prefills_total", "inferflux_kv_transfer_bytes_total", "inferflux_kv_transfer_seconds_count",
    )}  # fmt: skip

    assert grown["inferflux_prefills_total"] == 1
    assert grown["inferflux_kv_transfer_seconds_count"] == 1
    assert grown["inferflux_kv_transfer_bytes_total"] > 1_000_000
    assert total(after, "inferflux_kv_rejected_total") == total(before, "inferflux_kv_rejected_total")


def test_tokens_equal_one_vllm_server(vllm_cluster: Cluster) -> None:
    """Greedy and seeded tokens equal those of vLLM's own server in float32, alone and four at a time."""
    ours = Server(vllm_cluster.url, MODEL, vllm_cluster.api_key)
    with vllm_server(models_dir(os.environ) / MODEL, MODEL, "float32", threads=1, kv_cache_bytes=256 << 20) as peer:
        rows = asyncio.run(exactness.run(ours, peer, 5, 5, longest=500))

    assert [(row["mode"], row["equal"]) for row in rows] == [(f"{m}/c{c}", 5) for m in exactness.MODES for c in (1, 4)]


def test_a_disconnect_frees_everything(vllm_cluster: Cluster) -> None:
    """When the client goes away in the middle of a stream, engines stop and all slots and blocks come back."""
    headers = {"authorization": f"Bearer {vllm_cluster.api_key}"}
    body = BODY | {"stream": True, "max_tokens": 1500, "ignore_eos": True}
    with httpx.stream("POST", f"{vllm_cluster.url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        assert next(line for line in response.iter_lines() if line.startswith("data: "))

    def is_idle() -> bool:
        prefill, decode = metrics(vllm_cluster, "prefill"), metrics(vllm_cluster, "decode")
        return (
            prefill['inferflux_kv_slots{state="used"}'] == 0
            and total(prefill, "inferflux_inflight") == total(decode, "inferflux_inflight") == 0
        )

    poll(is_idle, 5, "workers are not idle")


async def test_killing_the_control_plane_fails_nothing(vllm_cluster: Cluster) -> None:
    """A kill -9 of policy, registry and Redis in the middle of load: every request succeeds with the same text."""
    expected = ask(vllm_cluster).json()["choices"][0]["text"]
    async with httpx.AsyncClient(base_url=vllm_cluster.url, timeout=120) as client:
        headers = {"authorization": f"Bearer {vllm_cluster.api_key}"}
        tasks = [asyncio.create_task(client.post("/v1/completions", json=BODY, headers=headers)) for _ in range(4)]
        killed = [vllm_cluster.kill(role) for role in ("policy", "registry", "redis")]
        tasks += [asyncio.create_task(client.post("/v1/completions", json=BODY, headers=headers)) for _ in range(8)]
        answers = await asyncio.gather(*tasks)

    assert {200} == {answer.status_code for answer in answers}
    for process in killed:
        vllm_cluster.wait_restarted(process)
    assert {expected} == {json.loads(answer.content)["choices"][0]["text"] for answer in answers}

"""Pooling calls through a real gateway: which worker answers, and what happens when it is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.gateway.bounds import MAX_INPUTS
from tests.support.fake_cluster import (
    JSON_HEAD,
    MODEL,
    FakeClient,
    FakeCluster,
    FakeDecode,
    Job,
    end,
    failed,
    fake_cluster,
    running_gateway,
    until,
)

PATHS = {
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/score": {"text_1": "a", "text_2": ["b", "c"]},
    "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
}


async def answer(job: Job) -> None:
    """Answer with the path that was asked, whole."""
    job.emit(head=JSON_HEAD, data=json.dumps({"path": job.start.call.path}).encode(), end=end())


async def nothing(job: Job) -> None:
    await job.is_cancelled.wait()


@asynccontextmanager
async def pooled() -> AsyncIterator[tuple[FakeCluster, list[FakeDecode], FakeClient]]:
    """Two pooling workers beside a decode worker."""
    async with fake_cluster() as cluster:
        await cluster.add_decode()
        workers = [await cluster.add_pooling(f"pooling-{i}") for i in range(2)]
        for worker in workers:
            worker.script = answer
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: all(worker.hellos for worker in workers))
            await asyncio.sleep(0.1)  # their first pulses
            yield cluster, workers, gateway


@pytest.mark.parametrize("path", PATHS)
async def test_pooling_workers_answer_and_no_others(path: str) -> None:
    """The call arrives as it came, in one piece and without a ticket."""
    async with pooled() as (_, workers, gateway):
        response = await gateway.http.post(path, json={"model": MODEL, **PATHS[path]})

        assert response.json() == {"path": path}
        (job,) = [job for worker in workers for job in worker.jobs]
        assert job.body == {"model": MODEL, **PATHS[path]}
        assert not job.start.prompts


async def test_without_a_pooling_worker_there_is_no_answer() -> None:
    """A decode worker is none, and a chat does not go to a pooling worker."""
    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            response = await gateway.http.post("/v1/embeddings", json={"model": MODEL, "input": "a"})

            assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
            assert "pooling" in response.json()["error"]["message"]
            assert not decode.jobs
    async with fake_cluster() as cluster:
        pooling = await cluster.add_pooling()
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            assert (await gateway.chat()).status_code == 503
            assert not pooling.jobs


@pytest.mark.parametrize("how", ["kill", "fail"])
async def test_a_lost_worker_costs_the_client_nothing(how: str) -> None:
    """Whatever it had begun is begun again on the other one."""
    async with pooled() as (cluster, workers, gateway):
        for worker in workers:
            worker.script = nothing
        request = asyncio.ensure_future(gateway.http.post("/v1/embeddings", json={"model": MODEL, "input": "a"}))
        await until(lambda: any(worker.jobs for worker in workers))
        (lost,) = [worker for worker in workers if worker.jobs]
        (other,) = [worker for worker in workers if worker is not lost]
        other.script = answer
        if how == "kill":
            await cluster.kill(lost.worker_id)
        else:
            lost.jobs[0].emit(end=failed("ENGINE_FAILED", 500, is_retryable=True))
        response = await request

        assert response.json() == {"path": "/v1/embeddings"}
        assert len(other.jobs) == 1


async def test_too_many_texts_are_refused() -> None:
    """The refusal says which field, the limit and how many there were."""
    async with pooled() as (_, workers, gateway):
        body = {"model": MODEL, "input": ["a"] * (MAX_INPUTS + 1)}
        response = await gateway.http.post("/v1/embeddings", json=body)

        assert response.status_code == 400
        assert response.json()["error"]["param"] == "input"
        assert response.json()["error"]["message"] == f"input has {MAX_INPUTS + 1} elements, the limit is {MAX_INPUTS}"
        assert not any(worker.jobs for worker in workers)

"""The table of inference paths: what is in it, and that nothing else exists."""

from __future__ import annotations

import pytest

from services.gateway.endpoints import ENDPOINTS, Dialect, Kind, Scope
from tests.support.fake_cluster import fake_cluster, running_gateway

GENERATING = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
# What a worker's application also has, and what nobody outside may reach.
INTERNAL = (
    "/v1/load_lora_adapter",
    "/reset_prefix_cache",
    "/sleep",
    "/collective_rpc",
    "/server_info",
    "/start_profile",
    "/invocations",
    "/docs",
    "/openapi.json",
)
TRICKS = (
    "/v1/chat/completions/",
    "/v1//chat/completions",
    "/V1/chat/completions",
    "/v1/%2e%2e/v1/completions",
    "/v1/completions%00",
    "/v1/completions;x=1",
    "/v1",
    "/",
)


def test_exactly_the_generating_paths_have_a_prefill_phase():
    """All of them; a utility call has no prompt to compute."""
    assert {path for path, endpoint in ENDPOINTS.items() if endpoint.kind is Kind.GENERATE} == GENERATING


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_path_is_well_described(path):
    """Under its own name, for keys that may generate, in the dialect of those who call it."""
    endpoint = ENDPOINTS[path]

    assert endpoint.path == path
    assert endpoint.scope is Scope.GENERATE
    assert (endpoint.dialect is Dialect.ANTHROPIC) == path.startswith("/v1/messages")


def test_nothing_internal_is_in_the_table():
    """Not even by accident."""
    assert not ENDPOINTS.keys() & set(INTERNAL)


async def test_generating_paths_disaggregate_and_utility_paths_do_not():
    """Through a real gateway: each path of the table reaches decode, the generating ones through prefill."""
    paths = [path for path, endpoint in ENDPOINTS.items() if endpoint.kind is not Kind.POOLING]
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_prefill(), await cluster.add_decode()
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            for path in paths:
                assert (await gateway.http.post(path, json={"model": "tiny"})).status_code == 200, path

    assert [job.start.call.path for job in decode.jobs] == paths
    assert {request.call.path for request in prefill.requests} == GENERATING
    assert all(bool(job.start.prompts) == (job.start.call.path in GENERATING) for job in decode.jobs)


async def test_unknown_paths_reach_no_worker():
    """404 for all, whatever the worker's own application would say; also for near misses of good paths."""
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_prefill(), await cluster.add_decode()
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            for path in (*INTERNAL, *TRICKS):
                response = await gateway.http.post(path, json={"model": "tiny"})
                assert response.status_code == 404, path
                assert response.json()["error"]["code"] == "not_found"
                assert response.headers["x-request-id"]

    assert not prefill.requests
    assert not decode.jobs

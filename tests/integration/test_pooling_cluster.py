"""Embeddings, scores and rankings in a real cluster: real processes, only the engines are simulated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.support.cluster import Cluster, poll
from tests.support.scrapes import count

MODEL = "vectors"
NUM_CLIENTS, NUM_CALLS = 4, 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(options=["--embedding-model", MODEL, "--pooling", "2"]) as cluster:
        poll(lambda: count(cluster, "gateway", "inferflux_worker_up") == 4, 30, "not all workers are up")
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=30, trust_env=False) as client:
        yield client


def post(client: httpx.Client, path: str, **fields: object) -> dict:
    response = client.post(path, json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_client_gets_vectors(cluster: Cluster) -> None:
    """OpenAI's own client, which asks for base64; equal texts have equal vectors, whoever computes them."""
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.api_key, max_retries=0) as client:
        first, again = (client.embeddings.create(model=MODEL, input=["a cat", "the sea"]) for _ in range(2))

    assert [row.index for row in first.data] == [0, 1]
    assert [row.embedding for row in first.data] == [row.embedding for row in again.data]
    assert first.data[0].embedding != first.data[1].embedding
    assert first.usage.prompt_tokens == first.usage.total_tokens == len("a cat") + len("the sea")


def test_texts_are_scored_and_ranked(client: httpx.Client) -> None:
    """The nearest document comes first, under its own index."""
    texts = ["stock markets fell", "a black cat slept"]

    scores = post(client, "/v1/score", text_1="a black cat", text_2=texts)["data"]
    ranked = post(client, "/v1/rerank", query="a black cat", documents=texts, top_n=1)["results"]

    assert scores[0]["score"] < scores[1]["score"] <= 1
    assert [(row["index"], row["document"]["text"]) for row in ranked] == [(1, texts[1])]
    assert ranked[0]["relevance_score"] == pytest.approx(scores[1]["score"])


def test_models_say_what_they_can_do(client: httpx.Client) -> None:
    """Neither is asked for what the other one does, and the one that answers questions is the default."""
    models = {model["id"]: model["capabilities"] for model in client.get("/v1/models").json()["data"]}
    assert models[MODEL] == ["embeddings", "score"]

    refused = client.post("/v1/embeddings", json={"model": "sim", "input": "a"})
    unable = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "a"}]})
    for response, capability in ((refused, "embeddings"), (unable, "chat")):
        assert (response.status_code, response.json()["error"]["code"]) == (422, "capability_not_supported")
        assert capability in response.json()["error"]["message"]
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    assert answer.json()["model"] == "sim"


def test_workers_know_tokens_of_both_models(client: httpx.Client) -> None:
    """What any worker of a model knows, a pooling worker is asked for too."""
    assert post(client, "/tokenize", prompt="a cat")["count"] == 5


def test_a_killed_worker_fails_no_request(cluster: Cluster, client: httpx.Client) -> None:
    """What it had is computed by the other one; the dead one comes back."""

    def call(number: int) -> int:
        return client.post("/v1/embeddings", json={"model": MODEL, "input": f"text {number}"}).status_code

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        statuses = [pool.submit(call, number) for number in range(NUM_CALLS)]
        statuses[NUM_CALLS // 4].result(30)
        before = cluster.kill("pooling", 0)
        assert [status.result(30) for status in statuses] == [200] * NUM_CALLS
    cluster.wait_restarted(before)


def test_a_drained_worker_leaves_without_losing_any(cluster: Cluster, client: httpx.Client) -> None:
    """It finishes what it has; requests that come meanwhile go to the other one."""
    before = cluster.process("pooling", 1)
    drained = cluster.inferctl("drain", "pooling-1")
    assert drained.returncode == 0, drained.stderr

    for number in range(10):
        post(client, "/v1/embeddings", input=f"text {number}")
    cluster.wait_restarted(before)


def test_tokens_are_counted_for_the_model(cluster: Cluster, client: httpx.Client) -> None:
    """Prompt tokens only: nothing is generated."""
    name = f'inferflux_tokens_total{{kind="%s",model="{MODEL}"}}'
    before = count(cluster, "gateway", name % "prompt")
    post(client, "/v1/embeddings", input="a cat")

    assert count(cluster, "gateway", name % "prompt") == before + 5
    assert count(cluster, "gateway", name % "completion") == 0

"""What a pooling engine promises: one suite, run on the simulated engine and on vLLM with a small random model."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest

from inferflux.engine.options import MIB, EngineOptions
from inferflux.types import HttpCall, Role
from tests.support.engine_calls import Response, ask, context, settle
from tests.support.engine_host import HostedEngine, hosted
from tests.support.tiny_models import BERT, TEXTS, VECTORS, tiny_model

LONG = "a b c d e f g h " * 200


@pytest.fixture(
    scope="module", params=["sim", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)])]
)
def engine(request: pytest.FixtureRequest) -> Iterator[HostedEngine]:
    own = {**tiny_model(BERT), "max_model_len": 512} if request.param == "vllm" else {"max_model_len": 512}
    with hosted(
        request.param, EngineOptions("m", Role.POOLING, kv_cache_bytes=32 * MIB, max_num_seqs=8, **own)
    ) as engines:
        yield engines[0]


def call(path: str, **fields: Any) -> HttpCall:
    body = json.dumps({"model": "m", **fields}).encode()
    return HttpCall("POST", path, body, headers=(("content-type", "application/json"),))


async def embed(engine: HostedEngine, texts: list[str] | list[list[int]]) -> list[list[float]]:
    response = await ask(engine, call("/v1/embeddings", input=texts))
    assert response.head.status == 200, response.body
    return [row["embedding"] for row in response.json["data"]]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


async def test_it_says_what_it_can_do(engine: HostedEngine) -> None:
    info = await engine.info()

    assert info.capabilities == ("embeddings", "score")
    assert info.slot_bytes == 0 or info.name == "sim"


async def test_vectors_are_those_of_transformers(engine: HostedEngine) -> None:
    """Short and long texts, alone and in a batch; the control is that other texts have other vectors."""
    info = await engine.info()
    if info.name == "sim":
        expected = await embed(engine, list(TEXTS))
    else:
        await engine.check_numerics()
        expected = json.loads((tiny_model(BERT)["model_dir"] / VECTORS).read_text())

    together = await embed(engine, list(TEXTS))
    alone = [(await embed(engine, [text]))[0] for text in TEXTS]

    for vectors in (together, alone):
        assert all(cosine(a, b) > 0.9999 for a, b in zip(vectors, expected, strict=True))
    assert cosine(together[0], expected[1]) < 0.999


async def test_usage_is_prompt_tokens_alone(engine: HostedEngine) -> None:
    """Of all texts of the call, as the response itself says; nothing was generated."""
    response = await ask(engine, call("/v1/embeddings", input=list(TEXTS)))

    assert response.end is not None
    assert response.end.usage.prompt_tokens == response.json["usage"]["prompt_tokens"] > len(TEXTS)
    assert response.end.usage.completion_tokens == 0
    assert response.end.error is None


async def test_scores_are_cosines_and_ranks_follow_them(engine: HostedEngine) -> None:
    """A text is nearest to itself."""
    documents = [TEXTS[1], TEXTS[0]]
    vectors = await embed(engine, [TEXTS[0], *documents])

    scores = (await ask(engine, call("/v1/score", text_1=TEXTS[0], text_2=documents))).json["data"]
    ranked = (await ask(engine, call("/v1/rerank", query=TEXTS[0], documents=documents))).json["results"]

    assert [row["score"] for row in scores] == pytest.approx([cosine(vectors[0], v) for v in vectors[1:]], abs=1e-3)
    assert [row["index"] for row in ranked] == [1, 0]
    assert ranked[0]["document"]["text"] == TEXTS[0]
    assert ranked[0]["relevance_score"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/v1/embeddings", {}, 400),
        ("/v1/embeddings", {"input": []}, 400),
        ("/v1/embeddings", {"input": LONG}, 400),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, 404),
    ],
)
async def test_what_cannot_be_pooled_is_refused(
    engine: HostedEngine, path: str, fields: dict[str, Any], status: int
) -> None:
    """By the application, before the engine hears of it; the next call is fine."""
    response = await ask(engine, call(path, **fields))

    assert response.head is not None
    assert response.head.status == status
    assert response.end is not None
    assert response.end.error is None
    assert len(await embed(engine, ["a"])) == 1


async def test_a_cancelled_call_leaves_nothing_behind(engine: HostedEngine) -> None:
    """Whenever its client leaves."""
    for delay_s in (0.0, 0.001, 0.01):
        frames = engine.generate(context(), call("/v1/embeddings", input=[TEXTS[2]] * 64))
        async with aclosing(frames):
            first = asyncio.ensure_future(anext(frames))
            await asyncio.wait([first], timeout=delay_s)
            first.cancel()
            await asyncio.wait([first])
        await settle(engine)


async def test_ids_and_times_follow_from_the_request(engine: HostedEngine) -> None:
    """So that another worker's answer to the same request is the same."""
    about = context()
    bodies = []
    for _ in range(2):
        async with aclosing(engine.generate(about, call("/v1/embeddings", input=["a"]))) as frames:
            bodies.append(Response([frame async for frame in frames]).json)

    assert bodies[0]["id"] == bodies[1]["id"]

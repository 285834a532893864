"""Images through a whole cluster: from the client's body to prefill, and its KV to decode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.cluster import Cluster
from tests.support.pictures import data_url, picture
from tests.support.scrapes import count
from tests.support.tiny_models import IDEFICS, tiny_model


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tiny_model(IDEFICS)["model_dir"]
    env = {"INFERFLUX_MAX_IMAGE_PIXELS": "10000", "INFERFLUX_BLOCK_SIZE": "32"}
    with Cluster.start(engine="vllm", model=str(folder), options=["--dtype", "float32"], env=env) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.api_key, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, image: bytes) -> str:
    parts: list[Any] = [
        {"type": "text", "text": "Look at this: "},
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": " and say what you see, " + "word by word, " * 16},
    ]
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_images_reach_the_model_through_a_ticket(cluster: Cluster, client: openai.OpenAI) -> None:
    """Same image, same answer; other images, other answers; and decode read the KV of each."""
    (model,) = client.models.list().data
    assert "vision" in model.model_dump()["capabilities"]
    committed = 'inferflux_tickets_total{event="committed"}'
    before = count(cluster, "prefill", committed)

    answers = [ask(client, model.id, picture(number)) for number in (1, 1, 2, 3, 4)]

    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    assert count(cluster, "prefill", committed) == before + 5
    for process in ("prefill", "decode"):
        assert count(cluster, process, "inferflux_image_preprocess_seconds_count") >= 5
    assert count(cluster, "gateway", 'inferflux_images_total{result="accepted"}') >= 5


def test_an_image_beyond_the_limit_is_refused(cluster: Cluster, client: openai.OpenAI) -> None:
    """Before any worker hears of it, with the limit and the actual value."""
    before = count(cluster, "prefill", "inferflux_image_preprocess_seconds_count")
    with pytest.raises(openai.BadRequestError, match="101 x 100 = 10100 pixels, the limit is 10000"):
        ask(client, cluster.model, picture(1, 101, 100))

    assert count(cluster, "prefill", "inferflux_image_preprocess_seconds_count") == before

"""Vectors of a real model through a whole cluster equal those that transformers computes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import httpx
import openai

from tests.support.cluster import Cluster

TEXTS = [
    "A black cat sleeps on the sofa.",
    "The kitten is taking a nap on the couch.",
    "Stock markets fell sharply on Monday.",
    "import numpy as np",
    "Ein Satz auf Deutsch, der länger ist als die anderen und mit einer Frage endet: Wirklich? " * 5,
]
# Mean of the last states, as the model's card has it; independent of our own job and of vLLM.
ORACLE = """
import json, sys, torch, transformers
folder, texts = sys.argv[1], json.loads(sys.argv[2])
words = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
with torch.inference_mode():
    batch = words(texts, padding=True, return_tensors="pt")
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    vectors = (states * mask).sum(1) / mask.sum(1)
print(json.dumps(torch.nn.functional.normalize(vectors).tolist()))
"""


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def test_vectors_are_those_of_transformers(cluster: Cluster, folder: Path) -> None:
    """Cosine above 0.9999 for short texts and long, code and another language; and near texts are near."""
    command = [sys.executable, "-c", ORACLE, str(folder), json.dumps(TEXTS)]
    expected = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300).stdout)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.api_key, max_retries=0) as client:
        answer = client.embeddings.create(model=folder.name, input=TEXTS)

    vectors = [row.embedding for row in answer.data]
    assert min(cosine(a, b) for a, b in zip(vectors, expected, strict=True)) > 0.9999
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.3
    assert answer.usage.prompt_tokens > len(TEXTS)


def test_documents_are_ranked_by_meaning(cluster: Cluster, folder: Path) -> None:
    """The same words are not needed."""
    body = {"model": folder.name, "query": "Where is the cat?", "documents": TEXTS[1:4], "top_n": 2}
    response = httpx.post(f"{cluster.url}/v1/rerank", json=body, headers=cluster.headers, timeout=60)

    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert len(results) == 2
    assert results[0]["index"] == 0
    assert results[0]["relevance_score"] > results[1]["relevance_score"]

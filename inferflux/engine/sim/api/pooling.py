"""Embeddings, scores and rankings: POST /v1/embeddings, /v1/score, /v1/rerank and their other names.

A text's vector is the sum of its words' vectors, which follow from the words alone: texts that share words are near
each other, and equal texts have equal vectors on every worker.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from itertools import cycle
from math import sqrt
from typing import Any

from inferflux.engine.sim import tokenizer
from inferflux.engine.sim.api.call import BadCall, Fields, Outcome, Plan, Renderer
from inferflux.engine.sim.sequence import Emitted, Sampling
from inferflux.types import RequestContext, Usage

NUM_DIMENSIONS = 64
CAPABILITIES = ("embeddings", "score")
FORMATS = ("float", "base64")
# What the two sides of a score are called.
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
Vector = tuple[float, ...]
Rows = Callable[[Sequence[Vector]], dict[str, Any]]
Plans = dict[str, Callable[[Fields, str, RequestContext], Plan]]


def vector(text: str) -> Vector:
    """Embed a text: a unit vector, or zeros where there are no words."""
    total = [0.0] * NUM_DIMENSIONS
    for word in text.lower().split():
        bits = int.from_bytes(blake2b(word.encode(), digest_size=NUM_DIMENSIONS // 8).digest())
        total = [value + (1 if bits >> i & 1 else -1) for i, value in enumerate(total)]
    norm = sqrt(sum(value * value for value in total)) or 1.0
    return tuple(value / norm for value in total)


class PoolingRenderer(Renderer):
    """The whole answer; there are no streams. `rows`: what becomes of the texts' vectors."""

    prefix = "embd-"

    def __init__(self, model: str, context: RequestContext, texts: Sequence[str], rows: Rows) -> None:
        super().__init__(model, context)
        self._texts = texts
        self._rows = rows

    def chunk(self, part: Emitted) -> bytes:
        raise NotImplementedError

    def closing(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        raise NotImplementedError

    def document(self, outcomes: Sequence[Outcome], usage: Usage) -> dict[str, Any]:
        head = {"id": self.id, "object": "list", "created": self.created, "model": self.model}
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        return {**head, **self._rows([vector(text) for text in self._texts]), "usage": counts}


def embeddings(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a call for the vectors of texts."""
    if (encoding := fields.get("encoding_format") or "float") not in FORMATS:
        raise BadCall(f"encoding_format must be one of {', '.join(FORMATS)}", param="encoding_format")
    fields.refuse("dimensions", "messages")
    return _plan(model, context, _texts(fields, "input"), partial(_embedding_rows, encoding))


def score(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a call that compares texts pairwise, or one with each of many."""
    names = next((names for names in SIDES if all(map(fields.has, names))), None)
    if names is None:
        raise BadCall("text_1 and text_2 are missing", param="text_1")
    first, second = (_texts(fields, name) for name in names)
    if len(first) not in (1, len(second)):
        raise BadCall("Input lengths must be either 1:1, 1:N or N:N", param=names[0])
    return _plan(model, context, (*first, *second), partial(_score_rows, len(first)))


def rerank(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a call that orders documents by how near they are to a query."""
    documents = _texts(fields, "documents")
    top_n = fields.integer("top_n", 0, 1 << 31) or len(documents)
    texts = (fields.text("query"), *documents)
    return _plan(model, context, texts, partial(_rerank_rows, documents, top_n))


PLANS: Plans = {
    "/v1/embeddings": embeddings,
    **dict.fromkeys(("/v1/score", "/score"), score),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), rerank),
}


def _plan(model: str, context: RequestContext, texts: Sequence[str], rows: Rows) -> Plan:
    prompts = tuple(tuple(tokenizer.encode(text)) or (tokenizer.END_OF_TEXT,) for text in texts)
    renderer = PoolingRenderer(model, context, texts, rows)
    return Plan(prompts, Sampling(max_tokens=1, temperature=0), stream=False, renderer=renderer, is_pooling=True)


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.get(name)
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
        raise BadCall(f"{name} must be a string or a list of strings", param=name)
    return tuple(items)


def _embedding_rows(encoding: str, vectors: Sequence[Vector]) -> dict[str, Any]:
    values = [_base64(v) if encoding == "base64" else list(v) for v in vectors]
    return {"data": [{"index": i, "object": "embedding", "embedding": value} for i, value in enumerate(values)]}


def _base64(values: Vector) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _score_rows(num_first: int, vectors: Sequence[Vector]) -> dict[str, Any]:
    pairs = zip(cycle(vectors[:num_first]), vectors[num_first:], strict=False)
    return {"data": [{"index": i, "object": "score", "score": _cosine(a, b)} for i, (a, b) in enumerate(pairs)]}


def _rerank_rows(documents: Sequence[str], top_n: int, vectors: Sequence[Vector]) -> dict[str, Any]:
    query, *others = vectors
    scores = [_cosine(query, other) for other in others]
    best = sorted(range(len(documents)), key=lambda i: -scores[i])[:top_n]
    rows = [(i, {"text": documents[i], "multi_modal": None}) for i in best]
    return {"results": [{"index": i, "document": text, "relevance_score": scores[i]} for i, text in rows]}


def _cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))

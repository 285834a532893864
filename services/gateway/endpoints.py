"""Every inference path the gateway serves, in one table: what kind of work it is, and which errors its clients read.

A path that is not here does not exist: nothing of a worker's application is reachable by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from inferflux.policy.identity import Scope
from services.gateway.guardrails.events import CHOICES, MESSAGE, RESPONSE, Shape

__all__ = ["ENDPOINTS", "Dialect", "Endpoint", "Kind", "Scope"]


class Kind(StrEnum):
    """GENERATE computes a prompt and then tokens: prefill, then decode. The others are one call to one worker.

    POOLING computes prompts whose result is the answer, on a pooling worker; UTILITY is what any worker knows.
    """

    GENERATE = "generate"
    POOLING = "pooling"
    UTILITY = "utility"


class Dialect(StrEnum):
    """Whose error bodies the clients of a path understand."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Texts:
    """How guardrails find the text of a path. All strings are text; this is what else they have to know.

    `ids`: fields of the request that may hold a prompt as tokens. `stream`: the shape of its event streams; None: it
    has none.
    """

    ids: tuple[str, ...] = ()
    stream: Shape | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One inference path. All of them take POST with a JSON object."""

    path: str
    kind: Kind
    texts: Texts
    dialect: Dialect = Dialect.OPENAI
    scope: Scope = Scope.GENERATE


_PROMPTS = ("prompt", "prompt_embeds", "input", "tokens")
_GENERATE = {
    "/v1/chat/completions": Texts(("prompt_embeds",), CHOICES),
    "/v1/completions": Texts(_PROMPTS, CHOICES),
    "/v1/responses": Texts(("input",), RESPONSE),
}
_SIDES = ("text_1", "text_2", "queries", "items", "data_1", "data_2")
_RERANK = (*_PROMPTS, "query", "documents", *_SIDES)
_UTILITY = {
    "/tokenize": Texts(_PROMPTS),
    "/detokenize": Texts(),  # tokens are all it takes; what they say is in its answer
    "/v1/chat/completions/render": Texts(),
    "/v1/completions/render": Texts(_PROMPTS),
    "/v1/responses/render": Texts(("input",)),
}
_POOLING = {
    "/v1/embeddings": Texts(_PROMPTS),
    "/v2/embed": Texts((*_PROMPTS, "texts")),
    "/v1/score": Texts(_RERANK),
    "/score": Texts(_RERANK),
    "/v1/rerank": Texts(_RERANK),
    "/v2/rerank": Texts(_RERANK),
    "/rerank": Texts(_RERANK),
    "/classify": Texts(_PROMPTS),
    "/pooling": Texts(_PROMPTS),
}

ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        *(Endpoint(path, Kind.GENERATE, texts) for path, texts in _GENERATE.items()),
        *(Endpoint(path, Kind.UTILITY, texts) for path, texts in _UTILITY.items()),
        *(Endpoint(path, Kind.POOLING, texts) for path, texts in _POOLING.items()),
        Endpoint("/v1/messages", Kind.GENERATE, Texts(stream=MESSAGE), Dialect.ANTHROPIC),
        Endpoint("/v1/messages/count_tokens", Kind.UTILITY, Texts(), Dialect.ANTHROPIC),
        Endpoint("/v1/messages/render", Kind.UTILITY, Texts(), Dialect.ANTHROPIC),
    )
}

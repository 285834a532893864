"""Every inference path the gateway serves, in one table: what kind of work it is, and which errors its clients read.

A path that is not here does not exist: nothing of a worker's application is reachable by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from inferflux.policy.identity import Scope

__all__ = ["ENDPOINTS", "Dialect", "Endpoint", "Kind", "Scope"]


class Kind(StrEnum):
    """GENERATE computes a prompt and then tokens: prefill, then decode. UTILITY is one call to a decode worker."""

    GENERATE = "generate"
    UTILITY = "utility"


class Dialect(StrEnum):
    """Whose error bodies the clients of a path understand."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One inference path. All of them take POST with a JSON object."""

    path: str
    kind: Kind
    dialect: Dialect = Dialect.OPENAI
    scope: Scope = Scope.GENERATE


_GENERATE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_UTILITY = (
    "/tokenize",
    "/detokenize",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/responses/render",
    "/v1/embeddings",
    "/v2/embed",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/classify",
    "/pooling",
)

ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        *(Endpoint(path, Kind.GENERATE) for path in _GENERATE),
        *(Endpoint(path, Kind.UTILITY) for path in _UTILITY),
        Endpoint("/v1/messages", Kind.GENERATE, Dialect.ANTHROPIC),
        Endpoint("/v1/messages/count_tokens", Kind.UTILITY, Dialect.ANTHROPIC),
        Endpoint("/v1/messages/render", Kind.UTILITY, Dialect.ANTHROPIC),
    )
}

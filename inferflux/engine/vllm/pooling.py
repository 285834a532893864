"""Pooling on vLLM: prompts whose result is the answer, a vector or a score.

vLLM's application renders and formats as ever and calls `encode` instead of `generate`. There is no KV to hand over:
no connector, no tickets, one forward pass.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from inferflux.types import ChoiceTokens, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from vllm.outputs import PoolingRequestOutput

    from inferflux.engine.vllm.transfer import Report
    from inferflux.errors import InferfluxError


class PoolingPhase:
    """What one API call does to the prompts that the application has computed; the same questions as a DecodePhase."""

    finish_reason = ""
    has_failed = False
    refusal: InferfluxError | None = None

    def __init__(self, cache_salt: str, priority: int) -> None:
        self._cache_salt = cache_salt
        self.priority = priority
        self.report: Callable[[Report], None] | None = None
        self.num_loads: dict[str, int] = {}
        self._num_prompt: dict[str, int] = {}

    def salted(self, prompt: Any) -> Any:
        """Separate the prefix caches of tenants."""
        is_salted = isinstance(prompt, dict) and self._cache_salt
        return {**prompt, "cache_salt": self._cache_salt} if is_salted else prompt

    async def observed(
        self, request_id: str, outputs: AsyncGenerator[PoolingRequestOutput, None]
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """See all outputs of a prompt before the application does."""
        async with aclosing(outputs):
            async for output in outputs:
                self._num_prompt[request_id] = len(output.prompt_token_ids or ())
                yield output

    def take_tokens(self, data: bytes = b"") -> tuple[ChoiceTokens, ...]:
        """None: nothing is generated."""
        return ()

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=sum(self._num_prompt.values()))


def capabilities(tasks: tuple[Any, ...], model_config: Any) -> tuple[str, ...]:
    """What a pooling engine can be asked for: scores need vectors, or a model that gives one number."""
    from vllm.entrypoints.pooling.utils import enable_scoring_api  # noqa: PLC0415

    from inferflux.models.capabilities import Capability  # noqa: PLC0415

    able = {
        Capability.EMBEDDINGS: "embed" in tasks,
        Capability.SCORE: enable_scoring_api(tasks, model_config),
        Capability.CLASSIFY: "classify" in tasks,
    }
    return tuple(capability for capability, can in able.items() if can)

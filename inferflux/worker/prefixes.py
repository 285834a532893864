"""What the prefix store of a prefill worker did, for metrics and for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from inferflux.engine.base import ComputedPrompt
from inferflux.kv.prefixes import Pin, PrefixStore, StoreCounts
from inferflux.telemetry import metrics


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """One worker's prefix store. Tokens are those of whole blocks; `num_peers`: other arenas it looks into."""

    slots: StoreCounts
    pins: tuple[Pin, ...]
    block_size: int
    num_peers: int
    requests: Counter[str]
    tokens: Counter[str]
    evictions: Counter[str]


class PrefixTally:
    """Counts since the worker's start, in metrics too.

    A prompt's result is judged by its whole blocks but for the last token, which is always computed: all of them known
    (hit), some (partial) or none (miss). Shorter prompts have nothing to find and are not counted.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()

    def observe(self, prompt: ComputedPrompt, block_size: int) -> None:
        """Count one computed prompt."""
        num_findable = (prompt.num_prompt_tokens - 1) // block_size * block_size
        if num_findable:
            self._count_request(_result(prompt.num_cached_tokens, num_findable))
        source = "peer" if prompt.is_from_peer else "arena"
        if prompt.has_failed_read:
            metrics.PREFIX_REJECTED.labels(source).inc()
        self._count_tokens("engine", prompt.num_cached_tokens - prompt.num_read_tokens)
        self._count_tokens(source, prompt.num_read_tokens)
        self._count_tokens("computed", prompt.num_prompt_tokens - prompt.num_cached_tokens)

    def evicted(self, reason: str, num: int) -> None:
        """Count blocks that the store has given up."""
        self.evictions[reason] += num
        metrics.PREFIX_EVICTIONS.labels(reason).inc(num)

    def status(self, store: PrefixStore, block_size: int) -> CacheStatus:
        """Everything at once."""
        num_peers = store.elsewhere.num_arenas if store.elsewhere is not None else 0
        return CacheStatus(
            store.counts(), store.pins(), block_size, num_peers, self.requests, self.tokens, self.evictions
        )

    def _count_request(self, result: str) -> None:
        self.requests[result] += 1
        metrics.PREFIX_REQUESTS.labels(result).inc()

    def _count_tokens(self, source: str, num: int) -> None:
        if num > 0:
            self.tokens[source] += num
            metrics.PREFIX_TOKENS.labels(source).inc(num)


def _result(num_cached: int, num_findable: int) -> str:
    if num_cached >= num_findable:
        return "hit"
    return "partial" if num_cached else "miss"

"""Models that see: what they can take, and how long it takes to make their input of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from inferflux.telemetry import metrics

if TYPE_CHECKING:
    from inferflux.engine.vllm.llm import TicketLLM
    from inferflux.types import Role


def can_see(llm: TicketLLM) -> bool:
    """Whether the model takes images."""
    processor = llm.renderer.mm_processor
    return processor is not None and "image" in processor.info.supported_mm_limits


def time_preprocessing(llm: TicketLLM, role: Role) -> None:
    """Measure what the processor of a model that sees does with each prompt's images, wherever it is called from."""
    processor: Any = llm.renderer.mm_processor
    if processor is None:
        return
    apply, histogram = processor.apply, metrics.IMAGE_PREPROCESS_SECONDS.labels(role.value)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began_at = time.perf_counter()
        try:
            return apply(*args, **kwargs)
        finally:
            histogram.observe(time.perf_counter() - began_at)

    processor.apply = timed

"""Which experts of a mixture the tokens go to, counted where vLLM's routers tell it.

An expert's number is its place in every layer, and with expert parallelism it says which rank has it: the sums over
layers show how evenly ranks are loaded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.platforms import current_platform

from inferflux.engine.layout import own_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

# Reading the counts waits for the device.
PERIOD_S = 1.0


class ExpertCounter:
    """Counts tokens by expert, over the layers of this rank; of its own replica only."""

    def __init__(self, config: VllmConfig, is_real_step: Callable[[], bool]) -> None:
        """`is_real_step`: whether the tokens of the running step are those of requests."""
        num_experts = config.model_config.get_num_experts()
        self._tokens = torch.zeros(num_experts, dtype=torch.int64, device=current_platform.device_type)
        self._replica = config.parallel_config.data_parallel_rank
        self._is_real_step = is_real_step
        self._taken_at = time.monotonic()
        for layer in config.compilation_config.static_forward_context.values():
            if isinstance(layer, MoERunner) and isinstance(layer.router, BaseRouter):
                layer.router.set_capture_fn(self._count)

    def take(self) -> list[int]:
        """Tokens of each expert since they were last taken; empty when that is not long ago."""
        if time.monotonic() < self._taken_at + PERIOD_S:
            return []
        self._taken_at = time.monotonic()
        tokens: list[int] = self._tokens.tolist()
        self._tokens.zero_()
        return tokens

    def _count(self, expert_ids: torch.Tensor) -> None:
        """`expert_ids`: `[tokens, experts per token]` of one layer."""
        if not self._is_real_step():
            return
        metadata = get_forward_context().dp_metadata
        if metadata is not None:
            tokens = metadata.num_tokens_across_dp_cpu.tolist()
            expert_ids = expert_ids[own_rows(len(expert_ids), metadata.local_sizes or tokens, self._replica, tokens)]
        ids = expert_ids.flatten().long()
        self._tokens.scatter_add_(0, ids, torch.ones_like(ids))

"""A correction to vLLM's LoRA operations on CPUs, loaded by the plugin.

A token without an adapter has the index -1, and torch takes that for the last one: in a batch with adapters, requests
without one got the output of another's. Here such tokens are given nothing.
"""

from __future__ import annotations

from typing import Any

import torch


def register() -> None:
    """Correct the operations that add an adapter's output. Idempotent."""
    from vllm.lora.ops.torch_ops import lora_ops  # noqa: PLC0415
    from vllm.lora.punica_wrapper import punica_cpu  # noqa: PLC0415

    if getattr(lora_ops.bgmv_expand, "_inferflux", False):
        return
    for name in ("bgmv_expand", "bgmv_expand_slice"):
        corrected = _spare_others(getattr(lora_ops, name))
        # One by the other's module globals: the operations for prompts call them there.
        setattr(lora_ops, name, corrected)
        setattr(punica_cpu, name, corrected)


def _spare_others(expand: Any) -> Any:
    """Let `expand` add nothing for tokens whose index is negative. Inputs: (tokens, rank); indices: (tokens,)."""

    def expand_own(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        indices: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        has_adapter = indices >= 0
        own = torch.where(has_adapter[: inputs.shape[0], None], inputs, 0)
        expand(own, weights, output, indices.clamp(min=0), *args, **kwargs)

    expand_own._inferflux = True  # type: ignore[attr-defined]  # noqa: SLF001
    return expand_own

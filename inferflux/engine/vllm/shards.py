"""Which part of every KV block this rank computes: layers by pipeline stage, KV heads by tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from inferflux.kv.blocks import BlockShape, Part, heads_of_rank, is_first_of_replicas

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import ModelConfig, VllmConfig

    from inferflux.kv.arena import Bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of an engine and its part of a block.

    `is_writer` False: where there are more ranks than KV heads, an earlier one has the same heads and writes them.
    """

    rank: int
    part: Part
    is_writer: bool = True

    @classmethod
    def of_this_rank(cls, config: VllmConfig, caches: Sequence[torch.Tensor]) -> Shard:
        """`caches`: the paged caches of this rank's layers, first layer first.

        Raises ValueError when blocks of these caches can't be put together from parts.
        """
        model, parallel = config.model_config, config.parallel_config
        num_ranks, num_heads = parallel.tensor_parallel_size, num_cached_heads(model)
        tensor_rank = get_tensor_model_parallel_rank()
        heads = heads_of_rank(tensor_rank, num_ranks, num_heads)
        first, num_layers = 0, len(caches)
        if parallel.pipeline_parallel_size > 1:
            first, num_layers = model.get_layers_start_end_indices(parallel)[0], model.get_total_num_hidden_layers()
        if len(heads) < num_heads:
            _require_heads_apart(caches, len(heads))
        shape = BlockShape(num_layers, num_heads, _piece_bytes(caches, len(heads)))
        part = Part(shape, range(first, first + len(caches)), heads)
        return cls(parallel.rank, part, is_first_of_replicas(tensor_rank, num_ranks, num_heads))


def num_cached_heads(model: ModelConfig) -> int:
    """KV heads in the cache of the whole model; with latent attention all heads share one."""
    return 1 if model.use_mla else model.get_total_num_kv_heads()


def bytes_by_block(tensor: torch.Tensor) -> Bytes:
    """View one layer's cache as writable bytes `[blocks, bytes of one block]`."""
    if not tensor.is_contiguous():
        raise ValueError(f"KV cache of shape {tuple(tensor.shape)} is not contiguous; blocks can't move as bytes")
    return tensor.view(tensor.shape[0], -1).view(torch.uint8).numpy()


def _require_heads_apart(caches: Sequence[torch.Tensor], num_heads: int) -> None:
    """Ranks fit side by side only where a block keeps the bytes of one head together."""
    if any(cache.dim() < 3 or cache.shape[1] != num_heads for cache in caches):
        raise ValueError(f"KV caches of shape {tuple(caches[0].shape)} do not keep their {num_heads} heads apart")


def _piece_bytes(caches: Sequence[torch.Tensor], num_heads: int) -> int:
    """Bytes of one head in one layer's block. `num_heads`: of this rank."""
    sizes = {cache[0].nbytes for cache in caches}
    if len(sizes) != 1:
        raise ValueError(f"the layers' blocks have {sorted(sizes)} bytes; blocks move only if all have the same")
    size, rest = divmod(sizes.pop(), num_heads)
    if rest:
        raise ValueError(f"blocks of {size * num_heads + rest} bytes are not {num_heads} heads of equal size")
    return size

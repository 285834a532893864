"""Corrections to vLLM for engines of several ranks on CPUs, loaded with the others (see inferflux.engine.vllm.plugin).

Each is idempotent, and proven by tests that compare tokens with those of one rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast

from inferflux.kv.shm import host_id

if TYPE_CHECKING:
    from collections.abc import Sequence


def register() -> None:
    """Apply all of them. Only on CPUs: elsewhere vLLM has its own ways, and cores to spin on."""
    if getattr(cpu_communicator.CpuCommunicator, "_inferflux", False):
        return
    cpu_communicator.CpuCommunicator._inferflux = True  # noqa: SLF001
    wait_for_messages_asleep()
    tell_hosts_apart()
    exchange_tokens()
    keep_to_own_experts()


def wait_for_messages_asleep() -> None:
    """Let core and ranks sleep until a message comes. vLLM's wait spins for a second, on the cores that compute."""
    init = shm_broadcast.SpinCondition.__init__

    def init_asleep(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.busy_loop_s = 0.0

    shm_broadcast.SpinCondition.__init__ = init_asleep


def tell_hosts_apart() -> None:
    """Share memory only with ranks of this host. vLLM takes ranks that agree on a port for ranks of one host."""
    shared = cpu_communicator._CPUSHMDistributed  # noqa: SLF001
    make_name = shared.make_group_name
    shared.make_group_name = staticmethod(lambda communicator: f"{make_name(communicator)}-{host_id()[:8]}")


def exchange_tokens() -> None:
    """Give CPUs the two exchanges that replicas with a mixture of experts need: each has another number of tokens."""
    cpu_communicator.CpuCommunicator.all_gatherv = all_gatherv
    cpu_communicator.CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate the rows of all ranks, `sizes` of each; None: equally many."""
    _require_rows(is_first=dim == 0)
    if isinstance(input_, list):
        return [_gather(self, tensor, sizes) for tensor in input_]
    return _gather(self, input_, sizes)


def _gather(group: Any, rows: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    """Pad to the longest, gather, cut."""
    sizes = sizes or [rows.shape[0]] * group.world_size
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=group.device_group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """Sum the rows of all ranks and keep this rank's, `sizes` for each; None: equally many."""
    _require_rows(is_first=dim in {0, -input_.dim()})
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    first = sum(sizes[: self.rank_in_group])
    return total[first : first + sizes[self.rank_in_group]].contiguous()


def _require_rows(*, is_first: bool) -> None:
    if not is_first:
        raise NotImplementedError("on CPUs only rows are exchanged: the first dimension")


def keep_to_own_experts() -> None:
    """Let a rank compute with the experts it has.

    vLLM's CPU kernel takes global numbers of experts for rows of this rank's weights, and reads behind their end.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts  # noqa: PLC0415

    apply = CPUUnquantizedExperts.apply

    def apply_own(
        self: Any, *, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, **rest: Any
    ) -> None:
        if expert_map is not None:
            own_ids = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(own_ids < 0, 0)
            topk_ids = own_ids.clamp(min=0).to(topk_ids.dtype)
        apply(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **rest)

    CPUUnquantizedExperts.apply = apply_own

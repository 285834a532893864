"""vLLM's KV connector on an arena: prefill copies finished blocks into slots, decode copies slots into blocks.

Loaded by vLLM by name in the engine core process, once as scheduler side and once per rank as worker side. Whole
blocks move as bytes, never token slices: on CPU a block holds K and V packed for the instruction set (see the layout in
the ticket's fingerprint). One slot holds one block of all layers and heads; each rank copies its own part of it.

Publishing happens right after the forward pass that completed the blocks. Hydration runs while the engine steps on;
vLLM schedules the request once `get_transfer_results` names it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from inferflux.engine.vllm import transfer
from inferflux.engine.vllm.hydrate import Hydrator, Load, LoadPlanner, RankReports
from inferflux.engine.vllm.publish import Publisher, Save
from inferflux.engine.vllm.shards import Shard, bytes_by_block
from inferflux.kv import handout
from inferflux.kv.arena import Arena

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from inferflux.engine.vllm.experts import ExpertCounter
    from inferflux.kv.arena import Bytes


@dataclass
class Transfers(KVConnectorMetadata):
    """One step's work, from the scheduler side to the worker side."""

    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)


class ArenaConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides in one class, as vLLM wants it; the sections say which side calls what."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        reports_fd, block_size = extra["reports_fd"], vllm_config.cache_config.block_size
        self._arena = None if extra["arena_fd"] is None else attach(extra, role)
        self._layers: list[Bytes] = []
        self._experts: ExpertCounter | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._planner = LoadPlanner(block_size, reports_fd, vllm_config.parallel_config.world_size)
            self._publisher = None if self._arena is None else Publisher(self._arena, block_size)
        else:
            self._hydrator = Hydrator()

    @property
    def requires_kv_delivery(self) -> bool:
        """A preempted prefill is simply computed again."""
        return False

    # -- scheduler side ------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Say how many tokens the request's source adds; they are loaded between steps."""
        num_tokens = self._planner.offer(request, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load into the blocks that vLLM has just reserved."""
        self._planner.accept(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Transfers:
        """Collect the step's loads and the blocks that it completes."""
        saves = self._publisher.plan(scheduler_output) if self._publisher is not None else []
        return Transfers(saves, self._planner.take())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Hear which loads failed, and what became of all."""
        self._planner.fail(connector_output.failed_recving)
        if isinstance(connector_output.kv_connector_worker_meta, RankReports):
            self._planner.hear(connector_output.kv_connector_worker_meta)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hand published slots over with the output. Copies are done, so the blocks may go at once."""
        num_read = self._planner.forget(request.request_id)
        slots = self._publisher.finish(request) if self._publisher is not None else None
        if slots is None:
            return False, None
        return False, {transfer.SLOTS: list(slots), transfer.NUM_READ: num_read, transfer.REMOTE: True}

    # -- worker side ---------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keep a byte view `[blocks, block bytes]` of each layer; the first rank tells the arena its slot size."""
        self._layers = [bytes_by_block(tensor) for tensor in kv_caches.values()]
        self._shard = Shard.of_this_rank(self._vllm_config, list(kv_caches.values()))
        if self._arena is not None and self._shard.rank == 0:
            shape = self._shard.part.shape
            self._arena.format(shape.slot_bytes, shape.num_pieces)
        if self._vllm_config.parallel_config.enable_expert_parallel and get_tensor_model_parallel_rank() == 0:
            from inferflux.engine.vllm.experts import ExpertCounter  # noqa: PLC0415  -- most models have none

            self._experts = ExpertCounter(self._vllm_config, self.has_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start this step's loads in the background."""
        for load in self._get_connector_metadata().loads:
            self._hydrator.start(load, self._shard.part, self._layers)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request is scheduled only after its load."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Do nothing: blocks are copied when all layers are done."""

    def wait_for_save(self) -> None:
        """Copy this rank's part of the blocks that this step completed into their slots."""
        if self._arena is None or not self._shard.is_writer:
            return
        for save in self._get_connector_metadata().saves:
            for block_id, slot in zip(save.block_ids, save.slots, strict=True):
                self._shard.part.copy_out([layer[block_id] for layer in self._layers], self._arena.slot(slot))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended since the last step."""
        return self._hydrator.take_results()

    def build_connector_worker_meta(self) -> RankReports | None:
        """Tell the scheduler side what became of loads, and where tokens went."""
        reports = self._hydrator.take_reports()
        if self._experts is not None:
            reports.expert_tokens = self._experts.take()
        return reports if reports.reports or reports.expert_tokens else None

    def shutdown(self) -> None:
        """End the hydration thread."""
        if self._role == KVConnectorRole.WORKER:
            self._hydrator.close()


def attach(extra: dict[str, Any], role: KVConnectorRole) -> Arena:
    """Map the worker's arena: forked ranks have inherited its descriptor, others are handed it."""
    if role == KVConnectorRole.SCHEDULER or "arena_socket" not in extra:
        return Arena.attach(extra["arena_fd"])
    fd = handout.take(Path(extra["arena_socket"]))
    try:
        return Arena.attach(fd)
    finally:
        os.close(fd)

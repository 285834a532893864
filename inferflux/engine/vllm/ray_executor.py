"""Ranks as actors of a Ray cluster: one placement group per engine, so that its ranks come and go together.

Runs in the engine core, which is the driver: when it ends, or a rank does, Ray ends the actors, and a new start makes a
new group. On CPUs, where Ray knows no accelerators, each rank holds one unit of a resource that nodes declare:

    ray start --resources '{"inferflux_rank": 1}' ...
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import ray
from vllm.distributed import parallel_state
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

from inferflux.engine.layout import share
from inferflux.engine.vllm.arguments import INHERITED, NODES, REPLICA_NODES
from inferflux.engine.vllm.placement import reserve, reserve_on, wait_for_nodes
from inferflux.kv import handout

RANK_RESOURCE = "inferflux_rank"


class Rank(ray_executor_v2.RayWorkerProc):
    """One rank, an actor. Ray kills actors, so a rank must leave nothing that it would have to clean up."""

    def worker_busy_loop(self) -> None:
        """Work until the end."""
        take_name_away(self.worker_response_mq)
        for group in parallel_state._groups.values():  # noqa: SLF001
            take_name_away(getattr(group(), "mq_broadcaster", None))
        super().worker_busy_loop()


class CpuRank(Rank):
    """One rank on a CPU: there is no device to find out about."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """Say which node this is; vLLM counts ranks by their devices, so the rank's number is one."""
        return ray.get_runtime_context().get_node_id(), [self._init_kwargs["rank"]]

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Start without the devices that the driver made up."""
        super().initialize_worker(*args, **{**kwargs, "assigned_physical_gpu_ids": None})


class RayExecutor(ray_executor_v2.RayExecutorV2):
    """vLLM's executor on our cluster, with our arena in its ranks."""

    uses_ray = True

    def _init_executor(self) -> None:
        ray_executor_v2.RayWorkerProc = Rank
        if current_platform.is_cpu():
            type(current_platform).ray_device_key = RANK_RESOURCE
            ray_executor_v2.RayWorkerProc = CpuRank
        # Never start a cluster of our own: its ports would be open to whoever reaches them. In a namespace of its own,
        # since replicas name their ranks alike.
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
        self._reserve_nodes()
        self._handout = ExitStack()
        transfer = self.vllm_config.kv_transfer_config
        extra = {} if transfer is None else transfer.kv_connector_extra_config
        if extra.get("arena_fd") is not None:
            extra["arena_socket"] = str(self._handout.enter_context(handout.offered(extra["arena_fd"])))
        super()._init_executor()
        take_name_away(self.rpc_broadcast_mq)

    def _reserve_nodes(self) -> None:
        """Have the ranks on as many nodes as were asked for; else vLLM takes room where there is."""
        wanted, parallel = self.vllm_config.additional_config, self.parallel_config
        if not wanted[NODES]:
            return
        device, num_ranks = str(current_platform.ray_device_key), parallel.world_size
        if parallel.data_parallel_size == 1:
            parallel.placement_group = reserve(device, num_ranks, wanted[REPLICA_NODES])
            return
        replica, num_replicas = parallel.data_parallel_rank, parallel.data_parallel_size
        nodes = wait_for_nodes(device, num_replicas * num_ranks // wanted[NODES], wanted[NODES])
        parallel.placement_group = reserve_on(device, share(nodes, num_ranks, replica, num_replicas))

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Let the ranks make their caches and connectors; after that nobody is handed the arena any more."""
        try:
            return super().initialize_from_config(*args, **kwargs)
        finally:
            self._handout.close()

    def shutdown(self) -> None:
        """End the ranks. Idempotent."""
        if hasattr(self, "_handout"):
            self._handout.close()
        super().shutdown()

    def _build_runtime_env(self) -> dict[str, Any]:
        """Set what must be there before an actor imports torch."""
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        runtime_env.setdefault("env_vars", {}).update(
            {name: os.environ[name] for name in INHERITED if name in os.environ}
        )
        return runtime_env


def take_name_away(queue: Any) -> None:
    """Remove a queue's memory from /dev/shm, where all who need it have mapped it: it goes with the last of them."""
    buffer = getattr(queue, "buffer", None)
    if buffer is not None and buffer.is_creator:
        buffer.shared_memory.unlink()
        buffer.is_creator = False

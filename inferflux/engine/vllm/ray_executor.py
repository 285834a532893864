"""Ranks as actors of a Ray cluster: one placement group per engine, so that its ranks come and go together.

Runs in the engine core, which is the driver: when it ends, or a rank does, Ray ends the actors, and a new start makes a
new group. On CPUs, where Ray knows no accelerators, each rank holds one unit of a resource that nodes declare:

    ray start --resources '{"inferflux_rank": 1}' ...
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

from inferflux.engine.vllm.arguments import INHERITED
from inferflux.kv import handout

RANK_RESOURCE = "inferflux_rank"


class CpuRank(ray_executor_v2.RayWorkerProc):
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
        if current_platform.is_cpu():
            type(current_platform).ray_device_key = RANK_RESOURCE
            ray_executor_v2.RayWorkerProc = CpuRank
        # Never start a cluster of our own: its ports would be open to whoever reaches them.
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, namespace="inferflux")
        extra = self.vllm_config.kv_transfer_config.kv_connector_extra_config
        arena_fd = extra["arena_fd"]
        with handout.offered(arena_fd) if arena_fd is not None else nullcontext(Path()) as path:
            extra["arena_socket"] = str(path)
            super()._init_executor()

    def _build_runtime_env(self) -> dict[str, Any]:
        """Set what must be there before an actor imports torch."""
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        runtime_env.setdefault("env_vars", {}).update(
            {name: os.environ[name] for name in INHERITED if name in os.environ}
        )
        return runtime_env

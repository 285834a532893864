"""From our options to vLLM's arguments: the one mapping."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from inferflux.types import Role

if TYPE_CHECKING:
    from argparse import Namespace

    from inferflux.engine.options import EngineOptions, Parallelism

CONNECTOR = "ArenaConnector"
NO_DOMAIN = "media.invalid"
_POOLING = ["--runner", "pooling"]
_GENERATION = ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
_GENERATION += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
CONNECTOR_MODULE = "inferflux.engine.vllm.connector"
# In vLLM's configuration, where its own number of nodes is for another executor: of the worker, and of one replica.
NODES, REPLICA_NODES = "inferflux_nodes", "inferflux_replica_nodes"
# What a rank that is no child of ours must find in its environment before it imports anything.
INHERITED = (
    "OMP_NUM_THREADS",
    "THP_MEM_ALLOC_ENABLE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENFORCE_STRICT_TOOL_CALLING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_PLUGINS",
    "PYTHONPATH",
)


def set_environment(options: EngineOptions) -> None:
    """Set what vLLM and torch read from the environment. Call before either is imported.

    Threads are explicit and processes pinned by us: with vLLM's own binding an engine with a KV connector gets another
    thread count than one without, and bf16 results differ. Nothing may look at model hubs: the directory is local.
    """
    os.environ.update(
        OMP_NUM_THREADS=str(options.threads),
        THP_MEM_ALLOC_ENABLE="1",  # huge pages for weights and caches: matrix products take 3-6% less time
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        VLLM_MEDIA_URL_ALLOW_REDIRECTS="0",
        VLLM_PLUGINS="inferflux",
        VLLM_ENFORCE_STRICT_TOOL_CALLING="0",  # its structural tags are xgrammar's alone: see grammars.BACKEND
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.parallelism.uses_ray:
        os.environ.update(RAY_ADDRESS=options.parallelism.ray_address, RAY_USAGE_STATS_ENABLED="0")


def server_arguments(options: EngineOptions, dtype: str, arena_fd: int | None, reports_fd: int) -> Namespace:
    """The arguments `vllm serve` would have parsed."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(_command_line(options, dtype))
    args.distributed_executor_backend = _executor(options.parallelism)
    args.additional_config = {NODES: options.parallelism.nodes, REPLICA_NODES: options.parallelism.nodes_of_replica}
    if options.role is not Role.POOLING:
        args.kv_transfer_config = _transfer_config(arena_fd, reports_fd)
    validate_parsed_serve_args(args)
    return args


def _command_line(options: EngineOptions, dtype: str) -> list[str]:
    line = ["--model", str(options.model_dir), "--served-model-name", options.model, "--dtype", dtype]
    # Eager: compiled mode computes wrong text on some CPUs and takes a minute to start.
    line += ["--enforce-eager", "--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    # Never anything else: other formats are pickles.
    line += ["--max-num-seqs", str(options.max_num_seqs), "--load-format", "safetensors"]
    line += _POOLING if options.role is Role.POOLING else _GENERATION
    line += ["--disable-uvicorn-access-log", "--scheduling-policy", "priority"]
    # Compact: small models lose themselves in white space. The backend: see grammars.BACKEND.
    line += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    # The gateway refuses media by address. Should one get here, it is of no domain that there is.
    line += ["--allowed-media-domains", NO_DOMAIN]
    # A cache of processed images would tell one tenant, by its speed, what another one has sent.
    line += ["--mm-processor-cache-gb", "0"]
    if options.max_model_len:
        line += ["--max-model-len", str(options.max_model_len)]
    if options.block_size:
        line += ["--block-size", str(options.block_size)]
    if options.max_adapters:
        # Twice: while an adapter is changed, requests that run keep the one before.
        line += ["--enable-lora", "--max-loras", str(options.max_adapters)]
        line += ["--max-cpu-loras", str(2 * options.max_adapters), "--max-lora-rank", str(options.max_adapter_rank)]
    return line + _parallelism(options.parallelism)


def _parallelism(parallelism: Parallelism) -> list[str]:
    line = ["--tensor-parallel-size", str(parallelism.tensor)]
    line += ["--pipeline-parallel-size", str(parallelism.pipeline)]
    line += ["--data-parallel-size", str(parallelism.data)]
    if parallelism.uses_ray and parallelism.data > 1:
        from vllm.utils.network_utils import get_ip  # noqa: PLC0415

        line += ["--data-parallel-address", get_ip()]  # where the ranks of all replicas meet
    return line + (["--enable-expert-parallel"] if parallelism.expert else [])


def _executor(parallelism: Parallelism) -> Any:
    """What starts the ranks, as a class: by name, vLLM's CPU platform takes mp for a single rank too.

    That one had a process of its own then, with queues in shared memory that both sides poll.
    """
    if parallelism.uses_ray:
        from inferflux.engine.vllm.ray_executor import RayExecutor  # noqa: PLC0415

        return RayExecutor
    if parallelism.executor == "mp" or parallelism.num_ranks > 1:
        return "mp"
    from vllm.v1.executor.uniproc_executor import UniProcExecutor  # noqa: PLC0415

    return UniProcExecutor


def _transfer_config(arena_fd: int | None, reports_fd: int) -> Any:
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_consumer" if arena_fd is None else "kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"arena_fd": arena_fd, "reports_fd": reports_fd},
    )

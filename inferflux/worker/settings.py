"""The settings of a worker, and what they mean to its engine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inferflux.config import CommonSettings
from inferflux.engine.options import MIB, EngineOptions, GrammarLimits, Parallelism
from inferflux.kv import nixl
from inferflux.models.rules import SignaturePolicy
from inferflux.types import Role, Transport

if TYPE_CHECKING:
    from inferflux.worker.model import LoadableModel

# Real steps can take seconds (a long prompt on a CPU), simulated ones take milliseconds.
MAX_ADAPTERS = 256
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
WEDGED_AFTER_S = {"vllm": 30.0, "sim": 2.0}


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommonSettings):
    """What prefill and decode workers read from their environment."""

    model: str
    """Name of the model in API calls."""
    engine: Literal["vllm", "sim"] = "vllm"
    """vllm serves users; sim serves tests and studies."""
    model_dir: Path | None = None
    """Hugging Face folder of the model; vllm needs it."""
    model_digest: str = ""
    """SHA-256 over the model's files, lower-case hex; workers share KV only when theirs are equal."""
    model_signature: SignaturePolicy = SignaturePolicy.WARN
    """What happens to a model that is not signed, or not as it was signed: require refuses it, warn loads it all the
    same, off does not look."""
    model_keys_dir: Path = Path()
    """Public keys (*.pub) and root certificates (*.crt) that may sign models; default home/model-keys."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    kv_cache_bytes: int = 512 * MIB
    """The engine's own paged cache."""
    kv_arena_bytes: int = 512 * MIB
    """Memory that a prefill worker's tickets point into; decode workers have none."""
    kv_transport: Literal["auto", "shm", "nixl"] = "auto"
    """How KV blocks travel: auto is shm within a host and nixl, where it is installed, between hosts."""
    kv_prefix_cache: bool = True
    """Whether a prefill worker keeps blocks for later prompts that begin alike, until their room is needed."""
    kv_pinned_share: float = 0.5
    """Largest share of the arena that pinned prefixes may hold, 0 to 1."""
    max_model_len: int = 0
    """Longest prompt plus output in tokens; 0: the model's own."""
    max_num_seqs: int = 64
    """Most sequences in one batch."""
    block_size: int = 0
    """Tokens per KV block; 0: the engine's own."""
    threads: int = 1
    """Compute threads of the engine."""
    cpu_cores: tuple[str, ...] = ()
    """Cores the engine may compute on, e.g. 0,2-3; empty: all."""
    tensor_parallel: int = 1
    """Ranks that share each layer of the model; its KV heads must be a multiple of it, or it of them."""
    pipeline_parallel: int = 1
    """Groups of ranks that have some of the layers each."""
    data_parallel: int = 1
    """Replicas of a decode worker's engine, each with a batch of its own; for mixtures of experts."""
    expert_parallel: bool = False
    """Whether the experts of a mixture are spread over all ranks instead of being cut like other weights."""
    executor: Literal["auto", "uniproc", "mp", "ray"] = "auto"
    """What starts the ranks: uniproc (one, in the engine's process), mp (processes of this host), ray (actors of a Ray
    cluster); auto is ray for several nodes, else uniproc for one rank and mp for more."""
    nodes: int = 0
    """Hosts of the Ray cluster that the ranks are spread over, equally many on each; 0: as there is room."""
    ray_address: str = "auto"
    """Where the Ray cluster is, host:port; auto: a node of it runs on this host."""
    grammar_cpu_s: int = 2
    """CPU time that compiling one grammar of structured output (a JSON schema, a regular expression) may take."""
    grammar_memory_bytes: int = 256 * MIB
    """Memory that compiling one grammar of structured output may take."""
    max_adapters: int = 0
    """Most LoRA adapters that the engine can hold; 0: none, which computes a little faster."""
    max_adapter_rank: int = 16
    """Highest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512."""
    sim_profile: Path | None = None
    """Sizes and latencies of the simulated engine."""
    numerics_reference: Path | None = None
    """What the model must compute; empty: it is not checked."""
    wedge_s: float = 0.0
    """Not ready when the engine has work and makes no step for this long, and the end of the process when that lasts
    twice as long; 0: 30 s for vllm, 2 s for sim."""
    drain_budget_s: float = 60.0
    """Longest time a drain waits for running requests and live tickets; 0: for ever."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bind:
            object.__setattr__(self, "bind", f"unix:{self.run_dir / self.instance_id}.sock")
        if self.model_keys_dir == Path():
            object.__setattr__(self, "model_keys_dir", self.home / "model-keys")
        if self.wedge_s <= 0:
            object.__setattr__(self, "wedge_s", WEDGED_AFTER_S[self.engine])
        if self.engine == "vllm" and self.model_dir is None:
            raise ValueError("INFERFLUX_MODEL_DIR: missing")
        if self.kv_transport == "nixl" and not nixl.is_installed():
            raise ValueError("INFERFLUX_KV_TRANSPORT: nixl is not installed: pip install 'inferflux[nixl]'")
        if not 0 <= self.kv_pinned_share <= 1:
            raise ValueError(f"INFERFLUX_KV_PINNED_SHARE: {self.kv_pinned_share} is not between 0 and 1")
        for name in ("grammar_cpu_s", "grammar_memory_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"INFERFLUX_{name.upper()}: {value} is not at least 1")
        parse_cores(self.cpu_cores)
        self._check_adapters()
        self._check_parallelism()

    def _check_adapters(self) -> None:
        if not 0 <= self.max_adapters <= MAX_ADAPTERS:
            raise ValueError(f"INFERFLUX_MAX_ADAPTERS: {self.max_adapters} is not from 0 to {MAX_ADAPTERS}")
        if self.max_adapter_rank not in ADAPTER_RANKS:
            ranks = ", ".join(map(str, ADAPTER_RANKS))
            raise ValueError(f"INFERFLUX_MAX_ADAPTER_RANK: {self.max_adapter_rank} is none of {ranks}")

    def _check_parallelism(self) -> None:
        sizes = {name: getattr(self, name) for name in ("tensor_parallel", "pipeline_parallel", "data_parallel")}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"INFERFLUX_{name.upper()}: {size} is not at least 1")
        if self.executor == "uniproc" and (num_ranks := self.parallelism.num_ranks) > 1:
            raise ValueError(f"INFERFLUX_EXECUTOR: uniproc has one rank, {num_ranks} are wanted")
        _check_nodes(self.parallelism)
        if self.parallelism.uses_ray:
            _check_ray()

    @property
    def parallelism(self) -> Parallelism:
        """How the engine is spread."""
        return Parallelism(
            self.tensor_parallel,
            self.pipeline_parallel,
            self.data_parallel,
            self.expert_parallel,
            self.executor,
            self.nodes,
            self.ray_address,
        )

    @property
    def transports(self) -> tuple[Transport, ...]:
        """What this worker offers, best first."""
        if self.kv_transport != "auto":
            return (Transport(self.kv_transport),)
        return (Transport.SHM, Transport.NIXL) if nixl.is_installed() else (Transport.SHM,)

    @property
    def arena_socket(self) -> Path:
        """Where a prefill worker hands its arena to readers."""
        return self.run_dir / f"{self.instance_id}.arena.sock"

    def engine_options(self, role: Role, model: LoadableModel) -> EngineOptions:
        """The engine's share of the settings, and the model that may be loaded."""
        return EngineOptions(
            model=self.model,
            role=role,
            model_dir=model.folder,
            model_digest=model.digest,
            dtype=self.dtype,
            kv_cache_bytes=self.kv_cache_bytes,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            block_size=self.block_size,
            threads=self.threads,
            cpu_cores=parse_cores(self.cpu_cores),
            parallelism=self.parallelism,
            numerics_reference=model.numerics_reference,
            sim_profile=self.sim_profile,
            grammar_limits=GrammarLimits(self.grammar_cpu_s, self.grammar_memory_bytes),
            max_adapters=self.max_adapters,
            max_adapter_rank=self.max_adapter_rank,
        )


def _check_nodes(parallelism: Parallelism) -> None:
    nodes, replicas, ranks = parallelism.nodes, parallelism.data, parallelism.data * parallelism.num_ranks
    if nodes < 0:
        raise ValueError(f"INFERFLUX_NODES: {nodes} is below 0")
    if nodes > 1 and not parallelism.uses_ray:
        raise ValueError(f"INFERFLUX_NODES: {nodes} hosts take the executor ray, it is {parallelism.executor}")
    if nodes and (ranks % nodes or (nodes % replicas and replicas % nodes)):
        raise ValueError(
            f"INFERFLUX_NODES: {replicas} replicas of {parallelism.num_ranks} ranks can't lie equally on {nodes} hosts"
        )


def _check_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ValueError("INFERFLUX_EXECUTOR: ray is not installed: pip install 'inferflux[ray]'")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise ValueError("INFERFLUX_EXECUTOR: ray runs code for whoever reaches its ports; set RAY_AUTH_MODE=token")


def parse_cores(items: Sequence[str]) -> tuple[int, ...]:
    """Core numbers from items like 3 or 0-3. Raises ValueError for anything else and for cores we don't have."""
    cores = tuple(sorted({core for item in items for core in _cores(item)}))
    available = os.sched_getaffinity(0)
    if missing := set(cores) - available:
        raise ValueError(f"INFERFLUX_CPU_CORES: no cores {sorted(missing)} here, only {sorted(available)}")
    return cores


def _cores(item: str) -> Iterator[int]:
    first, _, last = item.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise ValueError(f"INFERFLUX_CPU_CORES: {item!r} is neither a core nor a range of cores")
    return iter(range(int(first), int(last or first) + 1))

"""What a worker tells its engine, independent of which engine it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inferflux.types import Role

MIB = 1 << 20
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def auto_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What `auto` means on a CPU: bfloat16 where the instruction set has it, else float32.

    Emulated bfloat16 is slower: prefill took 5 times as long as float32 on a CPU with AVX2 only (EPYC 7003).
    """
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & BF16_FLAGS else "float32"


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How one engine is spread over processes: `tensor` times `pipeline` ranks in each of `data` replicas.

    `expert`: the experts of a mixture are spread over the ranks of all replicas instead of being cut like the other
    weights. `executor`: what starts the ranks: uniproc (one rank, inside the engine core), mp (processes of this host),
    ray (actors, on any host of the Ray cluster at `ray_address`), or auto, which is ray for several nodes, else uniproc
    for one rank and mp for more. `nodes`: hosts that the ranks of all replicas are spread over, equally many on each;
    0 = as there is room.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: bool = False
    executor: Literal["auto", "uniproc", "mp", "ray"] = "auto"
    nodes: int = 0
    ray_address: str = "auto"

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.pipeline

    @property
    def uses_ray(self) -> bool:
        """Whether the ranks are actors."""
        return self.executor == "ray" or (self.executor == "auto" and self.nodes > 1)

    @property
    def nodes_of_replica(self) -> int:
        """Hosts of one replica's ranks; 0 = as there is room."""
        return max(self.nodes // self.data, 1) if self.nodes else 0


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What compiling one grammar of structured output may take: seconds of CPU time, bytes of memory."""

    cpu_s: int = 2
    memory_bytes: int = 256 * MIB


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """One engine's configuration.

    `dtype`: auto | float32 | bfloat16 | float16. `max_model_len`, `block_size`: 0 = the model's or engine's own.
    `cpu_cores`: cores the engine's compute may use; empty = not pinned. `numerics_reference`: file with the top-1
    tokens and log-probabilities that `check_numerics` must reproduce; None = no check is possible.
    `cpu_cores` and `threads` are those of one rank's process.
    `max_adapters`: how many LoRA adapters it can hold, of at most `max_adapter_rank`; 0 = none.
    `model_digest`: SHA-256 over the model's files, part of every fingerprint. `sim_profile`: latencies of the sim
    engine; None = its default.
    """

    model: str
    role: Role
    model_dir: Path | None = None
    model_digest: str = ""
    dtype: str = "auto"
    kv_cache_bytes: int = 512 * MIB
    max_model_len: int = 0
    max_num_seqs: int = 64
    block_size: int = 0
    threads: int = 1
    cpu_cores: tuple[int, ...] = ()
    parallelism: Parallelism = Parallelism()
    numerics_reference: Path | None = None
    sim_profile: Path | None = None
    grammar_limits: GrammarLimits = GrammarLimits()
    max_adapters: int = 0
    max_adapter_rank: int = 16

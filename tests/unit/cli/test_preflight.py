from __future__ import annotations

import socket

import pytest

from inferflux.cli import preflight
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.plan import ClusterOptions
from inferflux.cli.preflight import GIB

VLLM = ClusterOptions("vllm", "m", dtype="float32")


def test_a_port_in_use_is_refused():
    """Somebody who listens is noticed; a port nobody has is fine."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(CliError, match="in use"):
        preflight.check_port("127.0.0.1", server.getsockname()[1])
    preflight.check_port("127.0.0.1", preflight.free_port("127.0.0.1"))


def test_an_address_that_is_none_is_wrong_usage():
    """A host that does not exist is the user's mistake."""
    with pytest.raises(CliError, match="no such host") as caught:
        preflight.check_port("no.such.host.invalid", 1)
    assert caught.value.code is Exit.USAGE


def test_memory_is_counted_from_the_sizes():
    """Weights count twice in float32, each worker has a cache, and each prefill worker an arena."""
    small, wide = (preflight.needed_bytes(VLLM, n * GIB, {}) for n in (1, 2))
    assert wide - small == 2 * 2 * GIB

    sizes = {"INFERFLUX_KV_CACHE_BYTES": str(GIB), "INFERFLUX_KV_ARENA_BYTES": "0"}
    more = sizes | {"INFERFLUX_KV_ARENA_BYTES": str(GIB)}
    assert preflight.needed_bytes(VLLM, 0, more) - preflight.needed_bytes(VLLM, 0, sizes) == GIB


def test_missing_memory_is_one_line():
    """What is needed and what there is are named before anything starts."""
    with pytest.raises(CliError, match=r"not enough memory: .* GiB needed, .* GiB available"):
        preflight.check_memory(VLLM, 1 << 50, {})


def test_nonsense_sizes_are_wrong_usage():
    """A size that is no number is the user's mistake."""
    with pytest.raises(CliError, match="not a number"):
        preflight.check_memory(VLLM, 0, {"INFERFLUX_KV_CACHE_BYTES": "1G"})


@pytest.mark.parametrize("version", ["v1", "v2", "none"])
def test_a_cgroup_limits_what_is_available(tmp_path, version):
    """The smaller of the machine's and the cgroup's memory counts; cached files are not in the way."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    folder, limit, usage, stat = {
        "v1": (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 1000\n"),
        "v2": (tmp_path, "memory.max", "memory.current", "inactive_file 1000\n"),
        "none": (tmp_path, "memory.max", "memory.current", ""),
    }[version]
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text("max" if version == "none" else "5000000")
    (folder / usage).write_text("2000000")
    (folder / "memory.stat").write_text(stat)

    expected = 8000 * 1024 if version == "none" else 5_000_000 - 2_000_000 + 1000
    assert preflight.available_bytes(tmp_path, tmp_path) == expected

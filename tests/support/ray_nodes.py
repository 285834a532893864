"""A Ray cluster of two nodes on loopback, each with room for one rank: what a real one has on two hosts."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from inferflux.cli.pdeathsig import die_with_parent

REPOSITORY = Path(__file__).parents[2]
START_S, STOP_S = 120.0, 20.0
ADDRESS = "127.0.0.1"
# What a head starts besides, with ports of its own, and engines have no use for.
WITHOUT = ("--include-dashboard=false", "--no-monitor")


@dataclass(frozen=True)
class RayCluster:
    """Where it is and what a process needs to use it."""

    address: str
    environ: dict[str, str]


@contextmanager
def ray_cluster(num_nodes: int, ranks_per_node: int = 1) -> Iterator[RayCluster]:
    """Run a cluster whose nodes take ranks; nothing of it is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="ifx-ray-", dir="/tmp"))
    cluster = RayCluster(f"{ADDRESS}:{_free_port()}", _environ(secrets.token_hex(32)))
    head = ["--head", f"--port={cluster.address.rpartition(':')[2]}", f"--temp-dir={directory}"]
    head.append(f"--ray-client-server-port={_free_port()}")
    try:
        with ExitStack() as stack:
            stack.enter_context(_node([*head, *WITHOUT], cluster, ranks_per_node, directory))
            for _ in range(num_nodes - 1):
                stack.enter_context(_node([f"--address={cluster.address}"], cluster, ranks_per_node, directory))
            yield cluster
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _environ(token: str) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(REPOSITORY),
    }


@contextmanager
def _node(how: list[str], cluster: RayCluster, num_ranks: int, directory: Path) -> Iterator[None]:
    ray = shutil.which("ray", path=str(REPOSITORY / ".venv" / "bin"))
    assert ray is not None
    resources = json.dumps({"inferflux_rank": num_ranks})
    size = ["--num-cpus=1", f"--resources={resources}", f"--object-store-memory={80 << 20}"]
    command = [ray, "start", *how, "--block", f"--node-ip-address={ADDRESS}", *size]
    log = directory / f"node-{len(list(directory.glob('node-*')))}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | cluster.environ,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one thread
        )
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a node with all that it has started; asked politely it takes half a minute."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.kill()
    process.wait()
    psutil.wait_procs(family, STOP_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])

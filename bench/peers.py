"""Other servers for comparisons: started here, in the same run, stopped by their own process group."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from bench.load import Server

STOP_TIMEOUT_S = 20.0
START_TIMEOUT_S = 300


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def vllm_server(
    model_dir: Path,
    name: str,
    dtype: str,
    *,
    threads: int = 0,
    kv_cache_bytes: int = 1 << 30,
    max_model_len: int = 2048,
    max_num_batched_tokens: int = 0,
) -> Iterator[Server]:
    """`python -m vllm.entrypoints.openai.api_server` on this machine, eager.

    `threads`: 0 = as vLLM decides (it keeps one core for its frontend); else so many, unbound.
    `max_num_batched_tokens`: of one engine step; 0 = as vLLM decides.
    """
    port = free_port()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_PLUGINS"] = ""
    if threads:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    command += ["--served-model-name", name, "--dtype", dtype, "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--kv-cache-memory-bytes", str(kv_cache_bytes)]
    command += ["--max-model-len", str(max_model_len), "--disable-uvicorn-access-log"]
    if max_num_batched_tokens:
        command += ["--max-num-batched-tokens", str(max_num_batched_tokens)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_healthy(f"http://127.0.0.1:{port}/health", process)
            yield Server(f"http://127.0.0.1:{port}", name)
        finally:
            _stop(process)


def _wait_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with {process.returncode} before it was healthy")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == httpx.codes.OK:
                return
        time.sleep(0.25)
    raise TimeoutError(f"vLLM's server was not healthy after {START_TIMEOUT_S} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: vLLM's server leaves its engine core behind when it is only killed itself.

    Its trackers of shared memory end last, when they have removed what the others left.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            process.poll()  # else the group has a dead member for ever
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

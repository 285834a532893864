"""A warm parent for vLLM workers: imports torch and vllm once, then forks a worker whenever the supervisor asks.

Importing takes 10 s and more of a core, a fork milliseconds: a killed worker is back as soon as its model is loaded.
Runs as `python -m inferflux.cli.zygote MODULE...` with a SOCK_SEQPACKET socket as fd 0, one JSON message per packet:

supervisor -> {"start": 7, "script": "inferflux-decode", "env": {...}, "log": "/..."}
zygote     -> {"started": 7, "pid": 123}, later {"exited": 123, "status": -9}

It stays single-threaded: no event loop, no gRPC, no OpenMP region before a fork. Its workers die with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from inferflux.cli.pdeathsig import die_with_parent
from inferflux.engine.options import EngineOptions
from inferflux.engine.vllm.arguments import set_environment
from inferflux.types import Role

MAX_MESSAGE = 1 << 17
# All that a worker imports until it is ready; what is missing here costs time at each start, nothing else.
PRELOAD = (
    "inferflux.worker.main",
    "inferflux.engine.vllm.engine",
    "inferflux.engine.vllm.llm",
    "inferflux.engine.vllm.application",
    "inferflux.engine.vllm.connector",
    "inferflux.engine.vllm.grammars",
    "inferflux.engine.vllm.numerics",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.generate.api_router",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
Message = dict[str, Any]


def main(modules: Sequence[str]) -> int:
    """Serve until the supervisor is gone; in a forked child, be the worker that was asked for."""
    preload(modules)
    with socket.socket(fileno=0) as supervisor:
        order = serve(supervisor)
    return become(order) if order else 0


def preload(modules: Sequence[str]) -> None:
    """Import what workers need. Raises when that started a thread: forking would be unsafe."""
    set_environment(EngineOptions("", Role.DECODE, threads=int(os.environ["OMP_NUM_THREADS"])))
    for name in modules:
        with suppress(ImportError):  # another version's name
            importlib.import_module(name)
    if (num_threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        raise RuntimeError(f"{num_threads} threads after the imports")
    gc.collect()
    gc.freeze()  # or the collector would write into pages that all workers share


def serve(supervisor: socket.socket) -> Message | None:
    """Fork on request and report ends. Returns None at the end, and in a child the message that it came from."""
    arm = die_with_parent()
    with selectors.DefaultSelector() as selector:
        selector.register(supervisor, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data, 0)
                    send(supervisor, exited=key.data, status=os.waitstatus_to_exitcode(status))
                    continue
                if not (packet := supervisor.recv(MAX_MESSAGE)):
                    return None
                order: Message = json.loads(packet)
                pid = os.fork()
                if pid == 0:
                    if arm is not None:
                        arm()
                    return order
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                send(supervisor, started=order["start"], pid=pid)


def send(supervisor: socket.socket, **message: int) -> None:
    """Send one message."""
    supervisor.send(json.dumps(message).encode())


def become(order: Message) -> int:
    """Turn this fork into the worker: its session, log and environment; then run its console script."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)  # first: it takes the place of the socket, which was fd 0
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
        os.set_inheritable(target, True)
    os.environ.clear()
    os.environ.update(order["env"])
    if (torch := sys.modules.get("torch")) is not None:  # OpenMP read the environment when it was loaded
        torch.set_num_threads(int(order["env"]["OMP_NUM_THREADS"]))
    sys.argv = [order["script"]]
    (script,) = entry_points(group="console_scripts", name=order["script"])
    status: int = script.load()()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

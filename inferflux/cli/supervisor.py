"""The supervisor of a local cluster: starts its processes, keeps them alive, answers inferctl, stops them in order.

    python -m inferflux.cli.supervisor OPTIONS_JSON

One per home. It is a process of its own also when `inferctl quickstart` runs in the foreground, so that both modes are
the same code. It does nothing while nothing happens. All it starts dies with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from inferflux import pki
from inferflux.cli import probe, state
from inferflux.cli.child import Child, Running, Spawned
from inferflux.cli.control import ControlServer
from inferflux.cli.plan import STOP_ORDER, WORKER_ROLES, ClusterOptions, ProcessSpec, plan
from inferflux.cli.state import ClusterState
from inferflux.cli.warm import WarmStarter
from inferflux.cli.workers import Workers, describe
from inferflux.errors import ConfigError
from inferflux.paths import Home
from inferflux.telemetry import logs

EXIT_OK, EXIT_FAILED, EXIT_RUNNING = 0, 1, 3
STOP_GRACE_S = 15.0
REDIS_READY_S = 10.0
RESTART_READY_S = 300.0
READY_POLL_S = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_log = logging.getLogger("inferflux.cli.supervisor")  # __name__ is __main__


class Supervisor:
    """All children of one home. `run` is its whole life."""

    def __init__(self, home: Home, options: ClusterOptions, specs: Sequence[ProcessSpec]) -> None:
        self._home = home
        self._options = options
        self._stop = asyncio.Event()
        self._children = [Child(spec, self._start) for spec in specs]
        self._workers = Workers(home, options, self._children, self._start, self._stop.is_set)
        self._pids: dict[int, int] = {}
        self._warm = WarmStarter(home.logs / "zygote.log")
        self._grace_s = STOP_GRACE_S

    async def run(self) -> None:
        """Serve until told to stop; nothing is left running afterwards, whatever happens."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        control = ControlServer(self._home.supervisor_socket, self._answer)
        await control.start()
        try:
            await self._start_all()
            await self._stop.wait()
        finally:
            await self._stop_all()
            self._warm.close()
            await control.close()
            ClusterState(self._options).save(self._home.state_file)

    def _on_signal(self) -> None:
        """Stop; at the second signal without mercy."""
        if self._stop.is_set():
            self._grace_s = 0.0
            for child in self._children:
                child.signal(signal.SIGKILL)
        self._stop.set()

    async def _start_all(self) -> None:
        """Start Redis and wait for it, so that the services do not begin with an error; then all others at once."""
        for child in self._of_roles("redis"):
            child.start()
            await self._until_ready(child, REDIS_READY_S)
        for child in self._children:
            if child.spec.role != "redis" and not self._stop.is_set():
                child.start()

    async def _until_ready(self, child: Child, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not (await probe.ask(child.spec.role, child.spec.socket)).ready:
            if self._stop.is_set() or time.monotonic() > deadline:
                return
            await asyncio.sleep(READY_POLL_S)

    async def _stop_all(self) -> None:
        _log.info("stopping")
        await self._workers.close()
        for roles in STOP_ORDER:
            await asyncio.gather(*(child.stop(self._grace_s) for child in self._of_roles(*roles)))

    def _of_roles(self, *roles: str) -> list[Child]:
        return [child for child in self._children if child.spec.role in roles]

    async def _start(self, spec: ProcessSpec) -> Running:
        """Start one process and write down that it is ours, for whoever cleans up after us."""
        is_warm = self._options.engine == "vllm" and spec.role in WORKER_ROLES
        running = await self._warm.start(spec) if is_warm else Spawned(spec)
        ticks = state.start_ticks(running.pid)
        self._pids = {pid: t for pid, t in self._pids.items() if state.is_alive(pid, t)}
        if ticks is not None:
            self._pids[running.pid] = ticks
        ClusterState(self._options, self._pids).save(self._home.state_file)
        return running

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["op"]:
            case "status":
                return await self._status()
            case "stop":
                self._on_signal()
                return {}
            case "restart":
                return await self._restart(str(request["name"]))
            case _:
                return await self._workers.answer(request)

    async def _status(self) -> dict[str, Any]:
        processes = await asyncio.gather(*(describe(child) for child in self._children))
        return {
            "pid": os.getpid(),
            "url": self._options.url,
            "options": self._options.to_json(),
            "stopping": self._stop.is_set(),
            "processes": processes,
        }

    async def _restart(self, name: str) -> dict[str, Any]:
        """Restart all processes of a role, or the one with this id; one after the other, so that the others serve."""
        chosen = [child for child in self._children if name in (child.spec.role, child.spec.id)]
        if not chosen:
            ids = ", ".join(child.spec.id for child in self._children)
            raise ValueError(f"no process {name!r}; there are {ids}")
        for child in chosen:
            await child.restart(STOP_GRACE_S)
            await self._until_ready(child, RESTART_READY_S)
        return {"restarted": [child.spec.id for child in chosen]}


def main(argv: Sequence[str]) -> int:
    """Supervise until stopped. Exit status: 0 stopped, 1 could not start, 3 another supervisor has this home."""
    logs.setup("supervisor", "supervisor", "INFO")
    home = Home.from_env(os.environ).ensure()
    lock = state.take_lock(home)
    if lock is None:
        return EXIT_RUNNING
    with lock:
        try:
            options = ClusterOptions.from_json(json.loads(argv[0]))
            clean_up(home)
            pki.ensure_pki(home.pki)
            pki.ensure_secrets(home.secrets)
            specs = plan(options, home, sorted(os.sched_getaffinity(0)), os.environ)
        except ConfigError as e:
            _log.error("can't start: %s", e.message)
            return EXIT_FAILED
        asyncio.run(Supervisor(home, options, specs).run())
    return EXIT_OK


def clean_up(home: Home) -> None:
    """End what a killed supervisor left behind."""
    earlier = ClusterState.load(home.state_file)
    if earlier is not None:
        state.sweep(earlier.pids)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The workers of a local cluster, by model, role and revision: started, counted and let go as the registry asks.

Whoever asks for fewer workers drains those that are retired; here they are only not started again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from inferflux.cli import launch, probe
from inferflux.cli.child import Child, Start
from inferflux.cli.deployments import Deployments
from inferflux.cli.plan import WORKER_ROLES, ClusterOptions, one_more
from inferflux.paths import Home

MAX_WORKERS = 64
END_GRACE_S = 15.0


class Workers:
    """All workers among `children`, which also has the other processes. `start`: runs the process of a new one."""

    def __init__(
        self,
        home: Home,
        options: ClusterOptions,
        children: list[Child],
        start: Start,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._home = home
        self._options = options
        self._children = children
        self._start = start
        self._is_stopping = is_stopping
        self._options_of = {(options.model, 0): options}
        if options.embedding is not None:
            self._options_of[options.embedding.name, 0] = options
        self._deployments = Deployments(options, os.environ, self._add_all)
        self._ending: set[asyncio.Task[None]] = set()

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:  # noqa: PLR0911 - a list of answers
        """Do what a control message asks. Raises ValueError."""
        model = str(request.get("model", self._options.model))
        match request["op"]:
            case "sizes":
                return {"sizes": {role: len(self._wanted(role, model)) for role in WORKER_ROLES}}
            case "grow":
                return self._grow(_role(request), model, int(request["size"]))
            case "shrink":
                return self._shrink(_role(request), model, int(request["size"]), request["first"])
            case "deploy":
                return self._deployments.deploy(request["spec"])
            case "deployment":
                return await self._deployment(model)
            case "retire":
                return self._retire(model, request["keep"], request["only"])
            case "end":
                return self._end(request["ids"])
            case unknown:
                raise ValueError(f"unknown op {unknown!r}")

    async def close(self) -> None:
        """Go on with nothing that is being prepared."""
        await self._deployments.close()

    def _of_roles(self, *roles: str) -> list[Child]:
        return [child for child in self._children if child.spec.role in roles]

    def _wanted(self, role: str, model: str) -> list[Child]:
        return [child for child in self._of_roles(role) if child.is_wanted and child.spec.model == model]

    def _grow(self, role: str, model: str, size: int) -> dict[str, Any]:
        """Start workers until there are so many that were not retired: more of the newest kind."""
        wanted = self._wanted(role, model)
        newest = max((child.spec.revision for child in self._workers(model)), default=0)
        options = self._options_of.get((model, newest))
        if options is None:
            raise ValueError(f"no model {model!r}")
        return {"added": [self._add(role, options, newest) for _ in range(min(size, MAX_WORKERS) - len(wanted))]}

    def _add_all(self, options: ClusterOptions, revision: int) -> None:
        """Start the workers of a deployment."""
        self._options_of[options.model, revision] = options
        for role, size in (("prefill", options.prefill), ("decode", options.decode)):
            for _ in range(size):
                self._add(role, options, revision)

    def _add(self, role: str, options: ClusterOptions, revision: int) -> str:
        """Start one worker; returns its id."""
        taken = {child.spec.id for child in self._of_roles(role)}
        number = next(i for i in count() if f"{role}-{i}" not in taken)
        cores = sorted(os.sched_getaffinity(0))
        spec = one_more(role, number, options, self._home, cores, os.environ)
        child = Child(replace(spec, revision=revision), self._start)
        self._children.append(child)
        if not self._is_stopping():
            child.start()
        return spec.id

    def _shrink(self, role: str, model: str, size: int, first: Sequence[str]) -> dict[str, Any]:
        """Retire workers, `first` and then the newest, until so many are left; somebody drains them."""
        wanted = self._wanted(role, model)
        newest_first = wanted[::-1]
        ranked = sorted(newest_first, key=lambda child: child.spec.id not in first)
        return self._let_go(ranked[: max(0, len(wanted) - size)])

    def _workers(self, model: str) -> list[Child]:
        return [child for child in self._of_roles(*WORKER_ROLES) if child.spec.model == model]

    async def _deployment(self, model: str) -> dict[str, Any]:
        """Report a model: what is being prepared, and all its workers."""
        children = self._workers(model)
        described = await asyncio.gather(*map(describe, children))
        workers = [
            described | {"wanted": child.is_wanted, "why": self._why(child)}
            for child, described in zip(children, described, strict=True)
        ]
        return {"deployment": self._deployments.status(model), "workers": workers}

    def _why(self, child: Child) -> str:
        """Say why a worker dies again and again; empty while it does not."""
        if child.restarts < launch.MAX_FAILED_STARTS:
            return ""
        return f"{child.last_exit}: {launch.last_message(self._home, child.spec.id)}"

    def _retire(self, model: str, keep: int | None, only: int | None) -> dict[str, Any]:
        """Let a model's workers go: all but those of revision `keep`, or only those of revision `only`."""
        if keep is None and only is None:
            self._deployments.forget(model)
        chosen = [
            child
            for child in self._workers(model)
            if child.spec.revision != keep and only in (None, child.spec.revision)
        ]
        return self._let_go(chosen)

    def _let_go(self, children: Sequence[Child]) -> dict[str, Any]:
        for child in children:
            if child.is_wanted:
                child.retire(partial(self._forget, child))
        return {"retired": [child.spec.id for child in children]}

    def _end(self, ids: Sequence[str]) -> dict[str, Any]:
        """Stop retired workers that nobody can tell to drain."""
        for child in self._of_roles(*WORKER_ROLES):
            if child.spec.id in ids and not child.is_wanted:
                task = asyncio.create_task(child.stop(END_GRACE_S), name=f"end-{child.spec.id}")
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
        return {}

    def _forget(self, child: Child) -> None:
        if not self._is_stopping() and child in self._children:
            self._children.remove(child)


def _role(request: dict[str, Any]) -> str:
    if request["role"] not in WORKER_ROLES:
        raise ValueError(f"no workers of role {request['role']!r}")
    return str(request["role"])


async def describe(child: Child) -> dict[str, Any]:
    """Report one process as `inferctl status -o json` shows it."""
    pid = child.pid
    readiness = await probe.ask(child.spec.role, child.spec.socket) if pid else probe.Readiness(ready=False)
    is_running = pid is not None
    return {
        "role": child.spec.role,
        "id": child.spec.id,
        "model": child.spec.model,
        "revision": child.spec.revision,
        "incarnation": child.incarnation if child.spec.role == "redis" else readiness.incarnation,
        "pid": pid,
        "ready": is_running and readiness.ready,
        "running": is_running,
        "reason": readiness.reason if is_running else child.last_exit or "not started yet",
        "state": readiness.state,
        "restarts": child.restarts,
        "last_exit": child.last_exit,
        "uptime_s": round(time.time() - child.started_at, 1) if is_running else 0.0,
        "cores": list(child.spec.cores),
        "log": str(child.spec.log),
    }

"""Models that a running cluster was told to load: each is prepared in a child process, then gets workers of its own.

The registry decides what is loaded and when something else may go; the supervisor only does it, and can be told again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inferflux.cli import preflight
from inferflux.cli.failure import CliError
from inferflux.cli.jobs import OFFLINE
from inferflux.cli.pdeathsig import die_with_parent
from inferflux.cli.plan import ClusterOptions
from inferflux.config import env_name
from inferflux.errors import ConfigError, InferfluxError

StartWorkers = Callable[[ClusterOptions, int], None]
MAX_LINE_BYTES = 1 << 16
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Deployment:
    """One revision of one model. `step`: what is being done before workers start; `error`: why it could not be."""

    revision: int
    step: str = "waiting"
    fraction: float | None = None
    error: str = ""
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"revision": self.revision, "step": self.step, "fraction": self.fraction, "error": self.error}


class Deployments:
    """All models that were asked for. `options`: of the cluster; `start` adds the workers of a prepared model."""

    def __init__(self, options: ClusterOptions, environ: Mapping[str, str], start: StartWorkers) -> None:
        self._options = options
        self._environ = environ
        self._start = start
        self._known: dict[str, Deployment] = {}

    def deploy(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Begin with a revision of a model; nothing happens when that was done before. Returns what it is up to."""
        model, revision = str(spec["model"]), int(spec["revision"])
        known = self._known.get(model)
        if known is not None and known.revision == revision:
            return known.to_json()
        self.forget(model)
        deployment = self._known[model] = Deployment(revision)
        options = replace(
            self._options,
            model=model,
            model_dir="",
            model_digest="",
            numerics_reference="",
            prefill=int(spec["prefill"]),
            decode=int(spec["decode"]),
            pooling=0,
            embedding=None,
            settings=dict(spec["settings"]),
        )
        work = self._carry_out(deployment, options, str(spec["source"]))
        deployment.task = asyncio.create_task(work, name=f"deploy-{model}")
        return deployment.to_json()

    def status(self, model: str) -> dict[str, Any]:
        """Say how far it is; revision 0: nothing was asked for."""
        return (self._known.get(model) or Deployment(0, step="")).to_json()

    def forget(self, model: str) -> None:
        """Go on with nothing of a model that has no workers yet."""
        known = self._known.pop(model, None)
        if known is not None and known.task is not None:
            known.task.cancel()

    async def close(self) -> None:
        """End what is being prepared."""
        tasks = [known.task for known in self._known.values() if known.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, deployment: Deployment, options: ClusterOptions, source: str) -> None:
        try:
            prepared = await self._prepare(deployment, options, source)
            self._start(prepared, deployment.revision)
            deployment.step = "starting workers"
        except (InferfluxError, CliError) as e:
            deployment.error = str(e)
        except Exception:  # noqa: BLE001 - the supervisor must live, and somebody waits for an answer
            _log.exception("deployment of %s failed", options.model)
            deployment.error = "it could not be prepared; the supervisor's log says more"

    async def _prepare(self, deployment: Deployment, options: ClusterOptions, source: str) -> ClusterOptions:
        """Find the model's files and what belongs to them, and make sure that there is room. Raises as it fails."""
        environ = {**self._environ, **{env_name(name): value for name, value in options.settings.items()}}
        if options.engine == "sim":
            preflight.check_memory(options, 0, environ)
            return replace(options, model_dir=source if Path(source).is_absolute() else "")
        if not source:
            raise ConfigError("source: missing: a folder, or a name in the models directory")
        model = await run_job(source, deployment)
        preflight.check_memory(options, model.pop("num_weight_bytes"), environ)
        return replace(options, **model)


async def run_job(source: str, deployment: Deployment) -> dict[str, Any]:
    """Let a child process prepare a model, and show how far it is. Raises ConfigError."""
    command = [sys.executable, "-m", "inferflux.cli.jobs.prepare", source]
    job = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **OFFLINE},
        stdin=DEVNULL,
        stdout=PIPE,
        limit=MAX_LINE_BYTES,
        preexec_fn=die_with_parent(),
    )
    assert job.stdout is not None  # noqa: S101 - for mypy
    try:
        async for line in job.stdout:
            message = json.loads(line)
            if "model" in message:
                model: dict[str, Any] = message["model"]
                return model
            if "error" in message:
                raise ConfigError(message["error"])
            deployment.step, deployment.fraction = message["what"], message["fraction"]
        raise ConfigError(f"preparing {source} ended with status {await job.wait()}; the supervisor's log says more")
    finally:
        with suppress(ProcessLookupError):
            job.kill()
        await job.wait()

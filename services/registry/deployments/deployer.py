"""Brings the cluster to what is deployed: new workers first, and only when they serve do the old ones go.

Everything it does may be done again: after a restart it begins where the stored deployments and the host's workers are.
A revision that can't serve, since its files, its settings or its numerics are wrong, is taken back, and what served
before goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from inferflux.clock import Clock
from inferflux.errors import Conflict, InferfluxError, NotFound, Unavailable
from inferflux.feed import Feed
from inferflux.types import State
from services.registry.deployments.deployment import Deployment, ModelSpec, Stage
from services.registry.deployments.host import Host, HostStatus, HostWorker
from services.registry.directory import Directory
from services.registry.planner.workers import WorkerClient
from services.registry.store import RegistryStore
from services.registry.workers import Worker

log = logging.getLogger(__name__)

BUSY_S = 0.25
IDLE_S = 5.0
SEEN_S = 15.0
"""Longest wait for all gateways to connect to new workers: some may be gone, and their watches not yet."""
UNLOADED = "unloaded"
FINAL = frozenset({Stage.READY, Stage.FAILED, UNLOADED})
ELSEWHERE = (
    "whoever starts this cluster's workers deploys its models (in Kubernetes: the chart's values), not the registry"
)

Document = dict[str, Any]


class Deployer:
    """Acts with `run`, as a task. `host` None: it only says what there is."""

    def __init__(
        self, store: RegistryStore, directory: Directory, host: Host | None, client: WorkerClient, clock: Clock
    ) -> None:
        self._store = store
        self._directory = directory
        self._host = host
        self._client = client
        self._clock = clock
        self._feeds: dict[str, Feed[Document]] = {}
        self._serving: dict[str, int] = {}
        self._hopeless: set[tuple[str, int]] = set()
        self._leaving: set[str] = set()
        self._ready_since: dict[tuple[str, int], float] = {}
        self._wake = asyncio.Event()

    async def load(self, spec: ModelSpec) -> Document:
        """Want a model from now on. Raises Conflict or Unavailable."""
        self._require_host()

        def edit(known: Deployment | None) -> Deployment:
            deployment = known or Deployment(spec.model, None)
            if known is not None and known.stage is Stage.UNLOADING:
                raise Conflict(f"model {spec.model!r} is being unloaded")
            return deployment.load(spec)

        return self._begun(await self._store.edit_deployment(spec.model, edit))

    async def unload(self, model: str) -> Document:
        """Want a model no more. Raises NotFound, Conflict for the default one, or Unavailable."""
        self._require_host()
        models = [known for known in self._directory.models() if not known.parent]
        if any(known.name == model and known.is_default for known in models) and len(models) > 1:
            raise Conflict(f"model {model!r} is the default: make another one the default first")
        is_known = any(known.name == model for known in models)

        def edit(known: Deployment | None) -> Deployment:
            if known is None and not is_known:
                raise NotFound(f"no model {model!r}")
            return (known or Deployment(model, None)).unload()

        return self._begun(await self._store.edit_deployment(model, edit))

    async def documents(self) -> list[Document]:
        """Describe all models: those that were deployed, and those that came with the cluster. Raises Unavailable."""
        deployments = await self._store.deployments()
        served = {model.name for model in self._directory.models() if not model.parent}
        return [
            await self._document(deployments.get(name) or Deployment(name, None), is_ours=name in deployments)
            for name in sorted(deployments.keys() | served)
        ]

    def watch(self, model: str) -> Feed[Document]:
        """Give the feed of a model's documents; the last one has a state of FINAL. Raises NotFound."""
        if model not in self._feeds:
            raise NotFound(f"no deployment of model {model[:128]!r} was begun here")
        return self._feeds[model]

    async def run(self) -> None:
        """Act for ever."""
        while self._host is not None:
            self._wake.clear()
            try:
                is_busy = await self._turn(self._host)
            except InferfluxError as e:
                log.debug("deployments wait", extra={"reason": e.message})
                is_busy = False
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_S if is_busy else IDLE_S):
                    await self._wake.wait()

    def _require_host(self) -> None:
        if self._host is None:
            raise Conflict(ELSEWHERE)

    def _begun(self, deployment: Deployment | None) -> Document:
        assert deployment is not None  # noqa: S101 - for mypy: the edits above make one
        self._serving.pop(deployment.model, None)
        self._leaving.discard(deployment.model)
        document = _render(deployment, [], HostStatus())
        self._publish(deployment.model, document)
        self._wake.set()
        return document

    async def _turn(self, host: Host) -> bool:
        """Go one step with each deployment; says whether there is more to do soon."""
        is_busy = False
        for deployment in (await self._store.deployments()).values():
            if deployment.stage is Stage.UNLOADING:
                is_busy |= await self._unload(host, deployment)
            elif (spec := self._due(deployment)) is not None:
                is_busy |= await self._deploy(host, deployment, spec)
        return is_busy

    def _due(self, deployment: Deployment) -> ModelSpec | None:
        """Say what should have workers and is not known to."""
        spec = deployment.wanted if deployment.stage is Stage.LOADING else deployment.kept
        if spec is None or self._serving.get(spec.model) == spec.revision:
            return None
        return None if (spec.model, spec.revision) in self._hopeless else spec

    async def _deploy(self, host: Host, deployment: Deployment, spec: ModelSpec) -> bool:
        """Let a revision start, look how far it is, and put it in place of the others or take it back."""
        await host.deploy(spec)
        status = await host.status(spec.model)
        workers = status.of(spec.revision)
        if error := _error(status, workers, spec.revision):
            await self._fail(host, deployment, spec, error)
        elif workers and await self._are_serving(spec, workers):
            await self._take_back(host, spec, await host.retire(spec.model, keep=spec.revision))
            await self._settle(spec)
        else:
            self._publish(spec.model, _render(deployment, self._workers(spec.model), status))
            return True
        return False

    async def _settle(self, spec: ModelSpec) -> None:
        self._serving[spec.model] = spec.revision
        self._ready_since.clear()
        deployment = await self._store.edit_deployment(
            spec.model, lambda known: known.settled(spec.revision) if known is not None else None
        )
        log.info("model deployed", extra={"model": spec.model, "revision": spec.revision})
        await self._report(deployment)

    async def _fail(self, host: Host, deployment: Deployment, spec: ModelSpec, error: str) -> None:
        log.error("deployment failed", extra={"model": spec.model, "revision": spec.revision, "reason": error})
        self._hopeless.add((spec.model, spec.revision))
        await self._take_back(host, spec, await host.retire(spec.model, only=spec.revision))
        failed = await self._store.edit_deployment(
            spec.model, lambda known: known.failed(spec.revision, error) if known is not None else None
        )
        if failed is not None and failed.kept is not None:
            self._serving[spec.model] = failed.kept.revision
        await self._report(failed)

    async def _unload(self, host: Host, deployment: Deployment) -> bool:
        """Drain what is left of a model, once, and forget it when nothing is left."""
        model = deployment.model
        if model not in self._leaving:
            self._leaving.add(model)
            await self._take_back(host, deployment.current or ModelSpec(model=model), await host.retire(model))
        status = await host.status(model)
        if status.workers or self._workers(model):
            self._publish(model, _render(deployment, self._workers(model), status))
            return True
        with suppress(NotFound):
            await self._directory.delete_model(model)
        await self._store.edit_deployment(
            model, lambda known: None if known is not None and known.stage is Stage.UNLOADING else known
        )
        log.info("model unloaded", extra={"model": model})
        self._publish(model, _render(deployment, [], status) | {"state": UNLOADED})
        return False

    async def _take_back(self, host: Host, spec: ModelSpec, ids: Iterable[str]) -> None:
        """Drain workers that were retired; those that can't hear it are ended."""
        known = {worker.worker_id: worker for worker in self._workers(spec.model)}
        deaf = []
        for worker_id in ids:
            try:
                if worker_id not in known or known[worker_id].state is State.FAILED:
                    raise Unavailable("it has no engine")
                await self._client.drain(known[worker_id], spec.drain_s)
            except InferfluxError as e:
                log.info("worker is ended", extra={"worker_id": worker_id, "reason": e.message})
                deaf.append(worker_id)
        if deaf:
            await host.end(deaf)

    async def _are_serving(self, spec: ModelSpec, workers: Iterable[HostWorker]) -> bool:
        """Say whether all are ready, and known to all gateways that follow our snapshots."""
        known = {worker.worker_id: worker for worker in self._workers(spec.model)}
        registered = [known.get(worker.worker_id) for worker in workers]
        ready = [worker for worker in registered if worker is not None and worker.state is State.READY]
        if len(ready) < len(registered):
            return False
        since = self._ready_since.setdefault((spec.model, spec.revision), self._clock.monotonic())
        members = await self._client.look(ready)
        num_gateways = self._directory.feed.num_watchers
        are_seen = all(m.report is not None and m.report.num_gateways >= num_gateways for m in members)
        return are_seen or self._clock.monotonic() - since > SEEN_S

    def _workers(self, model: str) -> list[Worker]:
        return [worker for worker in self._directory.leases.workers() if worker.model == model]

    async def _report(self, deployment: Deployment | None) -> None:
        if deployment is not None:
            self._publish(deployment.model, await self._document(deployment, is_ours=True))

    async def _document(self, deployment: Deployment, *, is_ours: bool) -> Document:
        """Describe a deployment as it is now, if the host tells."""
        status = HostStatus()
        if self._host is not None:
            with suppress(Unavailable):
                status = await self._host.status(deployment.model)
        document = _render(deployment, self._workers(deployment.model), status)
        return document if is_ours else document | {"state": Stage.READY}

    def _publish(self, model: str, document: Document) -> None:
        feed = self._feeds.setdefault(model, Feed())
        if document != feed.value:
            feed.publish(feed.revision + 1, document)


def _error(status: HostStatus, workers: Iterable[HostWorker], revision: int) -> str:
    """Say why a revision will never serve; empty: it may."""
    if status.revision == revision and status.error:
        return status.error
    return next((f"{worker.worker_id}: {worker.error}" for worker in workers if worker.error), "")


def _render(deployment: Deployment, registered: Iterable[Worker], status: HostStatus) -> Document:
    """Write a deployment as administrators see it."""
    spec = deployment.wanted or deployment.current
    shown = {w.worker_id: {"role": w.role, "state": w.state, "reason": w.reason} for w in registered}
    revisions = {worker.worker_id: worker.revision for worker in status.workers}
    for worker in status.workers:
        shown.setdefault(worker.worker_id, {"role": worker.role, "state": worker.state, "reason": worker.reason})
    is_preparing = deployment.stage is Stage.LOADING and spec is not None and status.revision == spec.revision
    return {
        "id": deployment.model,
        "object": "deployment",
        "state": deployment.stage,
        "error": deployment.error,
        "spec": spec.to_json() if spec else None,
        "serving_revision": deployment.current.revision if deployment.current else 0,
        "step": status.step if is_preparing else "",
        "fraction": status.fraction if is_preparing else None,
        "workers": [
            {"id": worker_id, "revision": revisions.get(worker_id, 0), **fields}
            for worker_id, fields in sorted(shown.items())
        ],
    }

"""The node of the cluster: starts a worker for each pod, and tells it when the pod is deleted."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tests.support.fake_kube.network import Network
from tests.support.fake_kube.pod import Node, PodWorker
from tests.support.fake_kube.store import Key, Store, key_of

NAME = "node-0"
_log = logging.getLogger(__name__)


class Kubelet:
    """Runs all pods of the store."""

    def __init__(self, store: Store, network: Network, node: Node) -> None:
        self._store = store
        self._network = network
        self._node = node
        self._workers: dict[Key, PodWorker] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def log(self, key: Key, container: str) -> Path | None:
        worker = self._workers.get(key)
        return worker.log(container) if worker else None

    async def run(self) -> None:
        """Follow the store for ever."""
        while True:
            revision = self._store.revision
            for pod in self._store.list("Pod"):
                key = key_of(pod)
                if key not in self._tasks:
                    self._start(key, pod["metadata"]["uid"])
                if "deletionTimestamp" in pod["metadata"]:
                    self._workers[key].stop()
            await self._store.wait(revision)

    async def close(self) -> None:
        """End all pods at once."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, key: Key, uid: str) -> None:
        worker = PodWorker(self._store, key, uid, self._network.allocate_pod(), self._node)
        self._workers[key] = worker
        self._tasks[key] = asyncio.create_task(self._run(key, worker), name=f"pod-{key[2]}")

    async def _run(self, key: Key, worker: PodWorker) -> None:
        try:
            await worker.run()
        except Exception:  # noqa: BLE001  -- a broken pod is a test's to notice, not the end of its node
            _log.exception("pod %s failed", key)
            self._store.remove(key)
        finally:
            del self._workers[key], self._tasks[key]

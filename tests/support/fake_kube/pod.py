"""One pod on its node: volumes, init containers, containers with their probes and restarts, and its end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fake_kube import environment
from tests.support.fake_kube.environment import ConfigMissing
from tests.support.fake_kube.probes import probe
from tests.support.fake_kube.runtime import Container, ContainerSpec, Mount, start
from tests.support.fake_kube.store import Key, Object, Store, now
from tests.support.fake_kube.volumes import Volumes

MAX_HOOK_S = 3600.0
TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
# Kubernetes begins at 10 s; tests have less patience.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 10.0
RETRY_S = 0.5
REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Access:
    """How pods reach the API. `issue` makes a token of a service account."""

    host: str
    port: int
    ca_file: Path
    issue: Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Node:
    """What pods need of their node."""

    directory: Path
    claims: Path
    image_env: Mapping[str, str]
    opened: tuple[Path, ...]
    hosts_file: Callable[[str], Path]
    api: Access


@dataclass(slots=True)
class ContainerState:
    """What a container's status is made of."""

    name: str
    image: str
    container: Container | None = None
    is_started: bool = False
    is_ready: bool = False
    restarts: int = 0
    exit_code: int | None = None
    reason: str = "ContainerCreating"
    message: str = ""
    started_at: str = ""

    def to_status(self) -> dict[str, Any]:
        status: dict[str, Any] = {"name": self.name, "image": self.image, "imageID": self.image}
        status |= {"restartCount": self.restarts, "ready": self.is_ready, "started": self.is_started}
        return status | {"state": self._state()}

    def _state(self) -> dict[str, Any]:
        if self.container is not None:
            return {"running": {"startedAt": self.started_at}}
        if self.exit_code is not None:
            reason = "Completed" if self.exit_code == 0 else "Error"
            return {"terminated": {"exitCode": self.exit_code, "reason": reason, "finishedAt": now()}}
        return {"waiting": {"reason": self.reason, "message": self.message}}


@dataclass(slots=True)
class PodWorker:
    """Runs a pod until it is over or deleted. `run` once; `stop` makes it end."""

    store: Store
    key: Key
    uid: str
    address: str
    node: Node
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _states: dict[str, ContainerState] = field(default_factory=dict)
    _phase: str = "Pending"
    _started_at: str = field(default_factory=now)

    def stop(self) -> None:
        """Let the pod end; how long it may take is in its object."""
        self._stopping.set()

    def log(self, container: str) -> Path | None:
        path = self._directory / f"{container}.log"
        return path if path.exists() else None

    async def run(self) -> None:
        """Run the pod, and remove its object in the end if it was deleted."""
        pod = self._pod()
        self._directory.mkdir(parents=True, exist_ok=True)
        for container in pod["spec"]["containers"]:
            self._states[container["name"]] = ContainerState(container["name"], container["image"])
        self._report()
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                await stopping
            else:
                await self._end()
        finally:
            for task in (work, stopping):
                task.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            await self._kill()
            self._volumes().remove()
        self.store.remove(self.key)

    @property
    def _directory(self) -> Path:
        return self.node.directory / self.key[1] / f"{self.key[2]}_{self.uid}"

    def _pod(self) -> Object:
        pod = self.store.get(*self.key)
        assert pod is not None
        return pod

    def _volumes(self) -> Volumes:
        return Volumes(self.store, self._pod(), self._directory / "volumes", self.node.claims)

    async def _work(self) -> None:
        await self._until_configured(self._volumes().make)
        for container in self._pod()["spec"].get("initContainers") or ():
            while await self._run_once(container, ContainerState(container["name"], container["image"])) != 0:
                await asyncio.sleep(RETRY_S)
        self._phase = "Running"
        async with asyncio.TaskGroup() as tasks:
            refresh = tasks.create_task(self._refresh())
            keepers = [tasks.create_task(self._keep(c)) for c in self._pod()["spec"]["containers"]]
            await asyncio.gather(*keepers)
            refresh.cancel()
        self._phase = "Succeeded" if all(s.exit_code == 0 for s in self._states.values()) else "Failed"
        self._report()

    async def _until_configured(self, make: Callable[[], Any]) -> Any:
        """Do what needs Secrets and ConfigMaps, which may come later than the pod."""
        while True:
            try:
                return make()
            except ConfigMissing as e:
                for state in self._states.values():
                    state.reason, state.message = "CreateContainerConfigError", str(e)
                self._report()
                await asyncio.sleep(RETRY_S)

    async def _refresh(self) -> None:
        """Bring changes of Secrets and ConfigMaps into the volumes."""
        while True:
            await asyncio.sleep(REFRESH_S)
            with suppress(ConfigMissing):
                self._volumes().make()

    async def _keep(self, container: dict[str, Any]) -> None:
        """Run a container as often as the restart policy says."""
        state = self._states[container["name"]]
        backoff_s = FIRST_BACKOFF_S
        while True:
            code = await self._run_once(container, state)
            policy = self._pod()["spec"]["restartPolicy"]
            if policy == "Never" or (policy == "OnFailure" and code == 0):
                return
            await asyncio.sleep(backoff_s)
            state.restarts += 1
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _run_once(self, container: dict[str, Any], state: ContainerState) -> int:
        spec = await self._until_configured(lambda: self._spec(container))
        with (self._directory / f"{container['name']}.log").open("ab") as log:
            state.container = await start(spec, log)
        state.exit_code, state.started_at = None, now()
        self._report()
        probes = asyncio.create_task(self._probe(container, state))
        try:
            state.exit_code = await state.container.wait()
        finally:
            probes.cancel()
            await asyncio.gather(probes, return_exceptions=True)
            state.is_started = state.is_ready = False
        state.container = None
        self._report()
        return state.exit_code

    async def _probe(self, container: dict[str, Any], state: ContainerState) -> None:
        """Ask until it has started, then whether it lives and is ready."""
        if "startupProbe" in container and not await self._has_started(container["startupProbe"], state):
            return
        state.is_started = True
        async with asyncio.TaskGroup() as tasks:
            if "livenessProbe" in container:
                tasks.create_task(self._watch_life(container["livenessProbe"], state))
            if "readinessProbe" in container:
                tasks.create_task(self._watch_readiness(container["readinessProbe"], state))
            else:
                self._set_ready(state, is_ready=True)

    async def _has_started(self, action: dict[str, Any], state: ContainerState) -> bool:
        for _ in range(action["failureThreshold"]):
            if await self._ask(action, state):
                return True
            await asyncio.sleep(action["periodSeconds"])
        self._fail(state, "startup probe failed")
        return False

    async def _watch_life(self, action: dict[str, Any], state: ContainerState) -> None:
        failures = 0
        while failures < action["failureThreshold"]:
            await asyncio.sleep(action["periodSeconds"])
            failures = 0 if await self._ask(action, state) else failures + 1
        self._fail(state, "liveness probe failed")

    async def _watch_readiness(self, action: dict[str, Any], state: ContainerState) -> None:
        failures = 0
        while True:
            if await self._ask(action, state):
                failures = 0
                self._set_ready(state, is_ready=True)
            else:
                failures += 1
                if failures >= action["failureThreshold"]:
                    self._set_ready(state, is_ready=False)
            # Before it is ready for the first time a kubelet asks as soon as something changes.
            await asyncio.sleep(action["periodSeconds"] if state.is_ready else min(0.3, action["periodSeconds"]))

    async def _ask(self, action: dict[str, Any], state: ContainerState) -> bool:
        if state.container is None:
            return False
        return await probe(self._pod(), state.container, action, action["timeoutSeconds"])

    def _set_ready(self, state: ContainerState, *, is_ready: bool) -> None:
        if state.is_ready != is_ready:
            state.is_ready = is_ready
            self._report()

    def _fail(self, state: ContainerState, why: str) -> None:
        state.message = why
        with (self._directory / f"{state.name}.log").open("ab") as log:
            log.write(f"kubelet: {why}, killing the container\n".encode())
        if state.container is not None:
            state.container.kill()

    async def _end(self) -> None:
        """Stop all containers: hook, SIGTERM, and SIGKILL when the grace is over."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        containers = {c["name"]: c for c in self._pod()["spec"]["containers"]}
        ends = [
            asyncio.create_task(self._end_container(containers[name], state.container))
            for name, state in self._states.items()
            if state.container is not None
        ]
        while any(not end.done() for end in ends):
            left_s = begin + self._pod()["metadata"]["deletionGracePeriodSeconds"] - loop.time()
            if left_s <= 0:
                break  # a second deletion may have shortened it
            await asyncio.wait(ends, timeout=min(left_s, RETRY_S))
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)

    async def _end_container(self, spec: dict[str, Any], container: Container) -> None:
        hook = (spec.get("lifecycle") or {}).get("preStop")
        if hook is not None:
            await probe(self._pod(), container, hook, MAX_HOOK_S)
        container.signal(signal.SIGTERM)
        await container.wait()

    async def _kill(self) -> None:
        """Leave nothing running, whatever happened."""
        running = [state.container for state in self._states.values() if state.container is not None]
        for container in running:
            container.kill()
        await asyncio.gather(*(container.wait() for container in running))

    def _spec(self, container: dict[str, Any]) -> ContainerSpec:
        """Work out how to start a container. Raises ConfigMissing."""
        pod = self._pod()
        if not container.get("command"):
            raise ConfigMissing(f"container {container['name']!r} has no command, and images are not known here")
        service = {"KUBERNETES_SERVICE_HOST": self.node.api.host, "KUBERNETES_SERVICE_PORT": str(self.node.api.port)}
        env = environment.build(self.store, pod, container, {**self.node.image_env, **service})
        argv = [environment.expand(a, env) for a in [*container["command"], *(container.get("args") or ())]]
        of_pod, own = pod["spec"].get("securityContext") or {}, container.get("securityContext") or {}
        security = of_pod | own
        group = of_pod.get("fsGroup")
        return ContainerSpec(
            argv=argv,
            env=env,
            mounts=[*self._mounts(container), *self._own_mounts()],
            scratch=self._directory / container["name"],
            working_dir=container.get("workingDir", "/"),
            user=security.get("runAsUser"),
            group=security.get("runAsGroup"),
            groups=[group] if group is not None else [],
            has_privileges=security.get("allowPrivilegeEscalation") is not False,
            is_root_read_only=bool(security.get("readOnlyRootFilesystem")),
            is_init=not pod["spec"].get("shareProcessNamespace", False),
            opened=self.node.opened,
        )

    def _mounts(self, container: dict[str, Any]) -> list[Mount]:
        volumes, mounts = self._volumes(), []
        for mount in container.get("volumeMounts") or ():
            source = volumes.path(mount["name"]) / mount.get("subPath", "")
            kinds = next(v for v in self._pod()["spec"]["volumes"] if v["name"] == mount["name"])
            is_read_only = bool(mount.get("readOnly")) or bool(kinds.keys() & {"secret", "configMap", "projected"})
            mounts.append(Mount(source, mount["mountPath"], is_read_only))
        return mounts

    def _own_mounts(self) -> list[Mount]:
        """What a pod has without asking: names, and a token of its service account unless somebody declines it."""
        mounts = [Mount(self.node.hosts_file(self.key[1]), "/etc/hosts", True)]
        spec, namespace = self._pod()["spec"], self.key[1]
        account = self.store.get("ServiceAccount", namespace, spec["serviceAccountName"]) or {}
        if spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)):
            path = self._directory / "token"
            path.mkdir(exist_ok=True)
            (path / "token").write_text(self.node.api.issue(namespace, spec["serviceAccountName"]))
            (path / "namespace").write_text(namespace)
            (path / "ca.crt").write_bytes(self.node.api.ca_file.read_bytes())
            mounts.append(Mount(path, TOKEN_PATH, True))
        return mounts

    def _condition(self, name: str, *, is_true: bool) -> dict[str, str]:
        """Make a condition that remembers since when it has been so."""
        before = {c["type"]: c for c in (self._pod().get("status") or {}).get("conditions", ())}.get(name)
        if before is not None and before["status"] == str(is_true):
            return before
        return {"type": name, "status": str(is_true), "lastTransitionTime": now()}

    def _report(self) -> None:
        states = list(self._states.values())
        are_ready = bool(states) and all(state.is_ready for state in states)
        conditions = {
            "PodScheduled": True,
            "Initialized": self._phase != "Pending",
            "ContainersReady": are_ready,
            "Ready": are_ready,
        }
        status = {
            "phase": self._phase,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "hostIP": "127.0.0.1",
            "startTime": self._started_at,
            "conditions": [self._condition(name, is_true=is_true) for name, is_true in conditions.items()],
            "containerStatuses": [state.to_status() for state in states],
        }
        self.store.set_status(self.key, status)

"""The actuator and the lease in Kubernetes: the scale subresource of a pool's workload, and a coordination Lease.

A worker's id is the name of its pod. A Deployment lets go first whom we mark with the pod-deletion-cost annotation; a
StatefulSet lets go of its highest ordinals, whatever we would like. The pod's end is a drain too (SIGTERM).
The client is synchronous: it works in threads, with a time limit for each call.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from inferflux.clock import Clock, SystemClock
from inferflux.errors import ConfigError, InvalidRequest, NotFound, PermissionDenied, Unavailable
from services.registry.planner.pool import Member
from services.registry.planner.spec import PoolSpec

TIMEOUT_S = 5.0
LEASE_NAME = "inferflux-planner"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
VICTIM_COST = "-1000"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
T = TypeVar("T")
_log = logging.getLogger(__name__)


def connect(namespace: str, owner: str, ttl_s: float) -> tuple[KubernetesActuator, KubernetesLease]:
    """Connect as this pod, or as KUBECONFIG says. Raises ConfigError when there is neither."""
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
        home = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except (ConfigException, OSError):
        try:
            config.load_kube_config()  # type: ignore[no-untyped-call]
            _, active = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]
        except ConfigException as e:
            raise ConfigError(f"INFERFLUX_PLANNER: kubernetes, but there is no cluster to talk to: {e}") from e
        home = active["context"].get("namespace", "default")
    api = client.ApiClient()
    return KubernetesActuator(api, namespace or home), KubernetesLease(
        api, namespace or home, owner, SystemClock(), ttl_s
    )


class KubernetesActuator:
    """Scales Deployments and StatefulSets of one namespace."""

    def __init__(self, api: Any, namespace: str) -> None:
        self._apps = client.AppsV1Api(api)
        self._core = client.CoreV1Api(api)
        self._namespace = namespace

    async def size(self, spec: PoolSpec) -> int:
        read, _ = self._scale_calls(spec)
        scale = await _call(spec.target, read)
        return int(scale.spec.replicas or 0)

    async def doomed(self, spec: PoolSpec, size: int) -> Collection[str] | None:
        kind, _, name = spec.target.partition("/")
        if kind == "deployment":
            return None
        return [f"{name}-{ordinal}" for ordinal in range(size, await self.size(spec))]

    async def grow(self, spec: PoolSpec, size: int) -> None:
        await self._scale(spec, size)

    async def shrink(self, spec: PoolSpec, size: int, victims: Sequence[Member]) -> None:
        if spec.target.startswith("deployment/"):
            await asyncio.gather(*(self._mark(victim.worker.worker_id) for victim in victims))
        await self._scale(spec, size)

    async def _mark(self, pod: str) -> None:
        """Make a pod the first to go. One that is not there any more is gone."""
        body = {"metadata": {"annotations": {DELETION_COST: VICTIM_COST}}}
        try:
            await _call(
                pod, lambda: self._core.patch_namespaced_pod(pod, self._namespace, body, _request_timeout=TIMEOUT_S)
            )
        except NotFound:
            _log.info("a victim has no pod", extra={"worker_id": pod})

    async def _scale(self, spec: PoolSpec, size: int) -> None:
        _, patch = self._scale_calls(spec)
        await _call(spec.target, lambda: patch(size))

    def _scale_calls(self, spec: PoolSpec) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        """Return the calls that read and patch the scale of a pool's workload. Raises InvalidRequest."""
        kind, _, name = spec.target.partition("/")
        if not name:
            raise InvalidRequest(f"pool {spec.name}: target is missing, e.g. statefulset/decode", param="target")
        where: dict[str, Any] = {"name": name, "namespace": self._namespace, "_request_timeout": TIMEOUT_S}
        apps = self._apps
        if kind == "deployment":
            read, patch = apps.read_namespaced_deployment_scale, apps.patch_namespaced_deployment_scale
        else:
            read, patch = apps.read_namespaced_stateful_set_scale, apps.patch_namespaced_stateful_set_scale
        return lambda: read(**where), lambda size: patch(body={"spec": {"replicas": size}}, **where)


class KubernetesLease:
    """A Lease as client-go's leader election uses it.

    Clocks of others are not trusted: what counts is when we saw the lease change last.
    """

    def __init__(self, api: Any, namespace: str, owner: str, clock: Clock, ttl_s: float) -> None:
        self._leases = client.CoordinationV1Api(api)
        self._namespace = namespace
        self._owner = owner
        self._clock = clock
        self._ttl_s = ttl_s
        self._seen_version = ""
        self._seen_at = 0.0

    async def hold(self) -> bool:
        return await _call(LEASE_NAME, self._hold)

    async def drop(self) -> None:
        await _call(LEASE_NAME, self._drop)

    def _hold(self) -> bool:
        lease = self._read()
        try:
            if lease is None:
                self._leases.create_namespaced_lease(self._namespace, self._ours(None), _request_timeout=TIMEOUT_S)
            elif not self._is_free(lease):
                return False
            else:
                self._replace(self._ours(lease))
        except ApiException as e:
            if e.status == 409:  # somebody was faster
                return False
            raise
        return True

    def _drop(self) -> None:
        lease = self._read()
        if lease is not None and lease.spec.holder_identity == self._owner:
            lease.spec.holder_identity = ""
            self._replace(lease)

    def _read(self) -> Any:
        """None when there is none."""
        try:
            return self._leases.read_namespaced_lease(LEASE_NAME, self._namespace, _request_timeout=TIMEOUT_S)
        except ApiException as e:
            if e.status == 404:
                return None
            raise

    def _replace(self, lease: Any) -> None:
        """Write it back; the resource version that it was read with makes that fail if it changed since."""
        self._leases.replace_namespaced_lease(LEASE_NAME, self._namespace, lease, _request_timeout=TIMEOUT_S)

    def _is_free(self, lease: Any) -> bool:
        """Whether it is ours, nobody's, or was not renewed for its time, by our own clock."""
        now, version = self._clock.monotonic(), str(lease.metadata.resource_version)
        if version != self._seen_version:
            self._seen_version, self._seen_at = version, now
        holder = lease.spec.holder_identity
        span_s = lease.spec.lease_duration_seconds or self._ttl_s
        return not holder or holder == self._owner or now - self._seen_at > span_s

    def _ours(self, lease: Any) -> Any:
        now = datetime.now(UTC)
        is_renewal = lease is not None and lease.spec.holder_identity == self._owner
        turns = (lease.spec.lease_transitions or 0) if lease is not None else 0
        return client.V1Lease(
            metadata=lease.metadata if lease is not None else client.V1ObjectMeta(name=LEASE_NAME),
            spec=client.V1LeaseSpec(
                holder_identity=self._owner,
                lease_duration_seconds=math.ceil(self._ttl_s),
                acquire_time=lease.spec.acquire_time if is_renewal else now,
                renew_time=now,
                lease_transitions=turns if is_renewal or lease is None else turns + 1,
            ),
        )


async def _call(what: str, call: Callable[[], T]) -> T:
    """Run a call in a thread. Raises NotFound, PermissionDenied or Unavailable."""
    try:
        return await asyncio.to_thread(call)
    except ApiException as e:
        match e.status:
            case 404:
                raise NotFound(f"Kubernetes knows no {what}") from e
            case 401 | 403:
                raise PermissionDenied(f"Kubernetes does not let the planner touch {what}") from e
            case status:
                raise Unavailable(f"Kubernetes answered {status} about {what}") from e
    except (HTTPError, OSError) as e:
        raise Unavailable(f"the Kubernetes API cannot be reached: {type(e).__name__}") from e

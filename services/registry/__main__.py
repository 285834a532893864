"""The registry's process: settings, wiring, drain."""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from inferflux.clock import SystemClock
from inferflux.config import CommonSettings, env_name, load
from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.paths import Home
from inferflux.process import Tasks, fail, run
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from inferflux.v1.pool_service_pb2_grpc import add_PoolServiceServicer_to_server
from inferflux.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from services.registry.deployments import servicer as deployments
from services.registry.deployments.deployer import Deployer
from services.registry.deployments.host import LocalHost
from services.registry.deployments.keeper import Keeper
from services.registry.deployments.servicer import ModelServicer
from services.registry.directory import LEASE_S, Directory
from services.registry.planner import servicer as pools
from services.registry.planner.actuator import Actuator
from services.registry.planner.lease import TURNS, Lease, RedisLease
from services.registry.planner.local import LocalActuator
from services.registry.planner.planner import Planner
from services.registry.planner.servicer import PoolServicer
from services.registry.planner.specs import Specs
from services.registry.planner.store import PlannerStore
from services.registry.planner.workers import WorkerClient
from services.registry.servicer import CALLERS, RegistryServicer
from services.registry.store import RegistryStore

DRAIN_S = 1.0
MAX_PERIOD_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """What the registry reads from its environment; `bind` and `redis_url` are required."""

    instance_id: str = "registry-0"
    """Stable over restarts, unique in the cluster."""
    lease_s: float = LEASE_S
    """How long a worker that does not renew stays known; workers renew each second."""
    planner: Literal["advise", "local", "kubernetes"] = "advise"
    """What the planner acts through: nothing, the supervisor of this home, or the Kubernetes API."""
    planner_period_s: float = 5.0
    """How often the planner looks at the pools that have a spec."""
    pools_file: Path | None = None
    """Specs of pools as a JSON array, for those that nobody put; read again when it changes."""
    kube_namespace: str = ""
    """Namespace of the pools' workloads and of the planner's Lease; default: that of this pod."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if missing := [env_name(name) for name in ("bind", "redis_url") if not getattr(self, name)]:
            raise ValueError("\n".join(f"{name}: missing" for name in missing))
        if self.lease_s < 2:
            raise ValueError(f"{env_name('lease_s')}: must be at least 2, is {self.lease_s}")
        if not 0 < self.planner_period_s <= MAX_PERIOD_S:
            message = f"must be above 0 and at most {MAX_PERIOD_S:g}, is {self.planner_period_s}"
            raise ValueError(f"{env_name('planner_period_s')}: {message}")


async def serve(settings: Settings, lifecycle: Lifecycle) -> None:
    """Serve until drained. Starts, and stays, without Redis; see Directory for what is missing then."""
    identity = Identity.load(settings.pki_dir, "registry")
    server = RpcServer(identity, settings.bind, {**CALLERS, **pools.CALLERS, **deployments.CALLERS})
    async with RegistryStore(settings.redis_url) as store, AsyncExitStack() as stack, Tasks() as tasks:
        directory = Directory(store, SystemClock(), lifecycle.incarnation, settings.lease_s)
        add_RegistryServiceServicer_to_server(RegistryServicer(directory, store), server.grpc)
        planner_store = await stack.enter_async_context(PlannerStore(settings.redis_url))
        specs = Specs(planner_store, settings.pools_file)
        workers = directory.leases.workers
        add_PoolServiceServicer_to_server(PoolServicer(specs, planner_store, workers, SystemClock()), server.grpc)
        host = LocalHost(Home(settings.home).supervisor_socket) if settings.planner == "local" else None
        workers_client = await stack.enter_async_context(WorkerClient(identity))
        deployer = Deployer(store, directory, host, workers_client, SystemClock())
        adapter_client = await stack.enter_async_context(WorkerClient(identity))
        keeper = Keeper(store, directory, adapter_client, SystemClock())
        add_ModelServiceServicer_to_server(ModelServicer(deployer, keeper, directory), server.grpc)
        actuator, lease = _hands(settings, lifecycle, planner_store)
        planner = Planner(
            name=settings.instance_id,
            specs=specs,
            store=planner_store,
            lease=lease,
            workers=workers,
            client=await stack.enter_async_context(WorkerClient(identity)),
            actuator=actuator,
            clock=SystemClock(),
            period_s=settings.planner_period_s,
        )
        await server.start()
        tasks.spawn(directory.run_leases(), "leases")
        tasks.spawn(directory.run_writer(), "mirror-writer")
        tasks.spawn(directory.run_reader(), "mirror-reader")
        tasks.spawn(planner.run(), "planner")
        tasks.spawn(deployer.run(), "deployer", may_return=True)
        tasks.spawn(keeper.run(), "adapters")
        lifecycle.set_ready()
        await lifecycle.draining.wait()
        directory.feed.close()
        await server.stop(DRAIN_S)


def _hands(settings: Settings, lifecycle: Lifecycle, store: PlannerStore) -> tuple[Actuator | None, Lease]:
    """Make what the planner acts through, and what makes it the only one. Raises ConfigError."""
    owner, ttl_s = f"{settings.instance_id}.{lifecycle.incarnation}", TURNS * settings.planner_period_s
    match settings.planner:
        case "kubernetes":
            from services.registry.planner import k8s  # noqa: PLC0415 - 60 MB that only this needs

            return k8s.connect(settings.kube_namespace, owner, ttl_s)
        case "local":
            return LocalActuator(Home(settings.home).supervisor_socket), RedisLease(store, owner, ttl_s)
        case "advise":
            return None, RedisLease(store, owner, ttl_s)


def main() -> int:
    """Run the service; returns the exit code."""
    try:
        settings = load(Settings, os.environ)
    except ConfigError as e:
        return fail("registry", e)
    return run("registry", settings.instance_id, settings, partial(serve, settings))


if __name__ == "__main__":
    sys.exit(main())

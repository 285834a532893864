"""The registry's process: settings, wiring, drain."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial

from inferflux.clock import SystemClock
from inferflux.config import CommonSettings, env_name, load
from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.process import Tasks, fail, run
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from services.registry.directory import LEASE_S, Directory
from services.registry.servicer import CALLERS, RegistryServicer
from services.registry.store import RegistryStore

DRAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """What the registry reads from its environment; `bind` and `redis_url` are required."""

    instance_id: str = "registry-0"
    """Stable over restarts, unique in the cluster."""
    lease_s: float = LEASE_S
    """How long a worker that does not renew stays known; workers renew each second."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if missing := [env_name(name) for name in ("bind", "redis_url") if not getattr(self, name)]:
            raise ValueError("\n".join(f"{name}: missing" for name in missing))
        if self.lease_s < 2:
            raise ValueError(f"{env_name('lease_s')}: must be at least 2, is {self.lease_s}")


async def serve(settings: Settings, lifecycle: Lifecycle) -> None:
    """Serve until drained. Starts, and stays, without Redis; see Directory for what is missing then."""
    server = RpcServer(Identity.load(settings.pki_dir, "registry"), settings.bind, CALLERS)
    async with RegistryStore(settings.redis_url) as store, Tasks() as tasks:
        directory = Directory(store, SystemClock(), lifecycle.incarnation, settings.lease_s)
        add_RegistryServiceServicer_to_server(RegistryServicer(directory, store), server.grpc)
        await server.start()
        tasks.spawn(directory.run_leases(), "leases")
        tasks.spawn(directory.run_writer(), "mirror-writer")
        tasks.spawn(directory.run_reader(), "mirror-reader")
        lifecycle.set_ready()
        await lifecycle.draining.wait()
        directory.feed.close()
        await server.stop(DRAIN_S)


def main() -> int:
    """Run the service; returns the exit code."""
    try:
        settings = load(Settings, os.environ)
    except ConfigError as e:
        return fail("registry", e)
    return run("registry", settings.instance_id, settings, partial(serve, settings))


if __name__ == "__main__":
    sys.exit(main())

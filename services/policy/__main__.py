"""The policy service's process: settings, wiring, drain."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial

from inferflux.clock import SystemClock
from inferflux.config import CommonSettings, env_name, load
from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.policy.signature import KEY_FILE, Signer
from inferflux.process import Tasks, fail, run
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.v1.policy_service_pb2_grpc import add_PolicyServiceServicer_to_server
from services.policy.keeper import Keeper
from services.policy.keys import parse_api_keys
from services.policy.pepper import Pepper
from services.policy.servicer import CALLERS, PolicyServicer
from services.policy.store import PolicyStore

DRAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """What the policy service reads from its environment; `bind` and `redis_url` are required."""

    instance_id: str = "policy-0"
    """Stable over restarts, unique in the cluster."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that exist from the start, each `secret:scope+scope`; scopes are generate, read, admin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if missing := [env_name(name) for name in ("bind", "redis_url") if not getattr(self, name)]:
            raise ValueError("\n".join(f"{name}: missing" for name in missing))


async def serve(settings: Settings, lifecycle: Lifecycle) -> None:
    """Serve until drained. Starts, and stays, without Redis; see Keeper for what it answers then."""
    clock, pepper = SystemClock(), Pepper.load(settings.secrets_dir / "pepper.key")
    signer = Signer.load(settings.secrets_dir / KEY_FILE)
    initial = parse_api_keys(settings.api_keys, pepper, now_ms=int(clock.time() * 1000))
    server = RpcServer(Identity.load(settings.pki_dir, "policy"), settings.bind, CALLERS)
    async with PolicyStore(settings.redis_url, pepper) as store, Tasks() as tasks:
        keeper = Keeper(store, clock, initial)
        lifecycle.add_readiness("store", lambda: None if keeper.is_loaded else "not read since the start")
        add_PolicyServiceServicer_to_server(PolicyServicer(keeper, pepper, signer), server.grpc)
        await server.start()
        tasks.spawn(keeper.run(), "keeper")
        lifecycle.set_ready()
        await lifecycle.draining.wait()
        keeper.feed.close()
        await server.stop(DRAIN_S)


def main() -> int:
    """Run the service; returns the exit code."""
    try:
        settings = load(Settings, os.environ)
    except ConfigError as e:
        return fail("policy", e)
    return run("policy", settings.instance_id, settings, partial(serve, settings))


if __name__ == "__main__":
    sys.exit(main())

"""The policy service's process: settings, wiring, drain."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from inferflux.clock import SystemClock
from inferflux.config import CommonSettings, env_name, load
from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.policy.signature import KEY_FILE, Signer
from inferflux.process import Tasks, fail, run
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.v1.limits_service_pb2_grpc import add_LimitsServiceServicer_to_server
from inferflux.v1.policy_service_pb2_grpc import add_PolicyServiceServicer_to_server
from services.policy.audit_log import AuditLog
from services.policy.configured import read_configured
from services.policy.keeper import Keeper
from services.policy.keys import parse_api_keys
from services.policy.limits_servicer import CALLERS as LIMITS_CALLERS
from services.policy.limits_servicer import LimitsServicer
from services.policy.limits_store import LimitsStore
from services.policy.pepper import Pepper
from services.policy.replicas import Replicas
from services.policy.servicer import CALLERS, PolicyServicer
from services.policy.store import PolicyStore
from services.policy.vault import KEY_FILE as STORE_KEY
from services.policy.vault import Vault

DRAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """What the policy service reads from its environment; `bind` and `redis_url` are required."""

    instance_id: str = "policy-0"
    """Stable over restarts, unique in the cluster."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that exist from the start, each `secret:scope+scope`; scopes are generate, read, admin."""

    store_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that encrypt what is in Redis, each the base64 of 32 bytes, in place of the file `store.key`."""
    policy_file: Path = Path()
    """Policy document, JSON or .toml, in force until an administrator changes the policy; none by default."""
    policy: str = ""
    """Sections of the policy document, JSON, in place of the file's."""

    audit_dir: Path = Path()
    """The audit log; default home/audit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audit_dir == Path():
            object.__setattr__(self, "audit_dir", self.home / "audit")
        if missing := [env_name(name) for name in ("bind", "redis_url") if not getattr(self, name)]:
            raise ValueError("\n".join(f"{name}: missing" for name in missing))


async def serve(settings: Settings, lifecycle: Lifecycle) -> None:
    """Serve until drained. Starts, and stays, without Redis; see Keeper for what it answers then."""
    clock, pepper = SystemClock(), Pepper.load(settings.secrets_dir / "pepper.key")
    signer = Signer.load(settings.secrets_dir / KEY_FILE)
    vault = Vault.load(settings.secrets_dir / STORE_KEY, settings.store_keys)
    configured = read_configured(settings.policy_file, settings.policy)
    initial = parse_api_keys(settings.api_keys, pepper, now_ms=int(clock.time() * 1000))
    server = RpcServer(Identity.load(settings.pki_dir, "policy"), settings.bind, CALLERS | LIMITS_CALLERS)
    async with (
        PolicyStore(settings.redis_url, vault) as store,
        LimitsStore(settings.redis_url) as limits,
        Tasks() as tasks,
    ):
        keeper, replicas = Keeper(store, clock, initial, configured), Replicas(clock)
        audit = AuditLog(settings.audit_dir, settings.instance_id, signer, clock)
        audit.load()
        lifecycle.add_readiness("store", lambda: None if keeper.is_loaded else "not read since the start")
        add_PolicyServiceServicer_to_server(PolicyServicer(keeper, replicas, audit, pepper, signer), server.grpc)
        add_LimitsServiceServicer_to_server(LimitsServicer(limits, clock), server.grpc)
        await server.start()
        tasks.spawn(keeper.run(), "keeper")
        tasks.spawn(audit.keep_signed(), "audit heads")
        tasks.spawn(_date(replicas, keeper), "dates", may_return=True)
        lifecycle.set_ready()
        await lifecycle.draining.wait()
        keeper.feed.close()
        await server.stop(DRAIN_S)
        await audit.close()


async def _date(replicas: Replicas, keeper: Keeper) -> None:
    """Note when each revision came: what a gateway's lag is counted from."""
    async for revision, _ in keeper.feed.watch():
        replicas.published(revision)


def main() -> int:
    """Run the service; returns the exit code."""
    try:
        settings = load(Settings, os.environ)
    except ConfigError as e:
        return fail("policy", e)
    return run("policy", settings.instance_id, settings, partial(serve, settings))


if __name__ == "__main__":
    sys.exit(main())

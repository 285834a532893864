"""The process of a guardrail worker: settings, models, drain."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from functools import partial

from inferflux.config import CommonSettings, load
from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.process import fail, run
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.v1.guard_service_pb2_grpc import add_GuardServiceServicer_to_server
from services.guardrails.judges import KINDS
from services.guardrails.servicer import CALLERS, Desk, GuardServicer

DRAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """What a guardrail worker reads from its environment; `bind` is required."""

    instance_id: str = "guardrails-0"
    """Stable over restarts, unique in the cluster."""
    guardrail_kinds: tuple[str, ...] = tuple(KINDS)
    """Models to load: entities, injection, profanity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [] if self.bind else ["INFERFLUX_BIND: missing"]
        if unknown := [kind for kind in self.guardrail_kinds if kind not in KINDS]:
            problems.append(f"INFERFLUX_GUARDRAIL_KINDS: {', '.join(unknown)} is none of {', '.join(KINDS)}")
        if problems:
            raise ValueError("\n".join(problems))


async def serve(settings: Settings, lifecycle: Lifecycle) -> None:
    """Serve until drained."""
    server = RpcServer(Identity.load(settings.pki_dir, "guardrails"), settings.bind, CALLERS)
    desks = {kind: Desk(await asyncio.to_thread(KINDS[kind])) for kind in settings.guardrail_kinds}
    try:
        add_GuardServiceServicer_to_server(GuardServicer(desks), server.grpc)
        await server.start()
        lifecycle.set_ready()
        await lifecycle.draining.wait()
        await server.stop(DRAIN_S)
    finally:
        for desk in desks.values():
            desk.close()


def main() -> int:
    """Run the worker; returns the exit code."""
    try:
        settings = load(Settings, os.environ)
    except ConfigError as e:
        return fail("guardrails", e)
    return run("guardrails", settings.instance_id, settings, partial(serve, settings))


if __name__ == "__main__":
    sys.exit(main())

"""The gateway's process: settings, wiring, drain."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import sys
from functools import partial
from pathlib import Path

from inferflux.clock import SystemClock
from inferflux.config import load
from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.policy.signature import PUBLIC_FILE, Verifier
from inferflux.process import Tasks, fail, run
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.telemetry.logs import LineLog
from services.gateway.adapters_api import AdaptersApi
from services.gateway.admin import AdminApi
from services.gateway.app import create_app
from services.gateway.audit_api import AuditApi, AuditTrail
from services.gateway.audited import Audit
from services.gateway.auditor import Auditor
from services.gateway.auth import Authenticator, KeyRing, cache_salt
from services.gateway.cache import CacheApi
from services.gateway.control import PolicyClient, RegistryClient
from services.gateway.fetch import fetch_object
from services.gateway.fleet import Fleet
from services.gateway.fleet_api import FleetApi
from services.gateway.guardrails.referees import Referees
from services.gateway.guardrails_api import GuardrailsApi
from services.gateway.idempotency import Idempotency, Records
from services.gateway.inference import Inference
from services.gateway.jwks import KeySources
from services.gateway.limits_client import LimitsClient
from services.gateway.models_api import ModelsApi
from services.gateway.policy import Policies, identity_of, limits_of
from services.gateway.policy_api import PolicyApi
from services.gateway.policy_documents import PolicyDocuments
from services.gateway.policy_report import Contact, PolicyReporter, Trial
from services.gateway.policy_views import PolicyViews
from services.gateway.pool import Caller, Pool
from services.gateway.pools_api import PoolsApi
from services.gateway.rehearsal import Shadow
from services.gateway.rehearsal_api import RehearsalApi
from services.gateway.reservations import Reservations
from services.gateway.server import HttpServer, bind
from services.gateway.settings import Settings
from services.gateway.shares import Shares
from services.gateway.snapshots import Snapshot
from services.gateway.spool import Spool
from services.gateway.tokens import TokenVerifier
from services.gateway.usage_api import UsageApi
from services.gateway.views import ClusterView

_log = logging.getLogger(__name__)
KNOWN_S = 1.0
"""Longest that a start waits for each of policy and registry, and for workers: without them it refuses with 503."""


async def serve(settings: Settings, sock: socket.socket, lifecycle: Lifecycle) -> None:
    """Serve until drained. Starts, and stays, without the other services; /readyz says what is missing."""
    identity = Identity.load(settings.pki_dir, "gateway")
    pepper, tenant_key = (_read_secret(settings.secrets_dir / name) for name in ("pepper.key", "tenant.key"))
    verifier = Verifier.load(settings.secrets_dir / PUBLIC_FILE)
    caller = Caller(settings.instance_id, f"{settings.instance_id}.{lifecycle.incarnation}", identity)
    async with (
        open_channel(settings.policy_address, identity, "policy") as policy_channel,
        open_channel(settings.registry_address, identity, "registry") as registry_channel,
        Referees(identity, settings.guardrails_address, settings.opa_url) as referees,
        Tasks() as tasks,
    ):
        policy_client = PolicyClient(policy_channel, settings.instance_id, tenant_key, verifier)
        registry_client = RegistryClient(registry_channel, settings.instance_id)
        trail = AuditTrail(policy_channel, settings.instance_id)
        auditor = _auditor(settings, trail, lifecycle.incarnation)
        trial, contact = Trial(), Contact(SystemClock(), settings.policy_max_age_s)
        key_sources = KeySources(tasks, fetch_object, SystemClock())

        def take(policies: Policies) -> None:
            trial.begin(policies)
            key_sources.reconcile(policies.issuers)

        policy = Snapshot[Policies]("policy", take)

        def key_ring() -> KeyRing | None:
            contact.require()
            return policy.value.keys if policy.value is not None else None

        documents = PolicyDocuments(policy_channel, settings.instance_id)
        pool = Pool(caller, tasks, settings.terms)
        registry = Snapshot[ClusterView]("registry", pool.reconcile)
        limits_client = LimitsClient(policy_channel)
        shares = Shares(limits_client.exchange, settings.instance_id, SystemClock(), tasks)
        shadow = Shadow(lambda: policy.value, referees, trial)
        inference = Inference(
            auth=Authenticator(
                pepper,
                keyring=key_ring,
                identity=lambda credential: identity_of(policy.value, credential),
                tokens=TokenVerifier(key_sources, partial(cache_salt, tenant_key)),
            ),
            pool=pool,
            policies=lambda: policy.value,
            reservations=Reservations(shares),
            limits=settings.body_limits,
            timeout_s=settings.request_timeout_s,
            trial=trial,
            audit=Audit(auditor, hmac.digest(pepper, b"\1audit", "sha256")),
            access_log=LineLog("gateway", settings.instance_id, "request", __name__) if settings.access_log else None,
            referees=referees,
            shadow=shadow,
        )
        idempotency = Idempotency(inference, Records(SystemClock(), settings.record_limits), tasks)
        admin = AdminApi(policy_client, policy.reached, FleetApi(Fleet(pool.workers)), pool.matrix)
        documents_apis = PolicyApi(documents, policy.reached), PolicyViews(documents, policy.reached), AuditApi(trail)
        cache = CacheApi(inference.auth, pool, partial(cache_salt, tenant_key))
        usage = UsageApi(limits_client, lambda: limits_of(policy.value))
        models, adapters = ModelsApi(registry_channel), AdaptersApi(registry_channel)
        guardrails = GuardrailsApi(lambda: policy.value, referees)
        rehearsals = RehearsalApi(lambda: policy.value, referees)
        pools = PoolsApi(registry_channel)
        apis = (admin, cache, *documents_apis, usage, pools, models, adapters, guardrails, rehearsals)
        app = create_app(idempotency, apis, pool.models, lifecycle)
        lifecycle.add_readiness("policy", lambda: None if policy.value is not None else "not heard yet")
        lifecycle.add_readiness("workers", pool.objection)
        for work, name in (
            (policy.follow(policy_client.watch), "policy"),
            (PolicyReporter(policy, trial, documents.report, contact).run(), "policy report"),
            (auditor.run(), "audit"),
            (shadow.run(), "shadow"),
            (registry.follow(registry_client.watch), "registry"),
            (pool.watch_hearts(), "hearts"),
            (pool.matrix.scout(), "paths"),
            (shares.run(), "limits"),
        ):
            tasks.spawn(work, name)
        await _get_to_know(policy, registry, pool)
        server = HttpServer(app, settings)
        serving = tasks.spawn(server.serve(sockets=[sock]), "http", may_return=True)
        await server.listening.wait()
        lifecycle.set_ready()
        await lifecycle.draining.wait()
        server.drain()
        await serving
        await shares.close()
        await auditor.flush()


async def _get_to_know(policy: Snapshot[Policies], registry: Snapshot[ClusterView], pool: Pool) -> None:
    """Learn what there is before clients may come, if that can be had soon: they need not hear of our start."""
    if all(await asyncio.gather(policy.reached(1, KNOWN_S), registry.reached(1, KNOWN_S))):
        await pool.met(KNOWN_S)


def _auditor(settings: Settings, trail: AuditTrail, incarnation: str) -> Auditor:
    spool = Spool(settings.spool_dir / f"{settings.instance_id}.jsonl", settings.audit_spool_bytes)
    return Auditor(trail.append, spool, settings.instance_id, incarnation, SystemClock())


def _read_secret(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e


def main() -> int:
    """Run the gateway; returns the exit code."""
    try:
        settings = load(Settings, os.environ)
        sock = bind(settings.http_host, settings.http_port)
    except ConfigError as e:
        return fail("gateway", e)
    with sock:
        return run("gateway", settings.instance_id, settings, partial(serve, settings, sock))


if __name__ == "__main__":
    sys.exit(main())

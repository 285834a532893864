"""Every metric of the project, defined once: name, help with its unit, labels, buckets.

Labels are bounded: never request ids, never client text. A section per subsystem; whoever adds a metric adds it here.
Our own registry, because engines put theirs into prometheus_client's default one.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from inferflux.telemetry.tally import TallyHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REGISTRY = CollectorRegistry()
disable_created_metrics()  # type: ignore[no-untyped-call]  # one extra series per series, of no use to us
ProcessCollector(registry=REGISTRY)

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_TRANSFER_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_RPC_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)


def render() -> tuple[str, bytes]:
    """Content type and text of the exposition."""
    return CONTENT_TYPE, generate_latest(REGISTRY)


# --- every process ----------------------------------------------------------------------------------------------------

RPC_SECONDS = Histogram(
    "inferflux_rpc_seconds",
    "Time a gRPC server spent on a call, in seconds, by full method name and status code.",
    ("method", "code"),
    buckets=_RPC_S,
    registry=REGISTRY,
)
LOOP_LAG = Histogram(
    "inferflux_loop_lag_seconds",
    "How late the event loop ran a timer, in seconds.",
    buckets=_LAG_S,
    registry=REGISTRY,
)
SNAPSHOT_REVISION = Gauge(
    "inferflux_snapshot_revision",
    "Newest snapshot revision in use, by its source (policy, registry).",
    ("source",),
    registry=REGISTRY,
)
VERSION_REGRESSION = Counter(
    "inferflux_version_regression",
    "Snapshots refused because their revision was older than the one in use, by source.",
    ("source",),
    registry=REGISTRY,
)

# --- requests ---------------------------------------------------------------------------------------------------------

REQUESTS = Counter(
    "inferflux_requests",
    "Requests answered, by role, endpoint (route, not raw path) and HTTP status code.",
    ("role", "endpoint", "code"),
    registry=REGISTRY,
)
REQUEST_SECONDS = TallyHistogram(
    "inferflux_request_seconds",
    "Time from the full request body to the last byte of the response, in seconds.",
    ("role", "endpoint"),
    buckets=_LATENCY_S,
    registry=REGISTRY,
)
TTFT = TallyHistogram(
    "inferflux_ttft_seconds",
    "Time from the full request body to the first data written, in seconds (time to first token).",
    ("model",),
    buckets=_LATENCY_S,
    registry=REGISTRY,
)
ITL = TallyHistogram(
    "inferflux_itl_seconds",
    "Gap between consecutive tokens of a stream, in seconds (inter-token latency).",
    ("model",),
    buckets=_TOKEN_S,
    registry=REGISTRY,
)
INFLIGHT = Gauge(
    "inferflux_inflight",
    "Requests being worked on now.",
    ("role",),
    registry=REGISTRY,
)
CANCELLED = Counter(
    "inferflux_cancelled",
    "Requests whose client went away, by the phase they were in.",
    ("phase",),
    registry=REGISTRY,
)
REJECT = Counter(
    "inferflux_reject",
    "Requests refused before any work, by error reason.",
    ("reason",),
    registry=REGISTRY,
)
TOKENS = Counter(
    "inferflux_tokens",
    "Tokens by kind (prompt, completion, cached) and model.",
    ("kind", "model"),
    registry=REGISTRY,
)
WORKER_UP = Gauge(
    "inferflux_worker_up",
    "1 while the gateway routes to a worker, else 0.",
    ("role", "worker"),
    registry=REGISTRY,
)

# --- KV blocks and tickets --------------------------------------------------------------------------------------------

PREFILLS = Counter(
    "inferflux_prefills",
    "Prompts by where and how their prefill went: remote, local, answered, failed, cancelled.",
    ("result",),
    registry=REGISTRY,
)
KV_TRANSFER_BYTES = Counter(
    "inferflux_kv_transfer_bytes",
    "KV bytes read from prefill workers by ticket, by transport.",
    ("transport",),
    registry=REGISTRY,
)
KV_TRANSFER_SECONDS = Histogram(
    "inferflux_kv_transfer_seconds",
    "Time to read the KV blocks of one ticket, in seconds, by transport.",
    ("transport",),
    buckets=_TRANSFER_S,
    registry=REGISTRY,
)
KV_REJECTED = Counter(
    "inferflux_kv_rejected",
    "Tickets whose blocks were refused or unreadable, so that the prompt was computed again, by reason.",
    ("reason",),
    registry=REGISTRY,
)
KV_SLOTS = Gauge(
    "inferflux_kv_slots",
    "Arena slots by state: free, used.",
    ("state",),
    registry=REGISTRY,
)
TICKETS = Counter(
    "inferflux_tickets",
    "Tickets by event: issued, released, expired, revoked, orphaned.",
    ("event",),
    registry=REGISTRY,
)

# --- control plane ----------------------------------------------------------------------------------------------------

STORE_UP = Gauge(
    "inferflux_store_up",
    "1 while Redis answers this service, else 0, by store (policy, registry).",
    ("store",),
    registry=REGISTRY,
)

# --- gateway ----------------------------------------------------------------------------------------------------------

PHASES = Counter(
    "inferflux_phases",
    "Phases of requests computed, by phase (prefill, decode) and the role and id of the worker that computed them.",
    ("phase", "role", "worker"),
    registry=REGISTRY,
)
RETRIES = Counter(
    "inferflux_retries",
    "Requests started again on other workers before their first byte, by the reason the first try failed.",
    ("reason",),
    registry=REGISTRY,
)
IDEMPOTENT_HITS = Counter(
    "inferflux_idempotent_hits",
    "Requests answered by the execution of another with the same Idempotency-Key: running, or done before.",
    ("state",),
    registry=REGISTRY,
)
CONNECTIONS = Gauge(
    "inferflux_connections",
    "Open client connections.",
    registry=REGISTRY,
)

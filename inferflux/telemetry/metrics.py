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
_LIMIT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)
_IMAGE_SIZES = tuple(float(1 << exponent) for exponent in range(10, 27, 2))
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
JWTS = Counter(
    "inferflux_jwt",
    "Tokens of issuers that were looked at and not known yet, by result: verified, or what is wrong with them.",
    ("result",),
    registry=REGISTRY,
)
JWKS_FETCHES = Counter(
    "inferflux_jwks_fetches",
    "Fetches of the public keys of token issuers, by result (ok, failed).",
    ("result",),
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
    "Prompts by where and how their prefill went: remote, local, answered, failed, cancelled; for local why.",
    ("result", "why"),
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
TRANSPORT_FALLBACK = Counter(
    "inferflux_transport_fallback",
    "KV blocks that could not be read as intended, by the transport that failed and what came next (nixl, recompute).",
    ("from", "to"),
    registry=REGISTRY,
)
KV_PATH_GBPS = Gauge(
    "inferflux_kv_path_gbps",
    "Speed of the last read or probe of a prefill worker's arena, in GB/s (10^9 bytes), by peer and transport.",
    ("peer", "transport"),
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
    "Arena slots by state: free, cached (kept for later prompts, free when needed), used.",
    ("state",),
    registry=REGISTRY,
)
TICKETS = Counter(
    "inferflux_tickets",
    "Tickets by event: issued, claimed, committed, released, expired, revoked; orphaned counts slots without a ticket.",
    ("event",),
    registry=REGISTRY,
)
TICKETS_LIVE = Gauge(
    "inferflux_tickets_live",
    "Tickets that hold KV blocks now, by state: issued, claimed, committed.",
    ("state",),
    registry=REGISTRY,
)
TICKET_AGE = Histogram(
    "inferflux_ticket_age_seconds",
    "Time from the issue of a ticket to an event (see inferflux_tickets), in seconds.",
    ("event",),
    buckets=_LATENCY_S,
    registry=REGISTRY,
)
TICKET_CONFLICT = Counter(
    "inferflux_ticket_conflict",
    "Claims and commits refused by a ticket's owner, by what the ticket was: issued, claimed, committed, or stale (of "
    "another start of the owner).",
    ("reason",),
    registry=REGISTRY,
)
TICKET_EXPIRED = Counter(
    "inferflux_ticket_expired",
    "Tickets that nobody gave back, by what ended them: lease, session (of their gateway).",
    ("cause",),
    registry=REGISTRY,
)
TICKET_ORPHAN = Counter(
    "inferflux_ticket_orphan",
    "Tickets whose owner did not answer a claim in time, so that they were read without one.",
    registry=REGISTRY,
)
RELEASE = Counter(
    "inferflux_release",
    "Tickets given back by gateways, by why: committed, recomputed, unneeded, cancelled, rejected, failed.",
    ("why",),
    registry=REGISTRY,
)
CLAIM_SECONDS = Histogram(
    "inferflux_claim_seconds",
    "Time that a decode worker waited for a ticket's owner to answer its claim, in seconds, by result: granted, "
    "conflict, expired, stale, unanswered.",
    ("result",),
    buckets=_TRANSFER_S,
    registry=REGISTRY,
)

EXPERT_TOKENS = Counter(
    "inferflux_expert_tokens",
    "Tokens that an engine with expert parallelism sent to an expert of a mixture, summed over its layers.",
    ("expert",),
    registry=REGISTRY,
)

# --- prefixes ---------------------------------------------------------------------------------------------------------

PREFIX_REQUESTS = Counter(
    "inferflux_prefix_requests",
    "Prompts of at least one whole block by how much of them was cached: hit, partial, miss.",
    ("result",),
    registry=REGISTRY,
)
PREFIX_TOKENS = Counter(
    "inferflux_prefix_tokens",
    "Prompt tokens of prefill by where their KV came from: engine, arena, peer, computed.",
    ("source",),
    registry=REGISTRY,
)
PREFIX_REJECTED = Counter(
    "inferflux_prefix_rejected",
    "Prompts whose cached beginning could not be read and was computed, by its source: arena, peer.",
    ("source",),
    registry=REGISTRY,
)
PREFIX_EVICTIONS = Counter(
    "inferflux_prefix_evictions",
    "Kept blocks that were given up, by reason: room, broken.",
    ("reason",),
    registry=REGISTRY,
)

# --- control plane ----------------------------------------------------------------------------------------------------

STORE_UP = Gauge(
    "inferflux_store_up",
    "1 while Redis answers this service, else 0, by store (policy, registry).",
    ("store",),
    registry=REGISTRY,
)

POLICY_LAG = Gauge(
    "inferflux_policy_lag_seconds",
    "For how long there has been a newer policy revision than a gateway uses, in seconds, by gateway.",
    ("gateway",),
    registry=REGISTRY,
)
POLICY_SNAPSHOT_AGE = Gauge(
    "inferflux_policy_snapshot_age_seconds",
    "Time since a gateway last heard of the policy service, in seconds.",
    registry=REGISTRY,
)
POLICY_SHADOW = Counter(
    "inferflux_policy_shadow",
    "Requests that a policy in shadow was asked about, by what it would have done: same, refuse, allow, redact.",
    ("outcome",),
    registry=REGISTRY,
)
POLICY_REFUSED = Counter(
    "inferflux_policy_refused",
    "Policies that a gateway did not use and kept the last good one, by why: signature, document.",
    ("reason",),
    registry=REGISTRY,
)

AUDIT_RECORDS = Counter(
    "inferflux_audit_records",
    "Records written to the audit log of a policy service, heads among them.",
    registry=REGISTRY,
)
AUDIT_SPOOL_BYTES = Gauge(
    "inferflux_audit_spool_bytes",
    "Audit records on a gateway's disk that wait for the policy service, in bytes.",
    registry=REGISTRY,
)
AUDIT_DROPPED = Counter(
    "inferflux_audit_dropped",
    "Audit records of requests that a gateway lost, since the policy service was away and its own disk full.",
    registry=REGISTRY,
)
STORE_SECONDS = Histogram(
    "inferflux_store_seconds",
    "Time that Redis took to answer, in seconds, by what it was asked about: limits.",
    ("store",),
    buckets=_RPC_S,
    registry=REGISTRY,
)

# --- limits -----------------------------------------------------------------------------------------------------------

LIMIT_RESERVATIONS = Counter(
    "inferflux_limit_reservations",
    "Requests of limited keys by how they were counted: share (no call), store (one call), away (without the store), "
    "refused, unavailable.",
    ("result",),
    registry=REGISTRY,
)
LIMIT_REFUSALS = Counter(
    "inferflux_limit_refusals",
    "Requests refused by a limit, by its kind.",
    ("kind",),
    registry=REGISTRY,
)
LIMIT_SECONDS = TallyHistogram(
    "inferflux_limit_seconds",
    "Time that a request of a limited key waited to be counted, in seconds, by result (see "
    "inferflux_limit_reservations).",
    ("result",),
    buckets=_LIMIT_S,
    registry=REGISTRY,
)
LIMIT_STORE_UP = Gauge(
    "inferflux_limit_store_up",
    "1 while requests of limited keys are counted for all gateways together, 0 while each gateway counts by itself.",
    registry=REGISTRY,
)
LIMIT_UNBOOKED = Gauge(
    "inferflux_limit_unbooked",
    "Changes of counters that this gateway has not booked in the store yet.",
    registry=REGISTRY,
)

# --- planner ----------------------------------------------------------------------------------------------------------

POOL_REPLICAS = Gauge(
    "inferflux_pool_replicas",
    "Workers of a pool by state (ready, starting), as the leading planner counts them.",
    ("role", "model", "state"),
    registry=REGISTRY,
)
POOL_TARGET = Gauge(
    "inferflux_pool_target_replicas",
    "Workers that a pool should have: what an autoscaler may follow.",
    ("role", "model"),
    registry=REGISTRY,
)
POOL_NEED = Gauge(
    "inferflux_pool_needed_replicas",
    "Workers that a pool needs at this moment, by what asks for them: rate, backlog, sequences, kv, latency.",
    ("role", "model", "term"),
    registry=REGISTRY,
)
PLANNER_LEADS = Gauge(
    "inferflux_planner_leads",
    "1 while this registry is the one that plans, else 0.",
    registry=REGISTRY,
)
SCALINGS = Counter(
    "inferflux_scalings",
    "Changes of a pool's size by the planner, by direction (up, down) and result: done, failed.",
    ("role", "model", "direction", "result"),
    registry=REGISTRY,
)

# --- models -----------------------------------------------------------------------------------------------------------

ADAPTERS = Gauge("inferflux_adapters", "LoRA adapters that this worker holds.")
MODEL_VERIFICATIONS = Counter(
    "inferflux_model_verifications",
    "Models that a worker checked before loading, by result: verified, warned, refused.",
    ("result",),
    registry=REGISTRY,
)

# --- gateway ----------------------------------------------------------------------------------------------------------

PHASES = Counter(
    "inferflux_phases",
    "Phases of requests computed, by phase (prefill, decode) and the role and id of the worker that computed them.",
    ("phase", "role", "worker"),
    registry=REGISTRY,
)
FAILOVER = Counter(
    "inferflux_failover",
    "Requests moved to another worker, by the stage that was lost (prefill, decode) and the reason.",
    ("stage", "reason"),
    registry=REGISTRY,
)
RESUME_SECONDS = Histogram(
    "inferflux_resume_seconds",
    "Time from the loss of a request's decode worker to the next byte of its response, in seconds.",
    buckets=_LATENCY_S,
    registry=REGISTRY,
)
RESUME_REFUSED = Counter(
    "inferflux_resume_refused",
    "Requests that lost their worker and were not moved, by why: moves, budget, no_worker, answer, poison.",
    ("reason",),
    registry=REGISTRY,
)
STREAM_RESUME = Counter(
    "inferflux_stream_resume",
    "Streams that went on over another connection of their client.",
    registry=REGISTRY,
)
FENCED_WRITES = Counter(
    "inferflux_fenced_writes",
    "Deltas that came late from a worker that had lost the request, and were dropped.",
    registry=REGISTRY,
)
IDEMPOTENT_HITS = Counter(
    "inferflux_idempotent_hits",
    "Requests answered by the execution of another with the same Idempotency-Key: running, or done before.",
    ("state",),
    registry=REGISTRY,
)
CAPABILITY_REJECTED = Counter(
    "inferflux_capability_rejected",
    "Requests refused because their model can't do what they ask for, by capability.",
    ("capability",),
    registry=REGISTRY,
)
IMAGES = Counter(
    "inferflux_images",
    "Images in requests, by result (accepted, refused).",
    ("result",),
    registry=REGISTRY,
)
IMAGE_BYTES = Histogram(
    "inferflux_image_bytes",
    "Size of an accepted image as it came, without base64.",
    buckets=_IMAGE_SIZES,
    registry=REGISTRY,
)
IMAGE_PIXELS = Histogram(
    "inferflux_image_pixels",
    "Width times height of an accepted image.",
    buckets=_IMAGE_SIZES,
    registry=REGISTRY,
)
IMAGE_FETCH_SECONDS = Histogram(
    "inferflux_image_fetch_seconds",
    "Time in seconds to fetch an image by its address, or to fail.",
    buckets=_RPC_S,
    registry=REGISTRY,
)
IMAGE_PREPROCESS_SECONDS = Histogram(
    "inferflux_image_preprocess_seconds",
    "Time in seconds to make a model's input of all images of a prompt: resizing, cutting, normalizing.",
    ("role",),
    buckets=_RPC_S,
    registry=REGISTRY,
)
CONNECTIONS = Gauge(
    "inferflux_connections",
    "Open client connections.",
    registry=REGISTRY,
)

# --- guardrails ------------------------------------------------------------------------------------------------------

GUARDRAIL_SECONDS = Histogram(
    "inferflux_guardrail_seconds",
    "Time that the verdicts of a tier took for one text of a request, in seconds, by tier (1, 2, 3) and side.",
    ("tier", "side"),
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
    registry=REGISTRY,
)
GUARDRAIL_VERDICTS = Counter(
    "inferflux_guardrail_verdicts",
    "Rules that matched, each once a request and side, by rule, action and side.",
    ("rule", "action", "side"),
    registry=REGISTRY,
)
GUARDRAIL_FAILURES = Counter(
    "inferflux_guardrail_failures",
    "Rules that gave no verdict in time, by rule and what the policy says then (allow, block).",
    ("rule", "then"),
    registry=REGISTRY,
)

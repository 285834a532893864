"""What the gateway reads from its environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inferflux.config import CommonSettings, env_name
from services.gateway.envelope import BodyLimits
from services.gateway.idempotency import RecordLimits
from services.gateway.pool import Terms
from services.gateway.routing import LocalPrefill

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """`policy_address` and `registry_address` are required."""

    instance_id: str = "gateway-0"
    """Stable over restarts, unique in the cluster."""
    http_host: str = "127.0.0.1"
    """Interface that clients connect to."""
    http_port: int = 8080
    """Port that clients connect to; 0 picks one."""
    max_body_bytes: int = 32 * MIB
    """Largest request body; more is answered 413."""
    max_json_depth: int = 64
    """Deepest nesting of a request body; more is answered 400."""
    max_sequences: int = 128
    """Most sequences of one request, prompts times choices; more is answered 400."""
    max_schema_bytes: int = 256 * 1024
    """Most bytes of the schemas, grammars and tools of one request together; more is answered 400."""
    max_schema_depth: int = 32
    """Deepest nesting of a JSON schema; more is answered 400."""
    max_header_bytes: int = 32 * 1024
    """Largest request line and headers together; more is answered 431."""
    max_headers: int = 100
    """Most request headers; more is answered 431."""
    slow_client_s: float = 10.0
    """Longest a client may take for its headers, or be silent in its body; then 408."""
    stalled_client_s: float = 30.0
    """Longest a client may take nothing of a response that is ready for it; then its connection is cut."""
    max_buffered_bytes: int = 4 * MIB
    """Most response bytes of one stream that wait for a slow client; more ends the stream with an error."""
    max_connections: int = 8192
    """Most open client connections; more are answered 503 and closed."""
    max_connections_per_host: int = 2048
    """Most open connections of one client address; it is lower so that one host can't take them all."""
    keep_alive_s: float = 65.0
    """How long an idle connection stays open for the next request; longer than common clients keep theirs."""
    request_timeout_s: float = 600.0
    """Deadline of a request from its arrival; `x-inferflux-timeout-ms` may shorten it."""
    drain_timeout_s: float = 600.0
    """Longest that running requests may take after SIGTERM; then they end with an error."""
    guardrails_address: str = ""
    """gRPC address of the guardrail workers; without one, rules that need them have no verdicts."""
    opa_url: str = ""
    """http:// or https:// URL of an OPA server, for rules of the kind `opa`."""
    sse_event_ids: bool = True
    """Number the events of streams, so that a client that lost its connection can go on with `Last-Event-ID`."""
    idempotency_ttl_s: float = 600.0
    """How long the answer to a request with an Idempotency-Key is kept for its retries."""
    idempotency_max_bytes: int = 64 * MIB
    """Most bytes of such answers that are kept; more drops the oldest."""
    worker_dead_s: float = 2.5
    """A worker that sends no pulse for so long is lost: its requests move, its stream is opened anew."""
    resume_wait_s: float = 10.0
    """Longest that a request which lost its worker waits for another; then it ends with an error."""
    local_prefill_max_bytes: int = 0
    """The decode worker computes the prompts of request bodies up to this size: they are not worth the way."""
    local_prefill_max_requests: int = 64
    """Most prompts that one decode worker computes at a time for want of a prefill worker; more are answered 503."""
    admission_fail_closed_on_disagg_degraded: bool = False
    """Answer 503 for want of a prefill worker, instead of letting decode workers compute prompts."""
    access_log: bool = True
    """One line per inference request."""
    spool_dir: Path = Path()
    """Where audit records wait while the policy service is away; default home/spool."""
    audit_spool_bytes: int = 64 * MIB
    """Most bytes of such records; then those of requests are lost, and actions of administrators refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spool_dir == Path():
            object.__setattr__(self, "spool_dir", self.home / "spool")
        required = ("policy_address", "registry_address")
        if missing := [env_name(name) for name in required if not getattr(self, name)]:
            raise ValueError("\n".join(f"{name}: missing" for name in missing))

    @property
    def record_limits(self) -> RecordLimits:
        """The limits of kept answers."""
        return RecordLimits(self.idempotency_ttl_s, self.idempotency_max_bytes)

    @property
    def terms(self) -> Terms:
        """How to deal with workers."""
        local = LocalPrefill(
            self.local_prefill_max_bytes,
            self.local_prefill_max_requests,
            self.admission_fail_closed_on_disagg_degraded,
        )
        return Terms(self.worker_dead_s, self.resume_wait_s, self.max_buffered_bytes, local, self.sse_event_ids)

    @property
    def body_limits(self) -> BodyLimits:
        """The limits of request bodies."""
        return BodyLimits(
            self.max_body_bytes,
            self.max_json_depth,
            self.slow_client_s,
            self.max_sequences,
            self.max_schema_bytes,
            self.max_schema_depth,
        )

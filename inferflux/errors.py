"""The one exception tree. Each class carries what every border needs: reason, HTTP status, gRPC code, retryable.

    InferfluxError
    +-- InvalidRequest            400 INVALID_ARGUMENT
    |   +-- BodyTooLarge          413
    |   +-- HeadersTooLarge       431
    |   +-- IdempotencyKeyReused  422
    |   +-- CapabilityNotSupported 422
    |   +-- RequestExceedsLimit   400
    |   +-- PolicyInvalid         400
    |   +-- ContentPolicyViolation 400
    |   +-- RequestTimeout        408
    |       +-- SlowConsumer      408
    +-- Unauthenticated           401 UNAUTHENTICATED
    +-- PermissionDenied          403 PERMISSION_DENIED
    +-- NotFound                  404 NOT_FOUND
    |   +-- ModelNotFound         404
    +-- Unavailable               503 UNAVAILABLE          retryable
    |   +-- NoWorker              503                      retryable
    |   +-- WorkerLost            503                      retryable
    |   +-- Draining              503                      retryable
    |   +-- GuardrailUnavailable  503                      retryable
    |   +-- KvTransportDegraded   503                      retryable
    |   +-- AuditUnavailable      503                      retryable
    |   +-- LimitsUnavailable     503                      retryable
    +-- DeadlineExceeded          504 DEADLINE_EXCEEDED
    +-- LimitExceeded             429 RESOURCE_EXHAUSTED
    |   +-- RateLimited           429                      retryable
    |   +-- ConcurrencyLimited    429                      retryable
    |   +-- BudgetExhausted       429
    +-- Conflict                  409 ABORTED
    +-- PolicyPersistFailed       500 UNAVAILABLE          retryable
    +-- KvError                   500 FAILED_PRECONDITION  (never reaches a client: the prompt is computed again)
    |   +-- TicketInvalid, TicketForeign, TicketExpired, TicketConflict, KvStale, KvDigestMismatch, KvIncompatible,
    |       KvUnreachable, ArenaFull
    +-- EngineFailed              500 INTERNAL             retryable
    +-- PoisonRequest             500 INTERNAL
    +-- NumericsMismatch          500 FAILED_PRECONDITION
    +-- ModelRefused              500 FAILED_PRECONDITION
    +-- ConfigError               500 FAILED_PRECONDITION
    +-- Internal                  500 INTERNAL

Messages say what, which id, the limit and the actual value; never prompt text, never secrets.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class InferfluxError(Exception):
    """Base of all errors that may cross a border. `message` is safe to show to the caller."""

    reason: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param


class InvalidRequest(InferfluxError):
    reason, http_status, grpc_code = "INVALID_REQUEST", 400, grpc.StatusCode.INVALID_ARGUMENT


class BodyTooLarge(InvalidRequest):
    reason, http_status = "BODY_TOO_LARGE", 413


class HeadersTooLarge(InvalidRequest):
    reason, http_status = "HEADERS_TOO_LARGE", 431


class IdempotencyKeyReused(InvalidRequest):
    reason, http_status = "IDEMPOTENCY_KEY_REUSED", 422


class CapabilityNotSupported(InvalidRequest):
    """The model can't do what the request asks for; nothing was computed."""

    reason, http_status = "CAPABILITY_NOT_SUPPORTED", 422


class PolicyInvalid(InvalidRequest):
    """All problems of a policy document at once, one per line in `message`, each with its JSON path."""

    reason = "POLICY_INVALID"


class ContentPolicyViolation(InvalidRequest):
    """What was said is against a rule; the message names the rule, never the text."""

    reason = "CONTENT_POLICY_VIOLATION"


class RequestExceedsLimit(InvalidRequest):
    """The request is larger than a whole limit: it could never be let through."""

    reason = "REQUEST_EXCEEDS_LIMIT"


class RequestTimeout(InvalidRequest):
    reason, http_status, grpc_code = "REQUEST_TIMEOUT", 408, grpc.StatusCode.CANCELLED


class SlowConsumer(RequestTimeout):
    reason = "SLOW_CONSUMER"


class Unauthenticated(InferfluxError):
    reason, http_status, grpc_code = "UNAUTHENTICATED", 401, grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(InferfluxError):
    reason, http_status, grpc_code = "PERMISSION_DENIED", 403, grpc.StatusCode.PERMISSION_DENIED


class NotFound(InferfluxError):
    reason, http_status, grpc_code = "NOT_FOUND", 404, grpc.StatusCode.NOT_FOUND


class ModelNotFound(NotFound):
    reason = "MODEL_NOT_FOUND"


class Unavailable(InferfluxError):
    reason, http_status, grpc_code, is_retryable = "UNAVAILABLE", 503, grpc.StatusCode.UNAVAILABLE, True


class NoWorker(Unavailable):
    reason = "NO_WORKER"


class WorkerLost(Unavailable):
    reason = "WORKER_LOST"


class Draining(Unavailable):
    reason = "DRAINING"


class GuardrailUnavailable(Unavailable):
    """A rule that must be asked could not be asked in time."""

    reason = "GUARDRAIL_UNAVAILABLE"


class KvTransportDegraded(Unavailable):
    """Prompts can't be computed where they should be, and decode workers may not or can't take them all."""

    reason = "DISTRIBUTED_KV_TRANSPORT_DEGRADED"


class AuditUnavailable(Unavailable):
    """What an administrator wants to do can't be written down, so it is not done."""

    reason = "AUDIT_UNAVAILABLE"


class LimitsUnavailable(Unavailable):
    """Nobody can count the request, and the policy says that then it must wait."""

    reason = "LIMITS_UNAVAILABLE"


class LimitExceeded(InferfluxError):
    """A limit of the policy. `retry_after_s` is when it lets this request through at the earliest."""

    reason, http_status, grpc_code = "LIMIT_EXCEEDED", 429, grpc.StatusCode.RESOURCE_EXHAUSTED


class RateLimited(LimitExceeded):
    reason, is_retryable = "RATE_LIMITED", True


class ConcurrencyLimited(LimitExceeded):
    reason, is_retryable = "CONCURRENCY_LIMITED", True


class BudgetExhausted(LimitExceeded):
    reason = "BUDGET_EXHAUSTED"


class DeadlineExceeded(InferfluxError):
    reason, http_status, grpc_code = "DEADLINE_EXCEEDED", 504, grpc.StatusCode.DEADLINE_EXCEEDED


class Conflict(InferfluxError):
    reason, http_status, grpc_code = "CONFLICT", 409, grpc.StatusCode.ABORTED


class PolicyPersistFailed(InferfluxError):
    """The store did not take a change of the policy; nothing has changed."""

    reason, grpc_code, is_retryable = "POLICY_PERSIST_FAILED", grpc.StatusCode.UNAVAILABLE, True


class KvError(InferfluxError):
    """KV blocks that must not be used. `kv_reason` is the bounded label in metrics and KvReport.reason."""

    reason, grpc_code = "KV_ERROR", grpc.StatusCode.FAILED_PRECONDITION
    kv_reason: ClassVar[str] = "other"


class TicketInvalid(KvError):
    reason, kv_reason = "TICKET_INVALID", "mac"


class TicketForeign(KvError):
    reason, kv_reason = "TICKET_FOREIGN", "audience"


class TicketExpired(KvError):
    reason, kv_reason = "TICKET_EXPIRED", "expired"


class TicketConflict(KvError):
    reason, kv_reason = "TICKET_CONFLICT", "conflict"


class KvStale(KvError):
    reason, kv_reason = "KV_STALE", "stale"


class KvDigestMismatch(KvError):
    reason, kv_reason = "KV_DIGEST_MISMATCH", "digest"


class KvIncompatible(KvError):
    reason, kv_reason = "KV_INCOMPATIBLE", "fingerprint"


class KvUnreachable(KvError):
    reason, kv_reason = "KV_UNREACHABLE", "unreachable"


class ArenaFull(KvError):
    reason, kv_reason = "ARENA_FULL", "arena_full"


class EngineFailed(InferfluxError):
    """The engine gave up on this request; its neighbours are unharmed."""

    reason, is_retryable = "ENGINE_FAILED", True


class PoisonRequest(InferfluxError):
    """Workers died of this request; it is not given to another one."""

    reason = "POISON_REQUEST"


class NumericsMismatch(InferfluxError):
    """The engine does not compute what the reference computes; the worker must not serve."""

    reason, grpc_code = "NUMERICS_MISMATCH", grpc.StatusCode.FAILED_PRECONDITION


class ModelRefused(InferfluxError):
    """A model that must not be loaded: tampered with, not signed by anybody trusted, too old, or with its own code."""

    reason, grpc_code = "MODEL_REFUSED", grpc.StatusCode.FAILED_PRECONDITION


class ConfigError(InferfluxError):
    """All problems of a configuration at once, one per line in `message`."""

    reason, grpc_code = "CONFIG_ERROR", grpc.StatusCode.FAILED_PRECONDITION


class Internal(InferfluxError):
    reason = "INTERNAL"

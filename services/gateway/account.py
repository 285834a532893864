"""What is written down of each request: one log line without any of its text, and the metrics.

Looking up a metric's label costs more than counting, so the few label sets there are get looked up once.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from inferflux.errors import InferfluxError
from inferflux.telemetry import metrics
from inferflux.telemetry.logs import LineLog
from services.gateway.auth import Principal
from services.gateway.call import Call, Phase
from services.gateway.endpoints import Endpoint
from services.gateway.policy import Policy
from services.gateway.reply import Reply

CLIENT_GONE = 499
ROLE = "gateway"


class Account:
    """One request from its arrival to its end. `call` is set once the request is known to be a good one.

    `policy`: what decides for it, once it is known whose it is. `body`: as it came, once it is there.
    """

    def __init__(self, request_id: str, endpoint: Endpoint, reply: Reply, log: LineLog | None) -> None:
        self.request_id = request_id
        self.call: Call | None = None
        self.principal: Principal | None = None
        self.policy: Policy | None = None
        self.body = b""
        self.endpoint = endpoint
        self._reply = reply
        self._log = log
        self._arrived_at = asyncio.get_running_loop().time()

    @property
    def error(self) -> InferfluxError | None:
        """How it was refused, or failed."""
        return self._reply.error

    @property
    def phase(self) -> Phase:
        """Where the request is."""
        if self.call is None:
            return Phase.READING
        return Phase.STREAM if self._reply.has_started else self.call.phase

    def close(self, *, is_gone: bool = False) -> None:
        """Write everything down. `is_gone`: the client left before the end."""
        status = self._status(is_gone=is_gone)
        now = asyncio.get_running_loop().time()
        _requests(self.endpoint.path, status).inc()
        if is_gone:
            _cancelled(self.phase).inc()
        elif self._reply.error is not None and self.call is None:
            metrics.REJECT.labels(self._reply.error.reason).inc()
        if self.call is not None:
            _duration(self.endpoint.path).observe(now - self.call.received_at)
            self._count_tokens(self.call)
        if self._log is not None:
            self._log.write(self._line(status, now))

    def record(self, *, is_gone: bool) -> dict[str, object]:
        """Describe the request without any of its text."""
        return self._line(self._status(is_gone=is_gone), asyncio.get_running_loop().time())

    def _status(self, *, is_gone: bool) -> int:
        return CLIENT_GONE if is_gone else self._reply.status

    def _count_tokens(self, call: Call) -> None:
        if self._reply.is_streaming:
            _ttft(call.model).observe(self._reply.first_at - call.received_at)
        prompt, completion, cached = _tokens(call.model)
        prompt.inc(call.usage.prompt_tokens)
        completion.inc(call.usage.completion_tokens)
        cached.inc(call.usage.cached_tokens)

    def _line(self, status: int, now: float) -> dict[str, object]:
        line: dict[str, object] = {
            "request_id": self.request_id,
            "path": self.endpoint.path,
            "status": status,
            "seconds": round(now - self._arrived_at, 4),
            "bytes": self._reply.num_bytes,
        }
        if self._reply.error is not None:
            line["reason"] = self._reply.error.reason
        if self.principal is not None:
            line |= {"tenant": self.principal.tenant, "key_id": self.principal.key_id}
            if self.principal.team:
                line["team"] = self.principal.team
        if (call := self.call) is not None:
            line |= {
                "model": call.model,
                "phase": self.phase.value,
                "prefill": call.prefill_worker,
                "decode": call.decode_worker,
                "prompt_tokens": call.usage.prompt_tokens,
                "completion_tokens": call.usage.completion_tokens,
            }
            if call.guard is not None and (rules := call.guard.verdicts.names()):
                line["guardrails"] = rules
            if self._reply.first_at:
                line["first_byte_s"] = round(self._reply.first_at - call.received_at, 4)
        return line


@cache
def _requests(path: str, status: int) -> Any:
    return metrics.REQUESTS.labels(ROLE, path, str(status))


@cache
def _duration(path: str) -> Any:
    return metrics.REQUEST_SECONDS.labels(ROLE, path)


@cache
def _ttft(model: str) -> Any:
    return metrics.TTFT.labels(model)


@cache
def _cancelled(phase: Phase) -> Any:
    return metrics.CANCELLED.labels(phase.value)


@cache
def _tokens(model: str) -> Any:
    return tuple(metrics.TOKENS.labels(kind, model) for kind in ("prompt", "completion", "cached"))

"""The raw ASGI endpoint of all inference paths: checks a request, walks it through the cluster, ends it properly.

No framework objects on this path: it runs for every token.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from inferflux.errors import Draining, InferfluxError, InvalidRequest, Unavailable
from inferflux.telemetry import logs, metrics, tracing
from inferflux.telemetry.logs import LineLog
from inferflux.v1 import types_pb2
from services.gateway import capabilities, envelope, failures, flow, remote_images
from services.gateway.account import ROLE, Account
from services.gateway.asgi import WRITE_NOW, AsgiScope, ClientGone, Headers, RawHeaders, Receive, Send, header_map
from services.gateway.audited import Audit
from services.gateway.auth import Authenticator, read_credential
from services.gateway.call import Call
from services.gateway.endpoints import ENDPOINTS, Endpoint
from services.gateway.envelope import BodyLimits
from services.gateway.guardrails.guard import Guard, Subject
from services.gateway.guardrails.referees import Referees
from services.gateway.lifeline import Lifeline
from services.gateway.policy import Policies, Policy
from services.gateway.policy_report import Trial
from services.gateway.pool import Pool
from services.gateway.rehearsal import Recorded, Shadow
from services.gateway.reply import Reply
from services.gateway.reservations import Reservations

REQUEST_ID, POLICY_REVISION = b"x-request-id", b"x-inferflux-policy-rev"
TIMEOUT = b"x-inferflux-timeout-ms"
# What a worker's application may read. Never credentials, cookies, or anything about the client's network.
_FORWARDED = {
    name.encode(): name
    for name in ("content-type", "accept", "user-agent", "anthropic-version", "anthropic-beta", "openai-beta")
}
Serve = Callable[[Reply, Account], Awaitable[None]]
_log = logging.getLogger(__name__)
_inflight = metrics.INFLIGHT.labels(ROLE)


@dataclass(frozen=True, slots=True)
class Inference:
    """Serves every path of ENDPOINTS. `policies` gives the snapshot in use; None as long as none was ever received."""

    auth: Authenticator
    pool: Pool
    policies: Callable[[], Policies | None]
    reservations: Reservations
    limits: BodyLimits
    timeout_s: float
    access_log: LineLog | None
    trial: Trial = field(default_factory=Trial)
    audit: Audit | None = None
    referees: Referees = field(default_factory=Referees)
    shadow: Shadow | None = None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> bool:
        """Answer one request; whatever happens, it ends in an answer, in one error, or without a client.

        Tells whether the client has a worker's whole answer.
        """
        endpoint = ENDPOINTS[scope["path"]]
        return await self.conduct(endpoint, new_request_id(), scope, send, partial(self._serve, scope, receive))

    async def conduct(self, endpoint: Endpoint, request_id: str, scope: AsgiScope, send: Send, serve: Serve) -> bool:
        """Let `serve` answer, and end what it leaves open; see `__call__`."""
        write_now = scope.get("extensions", {}).get(WRITE_NOW)
        reply = Reply(send, request_id, endpoint.dialect, self.response_headers(request_id), write_now)
        account = Account(request_id, endpoint, reply, self.access_log)
        is_gone = False
        _inflight.inc()
        logs.REQUEST_ID.set(request_id)  # for this task, which serves nothing else
        try:
            await serve(reply, account)
        except ClientGone:
            is_gone = True
        except asyncio.CancelledError:  # the server's last word when it drains
            await reply.fail(Draining("the gateway is shutting down"))
        except Exception as e:  # noqa: BLE001 - the border: every error becomes an answer
            if not isinstance(e, InferfluxError):
                _log.exception("request failed")
            await reply.fail(failures.shown(e))
        finally:
            _inflight.dec()
            self._end(account, reply, is_gone=is_gone)
        return reply.error is None and not is_gone

    def _end(self, account: Account, reply: Reply, *, is_gone: bool) -> None:
        """Write a request down, wherever it counts."""
        account.close(is_gone=is_gone)
        if account.policy is not None and not is_gone:
            self.trial.count(account.policy.revision, is_failure=reply.status >= 400 or reply.error is not None)
        if self.audit is not None:
            self.audit.ended(account, is_gone=is_gone)
        if self.shadow is not None and self.shadow.is_wanted and account.body and not is_gone:
            self.shadow.take(_recorded(account), account.error)

    async def refuse(self, scope: AsgiScope, send: Send, error: InferfluxError) -> None:
        """Answer a request that gets no further with an error."""

        async def fail(_reply: Reply, _account: Account) -> None:
            raise error

        await self.conduct(ENDPOINTS[scope["path"]], new_request_id(), scope, send, fail)

    def response_headers(self, request_id: str) -> RawHeaders:
        """Make the headers of every response."""
        policies = self.policies()
        revision = policies.revision if policies is not None else 0
        return [(REQUEST_ID, request_id.encode()), (POLICY_REVISION, str(revision).encode())]

    async def _serve(self, scope: AsgiScope, receive: Receive, reply: Reply, account: Account) -> None:
        arrived_at = asyncio.get_running_loop().time()
        endpoint = account.endpoint
        if scope["method"] != "POST":
            raise failures.MethodNotAllowed("POST")
        headers = header_map(scope["headers"])
        credential = read_credential(headers)
        account.principal = principal = await self.auth.admit(credential, endpoint.scope)
        account.policy = policy = self.policy(credential)
        deadline_at = arrived_at + self._timeout_s(headers)
        account.body = body = await envelope.read_body(receive, headers, self.limits)
        known = envelope.parse(body, self.limits)
        model = self.pool.resolve(known.model, principal.allowance, principal.tenant)
        record = self.pool.record(model)
        capabilities.require(record, endpoint.path, known.wants)
        with tracing.start_span("request", headers.get(b"traceparent", b"").decode("latin-1")) as span:
            account.call = call = Call(
                request_id=account.request_id,
                endpoint=endpoint,
                principal=principal,
                policy=policy,
                model=model,
                parent=record.parent if record is not None else "",
                http=_http_call(endpoint, scope, headers, body),
                received_at=asyncio.get_running_loop().time(),
                deadline_at=deadline_at,
                created_s=int(time.time()),
                traceparent=span.traceparent,
            )
            async with Lifeline(receive, deadline_at):
                await self.screen(call, reply)
                async with self.reservations.hold(call, known.price, reply):
                    if known.has_addresses:
                        call.http.body = await self._with_images(call)
                    await flow.serve(call, self.pool, reply)

    async def _with_images(self, call: Call) -> bytes:
        return await remote_images.inlined(call.http.body, self.limits.images, self.limits.max_bytes)

    async def screen(self, call: Call, reply: Reply, num_seen: int = 0) -> None:
        """Have guardrails look at the prompt, now, and at the answer, when it comes. Raises ContentPolicyViolation.

        `num_seen`: events that the client has; the prompt was looked at when it asked for the first of them.
        """
        if (rules := call.policy.guardrails) is None:
            return
        call.guard = guard = Guard(rules, _subject(call), self.referees)
        if not call.is_recalled:
            call.http.body = await guard.admit(call.http.body)
        if (output := guard.output(num_seen)) is not None:
            reply.guard(output)
            call.journal.num_events = 0  # what the client has of a recalled stream is looked at again, for what follows

    def policy(self, credential: bytes) -> Policy:
        """Choose the policy of a client. Raises Unavailable."""
        policies = self.policies()
        if policies is None:
            raise Unavailable("the gateway has no policy yet", retry_after_s=1)
        return policies.choose(credential)

    def _timeout_s(self, headers: Headers) -> float:
        """Read the client's wish; it can only shorten the deadline."""
        wish = headers.get(TIMEOUT)
        if wish is None:
            return self.timeout_s
        if not re.fullmatch(rb"[1-9][0-9]{0,8}", wish):
            raise InvalidRequest(
                "x-inferflux-timeout-ms must be a positive number of milliseconds", param=TIMEOUT.decode()
            )
        return min(self.timeout_s, int(wish) / 1000)


def new_request_id() -> str:
    """Name a request; unique for the cluster, and nobody can guess another's."""
    return "req_" + secrets.token_hex(12)


def _recorded(account: Account) -> Recorded:
    """Describe a request that has ended, for a policy in shadow."""
    asker, call = account.principal, account.call
    return Recorded(
        path=account.endpoint.path,
        body=account.body,
        model=call.model if call is not None else "",
        tenant=asker.tenant if asker is not None else "",
        key_id=asker.key_id if asker is not None else "",
        team=asker.team if asker is not None else "",
    )


def _subject(call: Call) -> Subject:
    texts, asker = call.endpoint.texts, call.principal
    return Subject(call.endpoint.path, call.model, asker.tenant, asker.key_id, texts.ids, texts.stream)


def _http_call(endpoint: Endpoint, scope: AsgiScope, headers: Headers, body: bytes) -> types_pb2.HttpCall:
    call = types_pb2.HttpCall(
        method="POST", path=endpoint.path, query=scope["query_string"].decode("latin-1"), body=body
    )
    for raw, name in _FORWARDED.items():
        if raw in headers:
            call.headers.add(name=name, value=headers[raw].decode("latin-1"))
    return call

"""What a policy that does not decide would have done with requests: in shadow beside the live one, or on recorded ones.

In the order of a real request: may its model be used, what do guardrails say of its prompt, is there anything left of
its limits. Answers are not looked at. Nothing of it is counted anywhere but here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from inferflux.errors import BudgetExhausted, ContentPolicyViolation, InferfluxError, ModelNotFound, RateLimited
from inferflux.policy.counting import Ask, Counters, Exchange, Refusal
from inferflux.policy.limits import Limit, Limits, Span, Unit
from inferflux.telemetry import metrics
from services.gateway.endpoints import ENDPOINTS
from services.gateway.guardrails.guard import Guard, Subject
from services.gateway.guardrails.referees import Referees
from services.gateway.policy import Policies, Policy
from services.gateway.policy_report import Trial

MAX_WAITING, MAX_WAITING_BYTES = 100, 256 * 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request, whose it was, when it came (`at`: Unix seconds), and the tokens it took. `body` empty: unknown."""

    path: str
    body: bytes
    model: str
    tenant: str
    key_id: str
    team: str = ""
    at: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    was_refused: bool = False


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a policy would do: the reason it would refuse for (empty: none), in which words, what it would change."""

    refusal: str = ""
    message: str = ""
    is_redacted: bool = False
    rules: tuple[str, ...] = ()


class Rehearsal:
    """One policy over many requests, in the order in which they came."""

    def __init__(self, policy: Policy, referees: Referees) -> None:
        self._policy = policy
        self._referees = referees
        self._counters: dict[str, Counters] = {}

    async def judge(self, request: Recorded) -> Opinion:
        """Say what the policy would do with the next request."""
        opinion = await self.judge_alone(request)
        if opinion.refusal or self._policy.limits is None:
            return opinion
        refused = self._count(request, self._policy.limits)
        if refused is None:
            return opinion
        error = RateLimited if refused.kind.span is Span.MINUTE else BudgetExhausted
        limit = f"{refused.kind.value} of {refused.name.scope.value} {refused.name.owner}"
        return Opinion(error.reason, limit, rules=opinion.rules)

    async def judge_alone(self, request: Recorded) -> Opinion:
        """Say what the policy would do with a request if there was no other: without its limits."""
        allowance = self._policy.identity.allowance(request.tenant, request.team)
        if request.model and not allowance.permits(request.model):
            return Opinion(ModelNotFound.reason, f"the model {request.model!r} is not on the lists")
        endpoint = ENDPOINTS.get(request.path)
        if self._policy.guardrails is None or endpoint is None or not request.body:
            return Opinion()
        subject = Subject(request.path, request.model, request.tenant, request.key_id, endpoint.texts.ids)
        guard = Guard(self._policy.guardrails, subject, self._referees, is_dry=True)
        refusal, message, body = "", "", request.body
        try:
            body = await guard.admit(request.body)
        except InferfluxError as e:
            refusal, message = e.reason, e.message
        return Opinion(refusal, message, body is not request.body, tuple(guard.verdicts.names()))

    def _count(self, request: Recorded, limits: Limits) -> Limit | None:
        """Count a request by what it took; gives the limit that it would have met."""
        found = limits.of(request.tenant, request.team, request.key_id)
        counted = [limit for limit in found if limit.kind.span is not Span.RUNNING]
        asks = []
        for limit in counted:
            need = _amount(limit.kind.unit, limits, request)
            asks.append(Ask(limit.name, limit.most, need, need))
        counters = self._counters.setdefault(request.tenant, Counters())
        outcome = counters.exchange(request.at, Exchange(request.tenant, "rehearsal", asks=asks))
        return counted[outcome.index] if isinstance(outcome, Refusal) else None


class Shadow:
    """Asks the candidate in shadow about requests that the live policy has decided on, one by one, when there is time.

    Those that come faster than they can be judged, and very long ones, are left out: it is a sample then.
    """

    def __init__(self, policies: Callable[[], Policies | None], referees: Referees, trial: Trial) -> None:
        self._policies = policies
        self._referees = referees
        self._trial = trial
        self._waiting: deque[Recorded] = deque(maxlen=MAX_WAITING)
        self._is_wanted = asyncio.Event()

    @property
    def is_wanted(self) -> bool:
        """Whether there is a policy in shadow."""
        policies = self._policies()
        return policies is not None and policies.shadow is not None

    def take(self, request: Recorded, error: InferfluxError | None) -> None:
        """Have a request judged later, if it went well or was refused for its content."""
        is_decided = error is None or error.reason == ContentPolicyViolation.reason
        if is_decided and len(request.body) <= MAX_WAITING_BYTES:
            self._waiting.append(replace(request, was_refused=error is not None))
            self._is_wanted.set()

    async def run(self) -> None:
        """Judge for ever."""
        while True:
            await self._is_wanted.wait()
            self._is_wanted.clear()
            while self._waiting:
                await self._judge(self._waiting.popleft())

    async def _judge(self, request: Recorded) -> None:
        policies = self._policies()
        if policies is None or (policy := policies.shadow) is None:
            return
        try:
            opinion = await Rehearsal(policy, self._referees).judge_alone(request)
        except Exception:  # noqa: BLE001 - what does not decide must not stop the gateway
            _log.exception("a policy in shadow failed")
            opinion = Opinion("INTERNAL")
        outcome = _difference(opinion, was_refused=request.was_refused)
        self._trial.count(policy.revision, is_failure=outcome == "refuse")
        metrics.POLICY_SHADOW.labels(outcome).inc()


def _difference(opinion: Opinion, *, was_refused: bool) -> str:
    if bool(opinion.refusal) is not was_refused:
        return "allow" if was_refused else "refuse"
    return "redact" if opinion.is_redacted else "same"


def _amount(unit: Unit, limits: Limits, request: Recorded) -> int:
    """Say what a request takes of a limit."""
    if unit is Unit.REQUESTS:
        return 1
    if unit is Unit.TOKENS:
        return request.prompt_tokens + request.completion_tokens
    return limits.micro_usd(request.model, request.prompt_tokens, request.completion_tokens)

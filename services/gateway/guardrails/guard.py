"""The guardrails of one request: its prompt before anything is done for it, its answer before the client has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import orjson

from inferflux.errors import ContentPolicyViolation, GuardrailUnavailable, InferfluxError, Internal, InvalidRequest
from inferflux.policy.guardrails import (
    Action,
    EntitiesRule,
    InjectionRule,
    OpaRule,
    ProfanityRule,
    RegoRule,
    Rule,
    Side,
)
from inferflux.telemetry import metrics
from inferflux.types import HttpAnswer
from services.gateway.guardrails import texts, verdicts
from services.gateway.guardrails.events import Shape
from services.gateway.guardrails.referees import Finding, Referees
from services.gateway.guardrails.rules import Checks, Guardrails
from services.gateway.guardrails.stream import StreamScreen
from services.gateway.guardrails.texts import Leaf
from services.gateway.guardrails.verdicts import Verdicts
from services.gateway.guardrails.window import Edit, edited

LARGE_CHARS = 64 * 1024
"""Longer inputs are read in a thread: they would keep all streams waiting for milliseconds."""
SEGMENT_CHARS = 400
OVERLAP_CHARS = 100
"""Of a stream, for rules that take long: so much is judged at a time, with so much of what came before."""
PARAMETERS = ("stream", "max_tokens", "max_completion_tokens", "n", "temperature", "top_p", "tool_choice")
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks what of which model. `ids`: fields of the request that may hold tokens instead of text."""

    path: str
    model: str
    tenant: str
    key_id: str
    ids: tuple[str, ...] = ()
    shape: Shape | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


class Guard:
    """One request. `verdicts` are all there are on it so far. `is_dry`: a trial, which is not counted."""

    def __init__(self, rules: Guardrails, subject: Subject, referees: Referees, *, is_dry: bool = False) -> None:
        self.verdicts = Verdicts(is_counted=not is_dry)
        self._rules = rules
        self._subject = subject
        self._referees = referees

    async def admit(self, body: bytes) -> bytes:
        """Return the body that may go on: the same, or without what is redacted.

        Raises ContentPolicyViolation, GuardrailUnavailable, or InvalidRequest for a prompt that can't be read.
        """
        checks = self._checks(Side.INPUT)
        if checks is None:
            return body
        document = orjson.loads(body)
        if (name := texts.has_token_ids(document, self._subject.ids)) is not None:
            raise InvalidRequest(f"{name} must be text: guardrails are in force", param=name)
        self._subject.parameters.update((key, document[key]) for key in PARAMETERS if key in document)
        is_changed = await self._judge(Side.INPUT, checks, list(texts.of_request(document)))
        return orjson.dumps(document) if is_changed else body

    def output(self, num_seen: int = 0) -> OutputGuard | None:
        """Return what looks at the answer; None: nothing. `num_seen`: events that the client has from before."""
        checks = self._checks(Side.OUTPUT)
        return None if checks is None else OutputGuard(self, checks, self._subject.shape, num_seen)

    async def answer(self, checks: Checks, answer: HttpAnswer) -> HttpAnswer:
        """Return a whole answer as the client may have it. Raises ContentPolicyViolation, GuardrailUnavailable."""
        try:
            document = orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            document = {"text": answer.body.decode("utf-8", "replace")}
        whole = {"answer": document}
        if not await self._judge(Side.OUTPUT, checks, list(texts.of_answer(whole))):
            return answer
        texts.forget_tokens(whole)
        is_text = isinstance(document, dict) and list(document) == ["text"]
        return HttpAnswer(answer.head, document["text"].encode() if is_text else orjson.dumps(document))

    async def try_on(self, side: Side, text: str) -> dict[str, Any]:
        """Say what would become of a text; `unasked` is the error of a rule that gave no verdict."""
        document, unasked = {"text": text}, None
        checks, is_blocked = self._checks(side), False
        try:
            if checks is not None:
                await self._judge(side, checks, list(texts.of_request(document)))
        except ContentPolicyViolation:
            is_blocked = True
        except GuardrailUnavailable as e:
            unasked = e.message
        found = self.verdicts.documents()
        return {
            "action": max((verdict["action"] for verdict in found), key=list(Action).index, default=Action.ALLOW),
            "text": None if is_blocked or unasked else document["text"],
            "verdicts": found,
            "unasked": unasked,
        }

    def _checks(self, side: Side) -> Checks | None:
        return self._rules.checks(side, self._subject.tenant, self._subject.model)

    # --- the tiers

    async def _judge(self, side: Side, checks: Checks, leaves: Sequence[Leaf]) -> bool:
        """Go through all tiers; what is to be redacted is replaced in its place. Tells whether anything was."""
        num_chars = sum(len(leaf.text) for leaf in leaves)
        begin = perf_counter()
        if num_chars > LARGE_CHARS:
            is_changed = await asyncio.to_thread(self._screen, side, checks, leaves)
        else:
            is_changed = self._screen(side, checks, leaves)
        for rule in checks.screen.too_long(num_chars):
            self.meet(rule, side, "LENGTH")
        verdicts.seconds(1, side).observe(perf_counter() - begin)
        is_changed = await self.ask_models(side, checks, leaves) or is_changed
        await self.ask_code(side, checks)
        return is_changed

    def _screen(self, side: Side, checks: Checks, leaves: Sequence[Leaf]) -> bool:
        is_changed = False
        for leaf in leaves:
            window, text = checks.screen.window(), leaf.text
            window.feed(text)
            window.finish()
            for match in window.found:
                self.meet(match.rule, side, match.label)
            if window.blocked is not None:
                self.meet(window.blocked.rule, side, window.blocked.label)
            if window.edits:
                leaf.replace(edited(text, window.edits))
                is_changed = True
        return is_changed

    def meet(self, rule: Rule, side: Side, label: str) -> None:
        """Take a match. Raises ContentPolicyViolation when that is the end."""
        self.verdicts.add(rule, side, label)
        if rule.action is Action.BLOCK:
            raise verdicts.violation(rule, side)

    async def ask_models(self, side: Side, checks: Checks, leaves: Sequence[Leaf]) -> bool:
        """Have guardrail workers judge; they are asked at the same time. Tells whether anything was replaced."""
        if not checks.judged or not leaves:
            return False
        begin, said = perf_counter(), [leaf.text for leaf in leaves]
        questions = [self._in_time(rule, self._referees.judge(rule, said)) for rule in checks.judged]
        answers = await asyncio.gather(*questions)
        verdicts.seconds(2, side).observe(perf_counter() - begin)
        edits: list[Finding] = []
        for rule, found in zip(checks.judged, answers, strict=True):
            for finding in found or ():
                self.meet(rule, side, finding.label)
                if rule.action is Action.REDACT:
                    edits.append(finding)
        for number, leaf in enumerate(leaves):
            theirs = sorted(Edit(f.start, f.end, f.label) for f in edits if f.text == number)
            leaf.replace(edited(said[number], theirs))
        return bool(edits)

    async def ask_code(self, side: Side, checks: Checks) -> None:
        """Have policies as code decide on the request and the verdicts there are."""
        if not checks.code:
            return
        begin = perf_counter()
        for rule in checks.code:
            if await self._in_time(rule, self._ask_code(rule, side)):
                self.meet(rule, side, "DENIED")
        verdicts.seconds(3, side).observe(perf_counter() - begin)

    async def _ask_code(self, rule: RegoRule | OpaRule, side: Side) -> bool:
        code = self._rules.rego(rule) if isinstance(rule, RegoRule) else self._referees.opa(rule)
        subject = self._subject
        request = {"path": subject.path, "model": subject.model, "tenant": subject.tenant, "key_id": subject.key_id}
        verdicts_so_far = self.verdicts.documents()
        document = {"side": side.value, "request": request | subject.parameters, "verdicts": verdicts_so_far}
        return await code.denies(document)

    async def _in_time(
        self, rule: EntitiesRule | InjectionRule | ProfanityRule | RegoRule | OpaRule, answer: Awaitable[T]
    ) -> T | None:
        """Wait for an answer until the rule's deadline. Raises GuardrailUnavailable if there has to be one."""
        try:
            async with asyncio.timeout(rule.deadline_ms / 1000):
                return await answer
        except Exception as e:
            metrics.GUARDRAIL_FAILURES.labels(rule.name, rule.on_failure).inc()
            _log.warning("no verdict", extra={"rule": rule.name, "reason": type(e).__name__})
            if rule.on_failure == "block":
                raise verdicts.unavailable(rule) from e
            return None


class OutputGuard:
    """The answer of one request, whole or as a stream. `error`: why the stream has ended, once it has."""

    def __init__(self, guard: Guard, checks: Checks, shape: Shape | None, num_seen: int) -> None:
        self.error: InferfluxError | None = None
        self._guard = guard
        self._checks = checks
        self._stream = StreamScreen(checks.screen, shape, num_seen) if shape is not None else None
        self._is_slow = bool(checks.judged)
        self._unjudged = b""
        self._said = ""
        self._num_judged = 0
        self._is_asked = False

    async def answer(self, answer: HttpAnswer) -> HttpAnswer:
        """See Guard.answer."""
        return await self._guard.answer(self._checks, answer)

    async def feed(self, data: bytes) -> bytes:
        """Take the next bytes of an event stream; returns what the client may have. Raises GuardrailUnavailable."""
        return await self._pass(data, is_final=False)

    async def finish(self) -> bytes:
        """Take the end of an event stream; returns the rest."""
        return await self._pass(b"", is_final=True)

    async def _pass(self, data: bytes, *, is_final: bool) -> bytes:
        stream = self._stream
        if stream is None:
            raise Internal("a stream came that guardrails can't read")
        begin = perf_counter()
        shown = stream.feed(data) + (stream.finish() if is_final else b"")
        verdicts.seconds(1, Side.OUTPUT).observe(perf_counter() - begin)
        is_news = self._take_verdicts(stream)
        return await self._pass_slow(stream, shown, is_news=is_news, is_final=is_final or self.error is not None)

    def _take_verdicts(self, stream: StreamScreen) -> bool:
        """Take what the stream found; tells whether it is news."""
        news = [self._guard.verdicts.add(match.rule, Side.OUTPUT, match.label) for match in stream.found]
        stream.found.clear()
        if stream.blocked is not None:
            self._guard.verdicts.add(stream.blocked, Side.OUTPUT, "")
            self.error = verdicts.violation(stream.blocked, Side.OUTPUT)
        return any(news)

    async def _pass_slow(self, stream: StreamScreen, shown: bytes, *, is_news: bool, is_final: bool) -> bytes:
        """Let pass what those have judged who take long, in segments."""
        self._unjudged += shown
        try:
            if is_news or not self._is_asked:
                self._is_asked = True
                await self._guard.ask_code(Side.OUTPUT, self._checks)
            if self._is_slow:
                if len(stream.said) - self._num_judged < SEGMENT_CHARS and not is_final:
                    return b""
                await self._judge_segment(stream)
        except ContentPolicyViolation as e:
            self.error = e
            return stream.end()
        passed, self._unjudged = self._unjudged, b""
        return passed

    async def _judge_segment(self, stream: StreamScreen) -> None:
        segment = {"text": stream.said[max(0, self._num_judged - OVERLAP_CHARS) :]}
        self._num_judged = len(stream.said)
        await self._guard.ask_models(Side.OUTPUT, self._checks, [Leaf(("text",), segment, "text")])

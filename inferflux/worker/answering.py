"""One request on a decode worker, from its tickets to its last frame.

However it goes, the reader gets exactly one frame with an `end`, the engine's generator is closed, and nothing of an
unknown exception's text leaves the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from inferflux import failpoints
from inferflux.engine.base import KvSource
from inferflux.errors import Conflict, Draining, InferfluxError, Internal, KvError, KvUnreachable, WorkerLost
from inferflux.telemetry import logs, metrics, tracing
from inferflux.types import Delivered, End, ErrorDetail, Frame, HttpCall, KvReport, PrefilledPrompt, RequestContext
from inferflux.worker.claims import Claims
from inferflux.worker.deadline import deadline
from inferflux.worker.meter import Pace
from inferflux.worker.paths import note_speed
from inferflux.worker.record import RequestRecord
from inferflux.worker.sources import TicketGate
from inferflux.worker.worker import Worker

_log = logging.getLogger(__name__)
BY_GATEWAY = "by gateway"
"""The cancel message of a task whose gateway wants nothing more."""
TAKEN_OVER = "taken over"
"""The cancel message of a task whose request goes on elsewhere."""
Post = Callable[[Frame], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What a gateway starts. `handle` names it in its session."""

    handle: int
    context: RequestContext
    call: HttpCall
    prompts: tuple[PrefilledPrompt, ...] = ()
    delivered: Delivered | None = None


class Answerer:
    """Runs requests on the engine. `answer` is safe concurrently. Without `claims`, sources are read unclaimed."""

    def __init__(self, worker: Worker, claims: Claims | None = None) -> None:
        self._worker = worker
        self._claims = claims
        self._gate = TicketGate(worker.ticket_key, worker.info.fingerprint)

    async def answer(self, request: DecodeRequest, post: Post, end: Callable[[End], None]) -> None:
        """Post all frames; call `end` instead of posting a last one when the request fails or is cancelled."""
        try:
            with RequestRecord(self._worker.role, request.call.path) as record:
                await self._run(request, record, post)
        except asyncio.CancelledError as e:
            end(self._cancelled(e.args))
            raise
        except Exception as e:  # noqa: BLE001 - the border of a request: it must end, and say nothing it should not
            end(_failed(_presentable(e)))

    async def _run(self, request: DecodeRequest, record: RequestRecord, post: Post) -> None:
        context = request.context
        running, adapted = self._worker.work.running(), self._worker.using(context)
        with logs.request_id(context.request_id), running, adapted as context:
            request = replace(request, context=context)
            if failpoints.ON:
                failpoints.hit("decode.start")
            sources, refused = self._gate.admit(context, request.prompts)
            claimed = self._claims.begin(sources) if self._claims else sources
            if failpoints.ON:
                failpoints.hit("decode.admitted")
            async with deadline(context.time_left_s):
                connected, lost = await self._connected(claimed, context.time_left_s)
                await self._stream(request, connected, refused + lost, record, post)

    async def _connected(
        self, sources: Sequence[KvSource], time_left_s: float | None
    ) -> tuple[list[KvSource], list[KvReport]]:
        """Find the path to each source's blocks; a source without one is computed here."""
        if self._worker.paths is None:
            return list(sources), []
        connecting = (self._worker.paths.connect(source, time_left_s) for source in sources)
        found = await asyncio.gather(*connecting, return_exceptions=True)
        connected, lost = [], []
        for source, path in zip(sources, found, strict=True):
            match path:
                case KvSource():
                    connected.append(path)
                case KvError():
                    _log.warning("no path to kv", extra={"ticket_id": source.ticket_id, "reason": path.message})
                    lost.append(KvReport(source.ticket_id, "recomputed", path.kv_reason))
                case _:
                    raise path
        return connected, lost

    async def _stream(
        self,
        request: DecodeRequest,
        sources: Sequence[KvSource],
        refused: Sequence[KvReport],
        record: RequestRecord,
        post: Post,
    ) -> None:
        context, model = request.context, self._worker.info.model
        attributes = {"inferflux.request_id": context.request_id, "gen_ai.request.model": model}
        with tracing.start_span("decode", context.traceparent, attributes) as span:
            note = partial(self._noted, record=record, span=span, sources={s.ticket_id: s for s in sources})
            if refused:
                await post(note(Frame(kv=tuple(refused))))
            frames = self._worker.engine.generate(context, request.call, sources, request.delivered)
            last: Frame | None = None
            pace = Pace()
            async with aclosing(frames):
                async for last in frames:
                    pace.see(last)
                    if failpoints.ON:
                        failpoints.hit("decode.end" if last.end is not None else "decode.token")
                    if last.kv and self._claims:
                        self._claims.settle(sources, last.kv)
                    await post(note(last))
        if last is None or last.end is None:
            raise Internal("the engine's response has no end")
        self._worker.meter.add(pace.num_tokens, pace.s_per_token())
        if not sources:
            metrics.TOKENS.labels("prompt", model).inc(last.end.usage.prompt_tokens)

    def _noted(self, frame: Frame, record: RequestRecord, span: tracing.Span, sources: Mapping[str, KvSource]) -> Frame:
        """Let metrics and the trace see a frame pass."""
        if frame.head is not None:
            record.status = frame.head.status
        if frame.kv:
            frame = replace(frame, kv=tuple(self._noted_kv(report, span, sources) for report in frame.kv))
        if frame.end is not None:
            usage, model = frame.end.usage, self._worker.info.model
            metrics.TOKENS.labels("completion", model).inc(usage.completion_tokens)
            metrics.TOKENS.labels("cached", model).inc(usage.cached_tokens)
            span.set("gen_ai.usage.output_tokens", usage.completion_tokens)
        return frame

    def _noted_kv(self, report: KvReport, span: tracing.Span, sources: Mapping[str, KvSource]) -> KvReport:
        """Count what became of a ticket, and say how its blocks came."""
        source = sources.get(report.ticket_id)  # None: it never got as far as the engine
        if source is not None:
            report = replace(report, transport=source.transport)
        span.past("kv transfer", report.transfer_s, _kv_attributes(report))
        if report.result == "recomputed":
            metrics.KV_REJECTED.labels(report.reason).inc()
            _log.warning("kv not used", extra={"ticket_id": report.ticket_id, "reason": report.reason})
            if source is not None and report.reason == KvUnreachable.kv_reason and self._worker.paths is not None:
                self._worker.paths.lost(source)
        elif report.result == "committed" and source is not None:
            _note_transfer(report, source)
        return report

    def _cancelled(self, args: tuple[object, ...]) -> End:
        """Unless the gateway itself said so, it still waits: what it has must not pass for a whole response."""
        if args == (BY_GATEWAY,):
            return End("abort")
        if args == (TAKEN_OVER,):
            return _failed(Conflict("the client came back through another connection"))
        is_draining = self._worker.lifecycle.draining.is_set()
        return _failed((Draining if is_draining else WorkerLost)("the worker stopped before the request was done"))


def _note_transfer(report: KvReport, source: KvSource) -> None:
    metrics.KV_TRANSFER_BYTES.labels(report.transport).inc(report.num_bytes)
    metrics.KV_TRANSFER_SECONDS.labels(report.transport).observe(report.transfer_s)
    if report.transfer_s > 0:
        note_speed(source.path, report.num_bytes, report.transfer_s)


def _kv_attributes(report: KvReport) -> tracing.Attributes:
    return {
        "inferflux.kv.transport": report.transport,
        "inferflux.kv.result": report.result,
        "inferflux.kv.reason": report.reason,
        "inferflux.kv.num_bytes": report.num_bytes,
        "inferflux.kv.ticket_id": report.ticket_id,
    }


def _presentable(error: Exception) -> InferfluxError:
    if isinstance(error, InferfluxError):
        return error
    _log.error("request failed", exc_info=error)
    return Internal("internal error")


def _failed(error: InferfluxError) -> End:
    return End(error=ErrorDetail.of(error))

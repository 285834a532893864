"""One request on a decode worker, from its tickets to its last frame.

However it goes, the reader gets exactly one frame with an `end`, the engine's generator is closed, and nothing of an
unknown exception's text leaves the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from inferflux.engine.base import KvSource
from inferflux.errors import Draining, InferfluxError, Internal, WorkerLost
from inferflux.telemetry import logs, metrics, tracing
from inferflux.types import Delivered, End, ErrorDetail, Frame, HttpCall, KvReport, PrefilledPrompt, RequestContext
from inferflux.worker.deadline import deadline
from inferflux.worker.record import RequestRecord
from inferflux.worker.sources import TicketGate
from inferflux.worker.worker import Worker

_log = logging.getLogger(__name__)
BY_GATEWAY = "by gateway"
"""The cancel message of a task whose gateway wants nothing more."""
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
    """Runs requests on the engine. `answer` is safe concurrently."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._gate = TicketGate(worker.ticket_key, worker.info.fingerprint, worker.host_id)

    async def answer(self, request: DecodeRequest, post: Post, end: Callable[[End], None]) -> None:
        """Post all frames; call `end` instead of posting a last one when the request fails or is cancelled."""
        try:
            with RequestRecord(self._worker.role, request.call.path) as record:
                await self._run(request, record, post)
        except asyncio.CancelledError as e:
            end(End("abort") if e.args == (BY_GATEWAY,) else self._stopped())
            raise
        except Exception as e:  # noqa: BLE001 - the border of a request: it must end, and say nothing it should not
            end(_failed(_presentable(e)))

    async def _run(self, request: DecodeRequest, record: RequestRecord, post: Post) -> None:
        context = request.context
        with logs.request_id(context.request_id), self._worker.work.running():
            sources, refused = self._gate.admit(context, request.prompts)
            async with deadline(context.time_left_s):
                await self._stream(request, sources, refused, record, post)

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
            if refused:
                await post(_noted(Frame(kv=tuple(refused)), record, span, model))
            frames = self._worker.engine.generate(context, request.call, sources, request.delivered)
            last: Frame | None = None
            async with aclosing(frames):
                async for last in frames:
                    await post(_noted(last, record, span, model))
        if last is None or last.end is None:
            raise Internal("the engine's response has no end")
        if not sources:
            metrics.TOKENS.labels("prompt", model).inc(last.end.usage.prompt_tokens)

    def _stopped(self) -> End:
        """The gateway still waits for the rest: what it has must not pass for a whole response."""
        is_draining = self._worker.lifecycle.draining.is_set()
        return _failed((Draining if is_draining else WorkerLost)("the worker stopped before the request was done"))


def _noted(frame: Frame, record: RequestRecord, span: tracing.Span, model: str) -> Frame:
    """Let metrics and the trace see a frame pass."""
    if frame.head is not None:
        record.status = frame.head.status
    for report in frame.kv:
        _note_kv(report, span)
    if frame.end is not None:
        usage = frame.end.usage
        metrics.TOKENS.labels("completion", model).inc(usage.completion_tokens)
        metrics.TOKENS.labels("cached", model).inc(usage.cached_tokens)
        span.set("gen_ai.usage.output_tokens", usage.completion_tokens)
    return frame


def _note_kv(report: KvReport, span: tracing.Span) -> None:
    span.past("kv transfer", report.transfer_s, _kv_attributes(report))
    if report.result == "recomputed":
        metrics.KV_REJECTED.labels(report.reason).inc()
        _log.warning("kv not used", extra={"ticket_id": report.ticket_id, "reason": report.reason})
    elif report.result == "committed":
        metrics.KV_TRANSFER_BYTES.labels("shm").inc(report.num_bytes)
        metrics.KV_TRANSFER_SECONDS.labels("shm").observe(report.transfer_s)


def _kv_attributes(report: KvReport) -> tracing.Attributes:
    return {
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

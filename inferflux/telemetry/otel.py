"""The OpenTelemetry side of tracing; imported only when an OTLP endpoint is set."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from inferflux.telemetry.tracing import Attributes, AttributeValue

FLUSH_TIMEOUT_S = 2.0
_PROPAGATOR = TraceContextTextMapPropagator()


class OtelSpan:
    """A recorded span."""

    __slots__ = ("_span", "_tracer", "traceparent")

    def __init__(self, span: trace.Span, tracer: trace.Tracer) -> None:
        self._span = span
        self._tracer = tracer
        self.traceparent = _inject(span)

    def set(self, key: str, value: AttributeValue) -> None:
        self._span.set_attribute(key, value)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def past(self, name: str, duration_s: float, attributes: Attributes) -> None:
        start_ns = time.time_ns() - int(duration_s * 1e9)
        parent = trace.set_span_in_context(self._span)
        self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns).end()


class OtelTracer:
    """Exports sampled spans in the background. `ratio`: share of new traces; callers' decisions are kept."""

    def __init__(self, role: str, instance_id: str, ratio: float, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create({"service.name": f"inferflux-{role}", "service.instance.id": instance_id})
        sampler = ParentBased(TraceIdRatioBased(ratio))
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("inferflux")

    @contextmanager
    def start(self, name: str, parent_traceparent: str, attributes: Attributes) -> Iterator[OtelSpan]:
        """Open a span; an exception's text stays out of it, it may quote a prompt."""
        parent = _PROPAGATOR.extract({"traceparent": parent_traceparent})
        span = self._tracer.start_span(name, parent, attributes=attributes)
        try:
            yield OtelSpan(span, self._tracer)
        except BaseException as e:
            span.set_status(trace.StatusCode.ERROR, type(e).__name__)
            raise
        finally:
            span.end()

    def shutdown(self) -> None:
        """Send what is left if the collector takes it within a moment.

        The exporter itself would retry an absent collector for 15 s, and a drained process has to end.
        """
        flush = threading.Thread(target=self._provider.shutdown, name="otel-flush", daemon=True)
        flush.start()
        flush.join(FLUSH_TIMEOUT_S)


def _inject(span: trace.Span) -> str:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")

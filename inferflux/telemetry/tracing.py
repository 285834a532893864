"""Distributed traces, free when off.

Tracing is on when OTEL_EXPORTER_OTLP_ENDPOINT is set; only then OpenTelemetry is imported. Its exporter, with its
threads, starts at the first span: a worker forks its engine before it serves. When off, spans do nothing but pass the
caller's W3C traceparent on.

    with tracing.start_span("prefill", parent_traceparent=context.traceparent) as span:
        span.set("inferflux.worker", worker_id)
        await stub.Prefill(... traceparent=span.traceparent ...)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, Self

from inferflux.errors import ConfigError

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
RATIO_VARIABLE = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_RATIO = "0.1"
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
AttributeValue = str | bool | int | float
Attributes = Mapping[str, AttributeValue]


class Span(Protocol):
    """A piece of work. Leaving its `with` block by an exception marks it failed, by type only."""

    @property
    def traceparent(self) -> str:
        """W3C trace context for the next hop; empty when there is none."""

    def set(self, key: str, value: AttributeValue) -> None:
        """Add an attribute; never prompt text."""

    def event(self, name: str) -> None:
        """Mark an instant."""

    def past(self, name: str, duration_s: float, attributes: Attributes) -> None:
        """Record a child that ends now and took `duration_s`: work elsewhere that is told of afterwards."""


StartSpan = Callable[[str, str, Attributes], AbstractContextManager[Span]]


class PassingSpan:
    """The span when tracing is off: forwards the caller's context untouched."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, key: str, value: AttributeValue) -> None:
        """Nothing to record."""

    def event(self, name: str) -> None:
        """Nothing to record."""

    def past(self, name: str, duration_s: float, attributes: Attributes) -> None:
        """Nothing to record."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


def _start_passing(_name: str, parent_traceparent: str, _attributes: Attributes) -> AbstractContextManager[Span]:
    return PassingSpan(parent_traceparent)


class _Tracer:
    """The process's one tracer; OTel itself is per process too."""

    start: StartSpan = staticmethod(_start_passing)
    shutdown: Callable[[], None] = staticmethod(lambda: None)


def start_span(
    name: str, parent_traceparent: str | None = None, attributes: Attributes | None = None
) -> AbstractContextManager[Span]:
    """Open a span under the caller's context; anything but a valid version-00 traceparent counts as none."""
    return _Tracer.start(name, _valid(parent_traceparent), attributes or {})


def setup(role: str, instance_id: str, environ: Mapping[str, str]) -> None:
    """Turn tracing on if the environment names an OTLP endpoint. Raises ConfigError."""
    if not environ.get(ENDPOINT_VARIABLE):
        return
    from inferflux.telemetry.otel import OtelTracer  # noqa: PLC0415  -- half a second and 10 MB, only when on

    ratio = _ratio(environ)

    def start_first(name: str, parent_traceparent: str, attributes: Attributes) -> AbstractContextManager[Span]:
        tracer = OtelTracer(role, instance_id, ratio)
        _Tracer.start, _Tracer.shutdown = tracer.start, tracer.shutdown
        return tracer.start(name, parent_traceparent, attributes)

    _Tracer.start = start_first


def shutdown() -> None:
    """Send what is left, within a bounded time, and turn tracing off."""
    _Tracer.shutdown()
    _Tracer.start, _Tracer.shutdown = _start_passing, lambda: None


def _ratio(environ: Mapping[str, str]) -> float:
    """Read the share of new traces to record."""
    text = environ.get(RATIO_VARIABLE) or DEFAULT_RATIO
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"{RATIO_VARIABLE}: must be a number from 0 to 1, is {text!r}")
    return ratio


def _valid(traceparent: str | None) -> str:
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else ""

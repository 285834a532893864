"""Logs, metrics and traces say enough, and never what a client wrote."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1 import trace_pb2
from prometheus_client.parser import text_string_to_metric_families

from inferflux.errors import ConfigError, KvStale
from inferflux.telemetry import logs, metrics, tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "the secret prompt"


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger whose lines can be read back, as the services format them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter("decode", "decode-0"))
    logger = logging.Logger("inferflux.test")  # noqa: LOG001  -- not in the tree: its own level and handler
    logger.addHandler(handler)
    return logger, stream


def test_a_line_is_one_json_object_with_the_common_fields(logger: tuple[logging.Logger, io.StringIO]) -> None:
    """ts, level, role, id, msg and request_id are always there; extra fields are added."""
    log, stream = logger
    with logs.request_id("req-1"):
        log.info("ticket %s\nissued", "t-1", extra={"num_slots": 3, "path": Path("/x")})
    log.info("idle")

    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("ts"))
    assert first == {
        "level": "INFO",
        "role": "decode",
        "id": "decode-0",
        "msg": "ticket t-1\nissued",
        "request_id": "req-1",
        "logger": "inferflux.test",
        "num_slots": 3,
        "path": "/x",
    }
    assert second["request_id"] == ""


def test_exception_texts_that_may_quote_a_prompt_stay_out(logger: tuple[logging.Logger, io.StringIO]) -> None:
    """Of a ValueError only type and place are logged, its causes and groups included; our own errors are quoted."""
    log, stream = logger
    try:
        try:
            int(SECRET)
        except ValueError as e:
            raise ExceptionGroup("both", [KvStale("slot 3 is stale"), KeyError(SECRET)]) from e
    except ExceptionGroup:
        log.exception("failed")

    line = json.loads(stream.getvalue())
    assert SECRET not in stream.getvalue()
    assert (line["error"], line["cause"]["error"]) == ("ExceptionGroup", "ValueError")
    assert [error["error"] for error in line["errors"]] == ["KvStale", "KeyError"]
    assert line["errors"][0]["error_text"] == "slot 3 is stale"
    assert line["stack"][0].endswith("test_exception_texts_that_may_quote_a_prompt_stay_out")


def test_setup_keeps_libraries_quiet_and_us_at_our_level() -> None:
    """Our loggers follow the setting, everyone else speaks from WARNING on."""
    code = (
        "import logging; from inferflux.telemetry import logs; logs.setup('decode', 'decode-0', 'debug');"
        "[logging.getLogger(n).debug('d') or logging.getLogger(n).warning('w') for n in"
        " ('inferflux.a', 'services.b', 'vendor')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["logger"], line["msg"]) for line in lines] == [
        ("inferflux.a", "d"),
        ("inferflux.a", "w"),
        ("services.b", "d"),
        ("services.b", "w"),
        ("vendor", "w"),
    ]


def test_exposition_can_be_parsed_and_every_metric_is_documented() -> None:
    """Names are ours, help texts end as sentences, times are in seconds."""
    content_type, text = metrics.render()

    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    ours = [family for name, family in families.items() if name.startswith("inferflux_")]
    assert content_type.startswith("text/plain")
    assert len(ours) >= 20
    assert {name.partition("_")[0] for name in families} == {"inferflux", "process"}
    for family in ours:
        assert family.documentation.endswith("."), family.name
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_bytes", "_pixels")), family.name
            assert not family.name.endswith("_seconds") or "seconds" in family.documentation, family.name
        assert not family.name.endswith("_created")


def test_counters_appear_under_their_total_name() -> None:
    """A counter is exposed as inferflux_<noun>_total with its labels."""
    metrics.KV_TRANSFER_BYTES.labels("test").inc(5)

    assert b'inferflux_kv_transfer_bytes_total{transport="test"} 5.0' in metrics.render()[1]


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (PARENT, PARENT),
        (None, ""),
        ("", ""),
        ("junk\r\nx: y", ""),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", ""),
        ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", ""),
    ],
)
def test_trace_context_is_passed_on_when_tracing_is_off(parent: str | None, expected: str) -> None:
    """The caller's context goes to the next hop untouched; anything invalid does not."""
    with tracing.start_span("prefill", parent_traceparent=parent, attributes={"a": 1}) as span:
        span.set("gen_ai.usage.input_tokens", 3)
        span.event("first token")

        assert span.traceparent == expected


class Collector:
    """A real OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, trace_pb2.Span]] = []
        export = grpc.unary_unary_rpc_method_handler(
            self._export, ExportTraceServiceRequest.FromString, ExportTraceServiceResponse.SerializeToString
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self.server = grpc.server(ThreadPoolExecutor(1))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": export}),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def _export(self, request: ExportTraceServiceRequest, _context: object) -> ExportTraceServiceResponse:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            self.spans.extend((names["service.name"], span) for span in spans)
        return ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    tracing.shutdown()
    collector.server.stop(0).wait()


def turn_on(collector: Collector, monkeypatch: pytest.MonkeyPatch, ratio: str) -> None:
    monkeypatch.setenv(tracing.ENDPOINT_VARIABLE, f"http://127.0.0.1:{collector.port}")
    tracing.setup("gateway", "gateway-0", {**os.environ, tracing.RATIO_VARIABLE: ratio})


def test_spans_of_a_request_form_one_trace(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans are children of the client's span and of each other, with attributes, and without an exception's text."""
    turn_on(collector, monkeypatch, "0")

    with suppress(ValueError), tracing.start_span("request", PARENT, {"model": "m"}) as outer:
        with tracing.start_span("prefill", outer.traceparent) as inner:
            inner.set("gen_ai.usage.input_tokens", 7)
            inner.event("first token")
            inner.past("kv transfer", 0.25, {"inferflux.kv.num_bytes": 5})
        int(SECRET)
    tracing.shutdown()

    names = {service for service, _ in collector.spans}
    spans = {span.name: span for _, span in collector.spans}
    request, prefill, transfer = spans["request"], spans["prefill"], spans["kv transfer"]
    assert names == {"inferflux-gateway"}
    assert {span.trace_id.hex() for span in spans.values()} == {PARENT.split("-")[1]}
    assert request.parent_span_id.hex() == PARENT.split("-")[2]
    assert prefill.parent_span_id == request.span_id
    assert transfer.parent_span_id == prefill.span_id
    assert transfer.end_time_unix_nano - transfer.start_time_unix_nano == pytest.approx(0.25e9, rel=0.1)
    assert outer.traceparent == f"00-{PARENT.split('-')[1]}-{request.span_id.hex()}-01"
    assert [(a.key, a.value.int_value) for a in prefill.attributes] == [("gen_ai.usage.input_tokens", 7)]
    assert [event.name for event in prefill.events] == ["first token"]
    assert (request.status.code, request.status.message) == (trace_pb2.Status.STATUS_CODE_ERROR, "ValueError")
    assert SECRET not in str(collector.spans)


def test_unsampled_traces_are_not_exported(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ratio 0 a new trace is recorded nowhere, and the next hop is told so."""
    turn_on(collector, monkeypatch, "0")

    with tracing.start_span("request") as span:
        flags = span.traceparent.split("-")[3]
    tracing.shutdown()

    assert int(flags, 16) & 1 == 0
    assert collector.spans == []


@pytest.mark.parametrize("ratio", ["all", "2", "-0.1", "nan"])
def test_bad_sampling_ratio_is_a_config_error(ratio: str) -> None:
    """A ratio that is no share is refused at start."""
    with pytest.raises(ConfigError, match=tracing.RATIO_VARIABLE):
        tracing.setup("gateway", "gateway-0", {tracing.ENDPOINT_VARIABLE: "http://x", tracing.RATIO_VARIABLE: ratio})


def test_absent_collector_does_not_hold_up_the_end() -> None:
    """A process whose spans nobody takes still ends within a few seconds."""
    code = (
        "import os; from inferflux.telemetry import tracing; tracing.setup('gateway', 'gateway-0', os.environ)\n"
        "with tracing.start_span('x', '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'): pass\n"
        "tracing.shutdown()"
    )
    environ = {tracing.ENDPOINT_VARIABLE: "http://127.0.0.1:1"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=12, capture_output=True)


def test_open_telemetry_is_not_imported_when_off() -> None:
    """An idle tracer costs no memory and no start-up time, the whole process shell included."""
    code = (
        "import os, sys; from inferflux import process; from inferflux.telemetry import tracing;"
        "tracing.setup('gateway', 'gateway-0', os.environ)\n"
        "with tracing.start_span('x'): pass\n"
        "heavy = ('opentelemetry', 'torch', 'vllm', 'fastapi', 'cryptography', 'numpy', 'redis')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={})

    assert done.stdout.decode().strip() == "[]"

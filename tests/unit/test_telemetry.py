"""Logs, metrics and traces say enough, and never what a client wrote."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferflux.errors import KvStale
from inferflux.telemetry import logs, metrics, tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "the secret prompt"


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger whose lines can be read back, as the services format them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter("decode", "decode-0"))
    logger = logging.Logger("inferflux.test")
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
            raise ValueError(SECRET)
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
            assert family.name.endswith("_seconds"), family.name
            assert "seconds" in family.documentation, family.name
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

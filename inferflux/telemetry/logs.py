"""Structured logs: one JSON object per line on stderr, the same fields from every process.

Fields: ts, level, role, id, msg, request_id, and whatever a call passes in `extra`. Prompt text never gets here: the
text of an exception is logged only for types whose messages cannot quote a request.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from traceback import walk_tb
from types import TracebackType

import orjson

from inferflux.errors import InferfluxError

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_QUOTABLE = (InferfluxError, OSError, ImportError, TypeError, AttributeError, NameError)
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
_OWN_LOGGERS = ("inferflux", "services")


def setup(role: str, instance_id: str, level: str = "INFO") -> None:
    """Send all logging to stderr as JSON lines; libraries only from WARNING on. Call once per process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role, instance_id))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())


@contextmanager
def request_id(value: str) -> Iterator[None]:
    """Put `value` into every log line written inside the block, by this task and the tasks it starts."""
    token = REQUEST_ID.set(value)
    try:
        yield
    finally:
        REQUEST_ID.reset(token)


class JsonFormatter(logging.Formatter):
    """One record to one line."""

    def __init__(self, role: str, instance_id: str) -> None:
        super().__init__()
        self._role = role
        self._instance_id = instance_id

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "role": self._role,
            "id": self._instance_id,
            "msg": record.getMessage(),
            "request_id": REQUEST_ID.get(),
            "logger": record.name,
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            line |= describe(record.exc_info[1])
        return json.dumps(line, default=str, ensure_ascii=False)


class LineLog:
    """Writes one kind of line, for what happens so often that `logging` itself would be the cost (20 times this)."""

    def __init__(self, role: str, instance_id: str, message: str, logger: str) -> None:
        self._common = {"level": "INFO", "role": role, "id": instance_id, "msg": message, "logger": logger}

    def write(self, fields: Mapping[str, object]) -> None:
        """Write a line with these fields, `request_id` among them."""
        line = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds")} | self._common | dict(fields)
        sys.stderr.write(orjson.dumps(line).decode() + "\n")


def describe(error: BaseException) -> dict[str, object]:
    """Tell what may be logged of an exception: type, place, cause, and its text if that is safe."""
    described: dict[str, object] = {"error": type(error).__name__, "stack": _stack(error.__traceback__)}
    if isinstance(error, _QUOTABLE):
        described["error_text"] = str(error)
    if isinstance(error, BaseExceptionGroup):
        described["errors"] = [describe(e) for e in error.exceptions]
    if error.__cause__ is not None and not isinstance(error.__cause__, BaseExceptionGroup):
        described["cause"] = describe(error.__cause__)
    return described


def _stack(trace: TracebackType | None) -> list[str]:
    return [f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}" for frame, line in walk_tb(trace)]

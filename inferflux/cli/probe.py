"""Ask a process whether it is ready, over its own socket; used by the supervisor only when somebody wants to know."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """One answer. `incarnation` is empty when the process does not name one; `state` failed: it will never be ready."""

    ready: bool
    reason: str = ""
    incarnation: str = ""
    state: str = ""


async def ask(role: str, socket: Path) -> Readiness:
    """Ask once; never raises: silence is an answer too."""
    question = b"PING\r\n" if role == "redis" else b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reply = await exchange(socket, question, is_http=role != "redis")
        return redis_readiness(reply) if role == "redis" else http_readiness(reply)
    except TimeoutError:
        return Readiness(ready=False, reason=f"busy: no answer within {TIMEOUT_S:.0f} s")
    except (OSError, ValueError, KeyError, TypeError, asyncio.IncompleteReadError):
        return Readiness(ready=False, reason="starting")


async def exchange(socket: Path, question: bytes, *, is_http: bool) -> bytes:
    """Send one request and read its answer: to the end of the connection, or one line."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        writer.write(question)
        return await (reader.read() if is_http else reader.readline())
    finally:
        writer.close()


def http_readiness(reply: bytes) -> Readiness:
    """Read the JSON of /readyz; its status line says no more."""
    document = json.loads(reply.partition(b"\r\n\r\n")[2])
    reason = "" if document["ready"] else str(document["reason"] or document["state"])
    return Readiness(bool(document["ready"]), reason, str(document["incarnation"]), str(document["state"]))


def redis_readiness(reply: bytes) -> Readiness:
    """Anything but +PONG (-LOADING ...) is the reason."""
    text = reply.decode(errors="replace").strip()
    return Readiness(ready=text == "+PONG", reason="" if text == "+PONG" else text or "starting")

"""The supervisor's control socket: one JSON line asks, one JSON line answers. Only its owner can connect (0600).

{"op": "status"}                          -> {"ok": true, "pid": ..., "options": {...}, "processes": [...]}
{"op": "stop"}                            -> {"ok": true}; the supervisor exits when all has stopped
{"op": "restart", "name": "decode"}       -> {"ok": true, "restarted": ["decode-0"]} once they are ready again
{"op": "sizes"}                           -> {"ok": true, "sizes": {"prefill": 1, "decode": 2}}: workers not retired
{"op": "grow", "role": "decode", "size": 3}   -> {"ok": true, "added": ["decode-2"]}
{"op": "shrink", "role": "decode", "size": 2, "first": ["decode-0"]} -> {"ok": true, "retired": ["decode-0"]}: it is
                                             not started again when it ends; whoever asks drains it
"sizes", "grow" and "shrink" are about the model that the cluster was started with, or "model".
{"op": "deploy", "spec": {"model": "m", "revision": 7, ...}}  -> {"ok": true}: prepares it and starts its workers
{"op": "deployment", "model": "m"}        -> {"ok": true, "deployment": {...}, "workers": [...]}
{"op": "retire", "model": "m", "keep": 7, "only": null}  -> {"ok": true, "retired": [...]}; as "shrink"
{"op": "end", "ids": ["decode-3"]}        -> {"ok": true}; stops retired workers that can't be told to drain
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 5.0

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Serves one request per connection."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._path = path
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; a socket left by a killed supervisor is replaced."""
        umask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_LINE_BYTES)
        finally:
            os.umask(umask)

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                line = await reader.readline()
            writer.write(json.dumps(await self._reply(line)).encode() + b"\n")
            await writer.drain()
        except (TimeoutError, OSError, ValueError):
            pass  # the peer is gone, or sends no line: nobody to answer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return {"ok": True, **await self._answer(request)}
        except (ValueError, KeyError, TypeError) as e:
            return {"ok": False, "error": str(e)}


class NotRunning(Exception):
    """There is no supervisor behind the socket."""


def ask(path: Path, op: str, *, timeout_s: float = 10.0, **fields: object) -> dict[str, Any]:
    """Ask a supervisor; blocks. Raises NotRunning, or ValueError with its complaint."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline(MAX_LINE_BYTES)
    except OSError as e:
        raise NotRunning(str(e)) from e
    if not line:
        raise NotRunning("the supervisor closed the connection")
    reply: dict[str, Any] = json.loads(line)
    if not reply.pop("ok"):
        raise ValueError(reply["error"])
    return reply

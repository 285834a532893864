"""The ops port of every process: /livez, /readyz and /metrics over plain HTTP/1.1, without a web framework.

Runs on the process's own event loop on purpose: an answer proves that the loop makes progress. Where it listens for
others than this machine's owner it has a token: then only who shows it gets more than what probes need, two statuses.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle

READ_TIMEOUT_S = 5.0
MAX_HEAD_BYTES = 8192
Answer = tuple[HTTPStatus, str, bytes]


class OpsServer:
    """Serves one connection per request. `address`: unix:/path or host:port. `token` empty: all may see all."""

    def __init__(
        self, address: str, lifecycle: Lifecycle, render_metrics: Callable[[], tuple[str, bytes]], token: str = ""
    ) -> None:
        self._address = address
        self._token = token.encode()
        self._lifecycle = lifecycle
        self._render_metrics = render_metrics
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen; returns the actual address. Raises ConfigError when that is impossible."""
        try:
            return await self._listen()
        except (OSError, ValueError) as e:
            raise ConfigError(f"ops server cannot listen on {self._address}: {e}") from e

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        if self._address.startswith("unix:"):
            _unlink(self._address[5:])

    async def _listen(self) -> str:
        if self._address.startswith("unix:"):
            path = self._address[5:]
            self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_HEAD_BYTES)
            os.chmod(path, 0o600)  # noqa: PTH101  -- one syscall
            return self._address
        host, _, port = self._address.rpartition(":")
        self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=MAX_HEAD_BYTES)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_encode(self._answer(head)))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the peer is gone, slow or not speaking HTTP: nobody to answer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> Answer:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET\n"
        if path == b"/livez":
            return HTTPStatus.OK, "text/plain", b"ok\n"
        if path == b"/readyz":
            return self._readyz(is_known=self._is_known(head))
        if path == b"/metrics":
            if not self._is_known(head):
                return HTTPStatus.UNAUTHORIZED, "text/plain", b"wants the ops token as a bearer token\n"
            return HTTPStatus.OK, *self._render_metrics()
        return HTTPStatus.NOT_FOUND, "text/plain", b"only /livez, /readyz and /metrics\n"

    def _is_known(self, head: bytes) -> bool:
        return not self._token or hmac.compare_digest(_bearer(head), self._token)

    def _readyz(self, *, is_known: bool) -> Answer:
        report = status(self._lifecycle)
        if not is_known:
            report = {"ready": report["ready"]}
        code = HTTPStatus.OK if report["ready"] else HTTPStatus.SERVICE_UNAVAILABLE
        return code, "application/json", json.dumps(report).encode() + b"\n"


def status(lifecycle: Lifecycle) -> dict[str, object]:
    """Build what /readyz answers."""
    readiness = lifecycle.readiness()
    return {
        "role": lifecycle.role,
        "id": lifecycle.instance_id,
        "incarnation": lifecycle.incarnation,
        "state": str(lifecycle.state),
        "ready": readiness.ready,
        "reason": readiness.reason,
        "pid": os.getpid(),
    }


def _bearer(head: bytes) -> bytes:
    """Find the bearer token of a request; empty when it has none."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"authorization":
            kind, _, token = value.strip().partition(b" ")
            return token.strip() if kind.lower() == b"bearer" else b""
    return b""


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _encode(answer: Answer) -> bytes:
    code, content_type, body = answer
    head = f"HTTP/1.1 {code.value} {code.phrase}\r\ncontent-type: {content_type}\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body

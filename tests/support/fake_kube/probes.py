"""Asks containers how they are."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.fake_kube.controllers import port_of
from tests.support.fake_kube.runtime import Container
from tests.support.fake_kube.store import Object


async def probe(pod: Object, container: Container, action: dict[str, Any], timeout_s: float) -> bool:
    """Do what a probe or a hook says; returns whether it succeeded in time."""
    try:
        async with asyncio.timeout(timeout_s):
            match action:
                case {"httpGet": request}:
                    return await _http(pod, request)
                case {"tcpSocket": {"port": port}}:
                    _, writer = await asyncio.open_connection(pod["status"]["podIP"], port_of(pod, port))
                    writer.transport.abort()
                    return True
                case {"exec": {"command": command}}:
                    return await container.execute(command, timeout_s)
                case {"sleep": {"seconds": seconds}}:
                    await asyncio.sleep(seconds)
                    return True
                case _:
                    raise ValueError(f"no such probe: {action}")
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


async def _http(pod: Object, request: dict[str, Any]) -> bool:
    host = request.get("host", pod["status"]["podIP"])
    reader, writer = await asyncio.open_connection(host, port_of(pod, request["port"]))
    try:
        head = f"GET {request.get('path', '/')} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.37\r\n"
        headers = "".join(f"{h['name']}: {h['value']}\r\n" for h in request.get("httpHeaders") or ())
        writer.write(f"{head}{headers}Connection: close\r\n\r\n".encode())
        status_line = await reader.readuntil(b"\r\n")
        return 200 <= int(status_line.split()[1]) < 400
    finally:
        writer.transport.abort()

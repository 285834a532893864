"""As much of the Kubernetes API as a planner touches, over real HTTP: scales, annotations of pods, Leases."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class TinyKube:
    """Objects by path. `denied`: paths that answer 403; `is_failing`: everything answers 500."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    is_failing: bool = False
    url: str = ""
    _version: int = 0

    def add(self, path: str, document: dict[str, Any]) -> None:
        self._version += 1
        document.setdefault("metadata", {})["resourceVersion"] = str(self._version)
        self.objects[path] = document

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        if self.is_failing or path in self.denied:
            return (500 if self.is_failing else 403), {}
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                return 409, {}
            self.add(path, body)
            return 201, self.objects[path]
        if path not in self.objects:
            return 404, {}
        known = self.objects[path]
        if method == "PUT":
            if body["metadata"].get("resourceVersion") != known["metadata"]["resourceVersion"]:
                return 409, {}
            self.add(path, body)
        if method == "PATCH":
            self.add(path, merged(known, body))
        return 200, self.objects[path]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Apply a JSON merge patch."""
    result = dict(old)
    for key, value in new.items():
        result[key] = merged(old.get(key) or {}, value) if isinstance(value, dict) else value
    return result


@contextmanager
def tiny_kube() -> Iterator[TinyKube]:
    kube, lock = TinyKube(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            with lock:
                status, document = kube.answer(self.command, self.path.partition("?")[0], body)
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815 - the base's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kube.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield kube
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

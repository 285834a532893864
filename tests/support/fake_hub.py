"""A Hugging Face-style hub on 127.0.0.1, as far as `inferctl pull` can tell: commits, pages, ranges, faults."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
PAGE = 3


@dataclass
class FakeHub:
    """Files of one repository, and what goes wrong. Large ones are answered by a redirect to another origin."""

    files: dict[str, bytes]
    token: str = ""
    cut_after: int = 0
    num_cuts: int = 0
    knows_ranges: bool = True
    wrong_bytes: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    leaked_tokens: list[str] = field(default_factory=list)
    url: str = ""
    cdn_url: str = ""

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".gguf"))

    def entry(self, name: str) -> dict:
        content = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        lfs = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}} if self.is_large(name) else {}
        return {"type": "file", "path": name, "size": len(content), "oid": git, **lfs}

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        """Status, headers and body for a path of the API or of a file."""
        parts = urlsplit(path)
        if "/revision/" in parts.path:
            about = {"sha": COMMIT, "cardData": {"license": "apache-2.0"}}
            return (200, {}, json.dumps(about).encode()) if parts.path.endswith(("/main", COMMIT)) else (404, {}, b"{}")
        if "/tree/" in parts.path:
            start = int(parts.query.rpartition("cursor=")[2]) if "cursor=" in parts.query else 0
            entries = [{"type": "directory", "path": "sub"}, *map(self.entry, sorted(self.files))]
            following = f'<{self.url}{parts.path}?recursive=true&cursor={start + PAGE}>; rel="next"'
            headers = {"Link": following} if start + PAGE < len(entries) else {}
            return 200, headers, json.dumps(entries[start : start + PAGE]).encode()
        name = unquote(parts.path.partition(f"/{COMMIT}/")[2])
        if name not in self.files:
            return 404, {}, b""
        if self.is_large(name) and not parts.path.startswith("/cdn/"):
            return 302, {"Location": f"{self.cdn_url}/cdn/{COMMIT}/{name}"}, b""
        content = self.files[name]
        return 200, {}, bytes(len(content)) if name in self.wrong_bytes else content


def handler(hub: FakeHub, *, is_cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """The tests look at `requests`."""

        def do_GET(self) -> None:
            wanted, authorization = self.headers.get("range", ""), self.headers.get("authorization", "")
            hub.requests.append((self.path, wanted))
            if is_cdn and authorization:
                hub.leaked_tokens.append(authorization)
            if hub.token and not is_cdn and authorization != f"Bearer {hub.token}":
                self.reply(401, {}, b"{}")
                return
            status, headers, body = hub.answer(self.path)
            if status == 200 and wanted and hub.knows_ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                status, body = 206, body[start:]
            self.reply(status, headers, body)

        def reply(self, status: int, headers: dict, body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if is_cdn and hub.num_cuts > 0 and len(body) > hub.cut_after:
                hub.num_cuts -= 1
                self.wfile.write(body[: hub.cut_after])
                self.close_connection = True
                return
            self.wfile.write(body)

    return Handler


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the hub and the origin of its large files."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, is_cdn=is_cdn)) for is_cdn in (False, True)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    hub.cdn_url = hub.cdn_url.replace("127.0.0.1", "localhost")
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

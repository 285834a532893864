"""Downloads that go on where they stopped, several at a time, and are checked before anybody sees them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx

from inferflux.cli.models import ModelError, Progress

PARALLEL = 4
MAX_ATTEMPTS = 6
BACKOFF_S = 0.2
CHUNK = 1 << 20
TIMEOUT = httpx.Timeout(connect=15.0, read=60.0, write=30.0, pool=60.0)


class Digester(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


DIGESTERS: dict[str, Callable[[int], Digester]] = {
    "sha256": lambda _: hashlib.sha256(),
    "md5": lambda _: hashlib.md5(usedforsecurity=False),
    # What git names a file by; hubs tell it for small files.
    "git": lambda size: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False),
}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file to fetch. `digest`: what its content must have, by the algorithm (see DIGESTERS); "" = nobody says."""

    name: str
    url: str
    size: int
    algorithm: str = ""
    digest: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """Names a partial file: what changed there has another one."""
        return hashlib.sha256(f"{self.name} {self.size} {self.algorithm} {self.digest}".encode()).hexdigest()


class Broken(Exception):
    """A try that failed and may be made again."""


def fetch(files: Sequence[RemoteFile], partials: Path, progress: Progress) -> dict[str, Path]:
    """Download all files into `partials`; returns where each lies. Raises ModelError.

    What is there of an earlier attempt is not fetched again.
    """
    partials.mkdir(mode=0o700, parents=True, exist_ok=True)
    limits = httpx.Limits(max_connections=PARALLEL)
    with (
        httpx.Client(timeout=TIMEOUT, follow_redirects=True, limits=limits) as client,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        fetched = pool.map(lambda file: _fetch_one(client, file, partials / file.key, progress), files)
        return dict(zip((file.name for file in files), fetched, strict=True))


def _fetch_one(client: httpx.Client, file: RemoteFile, path: Path, progress: Progress) -> Path:
    for attempt in range(MAX_ATTEMPTS):
        try:
            _continue(client, file, path, progress)
        except (Broken, httpx.TransportError) as e:
            if attempt + 1 == MAX_ATTEMPTS:
                raise ModelError(f"{file.name}: {str(e) or type(e).__name__} (after {MAX_ATTEMPTS} attempts)") from e
            time.sleep(BACKOFF_S * 2**attempt)
        else:
            progress(f"downloading {file.name}", 1.0)
            return path
    raise AssertionError("unreachable")


def _continue(client: httpx.Client, file: RemoteFile, path: Path, progress: Progress) -> None:
    """Fetch what is missing and check the whole. Raises Broken, TransportError or ModelError."""
    with path.open("ab") as sink:
        if sink.tell() > file.size:
            sink.truncate(0)
        if sink.tell() < file.size or file.size == 0:
            _receive(client, file, sink, progress)
    if (size := path.stat().st_size) != file.size:
        raise Broken(f"{size} of {file.size} bytes came")
    _check(file, path)


def _receive(client: httpx.Client, file: RemoteFile, sink: BinaryIO, progress: Progress) -> None:
    offset = sink.tell()
    ranges = {"range": f"bytes={offset}-"} if offset else {}
    # A compressed answer would have other offsets.
    headers = {"accept-encoding": "identity", **file.headers, **ranges}
    with client.stream("GET", file.url, headers=headers) as response:
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise Broken(f"the server answers {response.status_code}")
        if response.status_code not in (200, 206):
            raise ModelError(f"{file.name}: the server answers {response.status_code} {response.reason_phrase}")
        if offset and response.status_code == 200:  # it knows no ranges
            sink.truncate(0)
        elif offset and not response.headers.get("content-range", "").startswith(f"bytes {offset}-"):
            raise Broken("the server sent another range")
        for chunk in response.iter_bytes():  # as it comes: what is gathered first is lost with the line
            sink.write(chunk)
            if sink.tell() > file.size:
                sink.truncate(0)
                raise ModelError(f"{file.name}: more than the announced {file.size} bytes came")
            progress(f"downloading {file.name}", sink.tell() / (file.size or 1))


def _check(file: RemoteFile, path: Path) -> None:
    """Compare the digest; a wrong file is thrown away, so that the next attempt begins anew."""
    if not file.digest:
        return
    digester = DIGESTERS[file.algorithm](file.size)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digester.update(chunk)
    if digester.hexdigest() != file.digest:
        path.unlink()
        raise Broken(f"its {file.algorithm} digest is not {file.digest[:16]}...")

"""An S3 server (moto) as a process of its own, from the folder that `make test-tools` fills."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minio import Minio

PACKAGES = Path(sys.executable).parents[1] / "s3-server"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests-secret"}
START_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """One server; `environ` is what a client of it needs."""

    port: int

    @property
    def environ(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_REGION": "us-east-1"}

    def put(self, bucket: str, files: Mapping[str, Path]) -> None:
        """Make a bucket with these objects."""
        keys = dict(zip(("access_key", "secret_key"), CREDENTIALS.values(), strict=True))
        client = Minio(endpoint=f"127.0.0.1:{self.port}", secure=False, region="us-east-1", **keys)
        client.make_bucket(bucket_name=bucket)
        for name, path in files.items():
            client.fput_object(bucket_name=bucket, object_name=name, file_path=str(path))


@contextmanager
def running() -> Iterator[S3Server]:
    """Start a server on a free port, and end it."""
    assert (PACKAGES / ".ready").exists(), "make test-tools installs the S3 server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGES)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_up(process, port)
        yield S3Server(port)
    finally:
        process.kill()
        process.wait()


def wait_until_up(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, "the S3 server ended"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/moto-api/")
            connection.getresponse().read()
            connection.close()
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
        else:
            return

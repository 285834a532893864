"""The gateway as a process of its own: how it starts, how it refuses to, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from inferflux.pki import ensure_pki, ensure_secrets
from tests.support.cluster import poll

MAX_RSS_BYTES = 120_000_000


@pytest.fixture
def home() -> Iterator[Path]:
    """A home with certificates and secrets and nobody else in it."""
    with tempfile.TemporaryDirectory(prefix="ifx-", dir="/tmp") as root:
        ensure_pki(Path(root) / "pki")
        ensure_secrets(Path(root) / "secrets")
        yield Path(root)


def environment(home: Path, port: int, **settings: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "INFERFLUX_HOME": str(home),
        "INFERFLUX_HTTP_PORT": str(port),
        "INFERFLUX_POLICY_ADDRESS": f"unix:{home}/policy.sock",
        "INFERFLUX_REGISTRY_ADDRESS": f"unix:{home}/registry.sock",
        "INFERFLUX_PDEATHSIG": "1",
    } | settings


def start(env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "services.gateway"]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@contextmanager
def gateway(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run one until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process, url = start(environment(home, port)), f"http://127.0.0.1:{port}"
    try:
        poll(lambda: answers(url), 20, "the gateway does not answer")
        yield process, url
    finally:
        process.kill()
        process.communicate()


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/livez", trust_env=False).status_code == 200
    return False


def test_a_port_in_use_is_one_line_and_an_exit_code(home):
    """Whoever starts it sees at once what is wrong."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(environment(home, port))
        _, complaint = process.communicate(timeout=20)

    assert process.returncode == 2
    assert len(complaint.splitlines()) == 1
    assert json.loads(complaint)["reason"] == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_all_missing_settings_are_named_at_once(home):
    """And nothing is started."""
    env = environment(home, 0, INFERFLUX_MAX_HEADERS="many")
    del env["INFERFLUX_POLICY_ADDRESS"], env["INFERFLUX_REGISTRY_ADDRESS"]
    process = start(env)
    _, complaint = process.communicate(timeout=20)

    assert process.returncode == 2
    assert "INFERFLUX_MAX_HEADERS" in complaint
    process = start({**env, "INFERFLUX_MAX_HEADERS": "50"})
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "INFERFLUX_POLICY_ADDRESS: missing" in complaint
    assert "INFERFLUX_REGISTRY_ADDRESS: missing" in complaint


def test_it_lives_without_the_other_services_and_ends_when_told(home):
    """Alive and not ready; SIGTERM ends it with 0; it needs little memory and no engine."""
    with gateway(home) as (process, url):
        ready = httpx.get(f"{url}/readyz", trust_env=False)
        rss = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        started_at = time.monotonic()
        process.send_signal(signal.SIGTERM)

        assert process.wait(20) == 0
        assert time.monotonic() - started_at < 10
        assert ready.status_code == 503
        assert rss < MAX_RSS_BYTES
        assert "torch" not in maps

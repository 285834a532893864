from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux.cli import launch
from inferflux.cli.failure import Exit
from tests.support.cluster import inferctl


@pytest.fixture
def home() -> Iterator[Path]:
    """A home in which nothing was ever started."""
    with tempfile.TemporaryDirectory(prefix="ifx-", dir="/tmp") as folder:
        yield Path(folder)


def test_status_without_a_cluster(home):
    """Nothing running is exit status 3; programs still get a document."""
    result = inferctl(home, "status", "-o", "json")

    assert result.returncode == Exit.NOT_RUNNING
    assert json.loads(result.stdout) == {"processes": []}
    assert "nothing is running" in result.stderr


@pytest.mark.parametrize("command", [["server", "stop"], ["server", "restart", "decode"], ["server", "status"]])
def test_steering_nothing(home, command):
    """Commands about a running cluster say that there is none."""
    assert inferctl(home, *command).returncode == Exit.NOT_RUNNING


@pytest.mark.parametrize(
    "command", [["frobnicate"], ["quickstart", "--decode", "0"], ["chat"], ["status", "-o", "yaml"]]
)
def test_wrong_usage(home, command):
    """Wrong usage is exit status 2 and never a traceback."""
    result = inferctl(home, *command, INFERCTL_URL="http://127.0.0.1:9")

    assert (result.returncode, "Traceback" in result.stderr) == (Exit.USAGE, False)


def test_nobody_answers(home):
    """A gateway that is not there is exit status 3 and names the URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = inferctl(home, "models", INFERCTL_URL=f"http://127.0.0.1:{port}")

    assert result.returncode == Exit.NOT_RUNNING
    assert f"nothing answers at http://127.0.0.1:{port}" in result.stderr


def test_local_keys_need_a_cluster(home):
    """Without certificates and a policy service the operator can't manage keys."""
    result = inferctl(home, "admin", "api-keys", "list", "--local")

    assert (result.returncode, "Traceback" in result.stderr) == (Exit.NOT_RUNNING, False)


def test_help_documents_the_exit_statuses(home):
    """The help text names every exit status."""
    text = inferctl(home, "--help").stdout

    assert all(f"{code.value} " in text for code in Exit)


def test_it_starts_without_heavy_imports(home):
    """Asking for the status imports neither an engine, nor gRPC's event loop, nor an HTTP client."""
    program = (
        "import sys; from inferflux.cli.main import main; sys.argv = ['inferctl', 'status']; code = main();"
        "heavy = {'torch', 'vllm', 'transformers', 'httpx', 'fastapi', 'cryptography', 'redis'} & set(sys.modules);"
        "assert not heavy, heavy; assert code == 3"
    )
    environment = {**os.environ, "INFERFLUX_HOME": str(home)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)


def test_the_last_error_of_a_log_is_quoted(tmp_path):
    """Our own error records are quoted, later chatter is not; of a foreign log the last line."""
    log = tmp_path / "x.log"
    log.write_text(
        '{"level": "ERROR", "msg": "bad configuration", "reason": "A: missing\\nB: missing"}\n'
        '{"level": "INFO", "msg": "bye"}\n'
    )
    lines = launch.tail(log, 10)

    assert [launch.explain(line) for line in lines] == ["bad configuration: A: missing; B: missing", ""]
    log.write_text("a\n" * 5000 + "ImportError: x\n\n")
    assert launch.tail(log, 3) == ["a", "a", "ImportError: x"]

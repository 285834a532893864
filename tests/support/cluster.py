"""A real local cluster for tests: started with `inferctl quickstart`, as users do, and gone without a trace afterwards.

    with Cluster.start() as cluster:          # engine sim, a free port, its own home below /tmp
        httpx.get(f"{cluster.url}/v1/models", headers=cluster.headers)
        cluster.kill("decode")

It runs in the foreground of an inferctl of its own, so it also dies with the test run. Start it from the main thread:
it dies with the thread that started it. `stop` fails when any process that knows this home is still there.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from inferflux.cli import control
from inferflux.cli.pdeathsig import die_with_parent
from inferflux.cli.plan import ClusterOptions
from inferflux.paths import Home

INFERCTL = str(Path(sys.executable).parent / "inferctl")
START_S = {"sim": 60.0, "vllm": 300.0}
STOP_S = 60.0
DEADLINE_S = 30.0
POLL_S = 0.05
T = TypeVar("T")


@dataclass(slots=True)
class Cluster:
    """A running cluster; make one with `start`. Use as a context manager, also an asynchronous one."""

    home: Path
    url: str
    api_key: str
    model: str
    inferctl_process: subprocess.Popen[str]
    urls: tuple[str, ...] = ()

    @classmethod
    def start(
        cls,
        *,
        engine: str = "sim",
        prefill: int = 1,
        decode: int = 1,
        gateways: int = 1,
        model: str | None = None,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        home: Path | None = None,
    ) -> Cluster:
        """Start a cluster and wait until all is ready. `env`: more environment for all its processes."""
        home = home or new_home()
        arguments = ["--engine", engine, "--prefill", str(prefill), "--decode", str(decode), "--port", "0"]
        arguments += ["--gateways", str(gateways)]
        arguments += ["--model", model] if model else []
        process = launch(home, ["quickstart", *arguments, *options, "-o", "json"], env)
        try:
            started = read_document(process, START_S[engine])
        except BaseException:
            process.terminate()
            process.communicate(timeout=STOP_S)
            raise
        options_used = ClusterOptions.from_json(started["options"])
        return cls(home, started["url"], started["api_key"] or "", options_used.model, process, options_used.urls)

    @property
    def headers(self) -> dict[str, str]:
        """Authenticate a request as the administrator."""
        return {"authorization": f"Bearer {self.api_key}"}

    @property
    def processes(self) -> list[dict[str, Any]]:
        """Ask for the state of all processes."""
        processes: list[dict[str, Any]] = control.ask(Home(self.home).supervisor_socket, "status")["processes"]
        return processes

    @property
    def pids(self) -> dict[str, int]:
        """Ids of the processes that run now, by instance id, e.g. decode-0; the supervisor among them."""
        status = control.ask(Home(self.home).supervisor_socket, "status")
        return {p["id"]: p["pid"] for p in status["processes"] if p["pid"]} | {"supervisor": status["pid"]}

    def process(self, role: str, number: int = 0) -> dict[str, Any]:
        """State of one process."""
        return next(p for p in self.processes if p["id"] == f"{role}-{number}")

    def kill(self, role: str, number: int = 0, signum: int = signal.SIGKILL) -> dict[str, Any]:
        """Send a signal; returns the process's state from before. `supervisor` is a role here."""
        if role == "supervisor":
            os.kill(self.pids["supervisor"], signum)
            return {}
        before = self.process(role, number)
        os.kill(before["pid"], signum)
        return before

    def wait_restarted(self, before: Mapping[str, Any], timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait until the process that `kill` returned runs again, as a new incarnation, and is ready."""
        role, _, number = before["id"].rpartition("-")

        def is_new() -> dict[str, Any] | None:
            now = self.process(role, int(number))
            return now if now["ready"] and now["incarnation"] != before["incarnation"] else None

        return poll(is_new, timeout_s, f"{before['id']} is not back")

    def wait_ready(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait until every process is ready."""
        poll(lambda: all(p["ready"] for p in self.processes), timeout_s, "not all processes are ready")

    def metrics(self, role: str, number: int = 0) -> str:
        """Scrape /metrics from the ops socket of one process."""
        import httpx

        path = str(Home(self.home).run / f"{role}-{number}.ops.sock")
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://ops") as client:
            return client.get("/metrics").raise_for_status().text

    def log(self, role: str, number: int = 0) -> str:
        """Read the log of one process."""
        return (Home(self.home).logs / f"{role}-{number}.log").read_text()

    def inferctl(self, *arguments: str, key: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run inferctl against this cluster; `key` None = its administrator's."""
        return inferctl(self.home, *arguments, INFERCTL_API_KEY=self.api_key if key is None else key, **env)

    def stop(self) -> None:
        """Stop as Ctrl-C does, remove the home, and fail if anything is left running."""
        self.inferctl_process.send_signal(signal.SIGINT)
        try:
            self.inferctl_process.communicate(timeout=STOP_S)
        finally:
            assert_nothing_runs(self.home)
            shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop while the test's loop goes on: open streams must see the end of what they are connected to."""
        await asyncio.to_thread(self.stop)


def new_home() -> Path:
    """Make a home with a path short enough for unix sockets."""
    return Path(tempfile.mkdtemp(prefix="ifx-", dir="/tmp"))


def environment(home: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Build an environment in which only `home` and `env` say anything about InferFlux (and where models are)."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("INFERFLUX_", "INFERCTL_")) or k == "INFERFLUX_MODELS"
    }
    return {**kept, "INFERFLUX_HOME": str(home), **(env or {})}


def launch(home: Path, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start inferctl and don't wait for it."""
    return subprocess.Popen(
        [INFERCTL, *arguments],
        env=environment(home, env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - the child only makes two system calls
    )


def inferctl(home: Path, *arguments: str, timeout_s: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run inferctl to its end."""
    return subprocess.run(
        [INFERCTL, *arguments],
        env=environment(home, env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def read_document(process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    """Read the JSON document that a foreground quickstart prints when all is ready."""
    deadline, text = time.monotonic() + timeout_s, b""
    while (left_s := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left_s)[0]:
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                complaint = process.stderr.read()
                raise AssertionError(f"inferctl ended with {process.wait(STOP_S)}: {complaint}")
            text += part
            with suppress(ValueError):  # only a part of it yet
                document: dict[str, Any] = json.loads(text)
                return document
    raise AssertionError(f"not ready within {timeout_s:.0f} s")


def poll(check: Callable[[], T], timeout_s: float, complaint: str) -> T:
    """Wait until `check` returns something true; returns it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := check():
            return result
        time.sleep(POLL_S)
    raise AssertionError(f"{complaint} after {timeout_s:.0f} s")


def processes_of(home: Path) -> dict[int, str]:
    """Find every live process of this home, wherever it came from."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if belongs_to(entry, str(home)):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def belongs_to(process: Path, home: str) -> bool:
    """Look for the home in a process's environment and, as some write a title over theirs, in where its output goes."""
    if f"INFERFLUX_HOME={home}\0".encode() in (process / "environ").read_bytes():
        return True
    return str((process / "fd/2").readlink()).startswith(f"{home}/")


def assert_nothing_runs(home: Path, timeout_s: float = 5.0) -> None:
    """Fail, and clean up, when a process of this home outlives it."""
    try:
        poll(lambda: not processes_of(home), timeout_s, "processes are left")
    except AssertionError as e:
        left = processes_of(home)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"left running: {left}") from e

"""Starting and stopping the supervisor from inferctl, and watching its processes become ready."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from inferflux.cli import control
from inferflux.cli.child import rotate
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.pdeathsig import die_with_parent
from inferflux.cli.plan import ClusterOptions
from inferflux.paths import Home

START_S = 20.0
# Model loading on a slow disk and a busy machine; a worker that dies meanwhile is noticed at once.
READY_S = 600.0
MAX_FAILED_STARTS = 3
POLL_S = 0.1
EXCEPTION = re.compile(r"[A-Za-z_.]*(Error|Exception|Mismatch|Exit)\b")

Processes = list[dict[str, Any]]


def start_supervisor(home: Home, options: ClusterOptions, *, detach: bool) -> subprocess.Popen[bytes]:
    """Start the supervisor in a session of its own. Unless detached it ends, in order, when this process does."""
    log = home.logs / "supervisor.log"
    rotate(log)
    with log.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "inferflux.cli.supervisor", json.dumps(options.to_json())],
            env={**os.environ, "INFERFLUX_HOME": str(home.root)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=None if detach else die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one thread
        )


def wait_until_ready(
    home: Home, supervisor: subprocess.Popen[bytes], on_status: Callable[[Processes], None], check: Callable[[], None]
) -> dict[str, Any]:
    """Wait until every process is ready; returns the last status. Raises CliError when that will not happen.

    `check` is called again and again and may raise.
    """
    deadline = time.monotonic() + READY_S
    began_at = time.monotonic()
    while time.monotonic() < deadline:
        check()
        if supervisor.poll() is not None:
            raise CliError(f"the supervisor ended: {last_message(home, 'supervisor')}")
        with suppress(control.NotRunning):
            status = control.ask(home.supervisor_socket, "status")
            own = [p for p in status["processes"] if not p["revision"]]  # models that were loaded later come back later
            on_status(own)
            if all(p["ready"] for p in own):
                return status
            check_hopeless(home, own)
            began_at = time.monotonic()
        if time.monotonic() - began_at > START_S:
            raise CliError("the supervisor does not answer", hint=f"see {home.logs}/supervisor.log")
        time.sleep(POLL_S)
    raise CliError(f"not ready after {READY_S:.0f} s", hint="inferctl server logs says more")


def check_hopeless(home: Home, processes: Processes) -> None:
    """Give up when a process says that it failed, or dies again and again."""
    for p in processes:
        if p["state"] == "failed":
            raise CliError(f"{p['id']} failed: {p['reason']}", hint=f"see {p['log']}")
        if p["restarts"] >= MAX_FAILED_STARTS and not p["ready"]:
            raise CliError(f"{p['id']} {p['last_exit']}: {last_message(home, p['id'])}", hint=f"see {p['log']}")


def last_message(home: Home, name: str) -> str:
    """Find what a log says about an end: our own last error record, and the exception of a traceback before it."""
    try:
        lines = tail(home.logs / f"{name}.log", 100)
    except OSError:
        return "it has no log"
    record = next(filter(None, map(explain, reversed(lines))), "")
    exception = next((line for line in reversed(lines) if EXCEPTION.match(line)), "")
    return ": ".join(filter(None, (record, exception))) or (lines[-1] if lines else "its log is empty")


def explain(line: str) -> str:
    """Render a log record that is worth quoting: an error of ours."""
    try:
        record = json.loads(line)
        if record["level"] not in ("ERROR", "CRITICAL"):
            return ""
        parts = [record["msg"], record.get("reason", ""), record.get("error", "")]
        return ": ".join(str(part) for part in parts if part).replace("\n", "; ")
    except (ValueError, KeyError, TypeError):
        return ""


def tail(log: os.PathLike[str], num_lines: int) -> list[str]:
    """Read the last lines of a file without reading all of it."""
    with open(log, "rb") as file:  # noqa: PTH123
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 256 * num_lines))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-num_lines:]


def status(home: Home) -> dict[str, Any]:
    """Ask the supervisor. Raises CliError(NOT_RUNNING)."""
    try:
        return control.ask(home.supervisor_socket, "status")
    except control.NotRunning:
        raise CliError("nothing is running", Exit.NOT_RUNNING, hint="inferctl quickstart starts a cluster") from None


def stop(home: Home) -> None:
    """Stop everything and wait for the end. Raises CliError(NOT_RUNNING)."""
    pid = status(home)["pid"]
    pidfd = os.pidfd_open(pid)
    try:
        with suppress(control.NotRunning):
            control.ask(home.supervisor_socket, "stop")
        wait_for(pidfd)
    finally:
        os.close(pidfd)


def wait_for(pidfd: int) -> None:
    """Block until the process behind `pidfd` has ended."""
    import select  # noqa: PLC0415

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()

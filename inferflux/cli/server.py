"""`inferctl server ...` and `inferctl status`: look at and steer the cluster that runs in this home."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from inferflux.cli import control, launch
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table
from inferflux.cli.plan import ClusterOptions
from inferflux.cli.state import ClusterState
from inferflux.paths import Home

# Each of a role's processes may drain, load its model and warm up before the next one goes.
RESTART_S = 3600.0
FOLLOW_POLL_S = 0.3
MODEL_COLUMNS = ("id", "version", "signed by", "context", "capabilities", "failed workers")
COLUMNS = ("id", "role", "pid", "state", "restarts", "uptime", "incarnation", "reason")


def show_status(output: Format) -> None:
    """Print the processes; exit status 3 when nothing runs, with an empty list for programs."""
    try:
        status = launch.status(Home.from_env(os.environ))
    except CliError as e:
        if output is Format.JSON and e.code is Exit.NOT_RUNNING:
            print_json({"processes": []})
        raise
    if output is Format.JSON:
        print_json(status)
        return
    options = ClusterOptions.from_json(status["options"])
    note(f"{options.model} ({options.engine}) at {status['url']}")
    print_table(COLUMNS, (row(p) for p in status["processes"]))


def row(process: dict[str, Any]) -> tuple[object, ...]:
    """Render one process for people."""
    state = "ready" if process["ready"] else "running" if process["running"] else "down"
    uptime = f"{process['uptime_s']:.0f} s" if process["running"] else ""
    p = process
    return p["id"], p["role"], p["pid"], state, p["restarts"], uptime, p["incarnation"], p["reason"]


def show_models(output: Format) -> None:
    """Print what /v1/models answers."""
    from inferflux.cli.api import Api  # noqa: PLC0415 - status needs no HTTP client

    with Api() as api:
        answer = api.get("/v1/models")
    if output is Format.JSON:
        print_json(answer)
        return
    print_table(MODEL_COLUMNS, map(model_row, answer["data"]))


def model_row(model: dict[str, Any]) -> tuple[object, ...]:
    """Render one model for people."""
    failed = "; ".join(f"{worker['id']}: {worker['reason']}" for worker in model.get("failed_workers", ()))
    signed_by = (model.get("signed_by") or "")[:12]
    able = " ".join(model.get("capabilities", ()))
    return model["id"], model.get("version"), signed_by, model.get("max_model_len"), able, failed


def start(output: Format) -> None:
    """Start with the options of the last time, in the background."""
    from inferflux.cli.quickstart import quickstart  # noqa: PLC0415 - only commands that start need rich

    earlier = ClusterState.load(Home.from_env(os.environ).state_file)
    if earlier is None:
        raise CliError("nothing was started here yet", hint="inferctl quickstart starts a cluster")
    options = earlier.options
    model = options.model_dir or options.model
    embedding = options.embedding
    quickstart(
        replace(options, model="", model_dir="", model_digest="", numerics_reference="", embedding=None),
        model,
        (embedding.folder or embedding.name) if embedding else None,
        detach=True,
        output=output,
    )


def stop(output: Format) -> None:
    """Stop everything."""
    launch.stop(Home.from_env(os.environ))
    if output is Format.JSON:
        print_json({"stopped": True})
    else:
        note("stopped")


def restart(name: str | None, output: Format) -> None:
    """Restart some processes, or the whole cluster, and wait until they are ready."""
    home = Home.from_env(os.environ)
    if name is None:
        launch.stop(home)
        start(output)
        return
    try:
        reply = control.ask(home.supervisor_socket, "restart", timeout_s=RESTART_S, name=name)
    except control.NotRunning:
        raise CliError("nothing is running", Exit.NOT_RUNNING) from None
    except ValueError as e:
        raise CliError(str(e), Exit.USAGE) from e
    if output is Format.JSON:
        print_json(reply)
    else:
        note(f"restarted {', '.join(reply['restarted'])}")


def show_logs(name: str | None, num_lines: int, *, follow: bool, output: Format) -> None:
    """Print the last lines of the logs, one after the other, and what comes later if asked to."""
    home = Home.from_env(os.environ)
    logs = [log for log in sorted(home.logs.glob("*.log")) if name is None or is_log_of(log, name)]
    if not logs:
        raise CliError(f"no log of {name!r} in {home.logs}" if name else f"no logs in {home.logs}")
    if output is Format.JSON:
        print_json({log.stem: launch.tail(log, num_lines) for log in logs})
        return
    for log in logs:
        for line in launch.tail(log, num_lines):
            print_line(log, line)
    if follow:
        follow_logs(logs)


def is_log_of(log: Path, name: str) -> bool:
    """Match decode-0 with its id and with its role."""
    return name in (log.stem, log.stem.rpartition("-")[0])


def follow_logs(logs: list[Path]) -> None:
    """Print new lines until interrupted."""
    files = [(log, log.open()) for log in logs]
    for _, file in files:
        file.seek(0, os.SEEK_END)
    try:
        while True:
            for log, file in files:
                print_new(log, file)
            time.sleep(FOLLOW_POLL_S)
    except KeyboardInterrupt:
        return


def print_new(log: Path, file: IO[str]) -> None:
    """Print what was appended to a file since we last looked."""
    while line := file.readline():
        print_line(log, line.rstrip("\n"))


def print_line(log: Path, line: str) -> None:
    """Print a line with the name of its process."""
    sys.stdout.write(f"{log.stem:>12} {line}\n")

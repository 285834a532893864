"""`inferctl quickstart`: from nothing to a cluster that answers, or one line that says why not."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from inferflux.cli import control, launch, preflight
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json
from inferflux.cli.plan import ClusterOptions
from inferflux.cli.progress import Steps
from inferflux.errors import InferfluxError
from inferflux.paths import Home, models_dir

SIMULATOR = "THIS IS A SIMULATOR: the sim engine runs no model and its answers mean nothing. For tests and studies."
FIRST_KEY = "quickstart"


def quickstart(options: ClusterOptions, model: str | None, *, detach: bool, output: Format) -> None:
    """Start a cluster, or say what runs already. In the foreground it returns when the cluster has stopped."""
    try:
        home = Home.from_env(os.environ).ensure()
        running = find_running(home)
        if running is not None:
            tell_running(running, output)
            return
        with terminating_signals():
            supervisor = start(home, options, model, detach=detach, output=output)
            if not detach:
                stay(home, supervisor)
    except InferfluxError as e:
        raise CliError(e.message) from e


def find_running(home: Home) -> dict[str, Any] | None:
    """Return the status of the cluster that has this home; None if there is none."""
    try:
        return control.ask(home.supervisor_socket, "status")
    except control.NotRunning:
        return None


def tell_running(status: dict[str, Any], output: Format) -> None:
    """Say what runs, and that nothing was changed."""
    options = ClusterOptions.from_json(status["options"])
    if output is Format.JSON:
        print_json({"already_running": True, **status})
        return
    num_ready = sum(p["ready"] for p in status["processes"])
    note(f"already running: {options.model} ({options.engine}) at {status['url']}")
    note(f"  {num_ready} of {len(status['processes'])} processes are ready; `inferctl status` shows them,")
    note("  `inferctl server stop` stops them")


def start(
    home: Home, options: ClusterOptions, model: str | None, *, detach: bool, output: Format
) -> subprocess.Popen[bytes]:
    """Check, prepare, start and wait; when anything goes wrong, nothing is left running."""
    preflight.check_engine(options.engine)
    if options.port == 0:
        options = replace(options, port=preflight.free_port(options.host))
    preflight.check_port(options.host, options.port)
    with Steps() as steps:
        options = prepare(options, model, steps)
        supervisor = launch.start_supervisor(home, options, detach=detach)
        try:
            status = launch.wait_until_ready(home, supervisor, lambda processes: show(processes, steps))
            secret = create_first_key(home)
        except BaseException:
            end(supervisor)
            raise
    welcome(options, status, secret, detach=detach, output=output)
    return supervisor


def prepare(options: ClusterOptions, model: str | None, steps: Steps) -> ClusterOptions:
    """Get the model ready and check that all fits into memory."""
    if options.engine == "sim":
        note(SIMULATOR)
        options = replace(options, model=model or "sim")
        preflight.check_memory(options, 0, os.environ)
        return options
    from inferflux.cli import models  # noqa: PLC0415 - not for the simulator

    preflight.check_memory(options, 0, os.environ)  # before a download that would be in vain
    available = preflight.available_bytes()
    prepared = models.prepare(model or models.DEFAULT, models_dir(os.environ), steps.update, available_bytes=available)
    steps.finish_all()
    preflight.check_memory(options, prepared.num_weight_bytes, os.environ)
    return replace(
        options,
        model=prepared.name,
        model_dir=str(prepared.folder),
        model_digest=prepared.weights_digest,
        numerics_reference=str(prepared.reference),
    )


def show(processes: launch.Processes, steps: Steps) -> None:
    """Show each process's way to readiness."""
    for p in processes:
        if p["ready"]:
            steps.finish(p["id"], "ready")
        else:
            steps.update(p["id"], None, p["reason"])


def create_first_key(home: Home) -> str | None:
    """Create an admin key if there is no key at all; None when there are some or the operator brings their own."""
    if os.environ.get("INFERFLUX_API_KEYS"):
        return None
    from inferflux.cli import operator  # noqa: PLC0415 - gRPC only now

    if operator.list_keys(home):
        return None
    secret: str = operator.create_key(home, FIRST_KEY, ["admin"])["secret"]
    return secret


def welcome(
    options: ClusterOptions, status: dict[str, Any], secret: str | None, *, detach: bool, output: Format
) -> None:
    """Say where it is, the key (this once) and what to try."""
    if output is Format.JSON:
        print_json({"url": options.url, "api_key": secret, "detached": detach, **status})
        return
    key = secret or "YOUR_KEY"
    note(f"\n{options.model} is served at {options.url}/v1")
    if secret:
        note(f"API key (shown only now): {secret}")
    else:
        note("API keys: those you have; `inferctl admin api-keys create NAME --local` makes another")
    note(f"""
Try:
  export INFERCTL_API_KEY={key}
  inferctl chat "What is the capital of France?"
  curl {options.url}/v1/chat/completions -H "Authorization: Bearer $INFERCTL_API_KEY" \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{options.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
""")
    note("`inferctl server stop` stops it." if detach else "Ctrl-C stops it.")
    if options.engine == "sim":
        note(SIMULATOR)


def stay(home: Home, supervisor: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the cluster; a signal stops it in order, a second one at once."""
    try:
        supervisor.wait()
    except KeyboardInterrupt:
        note("stopping (again to kill)")
        end(supervisor)
        note("stopped")
        return
    if supervisor.returncode != 0:
        raise CliError(f"the supervisor ended unexpectedly ({supervisor.returncode})", hint=f"see {home.logs}")


def end(supervisor: subprocess.Popen[bytes]) -> None:
    """Stop the supervisor and wait for it; further signals are passed on."""
    while supervisor.poll() is None:
        try:
            supervisor.send_signal(signal.SIGTERM)
            supervisor.wait()
        except KeyboardInterrupt:
            continue


@contextmanager
def terminating_signals() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal as Ctrl-C inside the block."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        raise CliError("interrupted", Exit.INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""`inferctl quickstart`: from nothing to a cluster that answers, or one line that says why not."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferflux.cli import control, launch, preflight
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.interrupts import Interrupts
from inferflux.cli.output import Format, note, print_json
from inferflux.cli.plan import ClusterOptions, EmbeddingModel
from inferflux.cli.progress import Steps
from inferflux.errors import InferfluxError
from inferflux.paths import Home, models_dir

SIMULATOR = "THIS IS A SIMULATOR: the sim engine runs no model and its answers mean nothing. For tests and studies."
FIRST_KEY = "quickstart"


def quickstart(
    options: ClusterOptions, model: str | None, embedding_model: str | None, *, detach: bool, output: Format
) -> None:
    """Start a cluster, or say what runs already. In the foreground it returns when the cluster has stopped."""
    try:
        home = Home.from_env(os.environ).ensure()
        running = find_running(home)
        if running is not None:
            tell_running(running, output)
            return
        with Interrupts() as interrupts:
            prepared = prepare(options, model, embedding_model)
            with interrupts.deferred():
                run(home, prepared, interrupts, detach=detach, output=output)
    except InferfluxError as e:
        raise CliError(e.message) from e
    except KeyboardInterrupt:
        raise CliError("interrupted", Exit.INTERRUPTED) from None


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


def prepare(options: ClusterOptions, model: str | None, embedding_model: str | None = None) -> ClusterOptions:
    """Check what can be checked before anything starts, and get the models ready."""
    preflight.check_engine(options.engine)
    if options.port == 0:
        options = replace(options, port=preflight.free_port(options.host, options.gateways))
    for port in options.ports:
        preflight.check_port(options.host, port)
    preflight.check_memory(options, 0, os.environ)  # before a download that would be in vain
    if options.engine == "sim":
        note(SIMULATOR)
        embedding = EmbeddingModel(embedding_model) if embedding_model else None
        return replace(options, model=model or "sim", embedding=embedding)
    return prepare_model(prepare_embedding(options, embedding_model), model)


def prepare_model(options: ClusterOptions, model: str | None) -> ClusterOptions:
    """Download, convert or just check the model, and check that it fits into memory."""
    from inferflux.cli import models  # noqa: PLC0415 - not for the simulator

    with Steps() as steps:
        prepared = models.prepare(
            model or models.DEFAULT,
            models_dir(os.environ),
            steps.update,
            available_bytes=preflight.available_bytes(),
            is_verified_later=models.is_verified_later(os.environ),
        )
        steps.finish_all()
    if prepared.is_embedding:
        raise CliError(f"{prepared.name} gives vectors, not answers", hint="serve it with --embedding-model")
    preflight.check_memory(options, prepared.num_weight_bytes, os.environ)
    return replace(
        options,
        model=prepared.name,
        model_dir=str(prepared.folder),
        model_digest=prepared.weights_digest,
        numerics_reference=str(prepared.reference),
    )


def prepare_embedding(options: ClusterOptions, name: str | None) -> ClusterOptions:
    """Do the same for the embedding model, if one is wanted."""
    from inferflux.cli import models  # noqa: PLC0415 - not for the simulator

    if name is None:
        return options
    with Steps() as steps:
        prepared = models.prepare(
            name, models_dir(os.environ), steps.update, available_bytes=preflight.available_bytes()
        )
        steps.finish_all()
    if not prepared.is_embedding:
        raise CliError(f"{prepared.name} has no modules.json: not a sentence-transformers model")
    model = EmbeddingModel(prepared.name, str(prepared.folder), prepared.weights_digest, str(prepared.reference))
    return replace(options, embedding=model)


def run(home: Home, options: ClusterOptions, interrupts: Interrupts, *, detach: bool, output: Format) -> None:
    """Start all processes, welcome the user and stay, unless detached. A failed start leaves nothing running."""
    supervisor = launch.start_supervisor(home, options, detach=detach)
    try:
        with Steps() as steps:
            status = launch.wait_until_ready(
                home, supervisor, lambda processes: show(processes, steps), interrupts.check
            )
        secret = create_first_key(home)
    except BaseException:
        if not interrupts.num_received:
            supervisor.terminate()
        wait_for_end(supervisor, interrupts)
        raise
    welcome(options, status, secret, detach=detach, output=output)
    if not detach:
        stay(home, supervisor, interrupts)


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
    key, inferctl = secret or "YOUR_KEY", command()
    note(f"\n{options.model} is served at {options.url}/v1")
    if secret:
        note(f"API key (shown only now): {secret}")
    else:
        note(f"API keys: those you have; `{inferctl} admin api-keys create NAME --local` makes another")
    note(f"""
Try:
  export INFERCTL_API_KEY={key}
  {inferctl} chat "What is the capital of France?"
  curl {options.url}/v1/chat/completions -H "Authorization: Bearer $INFERCTL_API_KEY" \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{options.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
""")
    if options.embedding is not None:
        note(f"""  curl {options.url}/v1/embeddings -H "Authorization: Bearer $INFERCTL_API_KEY" \\
    -H 'Content-Type: application/json' -d '{{"model": "{options.embedding.name}", "input": "Hello!"}}'
""")
    note(f"`{inferctl} server stop` stops it." if detach else "Ctrl-C stops it.")
    if options.engine == "sim":
        note(SIMULATOR)


def command() -> str:
    """How the user can call inferctl from where they are."""
    if shutil.which("inferctl"):
        return "inferctl"
    path = Path(sys.argv[0]).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def stay(home: Home, supervisor: subprocess.Popen[bytes], interrupts: Interrupts) -> None:
    """Wait for the end of the cluster; a signal stops it in order, a second one at once."""
    wait_for_end(supervisor, interrupts)
    if interrupts.num_received or supervisor.returncode == 0:
        note("stopped")
    else:
        raise CliError(f"the supervisor ended unexpectedly ({supervisor.returncode})", hint=f"see {home.logs}")


def wait_for_end(supervisor: subprocess.Popen[bytes], interrupts: Interrupts) -> None:
    """Wait for the end of the supervisor, passing on to it whatever asks us to stop."""
    pidfd = os.pidfd_open(supervisor.pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(interrupts.fd, select.POLLIN)
    num_passed = 0
    while supervisor.poll() is None:
        while num_passed < interrupts.num_received:
            note("stopping at once" if num_passed else "stopping; again to kill")
            supervisor.terminate()
            num_passed += 1
        poll.poll()
        interrupts.clear_fd()
    os.close(pidfd)

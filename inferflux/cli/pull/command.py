"""What `inferctl pull` and `inferctl models gc` do and say."""

from __future__ import annotations

import os
from dataclasses import asdict

from inferflux.cli.failure import CliError
from inferflux.cli.models import DEFAULT
from inferflux.cli.output import Format, note, print_json
from inferflux.cli.progress import Steps
from inferflux.cli.pull import collect as collecting
from inferflux.cli.pull import pull as pulling
from inferflux.cli.pull.source import parse
from inferflux.cli.state import ClusterState
from inferflux.errors import InferfluxError
from inferflux.paths import Home, models_dir

QUOTA = "INFERFLUX_MODELS_QUOTA_BYTES"


def pull(text: str, name: str | None, output: Format) -> None:
    """Get a model and keep to the quota."""
    directory = models_dir(os.environ)
    try:
        source = parse(text)
        with Steps() as steps:
            receipt = pulling.pull(source, name or source.name, directory, steps.update)
            collecting.enforce(directory, quota_bytes(), {receipt.name, *served()}, steps.update)
            steps.finish_all()
    except InferfluxError as e:
        raise CliError(e.message) from e
    if output is Format.JSON:
        print_json({"folder": str(directory / receipt.name), **asdict(receipt)})
        return
    note(f"{receipt.name}: {len(receipt.files)} files from {receipt.source} in {directory / receipt.name}")


def collect(quota_gb: float | None, output: Format) -> None:
    """Make room."""
    quota = quota_bytes() if quota_gb is None else int(quota_gb * 1e9)
    with Steps() as steps:
        done = collecting.collect(models_dir(os.environ), quota, {DEFAULT, *served()}, steps.update)
    if output is Format.JSON:
        print_json(asdict(done))
        return
    removed = f"{done.num_blobs} files, {done.num_partials} downloads and {len(done.models)} models removed"
    note(f"{removed}: {done.freed_bytes / 1e6:.1f} MB; {done.kept_bytes / 1e6:.1f} MB are kept")


def quota_bytes() -> int:
    """How much INFERFLUX_MODELS may hold; 0: no limit. Raises CliError."""
    text = os.environ.get(QUOTA, "0")
    if not text.isdecimal():
        raise CliError(f"{QUOTA} must be a number of bytes, is {text!r}")
    return int(text)


def served() -> set[str]:
    """Name the model of this home's cluster, running or not."""
    state = ClusterState.load(Home.from_env(os.environ).state_file)
    return {state.options.model} if state else set()

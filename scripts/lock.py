"""Write the lock files of the images: what pip resolves today, each wheel with its digest.

`scripts/lock.py` writes deploy/docker/<name>.lock for Python 3.11 on x86-64 Linux; run it there when pyproject.toml
has changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
LOCKS = {"control": "gateway,k8s", "guardrails": "guardrails", "worker-cpu": "gateway,cpu,nixl"}
TIMEOUT_S = 1800


def resolve(extras: str) -> list[dict[str, Any]]:
    """Ask pip what it would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, f"{REPOSITORY}[{extras}]"], check=True, stdout=subprocess.PIPE, timeout=TIMEOUT_S)
    found: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return [item for item in found if item["metadata"]["name"] != "inferflux"]


def line(item: dict[str, Any]) -> str:
    """Write one requirement."""
    meta, digests = item["metadata"], item["download_info"]["archive_info"]["hashes"]
    return f"{meta['name'].lower()}=={meta['version']} --hash=sha256:{digests['sha256']}"


def main() -> None:
    """Write the lock files that are named, or all."""
    for name in sys.argv[1:] or LOCKS:
        lines = sorted(map(line, resolve(LOCKS[name])))
        head = f"# inferflux[{LOCKS[name]}] for Python 3.11 on x86-64 Linux, by scripts/lock.py"
        (REPOSITORY / "deploy" / "docker" / f"{name}.lock").write_text("\n".join([head, *lines, ""]))


if __name__ == "__main__":
    main()

"""Run a cluster: `python -m tests.support.fake_kube --dir DIR`. It is ready when DIR/kubeconfig exists."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.fake_kube.cluster import serve
from tests.support.fake_kube.images import image_env

REPOSITORY = Path(__file__).parents[3]


def main() -> None:
    """Parse the command line and serve until a signal."""
    parser = argparse.ArgumentParser(prog="fake_kube", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="state of the cluster, e.g. /tmp/ifx-kube")
    directory = parser.parse_args().dir.absolute()
    if os.geteuid() != 0:
        sys.exit("fake_kube starts containers in namespaces of their own, so it must run as root")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    opened = tuple(dict.fromkeys([*_closed_to_others(Path(sys.base_prefix)), *_closed_to_others(REPOSITORY)]))
    asyncio.run(serve(directory, image_env(directory / "bin", REPOSITORY), opened))


def _closed_to_others(path: Path) -> Iterator[Path]:
    """Yield the directories on the way to `path` that only their owner may pass, e.g. /root."""
    for parent in path.resolve().parents:
        if not parent.stat().st_mode & 0o001:
            yield parent


main()

"""python -m tests.api: schemathesis asks whatever OpenAI's description allows, and judges every answer by it.

A violation is an answer that the description does not allow, or a 5xx. Exit status 1 when there is any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.api.cut import CUT
from tests.support.cluster import Cluster

ST = Path(sys.executable).parents[1] / "tools/api/bin/st"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@contextmanager
def site(chosen: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield url and key of a cluster: one that runs, or one of our own."""
    if chosen.url:
        yield chosen.url, os.environ["INFERCTL_API_KEY"]
        return
    with Cluster.start(engine=chosen.engine) as cluster:
        yield cluster.url, cluster.api_key


def main(argv: list[str]) -> int:
    """Run schemathesis."""
    parser = argparse.ArgumentParser(prog="python -m tests.api", description=__doc__)
    parser.add_argument("--url", help="a running cluster, with its key in INFERCTL_API_KEY; default: one of our own")
    parser.add_argument("--engine", default="sim", help="of our own cluster")
    parser.add_argument("--seconds", type=int, default=240, help="for all requests")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked")
    chosen = parser.parse_args(argv)
    with site(chosen) as (url, key):
        command = [str(ST), "run", str(CUT), "--url", f"{url}/v1", "--header", f"Authorization: Bearer {key}"]
        command += ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--mode", "all"]
        command += ["--max-time", str(chosen.seconds), "--seed", str(chosen.seed), "--workers", "2"]
        command += ["--suppress-health-check", "all", "--request-timeout", "60", "--continue-on-failure"]
        return subprocess.run([*command, "--no-color"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Failpoints in child processes: what fires, when, and the evidence it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inferflux import failpoints
from inferflux.errors import ConfigError, Internal
from inferflux.failpoints import EVERY, EXIT_STATUS, SITES, Failpoint, Failpoints

ROOT = Path(failpoints.__file__).parent.parent
PASS = """
import sys
from inferflux import failpoints
for i in range(5):
    failpoints.hit("decode.token")
    print(i, flush=True)
"""


BECOME = """
import os
from inferflux import failpoints
os.environ["INFERFLUX_INSTANCE_ID"] = "decode-2"
failpoints.renew()
"""


def run(tmp_path: Path, script: str = PASS, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "INFERFLUX_INSTANCE_ID": "decode-1", "IFX_FAILPOINTS_LOG": str(tmp_path / "log"), **env}
    return subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )


def evidence(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_a_process_kills_itself_at_the_hit_that_was_asked_for_and_leaves_evidence(tmp_path: Path) -> None:
    done = run(tmp_path, IFX_FAILPOINTS="decode.token:kill:3")

    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1"]
    [line] = evidence(tmp_path)
    assert (line["instance"], line["site"], line["action"], line["hits"]) == ("decode-1", "decode.token", "kill", 3)


def test_an_ordered_failpoint_fires_once_however_often_the_process_starts(tmp_path: Path) -> None:
    (tmp_path / "decode-1").write_text("decode.token:exit:2")

    first = run(tmp_path, IFX_FAILPOINTS_DIR=str(tmp_path))
    second = run(tmp_path, IFX_FAILPOINTS_DIR=str(tmp_path))

    assert (first.returncode, first.stdout.split()) == (EXIT_STATUS, ["0"])
    assert (second.returncode, len(second.stdout.split())) == (0, 5)
    assert len(evidence(tmp_path)) == 1


def test_a_fork_that_became_another_process_follows_its_new_name(tmp_path: Path) -> None:
    (tmp_path / "decode-2").write_text("decode.token:exit")

    assert run(tmp_path, BECOME + PASS, IFX_FAILPOINTS_DIR=str(tmp_path)).returncode == EXIT_STATUS
    assert [line["instance"] for line in evidence(tmp_path)] == ["decode-2"]


def test_another_process_s_failpoint_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "decode-0").write_text("decode.token:kill")

    assert run(tmp_path, IFX_FAILPOINTS_DIR=str(tmp_path)).returncode == 0


def test_without_them_a_site_is_a_constant(tmp_path: Path) -> None:
    assert not failpoints.ON
    assert run(tmp_path).returncode == 0
    assert not (tmp_path / "log").exists()


def test_flip_changes_one_bit_of_the_bytes_that_pass(tmp_path: Path) -> None:
    points = Failpoints({"IFX_FAILPOINTS": "xfer.read:flip:*", "IFX_FAILPOINTS_LOG": str(tmp_path / "log")})
    data = np.zeros((4, 8), np.uint8)

    points.hit("xfer.read", data)

    assert int(np.unpackbits(data).sum()) == 1
    assert [line["hits"] for line in evidence(tmp_path)] == [1]


def test_error_raises_one_of_our_errors() -> None:
    points = Failpoints({"IFX_FAILPOINTS": "prefill.start:error"})

    with pytest.raises(Internal, match=r"failpoint prefill\.start"):
        points.hit("prefill.start")
    points.hit("prefill.start")  # only at its turn


def test_parsing_knows_sites_actions_and_amounts() -> None:
    assert Failpoint.parse("decode.end:hang=2.5") == Failpoint("decode.end", "hang", 2.5, 1)
    assert Failpoint.parse("decode.end:sleep=20:*") == Failpoint("decode.end", "sleep", 0.02, EVERY)


@pytest.mark.parametrize(
    "text", ["nowhere:kill", "decode.end", "decode.end:kill=3", "decode.end:hang", "decode.end:kill:x"]
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="failpoint"):
        Failpoint.parse(text)


def test_every_site_is_in_the_code_and_in_the_documentation() -> None:
    roots = [*(ROOT / "inferflux").rglob("*.py"), *(ROOT / "services").rglob("*.py")]
    used = {site for path in roots for site in re.findall(r'"([a-z]+\.[a-z]+)"', _hits(path.read_text()))}
    documented = set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", (ROOT / "docs/chaos.md").read_text(), re.MULTILINE))

    assert used == set(SITES) == documented


def _hits(source: str) -> str:
    return "\n".join(re.findall(r"failpoints\.hit\((.*)\)", source))

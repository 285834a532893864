from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from inferflux.cli.plan import ClusterOptions
from inferflux.cli.state import ClusterState, is_alive, start_ticks, sweep, take_lock
from inferflux.paths import Home

OPTIONS = ClusterOptions("sim", "sim", port=9)


def test_state_survives_its_file(tmp_path):
    """What is saved is loaded."""
    state = ClusterState(OPTIONS, {12: 345})
    state.save(tmp_path / "state.json")

    assert ClusterState.load(tmp_path / "state.json") == state


def test_nonsense_is_no_state(tmp_path):
    """A missing, torn or foreign state file is the same as none."""
    path = tmp_path / "state.json"
    assert ClusterState.load(path) is None
    for text in ("", "{", "[]", '{"options": {}, "pids": {}}', '{"pids": []}'):
        path.write_text(text)
        assert ClusterState.load(path) is None


def test_one_supervisor_per_home(tmp_path):
    """The lock is exclusive and goes with whoever holds it."""
    home = Home(tmp_path).ensure()
    lock = take_lock(home)

    assert lock is not None
    assert take_lock(home) is None
    lock.close()
    again = take_lock(home)
    assert again is not None
    again.close()


def test_a_recycled_id_is_not_ours():
    """A process with the right id and another start time is somebody else."""
    ticks = start_ticks(os.getpid())

    assert ticks is not None
    assert is_alive(os.getpid(), ticks)
    assert not is_alive(os.getpid(), ticks - 1)


def test_sweep_ends_what_was_left_and_nothing_else():
    """Leftovers are gone when sweep returns; a process whose id was recycled lives on."""
    ours, theirs = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        for _ in range(2)
    )
    try:
        sweep({ours.pid: start_ticks(ours.pid) or 0, theirs.pid: 1})

        assert ours.wait(5) == -9
        assert theirs.poll() is None
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def test_zombies_are_not_alive():
    """A process that has ended but was not reaped counts as gone."""
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline

    assert start_ticks(child.pid) is None
    child.wait()

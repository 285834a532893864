from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from inferflux.errors import ConfigError
from inferflux.kv import handout
from inferflux.kv.arena import Arena
from tests.support.children import forked


def test_another_process_gets_the_arena_writable() -> None:
    arena = Arena.create(1 << 16)
    path: list[Path] = []

    def write(pipe: Connection) -> None:
        pipe.recv()
        fd = handout.take(path[0])
        theirs = Arena.attach(fd)
        os.close(fd)
        theirs.format(4096, num_pieces=4)
        theirs.slot(0)[:] = 7
        theirs.close()

    with handout.offered(arena.fd) as offered:
        path.append(offered)
        assert offered.parent.stat().st_mode & 0o077 == 0
        with forked(write) as child:
            child.send("go")

    assert not offered.parent.exists()
    assert (arena.num_pieces, arena.slot(0).sum()) == (4, 7 * 4096)
    arena.close()


def test_a_rank_on_another_host_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the arena is not on this host"):
        handout.take(tmp_path / "arena")

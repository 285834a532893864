"""Real second processes for tests that are about two processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

FORK = get_context("fork")
JOIN_S = 20


@contextmanager
def forked(work: Callable[[Connection], None]) -> Iterator[Connection]:
    """Run `work` in a forked child with a pipe to it; the pipe closes when the block ends.

    Fails when the child fails, be it by an assertion of its own.
    """
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=_run, args=(work, ours, theirs))
    child.start()
    theirs.close()
    try:
        with ours:
            yield ours
        child.join(JOIN_S)
        assert child.exitcode == 0, f"the child ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()
        child.close()


def _run(work: Callable[[Connection], None], parents: Connection, mine: Connection) -> None:
    parents.close()  # or the child would never see the pipe end
    with mine:
        work(mine)

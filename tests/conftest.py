"""For every test: it leaves the machine, and its event loop, as it found them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.leaks import Traces, left_behind, unfinished_tasks


@pytest.fixture(autouse=True)
def leaves_no_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves processes, file descriptors, arenas or shared memory behind.

    Autouse, so it is set up before and torn down after the test's own fixtures. Fixtures of a wider scope are set up
    earlier still: what they hold is not the test's.
    """
    before = Traces.now()
    yield
    leaks = left_behind(before)
    if _shares_fixtures(request):
        # A client shared by several tests opens connections when it likes.
        leaks = [leak for leak in leaks if ": socket:[" not in leak]
    if leaks:
        pytest.fail("left behind: " + "; ".join(leaks), pytrace=False)


@pytest.fixture
async def leaves_no_tasks() -> AsyncIterator[None]:
    """Fail an asynchronous test that leaves tasks running; pytest-asyncio would cancel them in silence."""
    yield
    if leaks := await unfinished_tasks():
        pytest.fail("left running: " + "; ".join(leaks), pytrace=False)


def pytest_sessionstart() -> None:
    """Keep the plugins from making an event loop that nobody closes: asyncio makes one where none was ever set."""
    asyncio.set_event_loop(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put `leaves_no_tasks` around each test that has an event loop of its own."""
    for item in items:
        if isinstance(item, pytest.Function) and _has_own_loop(item):
            item.fixturenames.insert(0, "leaves_no_tasks")


def _has_own_loop(item: pytest.Function) -> bool:
    mark = item.get_closest_marker("asyncio")
    is_shared = mark is not None and mark.kwargs.get("loop_scope", "function") != "function"
    return inspect.iscoroutinefunction(item.obj) and not is_shared


def _shares_fixtures(request: pytest.FixtureRequest) -> bool:
    own = request.node._fixtureinfo.name2fixturedefs  # pytest has no public way to ask
    shared = [name for name, definitions in own.items() if definitions[-1].scope != "function"]
    return any(not name.startswith(("_", "event_loop_policy", "tmp_path_factory")) for name in shared)

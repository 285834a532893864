"""For every test: it leaves the machine, and its event loop, as it found them."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.leaks import Traces, left_behind, unfinished_tasks

BEFORE = pytest.StashKey[Traces]()
# Machines differ in speed by an order of magnitude, and what is slow is no bug. In CI the same examples each time.
settings.register_profile(
    "inferflux", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("inferflux")


@pytest.fixture(autouse=True)
def _before(request: pytest.FixtureRequest) -> None:
    """Look before the test's own fixtures are set up; those of a wider scope are there already, and not the test's."""
    request.node.stash[BEFORE] = Traces.now()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail a test that leaves processes, file descriptors, arenas or shared memory behind."""
    yield
    if BEFORE not in item.stash:
        return
    # What fixtures returned must not live on in pytest: gRPC gives back its sockets with its last object.
    getattr(item, "funcargs", {}).clear()
    leaks = left_behind(item.stash[BEFORE])
    if _shares_fixtures(item):
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


def _shares_fixtures(item: pytest.Item) -> bool:
    """Whether the test uses fixtures of a wider scope than its own; pytest has no public way to ask."""
    own = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    shared = [name for name, definitions in own.items() if definitions[-1].scope != "function"]
    return any(not name.startswith(("_", "event_loop_policy", "tmp_path_factory")) for name in shared)

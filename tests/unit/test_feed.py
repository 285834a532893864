"""Watchers see the newest version, never an older one after it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from inferflux.feed import Feed


async def test_a_watcher_gets_the_newest_at_once_and_each_newer_one():
    """The first value comes without waiting, later ones as they are published."""
    feed: Feed[str] = Feed()
    feed.publish(5, "five")

    async with aclosing(feed.watch()) as watch:
        assert await anext(watch) == (5, "five")
        feed.publish(6, "six")
        assert await anext(watch) == (6, "six")


async def test_a_slow_watcher_skips_what_it_missed():
    """Versions between two reads of a watcher are coalesced into the last one."""
    feed: Feed[str] = Feed()
    feed.publish(1, "one")

    async with aclosing(feed.watch()) as watch:
        await anext(watch)
        for revision in range(2, 100):
            feed.publish(revision, str(revision))
        assert await anext(watch) == (99, "99")


async def test_an_older_or_equal_revision_is_not_published():
    """Revisions never go back."""
    feed: Feed[str] = Feed()
    feed.publish(5, "five")
    feed.publish(5, "other")
    feed.publish(4, "four")

    async with aclosing(feed.watch()) as watch:
        assert await anext(watch) == (5, "five")


async def test_a_watcher_that_is_ahead_waits_for_its_revision():
    """Nothing below `at_least` is ever yielded; the revision itself is."""
    feed: Feed[str] = Feed()
    feed.publish(5, "five")

    async with aclosing(feed.watch(at_least=7)) as watch:
        waiting = asyncio.ensure_future(anext(watch))
        feed.publish(6, "six")
        feed.publish(7, "seven")
        assert await waiting == (7, "seven")


async def test_closing_ends_all_watches():
    """Watchers that wait, and those that come later, end."""
    feed: Feed[str] = Feed()
    waiting = asyncio.ensure_future(_all(feed))
    await asyncio.sleep(0)
    feed.close()

    assert await waiting == []
    assert await _all(feed) == []


async def _all(feed: Feed[str]) -> list[tuple[int, str]]:
    return [news async for news in feed.watch()]

"""Versions of a model: pushed once, promoted, rolled back, never silently older."""

from __future__ import annotations

import pytest

from inferflux.errors import Conflict, InvalidRequest, NotFound
from inferflux.models.manifest import Manifest, SignedFile
from services.registry.releases import Release, Version

NOW_MS, KEY = 1_700_000_000_000, "ab" * 32


def version(number=1, digest="cd" * 32):
    manifest = Manifest(name="m", version=number, files={"config.json": SignedFile(digest, 2)})
    return Version.make(KEY, "/models/m", manifest.dump(), b"signature")[1]


def pushed(*numbers):
    release = Release()
    for number in numbers:
        release = release.push(version(number), NOW_MS)
    return release


def test_a_push_is_remembered_and_raises_no_floor():
    """Workers may try a version before it counts."""
    release = pushed(2, 1)

    assert [v.version for v in release.versions] == [1, 2]
    assert (release.current, release.floor) == (0, 0)
    assert release.push(version(2), NOW_MS) is release


def test_a_version_never_changes():
    """Other files need another number."""
    with pytest.raises(Conflict, match="other files"):
        pushed(1).push(version(1, "ef" * 32), NOW_MS)


def test_promoting_raises_the_floor():
    """And nothing older comes back by a push or by a promotion."""
    release = pushed(1, 2).promote(2, NOW_MS)

    assert (release.current, release.floor) == (2, 2)
    assert release.promote(2, NOW_MS) is release
    with pytest.raises(Conflict, match="roll back"):
        release.promote(1, NOW_MS)
    with pytest.raises(Conflict, match="older than 2"):
        pushed(2).promote(2, NOW_MS).push(version(1), NOW_MS)
    with pytest.raises(NotFound):
        release.promote(3, NOW_MS)


def test_a_rollback_goes_back_to_what_was_current():
    """As often as there were promotions; the history keeps it."""
    release = pushed(1, 2, 3).promote(1, NOW_MS).promote(3, NOW_MS).roll_back(NOW_MS)

    assert (release.current, release.floor) == (1, 1)
    assert [(e.action, e.version) for e in release.events[-3:]] == [("promote", 1), ("promote", 3), ("rollback", 1)]
    with pytest.raises(Conflict, match="no earlier"):
        release.roll_back(NOW_MS)


def test_a_release_reads_back():
    """Nothing is lost in the store."""
    release = pushed(1, 2).promote(1, NOW_MS)

    assert Release.from_json(release.to_json()) == release


@pytest.mark.parametrize(
    ("key", "manifest", "signature"),
    [("AB" * 32, None, b"s"), (KEY, b"{}", b"s"), (KEY, None, b""), (KEY, None, b"x" * (1 << 21))],
)
def test_what_is_no_version_is_refused(key, manifest, signature):
    """Before it is stored."""
    with pytest.raises(InvalidRequest):
        Version.make(key, "", manifest or Manifest(name="m", version=1).dump(), signature)

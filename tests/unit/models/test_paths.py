"""Names from elsewhere can't leave a model's folder."""

from __future__ import annotations

import os

import pytest

from inferflux.errors import ModelRefused
from inferflux.models.paths import check_name, check_names, list_files, open_beneath

BAD_NAMES = [
    "",
    ".",
    "..",
    "/",
    "//",
    "/etc/passwd",
    "//etc/passwd",
    "../config.json",
    "a/../../b",
    "a/..",
    "a/.",
    "./a",
    "a//b",
    "a/",
    "..\\config.json",
    "a\\b",
    "C:config.json",
    "C:/config.json",
    "\\\\server\\share",
    "file:///etc/passwd",
    "a:stream",
    "a\x00.json",
    "a\nb",
    "a\tb",
    "a\rb",
    "\x1b[2J",
    "\x7f",
    "a\x80b",
    "~",
    "~root/.ssh/id",
    "a/~b",
    " a",
    "a ",
    "a /b",
    "a.",
    "a./b",
    "a/b.",
    "con",
    "CON",
    "nul.json",
    "a/Aux.txt",
    "prn",
    "COM1",
    "lpt9.safetensors",
    "a*b",
    "a?b",
    "a|b",
    "a<b",
    "a>b",
    'a"b',
    "e\u0301.json",
    "a\u202eb",
    "a\u200bb",
    "a\u2028b",
    "\ufeffa",
    "\u00a0a",
    "\ud800",
    "x" * 256,
    "ab/" * 400 + "c",
    "/".join("abcdefghijklmnopq"),
    "\u00e9" * 128,
    "...",
    "a/...",
    "a/\u2003b",
]


def test_there_are_sixty_of_them():
    """As many as were promised, each another."""
    assert len(set(BAD_NAMES)) == len(BAD_NAMES) >= 60


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_name_is_refused_as_text_and_as_a_file(name, tmp_path):
    """Before anything is opened."""
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        for attempt in (lambda: check_name(name), lambda: open_beneath(root, name)):
            with pytest.raises(ModelRefused):
                attempt()
    finally:
        os.close(root)


def test_good_names_are_kept():
    """As hubs have them."""
    for name in ("config.json", "1_Pooling/config.json", "model-00001-of-00002.safetensors", ".gitattributes", "é.txt"):
        assert check_name(name) == name


@pytest.mark.parametrize(("one", "other"), [("a.json", "A.json"), ("straße", "STRASSE"), ("ﬁle", "file")])
def test_names_that_some_systems_take_for_one_are_refused(one, other):
    """Case and compatibility forms."""
    with pytest.raises(ModelRefused, match="the same as"):
        check_names([one, other])


def test_links_and_special_files_are_not_opened(tmp_path):
    """Neither as a file nor on the way to one, wherever they lead, and nobody hangs at a pipe."""
    inside = tmp_path / "in"
    (inside / "folder").mkdir(parents=True)
    (inside / "folder" / "file").write_text("x")
    (inside / "link").symlink_to(inside / "folder" / "file")
    (inside / "out").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    root = os.open(inside, os.O_RDONLY)
    try:
        for name in ("link", "out/in/folder/file", "pipe", "folder", "missing"):
            with pytest.raises(ModelRefused, match=name.split("/")[0]):
                open_beneath(root, name)
        fd = open_beneath(root, "folder/file")
        assert os.read(fd, 9) == b"x"
        os.close(fd)
    finally:
        os.close(root)


@pytest.mark.parametrize("make", ["link", "pipe", "dangling"])
def test_a_folder_with_anything_but_files_is_refused(make, tmp_path):
    """The entry is named."""
    (tmp_path / "file").write_text("x")
    if make == "pipe":
        os.mkfifo(tmp_path / make)
    else:
        (tmp_path / make).symlink_to(tmp_path / ("file" if make == "link" else "nowhere"))

    with pytest.raises(ModelRefused, match=make):
        list_files(tmp_path)

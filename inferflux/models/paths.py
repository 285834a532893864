"""Names of files inside a model, and opening them so that nothing outside of its folder is ever touched.

A name comes from somebody else: a hub, a wheel, a bucket, a signed manifest. It is checked as text first, the same on
every system, and then walked component by component without following a link, as openat2 does with RESOLVE_BENEATH and
RESOLVE_NO_SYMLINKS.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from inferflux.errors import ModelRefused

MAX_NAME_BYTES, MAX_COMPONENT_BYTES, MAX_DEPTH = 1024, 255, 16
# What Windows keeps for devices: a model folder on a share or in an archive must mean the same everywhere.
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')


def check_name(name: str) -> str:
    """Return `name` if it is a plain relative path, with / between components. Raises ModelRefused."""
    if objection := _objection(name):
        raise ModelRefused(f"file name {name[:200]!r}: {objection}")
    return name


def check_names(names: Iterable[str]) -> list[str]:
    """Check all names of a model, sorted; no two may be one file to a file system that ignores case."""
    checked = sorted(map(check_name, names))
    seen: dict[str, str] = {}
    for name in checked:
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise ModelRefused(f"file name {name!r}: the same as {other!r} where case does not count")
    return checked


def _objection(name: str) -> str | None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "not valid Unicode"
    parts = name.split("/")
    if not name or size > MAX_NAME_BYTES or len(parts) > MAX_DEPTH:
        return f"must have 1 to {MAX_NAME_BYTES} bytes in at most {MAX_DEPTH} components"
    if unicodedata.normalize("NFC", name) != name:
        return "not in Unicode's normal form C"
    return next(filter(None, map(_component_objection, parts)), None)


def _component_objection(part: str) -> str | None:
    if part in ("", ".", ".."):
        return "absolute, or has an empty, . or .. component"
    if len(part.encode()) > MAX_COMPONENT_BYTES:
        return f"a component has more than {MAX_COMPONENT_BYTES} bytes"
    if FORBIDDEN.search(part) or any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in part):
        return "has a backslash, colon, wildcard or invisible character"
    if part != part.strip() or part.endswith(".") or part.startswith("~"):
        return "a component begins with ~ or a space, or ends in a dot or a space"
    return "a device's name" if DEVICES.fullmatch(part) else None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def open_beneath(root: int, name: str) -> int:
    """Open the regular file `name` below the directory `root` (a descriptor) for reading; the caller closes it.

    No component may be a link, nothing but a regular file is opened. Raises ModelRefused.
    """
    *folders, last = check_name(name).split("/")
    try:
        with ExitStack() as stack:
            for folder in folders:
                root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
                stack.callback(os.close, root)
            # Without O_NONBLOCK a pipe in a file's place would hold us for ever.
            fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    except OSError as e:
        raise ModelRefused(f"{name}: {e.strerror}") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelRefused(f"{name}: not a regular file")
    return fd


def list_files(folder: Path) -> list[str]:
    """List all files below `folder`, relative to it, sorted. Raises ModelRefused for links and anything but files."""
    return check_names(_walk(folder, ""))


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, name + "/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise ModelRefused(f"{name}: a link or a special file")

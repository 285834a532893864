"""Starts one container: a process in namespaces of its own, on a read-only view of this machine's files.

The view is an overlay of `/`: what a container writes goes to a tmpfs that ends with it. Needs root.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory or file that the container sees at `target`."""

    source: Path
    target: str
    is_read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """All that it takes to start a container."""

    argv: Sequence[str]
    env: Mapping[str, str]
    mounts: Sequence[Mount]
    scratch: Path
    working_dir: str = "/"
    user: int | None = None
    group: int | None = None
    groups: Sequence[int] = ()
    has_privileges: bool = True
    """Whether it may gain privileges and keeps its capabilities."""
    is_root_read_only: bool = False
    is_init: bool = True
    """Whether the command is process 1 of its namespace; otherwise something else is, as with a shared one."""
    opened: Sequence[Path] = field(default=())
    """Directories that image files lie in and that all users may pass."""


class Container:
    """A container that runs."""

    def __init__(self, process: asyncio.subprocess.Process, spec: ContainerSpec) -> None:
        self._process = process
        self._spec = spec

    @property
    def pid(self) -> int | None:
        """The command's process id on this machine; None when it has ended or not begun."""
        init = _first_child(self._process.pid)
        return init if init is None or self._spec.is_init else _first_child(init)

    async def wait(self) -> int:
        """Wait for the end; returns the exit code, 128 and more for a signal."""
        code = await self._process.wait()
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End everything in the container at once."""
        if (init := _first_child(self._process.pid)) is not None:
            with suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)

    async def execute(self, argv: Sequence[str], timeout_s: float) -> bool:
        """Run a command beside it, as its user; returns whether that succeeded in time."""
        pid = self.pid
        if pid is None:
            return False
        enter = ("nsenter", "--target", str(pid), "--mount", "--pid", "--root", "--wd", "--")
        command = (*_DIE_WITH_PARENT, *enter, *_as_user(self._spec), *argv)
        null = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *command, stdin=null, stdout=null, stderr=null, env=self._spec.env
        )
        try:
            async with asyncio.timeout(timeout_s):
                return await process.wait() == 0
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def start(spec: ContainerSpec, log: BinaryIO) -> Container:
    """Start a container; its output goes to `log`."""
    spec.scratch.mkdir(parents=True, exist_ok=True)
    script = spec.scratch / "start.sh"
    script.write_text(_script(spec))
    unshare = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--propagation", "private")
    process = await asyncio.create_subprocess_exec(
        *(*_DIE_WITH_PARENT, *unshare, "--fork", "--kill-child=KILL", "sh", str(script)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=spec.env,
        start_new_session=True,
    )
    return Container(process, spec)


def _script(spec: ContainerSpec) -> str:
    """Write the steps from this machine's files to the container's, ending in its command."""
    base = shlex.quote(str(spec.scratch / "fs"))
    root = f"{base}/root"
    lines = [
        "set -e",
        f"mkdir -p {base}",
        f"mount -t tmpfs -o mode=755 scratch {base}",
        f"mkdir {base}/upper {base}/work {root}",
        f"mount -t overlay overlay -o lowerdir=/,upperdir={base}/upper,workdir={base}/work {root}",
        *(f"chmod a+x {root}{shlex.quote(str(path))}" for path in spec.opened),
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /sys {root}/sys",
        f"mount --rbind /dev {root}/dev",
        f"mount -t tmpfs -o mode=1777 shm {root}/dev/shm",
        f"mount -t tmpfs -o mode=755 run {root}/run",
        *(line for mount in spec.mounts for line in _mount(mount, root)),
        *([f"mount -o remount,ro {root}"] if spec.is_root_read_only else []),
    ]
    command = shlex.join(["chroot", "ROOT", *_as_user(spec), "env", f"--chdir={spec.working_dir}", *spec.argv])
    command = command.replace("ROOT", root, 1)
    if spec.is_init:
        return "\n".join([*lines, f"exec {command}", ""])
    return "\n".join([*lines, f"{command} &", "code=0", "wait $! || code=$?", "exit $code", ""])


def _mount(mount: Mount, root: str) -> list[str]:
    """Mount one thing where the container's own links say that its target is."""
    source = shlex.quote(str(mount.source))
    lines = [f"target={root}$(chroot {root} realpath -m {shlex.quote(mount.target)})"]
    is_file = mount.source.is_file()
    lines += ['mkdir -p "${target%/*}"', 'touch "$target"'] if is_file else ['mkdir -p "$target"']
    lines += [f'mount --bind {source} "$target"']
    return [*lines, 'mount -o remount,bind,ro "$target"'] if mount.is_read_only else lines


def _as_user(spec: ContainerSpec) -> list[str]:
    options = []
    if spec.user is not None:
        options += [f"--reuid={spec.user}"]
    if spec.group is not None or spec.user is not None:
        options += [f"--regid={spec.group or 0}"]
        groups = ",".join(map(str, spec.groups))
        options += [f"--groups={groups}"] if groups else ["--clear-groups"]
    if not spec.has_privileges:
        options += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return ["setpriv", *options, "--"] if options else []


def _first_child(pid: int) -> int | None:
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None
    return None

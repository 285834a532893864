"""The faults, each with the proof that it happened. What can't be proved did not happen: the round is void."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Process = dict[str, Any]
PROOF_S = 5.0
POLL_S = 0.01


class Void(Exception):
    """The fault can't be shown to have happened."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault. `roles`: one process of each is hit, at once. `spec`: of a failpoint.

    `span_s`: how long it lasts, from and to. `weight`: how often it is drawn.
    """

    action: str
    roles: tuple[str, ...]
    spec: str = ""
    span_s: tuple[float, float] = (0.0, 0.0)
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.action} {'+'.join(self.roles)} {self.spec}".strip()

    @property
    def is_deadly(self) -> bool:
        """Whether a process must be started again afterwards."""
        return self.action in {"kill", "drain"} or ":kill" in self.spec or ":exit" in self.spec


def catalogue(*, has_peers: bool) -> list[Fault]:
    """List all faults. `has_peers`: there are two gateways, so one may go."""
    faults = [
        Fault("kill", ("decode",), weight=6),
        Fault("kill", ("prefill",), weight=4),
        Fault("kill", ("policy",)),
        Fault("kill", ("registry",)),
        Fault("kill", ("redis",)),
        Fault("kill", ("registry", "decode"), weight=2),
        Fault("kill", ("prefill", "decode"), weight=2),
        Fault("drain", ("decode",), weight=1.5),
        Fault("drain", ("prefill",), weight=1.5),
        *(Fault("stall", (role,), span_s=(0.2, 0.9), weight=1.5) for role in ("decode", "prefill")),
        *(
            Fault("stall", (role,), span_s=(0.2, 0.9), weight=0.7)
            for role in ("gateway", "policy", "registry", "redis")
        ),
        *(Fault("hang", (role,), span_s=(3.0, 4.0), weight=0.8) for role in ("decode", "prefill")),
        *(Fault("hang", (role,), span_s=(3.0, 4.0), weight=0.3) for role in ("policy", "registry", "redis")),
        Fault("leave", (), weight=3),
        *(Fault("failpoint", ("prefill",), f"{site}:kill", weight=1.5) for site in PREFILL_DEATHS),
        *(Fault("failpoint", ("decode",), f"{site}:kill", weight=1.5) for site in DECODE_DEATHS),
        *(Fault("failpoint", ("prefill",), f"{site}:error") for site in PREFILL_ERRORS),
        Fault("failpoint", ("prefill",), "prefill.start:hang=1"),
        Fault("failpoint", ("decode",), "decode.token:hang=0.8:20"),
        Fault("failpoint", ("decode",), "xfer.read:flip", weight=3),
        Fault("failpoint", ("decode",), "xfer.read:sleep=300"),
    ]
    if has_peers:
        faults += [Fault("hang", ("gateway",), span_s=(3.0, 4.0), weight=0.3)]
        faults += [Fault("kill", ("gateway",), weight=2), Fault("failpoint", ("gateway",), "gateway.batch:kill:10")]
        faults += [Fault("failpoint", ("gateway",), "gateway.routed:kill:2")]
    return faults


PREFILL_DEATHS = ("prefill.start", "arena.allocated", "ticket.published", "prefill.computed", "ticket.issued")
PREFILL_ERRORS = ("prefill.start", "prefill.computed", "ticket.issued")
DECODE_DEATHS = (
    "decode.start",
    "decode.admitted",
    "xfer.read",
    "decode.token",
    "decode.token:2",
    "decode.token:50",
    "decode.end",
    "session.batch:5",
)


def spec_of(site_and_nth: str) -> str:
    """Put the action between the site and the number: `decode.token:2:kill` -> `decode.token:kill:2`."""
    parts = site_and_nth.split(":")
    if len(parts) == 3 and parts[1].isdecimal():
        return ":".join((parts[0], parts[2], parts[1]))
    return site_and_nth


class Injector:
    """Does it. `folder`, `log`: where processes look for failpoints and say that they fired."""

    def __init__(self, folder: Path, log: Path, rng: random.Random) -> None:
        self._folder = folder
        self._log = log
        self._rng = rng

    async def inject(self, fault: Fault, targets: list[Process]) -> list[str]:
        """Do it to the targets, until it is over; returns the proof. Raises Void."""
        if fault.action == "failpoint":
            return [await self._arm(target, spec_of(fault.spec), fault) for target in targets]
        acts = {"kill": self._kill, "drain": self._drain, "stall": self._stop, "hang": self._stop}
        return list(await asyncio.gather(*(acts[fault.action](target, fault) for target in targets)))

    async def _kill(self, target: Process, _: Fault) -> str:
        return await end(target, signal.SIGKILL, PROOF_S)

    async def _drain(self, target: Process, _: Fault) -> str:
        return await end(target, signal.SIGTERM, 30.0)

    async def _stop(self, target: Process, fault: Fault) -> str:
        """Stop the process with all of its group, for a while."""
        pid, span_s = target["pid"], self._rng.uniform(*fault.span_s)
        group = -pid if os.getpgid(pid) == pid else pid
        os.kill(group, signal.SIGSTOP)
        try:
            await until(lambda: state_of(pid) == "T", f"{target['id']} does not stop")
            await asyncio.sleep(span_s)
            if state_of(pid) != "T":
                raise Void(f"{target['id']} did not stay stopped")
        finally:
            with suppress(ProcessLookupError):
                os.kill(group, signal.SIGCONT)
        await until(lambda: state_of(pid) != "T", f"{target['id']} does not go on")
        return f"{target['id']}: /proc/{pid}/stat was T for {span_s:.2f} s"

    async def _arm(self, target: Process, spec: str, fault: Fault) -> str:
        """Order a failpoint, and wait for its line in the log."""
        order, start = self._folder / target["id"], self._log.stat().st_size if self._log.exists() else 0
        partial = order.with_name(f".{order.name}")
        partial.write_text(spec)
        partial.replace(order)
        pidfd = os.pidfd_open(target["pid"])
        try:
            line = await until(lambda: self._fired(start, target), f"{spec} was not reached at {target['id']}")
            if fault.is_deadly:
                await until(lambda: has_ended(pidfd), f"{target['id']} lives on after {spec}")
        finally:
            order.unlink(missing_ok=True)
            os.close(pidfd)
        return f"{target['id']}: {line['site']} hit {line['hits']} times by pid {line['pid']}, {line['action']}"

    def _fired(self, start: int, target: Process) -> dict[str, Any] | None:
        with suppress(FileNotFoundError), self._log.open("rb") as log:
            log.seek(start)
            lines = [json.loads(line) for line in log.read().splitlines()]
            return next((line for line in lines if line["instance"] == target["id"]), None)
        return None


async def end(target: Process, signum: int, timeout_s: float) -> str:
    """Send a signal and wait until the kernel says that the process has ended."""
    pid = target["pid"]
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signum)
        await until(lambda: has_ended(pidfd), f"{target['id']} does not end", timeout_s)
    finally:
        os.close(pidfd)
    return f"{target['id']}: pidfd of {pid} says it ended after {signal.Signals(signum).name}"


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended; it need not be our child."""
    return bool(select.select([pidfd], [], [], 0)[0])


def state_of(pid: int) -> str:
    """Read a process's state; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


async def until(check: Any, complaint: str, timeout_s: float = PROOF_S) -> Any:
    """Wait until `check` returns something true and return it. Raises Void."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := check():
            return result
        await asyncio.sleep(POLL_S)
    raise Void(complaint)

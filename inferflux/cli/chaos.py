"""`inferctl chaos`: break one process of the running local cluster in the middle of a stream, and say what that did.

The same request is answered twice: first undisturbed, then with the fault. All it does is to send signals to processes
that the supervisor names, so it needs no other rights than those of the cluster's owner.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inferflux.cli import launch
from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table
from inferflux.cli.talk import CHAT, text_in
from inferflux.paths import Home

HANG_S = 3.5
PROOF_S = 5.0
RECOVERY_S = 300.0
RETRY_S = 30.0
POLL_S = 0.05
# The stream must run for a while: long enough to be hit, short enough to be watched.
NUM_TOKENS = 160
AT_EVENT = 8
PROMPT = "Tell me the story of a lighthouse keeper and a storm, in as much detail as you can."

Process = dict[str, Any]


@dataclass(slots=True)
class Verdict:
    """What one fault did to one stream. Times in seconds; `recovery_s`: until the process was ready again."""

    fault: str
    process: str
    evidence: str = ""
    num_events: int = 0
    num_connections: int = 0
    gap_s: float = 0.0
    recovery_s: float = 0.0
    is_complete: bool = False
    is_exact: bool = False
    error: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether the client noticed nothing but a gap, and the process is back."""
        return self.is_complete and self.is_exact and bool(self.evidence)


class Stream:
    """One answer as it comes. `on_event` is called with the number of each event."""

    def __init__(self, api: Api, on_event: Callable[[int], None] = lambda _: None) -> None:
        self._api = api
        self._on_event = on_event
        self.text = ""
        self.num_events = 0
        self.gap_s = 0.0

    def read(self) -> Stream:
        """Read all of it. Raises CliError when it breaks."""
        last_at = 0.0
        for event in self._api.stream(CHAT, _body(self._api)):
            now = time.monotonic()
            self.gap_s = max(self.gap_s, now - last_at) if last_at else 0.0
            last_at = now
            self.text += "".join(text_in(choice, "delta") for choice in event.get("choices", ()))
            self.num_events += 1
            self._on_event(self.num_events)
        return self


def run(fault: str, output: Format, *, is_full: bool) -> None:
    """Inject `fault` (`kill-decode`...) and print the verdict. Raises CliError when it is not a good one."""
    action, _, role = fault.partition("-")
    home = Home.from_env(os.environ)
    with Api() as api:
        note("asking undisturbed")
        wanted = Stream(api).read().text
        verdict = disturb(api, home, fault, action, role, wanted)
    _show(verdict, output, is_full=is_full)
    if not verdict.is_good:
        raise CliError(f"{fault} of {verdict.process} was not survived: {verdict.error or 'the text differs'}")


def disturb(api: Api, home: Home, fault: str, action: str, role: str, wanted: str) -> Verdict:
    """Ask again, with the fault on its way, and compare."""
    verdict = Verdict(fault, role)
    blow = Blow(home, action, role, verdict)
    # A prompt is computed in milliseconds, before the first event: then or never.
    early = threading.Timer(0.005, blow.strike) if role == "prefill" else None
    note(f"asking again, with {fault}")
    if early is not None:
        early.start()
    stream = Stream(api, lambda number: blow.strike() if number == AT_EVENT and early is None else None)
    try:
        _read_to_the_end(stream, verdict, wanted)
    finally:
        if early is not None:
            early.join()
        blow.undo()
    verdict.is_complete = not verdict.error
    verdict.num_events, verdict.gap_s = stream.num_events, round(stream.gap_s, 3)
    note("waiting until it is back")
    verdict.recovery_s = round(blow.wait_recovered(), 2)
    return verdict


def _read_to_the_end(stream: Stream, verdict: Verdict, wanted: str) -> None:
    """Read; a client whose gateway dies comes again, and must not hear anything else than before."""
    deadline = time.monotonic() + RETRY_S
    while True:
        verdict.num_connections += 1
        try:
            stream.read()
        except CliError as e:
            if not wanted.startswith(stream.text):
                verdict.notes.append("what came before the break was wrong")
            is_gateway = verdict.process.startswith("gateway")
            if not is_gateway or time.monotonic() > deadline:
                verdict.error = e.message
                return
            stream.text = ""
            time.sleep(POLL_S)
        else:
            verdict.is_exact = stream.text == wanted and not verdict.notes
            return


class Blow:
    """The fault itself, once. `strike` may run in a thread beside the stream."""

    def __init__(self, home: Home, action: str, role: str, verdict: Verdict) -> None:
        self._home = home
        self._action = action
        self._verdict = verdict
        self._target = find_target(home, role)
        self._struck_at = 0.0
        self._wake: threading.Timer | None = None
        verdict.process = self._target["id"]

    def strike(self) -> None:
        """Do it, and keep the proof. Does nothing the second time."""
        if self._struck_at:
            return
        self._struck_at = time.monotonic()
        if self._verdict.process.startswith("decode"):
            self._target = busiest(self._home, self._target)
            self._verdict.process = self._target["id"]
        pid = self._target["pid"]
        if self._action == "kill":
            self._verdict.evidence = kill(pid)
        else:
            self._verdict.evidence = stop(pid)
            self._wake = threading.Timer(HANG_S, _signal_group, (pid, signal.SIGCONT))
            self._wake.start()

    def undo(self) -> None:
        """Let a hanging process go on."""
        if self._wake is not None:
            self._wake.join()

    def wait_recovered(self) -> float:
        """Wait until the process is ready; returns how long after the blow. Raises CliError."""
        if not self._verdict.evidence:
            raise CliError(f"the stream was over before {self._verdict.fault} could happen: it proves nothing")
        deadline = time.monotonic() + RECOVERY_S
        while time.monotonic() < deadline:
            now = next(p for p in launch.status(self._home)["processes"] if p["id"] == self._target["id"])
            if now["ready"] and (self._action == "hang" or now["pid"] != self._target["pid"]):
                return time.monotonic() - self._struck_at
            time.sleep(POLL_S)
        raise CliError(f"{self._target['id']} is not back after {RECOVERY_S:.0f} s")


def find_target(home: Home, role: str) -> Process:
    """Choose a process of a role. Raises CliError when none of them is ready."""
    processes = launch.status(home)["processes"]
    for process in processes:
        if process["role"] == role and process["ready"]:
            return dict(process)
    raise CliError(f"no {role} process of this cluster is ready", Exit.USAGE if role == "redis" else Exit.FAILED)


def busiest(home: Home, otherwise: Process) -> Process:
    """Choose the decode worker that runs the most requests: ours, if nobody else uses the cluster."""
    from inferflux.cli import operator  # noqa: PLC0415 - gRPC only now

    ready = [p for p in launch.status(home)["processes"] if p["role"] == "decode" and p["ready"]]
    loads = {p["id"]: operator.num_running(home, p["id"], "decode") for p in ready}
    return max(ready, key=lambda p: loads[p["id"]], default=otherwise)


def kill(pid: int) -> str:
    """Kill a process; returns the proof. Raises CliError when there is none."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not select.select([pidfd], [], [], PROOF_S)[0]:
            raise CliError(f"process {pid} does not end")
    finally:
        os.close(pidfd)
    return f"pidfd: process {pid} ended after SIGKILL"


def stop(pid: int) -> str:
    """Stop a process and all of its group; returns the proof. Raises CliError when there is none."""
    _signal_group(pid, signal.SIGSTOP)
    deadline = time.monotonic() + PROOF_S
    while time.monotonic() < deadline:
        if _state_of(pid) == "T":
            return f"/proc/{pid}/stat: T (stopped), for {HANG_S} s"
        time.sleep(0.001)
    _signal_group(pid, signal.SIGCONT)
    raise CliError(f"process {pid} does not stop")


def _signal_group(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(-pid if os.getpgid(pid) == pid else pid, signum)


def _state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _body(api: Api) -> dict[str, Any]:
    message = {"role": "user", "content": PROMPT}
    return {
        "model": api.default_model(),
        "messages": [message],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


def _rows(verdict: Verdict) -> Iterator[tuple[str, Any]]:
    yield "verdict", "survived" if verdict.is_good else "NOT survived"
    yield "fault", f"{verdict.fault} ({verdict.process})"
    yield "evidence", verdict.evidence
    yield "text", "equal to the undisturbed run" if verdict.is_exact else "differs or incomplete"
    yield "longest gap", f"{verdict.gap_s:.3f} s"
    yield "ready again", f"after {verdict.recovery_s:.2f} s"


def _show(verdict: Verdict, output: Format, *, is_full: bool) -> None:
    """Print the verdict; in full: everything that was measured."""
    if output is Format.JSON:
        print_json({"survived": verdict.is_good, **asdict(verdict)})
        return
    rows = list(_rows(verdict))
    if is_full:
        rows += [(key, value) for key, value in asdict(verdict).items() if key not in {"fault", "evidence"}]
    print_table(("what", "result"), rows)

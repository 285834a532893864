"""Named places where a test makes this process die, hang, fail or read damaged bytes, and proves that it did.

    if failpoints.ON:
        failpoints.hit("decode.token")

Off (and then a site costs the look at one constant) unless the environment says otherwise when the process starts:

    IFX_FAILPOINTS       site:action[:nth], several by comma; nth counts the hits of this process, `*` means every one
    IFX_FAILPOINTS_DIR   a folder; the file named like the process (INFERFLUX_INSTANCE_ID) holds one more failpoint.
                         It may be put there at any time and is removed as it fires: the process that starts anew lives.
    IFX_FAILPOINTS_LOG   a file; each failpoint that fires appends a line of JSON to it before it acts

Actions: `kill` (SIGKILL), `stop` (SIGSTOP), `exit`, `hang=SECONDS` and `sleep=MS` (block the thread), `error` (raises
Internal), `flip` (of a bit, where a site passes bytes).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from inferflux.errors import ConfigError, Internal

if TYPE_CHECKING:  # the gateway starts without it
    import numpy as np
    import numpy.typing as npt

SITES: Final = {
    "prefill.start": "a prefill worker has taken a request",
    "arena.allocated": "slots are taken, nothing is in them yet",
    "ticket.published": "blocks are in the arena, nobody knows of them yet",
    "prefill.computed": "the engine has returned the prompt, no ticket is issued yet",
    "ticket.issued": "the tickets exist, the answer is not sent",
    "ticket.released": "a gateway gives tickets back, they still live",
    "decode.start": "a decode worker has taken a request",
    "decode.admitted": "its tickets are verified, nothing is read",
    "xfer.read": "a block was copied, its digest is not checked; passes the bytes",
    "decode.token": "a frame of a response is on its way to the session",
    "decode.end": "the last frame of a response is on its way to the session",
    "session.batch": "a batch is about to be sent to a gateway",
    "gateway.routed": "the gateway has chosen the workers of a request",
    "gateway.batch": "a batch has come from a decode worker",
}
ACTIONS: Final = ("kill", "stop", "exit", "hang", "sleep", "error", "flip")
EXIT_STATUS = 70
EVERY = 0


@dataclass(frozen=True, slots=True)
class Failpoint:
    """What happens at the `nth` hit of a site, or at EVERY one. `amount`: of `hang` and `sleep`, in seconds."""

    site: str
    action: str
    amount: float = 0.0
    nth: int = 1

    @classmethod
    def parse(cls, text: str) -> Failpoint:
        """Read `site:action[=amount][:nth]`. Raises ConfigError for anything else."""
        site, _, rest = text.strip().partition(":")
        deed, _, nth = rest.partition(":")
        action, _, amount = deed.partition("=")
        if site not in SITES or action not in ACTIONS or bool(amount) != (action in {"hang", "sleep"}):
            raise ConfigError(f"no failpoint {text[:100]!r}")
        try:
            amount_s = float(amount or 0) / (1000 if action == "sleep" else 1)
            return cls(site, action, amount_s, EVERY if nth == "*" else int(nth or 1))
        except ValueError as e:
            raise ConfigError(f"failpoint {text[:100]!r}: not a number") from e


class Failpoints:
    """The failpoints of one process. `hit` and `damage` may be called from any thread."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._name = environ.get("INFERFLUX_INSTANCE_ID", "")
        self._points = [Failpoint.parse(text) for text in environ.get("IFX_FAILPOINTS", "").split(",") if text]
        folder, log = environ.get("IFX_FAILPOINTS_DIR"), environ.get("IFX_FAILPOINTS_LOG")
        self._order = Path(folder) / self._name if folder else None
        self._log = Path(log) if log else None
        self._hits: Counter[str] = Counter()
        self._ordered: tuple[str, int] = ("", 0)

    def hit(self, site: str, data: npt.NDArray[np.uint8] | None = None) -> None:
        """Pass a site. `data`: bytes that `flip` may change in place."""
        self._hits[site] += 1
        for point in self._points:
            if point.site == site and point.nth in {EVERY, self._hits[site]}:
                self._fire(point, data)
        if self._order is not None and (ordered := self._due(self._order, site)):
            self._fire(ordered, data)

    def _due(self, order: Path, site: str) -> Failpoint | None:
        """Take the failpoint out of its file when this hit is its turn; it counts from when it was put there."""
        try:
            text = order.read_text()
        except FileNotFoundError:
            return None
        point = Failpoint.parse(text)
        if point.site != site:
            return None
        number = self._ordered[1] + 1 if self._ordered[0] == text else 1
        self._ordered = text, number
        if number < point.nth:
            return None
        self._ordered = "", 0
        try:
            order.unlink()  # whoever removes it fires, be there several threads
        except FileNotFoundError:
            return None
        return point

    def _fire(self, point: Failpoint, data: npt.NDArray[np.uint8] | None) -> None:
        self._note(point)
        match point.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(EXIT_STATUS)
            case "error":
                raise Internal(f"failpoint {point.site}")
            case "flip" if data is not None and data.size:
                data.reshape(-1)[data.size // 2] ^= 1
            case _:
                time.sleep(point.amount)

    def _note(self, point: Failpoint) -> None:
        """Append the evidence in one write, so that lines of several processes don't mix."""
        if self._log is None:
            return
        line = {
            "at": time.time(),
            "instance": self._name,
            "pid": os.getpid(),
            "site": point.site,
            "action": point.action,
            "hits": self._hits[point.site],
        }
        with self._log.open("ab", buffering=0) as log:
            log.write(json.dumps(line).encode() + b"\n")


ON: Final = "IFX_FAILPOINTS" in os.environ or "IFX_FAILPOINTS_DIR" in os.environ
_points = Failpoints(os.environ) if ON else None


def renew() -> None:
    """Read the environment again: this process was forked from one of another name."""
    global _points  # noqa: PLW0603 - of the process, as the environment is
    _points = Failpoints(os.environ) if ON else None


def hit(site: str, data: npt.NDArray[np.uint8] | None = None) -> None:
    """Pass a site of SITES; `data` as in Failpoints.hit. Raises Internal where a failpoint says `error`."""
    if _points is not None:
        _points.hit(site, data)

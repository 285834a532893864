"""Signals that ask a command to stop: Ctrl-C, SIGTERM, a closed terminal. Main thread only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Counts the signals that arrive inside its `with` block.

    Each raises KeyboardInterrupt at once, as Ctrl-C does by default, but for the time of `deferred`: there an exception
    out of nowhere could get lost (in a destructor) or leave processes behind, so one has to look at `num_received`.
    """

    def __init__(self) -> None:
        self.num_received = 0
        self._is_deferred = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write_fd)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._write_fd)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only count inside this block."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.num_received:
            raise KeyboardInterrupt

    def clear_fd(self) -> None:
        """Make `fd`, which is readable after a signal, unreadable until the next one."""
        with suppress(BlockingIOError):
            while os.read(self.fd, 64):
                pass

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.num_received += 1
        if not self._is_deferred:
            raise KeyboardInterrupt

"""How a command ends badly: one clear line on stderr and an exit status that scripts can tell apart."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of inferctl, documented in `inferctl --help`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    AUTH = 4
    INTERRUPTED = 130


class CliError(Exception):
    """Ends the command. `hint`: what to do about it, on a second line."""

    def __init__(self, message: str, code: Exit = Exit.FAILED, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint

"""What inferctl prints: results on stdout as a table or JSON, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any


class Format(StrEnum):
    """Value of -o/--output."""

    TABLE = "table"
    JSON = "json"


def print_json(document: Any) -> None:
    """Print a result for programs."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a result for people; not cut to 80 columns when it goes to a file or a pipe."""
    from rich.console import Console  # noqa: PLC0415 - inferctl starts fast
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column not in ("reason", "failed workers"))
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(table)


def note(line: str) -> None:
    """Say something to people."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()

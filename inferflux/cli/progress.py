"""How inferctl shows that it works: bars on a terminal, one line per finished step anywhere else. All on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Steps that run one after the other or side by side, each named once and updated by its name."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, name: str, fraction: float | None, detail: str = "") -> None:
        """Show how far a step is; `fraction` None = unknown. A step at 1 is finished, and stays so."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=None, detail="")
            self._began_at[name] = time.monotonic()
        total = None if fraction is None else 1.0
        self._bars.update(self._tasks[name], total=total, completed=fraction or 0.0, detail=detail)

    def finish(self, name: str, done: str = "done") -> None:
        """Mark a step as done."""
        self.update(name, 1.0, done)
        began_at = self._began_at.pop(name, None)
        if began_at is not None and not self._console.is_terminal:
            self._console.print(f"{name}: {done} after {time.monotonic() - began_at:.1f} s", markup=False)

    def finish_all(self) -> None:
        """Mark everything that was begun as done."""
        for name in list(self._began_at):
            self.finish(name)

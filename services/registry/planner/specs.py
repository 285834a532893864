"""The specs in force: what operators put, over what the deployment's file says. Both are read again each time."""

from __future__ import annotations

import logging
from pathlib import Path

from inferflux.errors import InvalidRequest
from services.registry.planner import book
from services.registry.planner.book import PoolBook
from services.registry.planner.spec import PoolSpec
from services.registry.planner.store import PlannerStore

log = logging.getLogger(__name__)


class Specs:
    """Reads specs. `file`: a JSON array of them, e.g. from a ConfigMap; None: there is none."""

    def __init__(self, store: PlannerStore, file: Path | None) -> None:
        self._store = store
        self._file = file
        self._of_file: dict[str, PoolSpec] = {}
        self._text = ""

    async def read(self) -> PoolBook:
        """Return the book in force; its revision is that of what operators put. Raises Unavailable."""
        stored = await self.put()
        return PoolBook(stored.revision, {**self._read_file(), **stored.pools})

    async def put(self) -> PoolBook:
        """Return the book of what operators put alone. Raises Unavailable."""
        return await self._store.read()

    def _read_file(self) -> dict[str, PoolSpec]:
        """Read the file if it has changed; one that cannot be read leaves the last specs in force."""
        if self._file is None:
            return {}
        try:
            text = self._file.read_text(encoding="utf-8")
            if text != self._text:
                self._of_file, self._text = book.decode(text), text
                log.info("pools read", extra={"file": str(self._file), "pools": sorted(self._of_file)})
        except (OSError, UnicodeDecodeError, InvalidRequest) as e:
            log.warning("file of pools not used", extra={"file": str(self._file), "reason": str(e)})
        return self._of_file

"""What `inferctl pull` remembers of a model: where it came from and what it consists of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = ".pulled"


@dataclass(frozen=True, slots=True)
class Receipt:
    """`source`: a URI, at the exact version. `files`: SHA-256 by name. `fetched`: that of what was fetched, by name.

    `converted_from`: the GGUF file, "" = nothing was converted.
    """

    name: str
    source: str
    files: Mapping[str, str]
    fetched: Mapping[str, str]
    converted_from: str = ""
    licence: str = ""

    @property
    def path_in(self) -> str:
        """File name, below the models directory."""
        return f"{DIRECTORY}/{self.name}.json"

    def save(self, models_dir: Path) -> None:
        """Write atomically."""
        path = models_dir / self.path_in
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(path)

    @classmethod
    def load(cls, models_dir: Path, name: str) -> Receipt | None:
        """Read one; None when there is none."""
        try:
            return cls(**json.loads((models_dir / DIRECTORY / f"{name}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @classmethod
    def all(cls, models_dir: Path) -> list[Receipt]:
        """All receipts, those of the longest unused models first."""
        paths = sorted((models_dir / DIRECTORY).glob("[!.]*.json"), key=lambda path: path.stat().st_mtime)
        return [receipt for path in paths if (receipt := cls.load(models_dir, path.stem))]

    def touch(self, models_dir: Path) -> None:
        """Note that the model is used."""
        os.utime(models_dir / self.path_in)

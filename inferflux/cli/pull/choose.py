"""Which files of a repository make a model. Pure.

Safetensors with their configuration if there are any; else the best GGUF file, which is converted. Pickles, code and
other frameworks' weights are never taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from inferflux.cli.models import ModelError
from inferflux.models.paths import check_names

# Best first: Q4_K_M is what most people run, then what is near in quality and size, then the rest by quality.
QUANTIZATIONS = (
    *("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "Q4_1", "Q4_0", "Q5_1", "Q5_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "BF16", "F16", "F32", "Q2_K"),
)
SIGNATURE = "model.sig"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
MODULE = re.compile(r"\d+_[A-Za-z]+/(config\.json|model\.safetensors)")
COMPANIONS = {".json", ".jinja", ".model", ".txt"}
NOT_OURS = ("README", "LICENSE", "NOTICE", "requirements")


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to get, or one GGUF to get and convert. `folder`: what they lie in, "." = at the top."""

    files: tuple[str, ...]
    gguf: str = ""
    folder: str = "."

    @property
    def targets(self) -> dict[str, str]:
        """Where each file goes, relative to the model's own folder."""
        return {name: PurePosixPath(name).relative_to(self.folder).as_posix() for name in self.files}


def choose(names: Iterable[str], wanted: str = "") -> Choice:
    """Choose among a repository's files; `wanted`: a GGUF file by name. Raises ModelError or ModelRefused."""
    names = check_names(names)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if wanted:
        if named := [n for n in ggufs if n == wanted or n.endswith(f"/{wanted}")]:
            return _alone(named[0])
        raise ModelError(f"there is no {wanted!r}; there are {', '.join(ggufs) or 'no GGUF files'}")
    if choice := _folder(names):
        return choice
    if gguf := best_gguf(ggufs):
        return _alone(gguf)
    raise ModelError("neither safetensors with a config.json nor a GGUF file in one piece is there")


def best_gguf(names: Iterable[str]) -> str:
    """Choose by quantization; "" when there is none in one piece."""
    whole = [name for name in names if not SHARD.search(name) and "mmproj" not in name.lower()]
    return min(whole, key=lambda name: (_rank(name), name), default="")


def _rank(name: str) -> int:
    parts = re.split(r"[.\-]", PurePosixPath(name).name.upper())
    return next((rank for rank, quantization in enumerate(QUANTIZATIONS) if quantization in parts), len(QUANTIZATIONS))


def _alone(gguf: str) -> Choice:
    return Choice((gguf,), gguf, PurePosixPath(gguf).parent.as_posix())


def _folder(names: list[str]) -> Choice | None:
    """The first folder with config.json and safetensors; all of it, and nothing else, when it is signed."""
    for config in sorted((n for n in names if PurePosixPath(n).name == "config.json"), key=lambda n: n.count("/")):
        folder = PurePosixPath(config).parent
        below = [name for name in names if PurePosixPath(name).is_relative_to(folder)]
        beside = [name for name in below if PurePosixPath(name).parent == folder]
        if weights := _weights(beside):
            is_signed = (folder / SIGNATURE).as_posix() in beside
            chosen = (
                below if is_signed else sorted({*weights, *filter(_is_companion, beside), *_modules(folder, below)})
            )
            return Choice(tuple(chosen), folder=folder.as_posix())
    return None


def _modules(folder: PurePosixPath, names: list[str]) -> list[str]:
    """How a sentence-transformers model makes one vector of many: each module has a folder, such as 1_Pooling."""
    if (folder / "modules.json").as_posix() not in names:
        return []
    return [n for n in names if MODULE.fullmatch(PurePosixPath(n).relative_to(folder).as_posix())]


def _weights(names: list[str]) -> list[str]:
    """One set of weights: with an index its shards, else the file that everybody names so, else all."""
    found = [name for name in names if name.endswith(".safetensors")]
    shards = [name for name in found if SHARD.search(name)]
    has_index = any(name.endswith("model.safetensors.index.json") for name in names)
    whole = [name for name in found if PurePosixPath(name).name == "model.safetensors"]
    return shards if has_index and shards else whole or found


def _is_companion(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in COMPANIONS and not path.name.startswith((".", *NOT_OURS, "inferflux-"))

"""From `--model NAME|DIR` to a folder that engines can load, its digest and its numerics reference.

Called by `inferctl quickstart` before anything starts. Slow work (download, conversion, hashing, the reference) happens
once and is cached under the models directory; two processes never do it at the same time. No code from a model folder
is ever run and no pickled weights are read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferflux.cli import digests, jobs
from inferflux.cli.digests import Digests
from inferflux.engine import reference
from inferflux.errors import ConfigError, InferfluxError, ModelRefused
from inferflux.models import manifest
from inferflux.models.manifest import NAME as MANIFEST
from inferflux.models.manifest import REFERENCE, Manifest
from inferflux.models.rules import SignaturePolicy

DEFAULT = "smollm2-135m"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
GIB = 1 << 30
MODULE = re.compile(r"\d+_[A-Za-z]+")
FLOAT32_BYTES_PER_WEIGHT_BYTE = 2  # weights come in 16 bits

Progress = Callable[[str, float | None], None]
"""Called with what is being done and how much of it is done, 0 to 1; None = unknown."""


class ModelError(InferfluxError):
    """A model that can't be served, and why, in one line."""

    reason = "MODEL_INVALID"


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to be served: its files checked, their digest and its numerics reference at hand."""

    name: str
    folder: Path
    weights_digest: str
    num_weight_bytes: int
    reference: Path
    is_embedding: bool = False


def prepare(
    name_or_folder: str,
    models_dir: Path,
    progress: Progress,
    *,
    available_bytes: int,
    is_verified_later: bool = False,
) -> Model:
    """Find, build or check the model. Raises ModelError.

    `is_verified_later`: workers load nothing but what was signed, so that a signed folder's word is taken for now.
    """
    models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    name, folder = locate(name_or_folder, models_dir)
    with locked(models_dir / f".lock-{name}", lambda: progress("waiting for another process", None)):
        from inferflux.cli.pull import pull  # noqa: PLC0415 - it needs us, too

        pull.ensure(name, folder, models_dir, progress)
        files = check_folder(folder)
        if is_embedding := manifest.is_embedding(folder):
            check_modules(folder)
        if is_verified_later and (signed := read_signed(name, folder)) is not None:
            return signed
        cache = cache_dir(folder, models_dir)
        known = ensure_digests(folder, files, cache, progress)
        num_bytes = sum(f.size for n, f in known.files.items() if n.endswith(".safetensors"))
        place = next(
            (p for p in (folder, cache) if has_reference(p, known.weights_digest, is_embedding=is_embedding)), None
        )
        if place is None:
            check_room(name, num_bytes, available_bytes)
            compute_reference(folder, known.weights_digest, cache, progress, is_embedding=is_embedding)
        return Model(name, folder, known.weights_digest, num_bytes, (place or cache) / REFERENCE, is_embedding)


def is_verified_later(environ: Mapping[str, str]) -> bool:
    """Say whether workers of this environment refuse what is not as it was signed."""
    return environ.get("INFERFLUX_MODEL_SIGNATURE") == SignaturePolicy.REQUIRE


def read_signed(name: str, folder: Path) -> Model | None:
    """Take digest and reference from a signed folder as they are; None when it does not bring both."""
    try:
        signed = Manifest.parse((folder / MANIFEST).read_bytes())
    except (OSError, ModelRefused):
        return None
    if not signed.numerics:
        return None
    num_bytes = sum(file.size for n, file in signed.files.items() if n.endswith(".safetensors"))
    return Model(
        name, folder, signed.weights_digest, num_bytes, folder / signed.numerics, manifest.is_embedding(folder)
    )


def locate(name_or_folder: str, models_dir: Path) -> tuple[str, Path]:
    """Split what the user gave into the name clients will use and a folder. A bare name means the models directory."""
    is_path = os.sep in name_or_folder or name_or_folder.startswith((".", "~"))
    if not is_path and (name_or_folder == DEFAULT or (models_dir / name_or_folder).is_dir()):
        return name_or_folder, models_dir / name_or_folder
    folder = Path(name_or_folder).expanduser().resolve()
    if not folder.is_dir():
        raise ModelError(f"no model {name_or_folder!r}: not a folder, and not in {models_dir} ({known(models_dir)})")
    return public_name(folder), folder


def known(models_dir: Path) -> str:
    """List the names that `locate` accepts."""
    return ", ".join(sorted({DEFAULT} | {p.parent.name for p in models_dir.glob("[!.]*/config.json")}))


def public_name(folder: Path) -> str:
    """Name a folder: its own name, or the repository's in a Hugging Face cache (models--org--name/snapshots/...)."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def check_folder(folder: Path) -> list[str]:
    """Check that `folder` is a complete Hugging Face model without code; return the names of the files that make it."""
    config = read_json(folder / "config.json")
    if not config.get("architectures"):
        raise ModelError(f"{folder}/config.json names no architectures: not a model that can be served")
    for source in ("config.json", "tokenizer_config.json"):
        if (folder / source).exists() and "auto_map" in read_json(folder / source):
            raise ModelError(f"{folder}/{source} has auto_map: models that bring their own code are not run")
    vocabularies = [n for n in VOCABULARIES if (folder / n).is_file()]
    if not vocabularies:
        raise ModelError(f"{folder} has no tokenizer ({', '.join(VOCABULARIES)})")
    settings = [p.name for p in folder.glob("*.json") if not p.name.startswith("inferflux-")]
    templates = [p.name for p in folder.glob("*.jinja")]
    modules = [p.relative_to(folder).as_posix() for p in folder.glob("[0-9]*_*/config.json")]
    return sorted({"config.json", *check_weights(folder), *vocabularies, *settings, *templates, *modules})


def check_weights(folder: Path) -> list[str]:
    """Return the weight files; all shards that the index names must be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(s for s in shards if os.sep in s or not (folder / s).is_file())
        if missing or not shards:
            raise ModelError(f"{folder} misses weights: {', '.join(missing) or 'its index is empty'}")
        return sorted(shards)
    weights = sorted(p.name for p in folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} has no *.safetensors weights (pickled .bin and .pt files are not read)")
    return weights


def check_modules(folder: Path) -> None:
    """Check that the modules of an embedding model are folders of its own."""
    try:
        modules = json.loads((folder / "modules.json").read_text())
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{folder}/modules.json: {type(e).__name__}: {e}") from e
    if strange := [path for path in paths if path and not MODULE.fullmatch(path)]:
        raise ModelError(
            f"{folder}/modules.json: {strange[0][:200]!r} is not the folder of a module, such as 1_Pooling"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read an object. Raises ModelError."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise ModelError(f"{path.parent} has no {path.name}: not a Hugging Face model folder") from e
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: {e}") from e
    if not isinstance(document, dict):
        raise ModelError(f"{path}: not a JSON object")
    return document


def cache_dir(folder: Path, models_dir: Path) -> Path:
    """Where we keep what we learn about a folder: never in it, since it may be signed as it is."""
    return models_dir / ".cache" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]


def ensure_digests(folder: Path, files: list[str], cache: Path, progress: Progress) -> Digests:
    """Read the digests, or compute them when any file is new."""
    path = cache / digests.NAME
    known = Digests.load(path)
    if known is None or not known.is_fresh(folder, files):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = Digests.compute(folder, files, lambda fraction: progress("computing digests", fraction))
        known.save(path)
    return known


def has_reference(place: Path, weights_digest: str, *, is_embedding: bool) -> bool:
    """Say whether the numerics reference is there and of these very weights."""
    load = reference.load_embedding if is_embedding else reference.load
    try:
        return load(place / REFERENCE).weights_digest == weights_digest
    except ConfigError:
        return False  # none yet, or one of another format


def check_room(name: str, num_weight_bytes: int, available_bytes: int) -> None:
    """Refuse to compute a reference that does not fit: the kernel would end it, or something else."""
    needed = num_weight_bytes * FLOAT32_BYTES_PER_WEIGHT_BYTE
    if needed > available_bytes:
        sizes = f"{needed / GIB:.1f} GiB needed, {available_bytes / GIB:.1f} GiB available"
        raise ModelError(f"not enough memory for the numerics reference of {name} in float32: {sizes}")


def compute_reference(
    folder: Path, weights_digest: str, cache: Path, progress: Progress, *, is_embedding: bool
) -> None:
    """Compute the numerics reference in a child process, once."""
    arguments = [str(folder), weights_digest, str(cache / REFERENCE)]
    job = "embedding_reference" if is_embedding else "reference"
    jobs.run(job, arguments, lambda fraction: progress("computing numerics reference", fraction))


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on `path`; calls `on_wait` once when somebody else has it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

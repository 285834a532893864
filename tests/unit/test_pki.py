"""A local cluster's certificates and secrets are made once, private, and usable at once."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from inferflux import pki
from inferflux.errors import ConfigError
from inferflux.rpc.mtls import ROLES, Identity, caller_role, spiffe_id


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != ".lock"}


def test_makes_a_ca_and_a_certificate_per_role(tmp_path: Path) -> None:
    """All files exist, are private, and each certificate is signed by the CA and names its role."""
    directory = tmp_path / "pki"
    pki.ensure_pki(directory)

    expected = {"ca.crt", "ca.key"} | {f"{role}.{kind}" for role in ROLES for kind in ("crt", "key")}
    assert set(contents(directory)) == expected
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700
    ca = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
    for role in ROLES:
        certificate = x509.load_pem_x509_certificate((directory / f"{role}.crt").read_bytes())
        certificate.verify_directly_issued_by(ca)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [f"{role}.inferflux.internal"]
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://inferflux.internal/role/{role}"]


def test_is_idempotent(tmp_path: Path) -> None:
    """A second call changes nothing; a new role is signed by the same CA."""
    pki.ensure_pki(tmp_path, ["gateway"])
    before = contents(tmp_path)

    pki.ensure_pki(tmp_path, ["gateway", "decode"])

    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"decode.crt", "decode.key"}


def test_renews_only_what_is_about_to_end(tmp_path: Path) -> None:
    """A certificate near its end is replaced under the same CA."""
    pki.ensure_pki(tmp_path, ["gateway"], life=timedelta(days=1))
    before = contents(tmp_path)

    pki.ensure_pki(tmp_path, ["gateway"])

    after = contents(tmp_path)
    assert after["ca.crt"] == before["ca.crt"]
    assert after["gateway.crt"] != before["gateway.crt"]


def test_concurrent_first_starts_agree(tmp_path: Path) -> None:
    """Processes that start together end up with one CA and one set of secrets."""
    code = "import sys; from pathlib import Path; from inferflux import pki; d = Path(sys.argv[1]); "
    code += "pki.ensure_pki(d, ['gateway']); pki.ensure_secrets(d); "
    code += "print((d / 'ca.crt').read_text() + (d / 'ticket.key').read_bytes().hex())"
    starts = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(4)]
    seen = {start.communicate(timeout=30)[0] for start in starts}

    assert len(seen) == 1
    assert all(start.returncode == 0 for start in starts)


def test_secrets_are_random_private_and_kept(tmp_path: Path) -> None:
    """Different keys of 32 bytes, never replaced."""
    pki.ensure_secrets(tmp_path)
    before = contents(tmp_path)
    pki.ensure_secrets(tmp_path)

    assert contents(tmp_path) == before
    assert sorted(before) == ["pepper.key", "snapshot.key", "snapshot.pub", "store.key", "tenant.key", "ticket.key"]
    assert {len(secret) for secret in before.values()} == {32}
    assert len(set(before.values())) == 6
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_identity_hides_its_key_and_names_what_is_missing(tmp_path: Path) -> None:
    """A loaded identity does not print its key; a missing one is a configuration error."""
    pki.ensure_pki(tmp_path, ["gateway"])

    identity = Identity.load(tmp_path, "gateway")

    assert "PRIVATE" not in repr(identity)
    with pytest.raises(ConfigError, match="'decode'"):
        Identity.load(tmp_path, "decode")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([spiffe_id("gateway")], "gateway"),
        (["gateway.inferflux.internal", spiffe_id("gateway")], "gateway"),
        (["gateway.inferflux.internal"], "gateway"),
        (["gateway.inferflux.internal", spiffe_id("operator")], None),
        (["gateway.elsewhere.internal"], None),
        ([spiffe_id("gateway"), spiffe_id("operator")], None),
        (["spiffe://elsewhere/role/gateway"], None),
        ([], None),
    ],
)
def test_a_caller_has_exactly_one_role(names: list[str], expected: str | None) -> None:
    """Only a single role counts, told by a SPIFFE id or a name of our domain."""
    context = {"x509_subject_alternative_name": [name.encode() for name in names]}

    assert caller_role(context) == expected
    assert caller_role({}) is None

"""The store behind TLS with certificates on both sides and a user of few rights, as operators run it in production."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import trustme

from inferflux.errors import Unavailable
from services.registry.models import ModelBook
from services.registry.store import RegistryStore
from tests.helm.cluster import until
from tests.support.service import until as eventually

USER = "user inferflux on >right ~ifx:* &ifx:* +@all -@admin -@dangerous"
START_S = 20.0


@pytest.fixture(scope="module")
def port(certificates: Path) -> Iterator[int]:
    """Run a real Redis that listens with TLS only."""
    server = shutil.which("redis-server")
    assert server is not None, "redis-server is missing: make test-tools installs it"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number = probe.getsockname()[1]
    config = certificates / "redis.conf"
    files = f"tls-cert-file {certificates}/tls.crt\ntls-key-file {certificates}/tls.key\n"
    files += f"tls-ca-cert-file {certificates}/ca.crt\ntls-auth-clients yes\n"
    config.write_text(f'bind 127.0.0.1\nport 0\ntls-port {number}\nsave ""\n{files}user default off\n{USER}\n')
    process = subprocess.Popen([server, str(config)], cwd=certificates, stdout=subprocess.DEVNULL)
    try:
        until(lambda: _answers(number), START_S, lambda: f"redis-server ended with {process.poll()}")
        yield number
    finally:
        process.terminate()
        process.wait(START_S)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(directory / "ca.crt"))
    leaf.cert_chain_pems[0].write_to_path(str(directory / "tls.crt"))
    leaf.private_key_pem.write_to_path(str(directory / "tls.key"))
    trustme.CA().cert_pem.write_to_path(str(directory / "other-ca.crt"))
    return directory


async def test_the_url_says_whom_to_trust_and_who_we_are(port: int, certificates: Path) -> None:
    """What docs/operations/kubernetes.md tells operators to write works, written and read."""
    async with RegistryStore(_url(port, certificates, "ca.crt", "right")) as store:
        await store.update(lambda book: ModelBook(book.revision + 1, book.models))
        revision, _ = await store.read()

    await until_closed(port)
    assert revision == 1


@pytest.mark.parametrize(("ca", "secret"), [("other-ca.crt", "right"), ("ca.crt", "wrong")])
async def test_a_foreign_server_and_a_wrong_password_are_refused(
    port: int, certificates: Path, ca: str, secret: str
) -> None:
    """Nothing is said to a server that our CA did not sign, and nothing is had without the password."""
    async with RegistryStore(_url(port, certificates, ca, secret)) as store:
        with pytest.raises(Unavailable):
            await store.read()
    await until_closed(port)  # TLS says goodbye in the background, as long as there is a loop


async def until_closed(port: int) -> None:
    """Wait until this process has no connection to a port."""
    me = psutil.Process()
    await eventually(lambda: all(c.raddr.port != port for c in me.net_connections("tcp4") if c.raddr))


def _url(port: int, certificates: Path, ca: str, secret: str) -> str:
    ours = f"ssl_certfile={certificates}/tls.crt&ssl_keyfile={certificates}/tls.key"
    return f"rediss://inferflux:{secret}@127.0.0.1:{port}/0?ssl_ca_certs={certificates}/{ca}&{ours}"


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False

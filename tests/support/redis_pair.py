"""A real Redis 7 with a replica, both with TLS on both sides and users of few rights, behind one address.

async with running_pair(Path(directory)) as pair:
    pair.url                    # of whichever of them is the primary now
    pair.lag()                  # the replica hears of nothing from here on
    ...
    pair.fail_over()            # the primary is killed, the replica promoted with what it has
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import redis
import trustme

from tests.support.proxy import Proxy
from tests.support.service import until

USERS = """user default off
user inferflux on >right ~ifx:* &ifx:* +@all -@admin -@dangerous
user replica on >right +psync +replconf +ping
user operator on >right ~* &* +@all
"""
STOP_S = 20.0


class RedisNode:
    """One server; `inferflux` is the user of the services, `operator` ours."""

    def __init__(self, directory: Path, certificates: Path) -> None:
        binary = shutil.which("redis-server")
        assert binary is not None, "redis-server is missing: make test-tools installs it"
        directory.mkdir()
        self._certificates = certificates
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        files = f"tls-cert-file {certificates}/tls.crt\ntls-key-file {certificates}/tls.key\n"
        files += f"tls-ca-cert-file {certificates}/ca.crt\ntls-auth-clients yes\ntls-replication yes\n"
        listen = f'bind 127.0.0.1\nport 0\ntls-port {self.port}\ndir {directory}\nappendonly yes\nsave ""\n'
        replication = "masteruser replica\nmasterauth right\nrepl-diskless-sync-delay 0\n"
        (directory / "redis.conf").write_text(listen + files + replication + USERS)
        self.process = subprocess.Popen([binary, str(directory / "redis.conf")], stdout=subprocess.DEVNULL)

    @property
    def is_up(self) -> bool:
        with suppress(redis.RedisError, OSError):
            return bool(self.command("PING"))
        return False

    def command(self, *words: str, user: str = "operator") -> Any:
        """Send one command. Raises redis.RedisError."""
        files = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "tls.crt", "ssl_keyfile": "tls.key"}
        paths = {name: str(self._certificates / file) for name, file in files.items()}
        login = {"username": user, "password": "right", "decode_responses": True}
        with redis.Redis("127.0.0.1", self.port, ssl=True, socket_timeout=5, **login, **paths) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        """Kill it (SIGKILL). Idempotent."""
        self.process.kill()
        self.process.wait(STOP_S)


class RedisPair:
    """Both nodes, the address of the services, and what passes between the two."""

    def __init__(self, certificates: Path, primary: RedisNode, replica: RedisNode, front: Proxy, link: Proxy) -> None:
        self.primary = primary
        self.replica = replica
        self._certificates = certificates
        self._front = front
        self._link = link
        self._address = ""

    @property
    def url(self) -> str:
        here = self._certificates
        files = f"ssl_ca_certs={here}/ca.crt&ssl_certfile={here}/tls.crt&ssl_keyfile={here}/tls.key"
        return f"rediss://inferflux:right@{self._address}/0?{files}"

    async def start(self) -> None:
        """Wait until both are there and the same."""
        self._address = await self._front.start()
        host, _, port = (await self._link.start()).rpartition(":")
        await until(lambda: self.primary.is_up and self.replica.is_up)
        self.replica.command("REPLICAOF", host, port)
        await until(lambda: self.replica.command("INFO", "replication")["master_link_status"] == "up")

    def lag(self) -> None:
        """Let the replica hear of nothing any more, without telling anybody."""
        self._link.cut("down")

    @property
    def num_bytes_unheard(self) -> int:
        return self._link.bytes_held["down"]

    async def fail_over(self) -> None:
        """Kill the primary; the replica takes its place, with what it has."""
        self.primary.kill()
        await self._link.close()
        self.replica.command("REPLICAOF", "NO", "ONE")
        self._front.redirect(f"127.0.0.1:{self.replica.port}")


@asynccontextmanager
async def running_pair(directory: Path) -> AsyncIterator[RedisPair]:
    """Run a primary and its replica."""
    _make_certificates(directory)
    primary, replica = (RedisNode(directory / name, directory) for name in ("primary", "replica"))
    front, link = (Proxy("127.0.0.1:0", f"127.0.0.1:{primary.port}") for _ in range(2))
    try:
        pair = RedisPair(directory, primary, replica, front, link)
        await pair.start()
        yield pair
    finally:
        for node in (primary, replica):
            await asyncio.to_thread(node.kill)
        for proxy in (front, link):
            await proxy.close()


def _make_certificates(directory: Path) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(directory / "ca.crt"))
    leaf.cert_chain_pems[0].write_to_path(str(directory / "tls.crt"))
    leaf.private_key_pem.write_to_path(str(directory / "tls.key"))

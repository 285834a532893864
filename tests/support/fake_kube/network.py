"""Addresses, names and services of the cluster, all of them in one /16 of the loopback network.

A pod binds its own address, so that ports stay as rendered; names come from /etc/hosts, of which each pod sees that of
its namespace; a service is a listener that passes connections on to a ready pod, and like kube-proxy leaves those that
exist alone.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from contextlib import suppress
from pathlib import Path

from tests.support.fake_kube.store import Key, Object, Store, key_of

CHUNK = 1 << 16
HEADLESS = "None"


class Network:
    """The network 127.`octet`.0.0/16: services in its first /24, pods in the others. `directory` is for hosts files."""

    def __init__(self, store: Store, octet: int, directory: Path) -> None:
        self._store = store
        self._octet = octet
        self._directory = directory
        self._services = itertools.count(2)
        self._pods = itertools.count()
        self._proxies: dict[tuple[Key, int], asyncio.Server] = {}
        self._connections: set[asyncio.Task[None]] = set()

    def allocate_service(self, service: Object) -> None:
        """Give a new service an address."""
        if service["kind"] == "Service" and not service["spec"].get("clusterIP"):
            service["spec"]["clusterIP"] = f"127.{self._octet}.0.{next(self._services)}"

    def allocate_pod(self) -> str:
        """Return an address that no pod has had for long: nothing must find a successor at a dead pod's place."""
        number = next(self._pods) % (254 * 250)
        return f"127.{self._octet}.{1 + number // 250}.{2 + number % 250}"

    def hosts_file(self, namespace: str) -> Path:
        path = self._directory / f"hosts-{namespace}"
        if not path.exists():
            path.write_text("")
            self._write_hosts(namespace)
        return path

    async def run(self) -> None:
        """Follow the store for ever."""
        while True:
            revision = self._store.revision
            await self._sync()
            await self._store.wait(revision)

    async def close(self) -> None:
        for server in self._proxies.values():
            server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _sync(self) -> None:
        wanted = {}
        for service in self._store.list("Service"):
            if service["spec"].get("clusterIP", HEADLESS) != HEADLESS:
                wanted |= {(key_of(service), port["port"]): service for port in service["spec"].get("ports") or ()}
        for place in self._proxies.keys() - wanted.keys():
            self._proxies.pop(place).close()
        for place in wanted.keys() - self._proxies.keys():
            self._proxies[place] = await self._listen(wanted[place], place[1])
        for path in self._directory.glob("hosts-*"):
            self._write_hosts(path.name.removeprefix("hosts-"))

    async def _listen(self, service: Object, port: int) -> asyncio.Server:
        key = key_of(service)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            await self._pass_on(key, port, reader, writer)

        return await asyncio.start_server(serve, service["spec"]["clusterIP"], port)

    async def _pass_on(self, key: Key, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join a connection with one ready pod; where there is none it is reset, and nothing is tried twice."""
        try:
            if (endpoint := self._endpoint(key, port)) is None:
                return
            far_reader, far_writer = await asyncio.open_connection(*endpoint)
            try:
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(_pump(reader, far_writer))
                    pumps.create_task(_pump(far_reader, writer))
            finally:
                far_writer.transport.abort()
        except* OSError:
            pass  # one of them is gone: the other sees it below
        finally:
            writer.transport.abort()

    def _endpoint(self, key: Key, port: int) -> tuple[str, int] | None:
        service, found = self._store.get(*key), self._store.get("Endpoints", *key[1:])
        if service is None or found is None or not found["subsets"]:
            return None
        index = [p["port"] for p in service["spec"]["ports"]].index(port)
        subset = random.choice(found["subsets"])
        return subset["addresses"][0]["ip"], subset["ports"][index]["port"]

    def _write_hosts(self, namespace: str) -> None:
        """Change the file in place: pods have it mounted, not its directory."""
        lines = ["127.0.0.1 localhost"]
        for service in self._store.list("Service"):
            lines += self._names(service, namespace)
        text = ("\n".join(lines) + "\n").encode()
        path = self._directory / f"hosts-{namespace}"
        if path.read_bytes() == text:
            return
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), text, 0)
            file.truncate(len(text))

    def _names(self, service: Object, namespace: str) -> list[str]:
        name, home = service["metadata"]["name"], service["metadata"]["namespace"]
        long_names = [f"{name}.{home}", f"{name}.{home}.svc", f"{name}.{home}.svc.cluster.local"]
        names = " ".join([name, *long_names] if home == namespace else long_names)
        address = service["spec"].get("clusterIP", HEADLESS)
        if address != HEADLESS:
            return [f"{address} {names}"]
        found = self._store.get("Endpoints", home, name)
        return [f"{subset['addresses'][0]['ip']} {names}" for subset in (found or {}).get("subsets", ())]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK):
        writer.write(chunk)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()

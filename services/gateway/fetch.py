"""Documents from elsewhere, fetched so that nobody is led astray: keys of token issuers, and images.

One parser reads the URL. Its host is resolved once; every address must be in the permitted network, and the connection
goes to such an address, so that a name that means something else a moment later changes nothing. Redirects are not
followed, proxies of the environment not used, answers are bounded in time and size.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from functools import cache
from typing import TYPE_CHECKING, Any

import orjson

from inferflux.errors import Unavailable
from inferflux.policy.identity import Network

if TYPE_CHECKING:
    import httpx

MAX_BYTES = 256 * 1024
TIMEOUT_S = 5.0
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Instance metadata of clouds that use addresses of private networks for it.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))


async def fetch_object(url: str, network: Network) -> dict[str, Any]:
    """Get a JSON object. Raises Unavailable, whatever is wrong."""
    body = await fetch_bytes(url, network, MAX_BYTES, "application/json")
    try:
        document = orjson.loads(body)
    except ValueError as e:
        raise Unavailable(f"cannot fetch {url}: {e}", retry_after_s=5) from e
    if not isinstance(document, dict):
        raise Unavailable(f"cannot fetch {url}: not a JSON object", retry_after_s=5)
    return document


async def fetch_bytes(url: str, network: Network, max_bytes: int, accept: str) -> bytes:
    """Get what is there, as it is. Raises Unavailable, whatever is wrong."""
    import httpx  # noqa: PLC0415 - most gateways fetch nothing

    try:
        async with asyncio.timeout(TIMEOUT_S):
            target = httpx.URL(url)
            _check_scheme(target, network)
            addresses = await _resolve(target, network)
            return await _get(target, addresses[0], max_bytes, accept)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, UnicodeError, ValueError) as e:
        raise Unavailable(f"cannot fetch {url}: {str(e) or type(e).__name__}", retry_after_s=5) from e


def host_of(url: str) -> str:
    """Return the host that a URL would be fetched from, by the parser that will read it then; "": none."""
    import httpx  # noqa: PLC0415

    try:
        return httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError, ValueError):
        return ""


def is_permitted(address: Address, network: Network) -> bool:
    """Tell whether an address is in a network. What carries an IPv4 address inside is judged by that."""
    address = _inner(address) or address
    if address.is_unspecified or address.is_multicast or address.is_link_local or address in _METADATA:
        return False
    if network == "loopback":
        return address.is_loopback
    if network == "private":
        return not (address.is_loopback or address.is_reserved)
    return address.is_global


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def _check_scheme(url: httpx.URL, network: Network) -> None:
    if url.scheme != "https" and not (url.scheme == "http" and network == "loopback"):
        raise ValueError("the URL must begin with https://")
    if url.userinfo or not url.host:
        raise ValueError("the URL must have a host and no user")


async def _resolve(url: httpx.URL, network: Network) -> list[Address]:
    """Return the addresses of the host. Raises ValueError when one of them is not permitted."""
    port = url.port or (443 if url.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not addresses or not all(is_permitted(address, network) for address in addresses):
        raise ValueError(f"the host is not in the permitted network ({network})")
    return addresses


async def _get(url: httpx.URL, address: Address, max_bytes: int, accept: str) -> bytes:
    import httpx  # noqa: PLC0415

    pinned = url.copy_with(host=str(address))
    headers = {"host": url.netloc.decode("ascii"), "accept": accept, "accept-encoding": "identity"}
    client = httpx.AsyncClient(verify=_tls(), trust_env=False, follow_redirects=False, timeout=TIMEOUT_S)
    extensions = {"sni_hostname": url.host}
    async with client, client.stream("GET", pinned, headers=headers, extensions=extensions) as response:
        if response.status_code != 200:
            raise ValueError(f"answered {response.status_code}")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > max_bytes:
                raise ValueError(f"more than {max_bytes} bytes")
        return bytes(body)


@cache
def _tls() -> ssl.SSLContext:
    import httpx  # noqa: PLC0415

    return httpx.create_ssl_context()

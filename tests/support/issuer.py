"""An issuer of tokens in this process: real keys, a real HTTP server, and every forgery that we know of."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives import serialization
from joserfc import jwe, jws
from joserfc.jwk import ECKey, OctKey, RSAKey

AUDIENCE = "inferflux"
JWKS = "/keys"


@cache
def rsa_key(name: str = "rsa-1") -> RSAKey:
    """Make the key of a name, once."""
    return RSAKey.generate_key(2048, {"kid": name})


@cache
def ec_key(name: str = "ec-1") -> ECKey:
    """Make the key of a name, once."""
    return ECKey.generate_key("P-256", {"kid": name})


@cache
def stranger(kid: str) -> RSAKey:
    """Make a key that no issuer has published under an id."""
    return RSAKey.generate_key(2048, {"kid": kid})


def part(value: Any) -> str:
    """Encode a part of a token."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def sign(header: dict[str, Any], claims: Any, key: Any, algorithms: tuple[str, ...] = ("RS256", "ES256")) -> str:
    """Sign whatever it is."""
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    registry = jws.JWSRegistry(algorithms=list(algorithms), strict_check_header=False)
    return jws.serialize_compact(header, payload, key, registry=registry)


def unsigned(header: dict[str, Any], claims: Any, signature: str = "") -> str:
    """Put parts together without a signature, or with a given one."""
    return f"{part(header)}.{part(claims)}.{signature}"


def with_hmac(header: dict[str, Any], claims: Any, secret: bytes) -> str:
    """Sign with a shared secret, as HS256 does."""
    body = f"{part(header)}.{part(claims)}"
    return f"{body}.{part(hmac.digest(secret, body.encode(), hashlib.sha256))}"


@dataclass(slots=True)
class TokenIssuer:
    """What one issuer publishes and signs. `keys`: published; the first RSA key and the first EC key sign."""

    url: str = "https://idp.example.com"
    keys: list[Any] = field(default_factory=lambda: [rsa_key(), ec_key()])

    def jwks(self) -> dict[str, Any]:
        """What it publishes."""
        return {"keys": [key.as_dict(private=False, use="sig") for key in self.keys]}

    def claims(self, **claims: Any) -> dict[str, Any]:
        """Make good claims, but for what is given; None leaves one out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "ann", "iat": now, "exp": now + 600, "groups": ["users"]}
        return {name: value for name, value in (good | claims).items() if value is not None}

    def token(self, key: Any = None, **claims: Any) -> str:
        """Make a token as this issuer would."""
        key = key or self.keys[0]
        algorithm = "RS256" if isinstance(key, RSAKey) else "ES256"
        header = {"alg": algorithm, "typ": "JWT"} | ({"kid": key.kid} if key.kid else {})
        return sign(header, self.claims(**claims), key)


def forgeries(issuer: TokenIssuer) -> dict[str, str]:
    """Name and make tokens that must not be taken, of an issuer with the keys rsa-1 and ec-1."""
    rsa, ec, other = rsa_key(), ec_key(), stranger("rsa-1")
    good, header = issuer.claims(), {"alg": "RS256", "kid": "rsa-1", "typ": "JWT"}
    public_pem = rsa.public_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_der = rsa.public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    token, now = issuer.token(), int(time.time())
    head, body, signature = token.split(".")
    own_jwk = other.as_dict(private=False)
    admin = part(issuer.claims(groups=["admins"]))
    tokens = {
        "alg none": unsigned(header | {"alg": "none"}, good),
        "alg None": unsigned(header | {"alg": "None"}, good),
        "alg nOnE with a signature": unsigned(header | {"alg": "nOnE"}, good, signature),
        "alg empty": unsigned(header | {"alg": ""}, good, signature),
        "alg missing": unsigned({"kid": "rsa-1"}, good, signature),
        "alg a list": unsigned(header | {"alg": ["RS256"]}, good, signature),
        "HS256 with the public key as PEM": with_hmac(header | {"alg": "HS256"}, good, public_pem),
        "HS256 with the public key as DER": with_hmac(header | {"alg": "HS256"}, good, public_der),
        "HS256 with an empty key": with_hmac(header | {"alg": "HS256"}, good, b""),
        "HS256 with the modulus": with_hmac(header | {"alg": "HS256"}, good, rsa.as_dict()["n"].encode()),
        "RS384, not listed": sign(header | {"alg": "RS384"}, good, rsa, ("RS384",)),
        "PS256, not listed": sign(header | {"alg": "PS256"}, good, rsa, ("PS256",)),
        "ES256 with the id of an RSA key": sign({"alg": "ES256", "kid": "rsa-1"}, good, ec),
        "RS256 with the id of an EC key": sign({"alg": "RS256", "kid": "ec-1"}, good, rsa),
        "a stranger's key": sign(header, good, other),
        "an embedded key": sign(header | {"jwk": own_jwk}, good, other),
        "the true key embedded": sign(header | {"jwk": rsa.as_dict(private=False)}, good, rsa),
        "jku": sign(header | {"jku": "https://attacker.example.com/keys"}, good, rsa),
        "x5u": sign(header | {"x5u": "https://attacker.example.com/cert"}, good, rsa),
        "x5c": sign(header | {"x5c": ["AAAA"]}, good, rsa),
        "crit": unsigned(header | {"crit": ["exp"]}, good, signature),
        "b64 false": unsigned(header | {"b64": False, "crit": ["b64"]}, good, signature),
        "kid a path": sign(header | {"kid": "../../../../dev/null"}, good, other),
        "kid SQL": sign(header | {"kid": "x' UNION SELECT 'k"}, good, other),
        "kid unknown": sign(header | {"kid": "rsa-2"}, good, stranger("rsa-2")),
        "kid a number": unsigned(header | {"kid": 1}, good, signature),
        "kid missing among several keys": sign({"alg": "RS256"}, good, rsa),
        "typ of a logout token": sign(header | {"typ": "logout+jwt"}, good, rsa),
        "typ a list": unsigned(header | {"typ": ["JWT"]}, good, signature),
        "no signature": f"{head}.{body}.",
        "signature of zeros": f"{head}.{body}.{part(bytes(256))}",
        "signature cut": f"{head}.{body}.{signature[:-4]}",
        "signature of another token": f"{head}.{body}.{issuer.token(sub='bob').split('.')[2]}",
        "claims replaced": f"{head}.{admin}.{signature}",
        "ECDSA of zeros": unsigned({"alg": "ES256", "kid": "ec-1"}, good, part(bytes(64))),
        "header no object": f"{part([])}.{body}.{signature}",
        "header a bomb": f"{part({'a': 'b'})[:-1]}{'A' * 12_000}.{body}.{signature}",
        "claims no object": sign(header, b"[]", rsa),
        "claims no JSON": sign(header, b"{", rsa),
        "claims nested deeply": sign(header, b'{"iss":' + b"[" * 5000, rsa),
        "four parts": f"{token}.AAAA",
        "iss of somebody else": sign(header, issuer.claims(iss="https://other.example.com"), rsa),
        "iss with a slash more": sign(header, issuer.claims(iss=issuer.url + "/"), rsa),
        "iss a list": sign(header, issuer.claims(iss=[issuer.url]), rsa),
        "iss missing": sign(header, issuer.claims(iss=None), rsa),
        "aud of somebody else": sign(header, issuer.claims(aud="other"), rsa),
        "aud a part of ours": sign(header, issuer.claims(aud=AUDIENCE[:-1]), rsa),
        "aud an object": sign(header, issuer.claims(aud={AUDIENCE: 1}), rsa),
        "aud missing": sign(header, issuer.claims(aud=None), rsa),
        "aud empty": sign(header, issuer.claims(aud=[]), rsa),
        "sub missing": sign(header, issuer.claims(sub=None), rsa),
        "sub a number": sign(header, issuer.claims(sub=7), rsa),
        "expired": sign(header, issuer.claims(iat=now - 700, exp=now - 61), rsa),
        "exp missing": sign(header, issuer.claims(exp=None), rsa),
        "exp a text": sign(header, issuer.claims(exp=str(now + 600)), rsa),
        "exp NaN": sign(header, json.dumps(issuer.claims(exp=float("nan"))).encode(), rsa),
        "exp infinite": sign(header, json.dumps(issuer.claims(exp=float("inf"))).encode(), rsa),
        "exp true": sign(header, issuer.claims(exp=True), rsa),
        "exp in a thousand years": sign(header, issuer.claims(exp=now + 31_536_000_000), rsa),
        "exp beyond all floats": sign(header, issuer.claims(exp=10**400, iat=now + 0.5), rsa),
        "not yet": sign(header, issuer.claims(nbf=now + 120), rsa),
        "nbf a text": sign(header, issuer.claims(nbf="0"), rsa),
        "issued tomorrow": sign(header, issuer.claims(iat=now + 86_400, exp=now + 86_500), rsa),
        "iat missing": sign(header, issuer.claims(iat=None), rsa),
        "blocked subject": sign(header, issuer.claims(sub="mallory"), rsa),
    }
    tokens["encrypted"] = jwe.encrypt_compact(
        {"alg": "dir", "enc": "A128GCM"}, json.dumps(good), OctKey.import_key(bytes(16))
    )
    tokens["encrypted around a good token"] = jwe.encrypt_compact(
        {"alg": "dir", "enc": "A128GCM", "zip": "DEF", "cty": "JWT"}, token, OctKey.import_key(bytes(16))
    )
    return tokens


@contextmanager
def serving(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Answer GETs by path; gives the server's URL and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running_issuer() -> Iterator[TokenIssuer]:
    """Publish an issuer's discovery document and keys."""
    issuer = TokenIssuer()

    def answer(path: str) -> tuple[int, bytes]:
        documents = {
            "/.well-known/openid-configuration": {"issuer": issuer.url, "jwks_uri": issuer.url + JWKS},
            JWKS: issuer.jwks(),
        }
        return (200, json.dumps(documents[path]).encode()) if path in documents else (404, b"{}")

    with serving(answer) as (issuer.url, _):
        yield issuer

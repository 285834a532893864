"""The audit log's format: JSON lines, each bound to the one before it, with signed heads in between.

    {"hash": ..., "prev": ..., "record": {...}, "seq": n}

`hash` is the SHA-256 of the line without it, in canonical JSON, and `prev` the hash of the line before: a line that is
changed, cut out, moved or put in breaks the chain at a line that can be named. A head is a record that signs what is
before it. What is cut off at the end is missed against the last head, which is also kept beside the log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from inferflux.policy.signature import Signer, Verifier

NO_HASH = "0" * 64
HEAD_KIND = "head"


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain: number and hash of its last line. The first line has number 1."""

    chain: str
    seq: int = 0
    hash: str = NO_HASH

    @property
    def signed_bytes(self) -> bytes:
        """What a signature of it covers."""
        return f"inferflux audit head\n{self.chain}\n{self.seq}\n{self.hash}".encode()

    def extend(self, record: dict[str, Any]) -> tuple[Head, bytes]:
        """Write the next line; returns the new end and the line."""
        line: dict[str, Any] = {"seq": self.seq + 1, "prev": self.hash, "record": record}
        digest = line_hash(line)
        return Head(self.chain, self.seq + 1, digest), dump(line | {"hash": digest}) + b"\n"

    def sign(self, signer: Signer, at: str) -> dict[str, Any]:
        """Make the record that signs everything up to here."""
        signature = signer.sign(self.signed_bytes).hex()
        return {"kind": HEAD_KIND, "at": at, "chain": self.chain, "seq": self.seq, "signature": signature}

    def is_signed_by(self, signature: object, verifier: Verifier) -> bool:
        """Check a signature in hexadecimal."""
        try:
            return isinstance(signature, str) and verifier.is_valid(bytes.fromhex(signature), self.signed_bytes)
        except ValueError:
            return False


@dataclass(slots=True)
class Verdict:
    """What was found in a log. `problem` empty: nothing is wrong up to `end`; else it says what, at `bad_line`."""

    end: Head
    num_heads: int = 0
    last_signed: int = 0
    bad_line: int = 0
    problem: str = ""

    @property
    def num_unsigned(self) -> int:
        """Lines after the last head: bound to each other, not signed yet."""
        return self.end.seq - self.last_signed


def verify(lines: Iterable[bytes], chain: str, verifier: Verifier, last: Head | None = None) -> Verdict:
    """Check a whole chain, line by line. `last`: its last known head, signed; the log must reach it."""
    verdict = Verdict(Head(chain))
    for number, raw in enumerate(lines, 1):
        verdict.problem = check(raw, verdict, verifier)
        if not verdict.problem and last is not None and verdict.end.seq == last.seq and verdict.end.hash != last.hash:
            verdict.problem = "is not the line that the last known head has signed"
        if verdict.problem:
            verdict.bad_line = number
            return verdict
    if last is not None and verdict.end.seq < last.seq:
        verdict.bad_line = verdict.end.seq + 1
        verdict.problem = f"is missing: the last known head is at line {last.seq}"
    return verdict


def check(raw: bytes, verdict: Verdict, verifier: Verifier) -> str:
    """Say what is wrong with the next line; empty: it is good, and the verdict's new end."""
    line, end = _read(raw), verdict.end
    if line is None:
        return "is no line of an audit log, or not written as this log writes lines"
    if line["seq"] != end.seq + 1:
        return f"has number {line['seq']} where {end.seq + 1} belongs: lines were cut out, put in or moved"
    if line["prev"] != end.hash:
        return "does not follow the line before it"
    if line.pop("hash") != (digest := line_hash(line)):
        return "was changed"
    if line["record"].get("kind") == HEAD_KIND:
        if not end.is_signed_by(line["record"].get("signature"), verifier):
            return "is a head with a wrong signature"
        verdict.num_heads, verdict.last_signed = verdict.num_heads + 1, line["seq"]
    verdict.end = Head(end.chain, line["seq"], digest)
    return ""


def _read(raw: bytes) -> dict[str, Any] | None:
    """Read a line that is exactly as it was written; None: it is not."""
    try:
        line = orjson.loads(raw)
    except ValueError:
        return None
    is_line = isinstance(line, dict) and line.keys() == {"hash", "prev", "record", "seq"}
    return line if is_line and isinstance(line["record"], dict) and dump(line) + b"\n" == raw else None


def line_hash(line: dict[str, Any]) -> str:
    """Hash a line that has no hash yet."""
    return hashlib.sha256(dump(line)).hexdigest()


def dump(value: dict[str, Any]) -> bytes:
    """Write canonical JSON: no line break can be inside."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)

"""The audit log on this replica's disk: appended to, signed now and then, searched.

A record is on disk when `append` returns, or else nothing of it is. Gateways send a record again when an answer was
lost, so the ids of the last ones are remembered. A replica writes one chain, in files of bounded size, whose names are
the numbers of their first lines; whatever a crash has left of a line is cut off, since nobody was told of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import orjson

from inferflux.audit import HEAD_KIND, Head, dump
from inferflux.clock import Clock
from inferflux.errors import AuditUnavailable, InvalidRequest
from inferflux.paths import private_dir
from inferflux.policy.signature import Signer
from inferflux.telemetry import metrics

SIGN_EVERY_S = 5.0
SIGN_EVERY_LINES = 100
MAX_FILE_BYTES = 64 << 20
MAX_RECORD_BYTES = 1 << 20
REMEMBERED_IDS = 20_000
T = TypeVar("T")
log = logging.getLogger(__name__)


class AuditLog:
    """One chain. Used from one event loop; writes in threads, one at a time."""

    def __init__(self, directory: Path, chain: str, signer: Signer, clock: Clock) -> None:
        self._directory = directory
        self._signer = signer
        self._clock = clock
        self._writing = asyncio.Lock()
        self._fd = -1
        self._path: Path | None = None
        self._num_bytes = 0
        self._num_unsigned = 0
        self._ids: dict[str, None] = {}
        self.head = Head(chain)

    @property
    def chain(self) -> str:
        """Its name: the replica's."""
        return self.head.chain

    @property
    def head_file(self) -> Path:
        """Where the last signed head is, beside the log."""
        return self._directory / f"{self.chain}.head.json"

    async def append(self, records: list[bytes]) -> None:
        """Write records and wait until they are on disk. Raises AuditUnavailable or InvalidRequest."""
        parsed = [_parse(record) for record in records]
        async with self._writing:
            new = [record for record in parsed if record["id"] not in self._ids]
            if not new:
                return
            await self._write(new)
            self._remember(new)
            if self._num_unsigned >= SIGN_EVERY_LINES:
                await self._sign()

    async def act(self, actor: str, action: str, target: str) -> None:
        """Write down what is about to be done here, and not through a gateway. Raises AuditUnavailable."""
        record = {"kind": "admin", "phase": "intent", "actor": actor, "action": action, "target": target}
        stamp = {"id": os.urandom(12).hex(), "at": self._now()}
        await self.append([dump(record | stamp)])

    async def keep_signed(self) -> None:
        """Sign what is new, for ever, every few seconds."""
        while True:
            await asyncio.sleep(SIGN_EVERY_S)
            await self.sign()

    async def sign(self) -> None:
        """Sign what is new; a full disk is for the next time."""
        async with self._writing:
            if self._num_unsigned:
                await self._sign()

    async def search(self, fields: Mapping[str, str], since: str, limit: int) -> list[bytes]:
        """Find the newest lines whose records have these fields; returns them oldest first. Raises AuditUnavailable."""
        return await asyncio.to_thread(self._guarded, lambda: self._search(fields, since, limit))

    async def close(self) -> None:
        """Sign the rest and close the file. Idempotent."""
        await self.sign()
        self._shut()

    async def _sign(self) -> None:
        head, signature = self.head, self.head.sign(self._signer, self._now())
        try:
            await self._write([signature])
            await asyncio.to_thread(self._guarded, lambda: self._save_head(head, signature["signature"]))
            self._num_unsigned = 0
        except AuditUnavailable:
            log.error("the audit log could not be signed", extra={"seq": head.seq})  # noqa: TRY400 - said already

    async def _write(self, records: list[dict[str, Any]]) -> None:
        head, lines = self.head, []
        for record in records:
            head, line = head.extend(record)
            lines.append(line)
        await asyncio.to_thread(self._guarded, lambda: self._put(b"".join(lines)))
        self.head = head
        self._num_unsigned += len(records)
        metrics.AUDIT_RECORDS.inc(len(records))

    def _guarded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as e:
            log.error("the audit log can't be used", extra={"reason": e.strerror})  # noqa: TRY400 - says all
            raise AuditUnavailable(f"the audit log of {self.chain} can't be used: {e.strerror}") from e

    def _put(self, data: bytes) -> None:
        """Write all of it, or leave what `_opened` cuts off again."""
        fd, rest = self._opened(), memoryview(data)
        try:
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        except OSError:
            self._shut()
            raise
        self._num_bytes += len(data)

    def _opened(self) -> int:
        """Return the current file, or begin the next one; without what a failed write has left in it."""
        if self._fd < 0 or self._num_bytes >= MAX_FILE_BYTES:
            self._shut()
            if self._path is None or self._num_bytes >= MAX_FILE_BYTES:
                self._path, self._num_bytes = self._directory / file_name(self.chain, self.head.seq + 1), 0
            private_dir(self._directory)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, self._num_bytes)
        return self._fd

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _save_head(self, head: Head, signature: str) -> None:
        text = dump({"chain": head.chain, "seq": head.seq, "hash": head.hash, "signature": signature})
        temporary = self.head_file.with_suffix(".new")
        with open(temporary, "wb", opener=_private) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.head_file)

    def _search(self, fields: Mapping[str, str], since: str, limit: int) -> list[bytes]:
        found: list[bytes] = []
        for line in self._newest_first():
            record = orjson.loads(line)["record"]
            if record["kind"] == HEAD_KIND:
                continue
            if record["at"] < since or len(found) == limit:
                break
            if all(str(record.get(name)) == value for name, value in fields.items()):
                found.append(line)
        return found[::-1]

    def _newest_first(self) -> Iterator[bytes]:
        for path in reversed(files(self._directory, self.chain)):
            yield from reversed(path.read_bytes().splitlines())

    def _remember(self, records: list[dict[str, Any]]) -> None:
        self._ids |= dict.fromkeys(record["id"] for record in records)
        for forgotten in list(self._ids)[:-REMEMBERED_IDS]:
            del self._ids[forgotten]

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock.time(), UTC).isoformat(timespec="milliseconds")

    def load(self) -> None:
        """Find the end of the chain on disk. Without a usable disk, writes are refused until there is one."""
        try:
            private_dir(self._directory)
            known = files(self._directory, self.chain)
            if known:
                self._load(known)
        except OSError as e:
            log.error("the audit log can't be read", extra={"reason": e.strerror})  # noqa: TRY400 - says all

    def _load(self, known: list[Path]) -> None:
        whole, newline, torn = known[-1].read_bytes().rpartition(b"\n")
        if torn:
            log.warning("cutting off a line that was never finished", extra={"file": known[-1].name})
        self._path, self._num_bytes = known[-1], len(whole) + len(newline)
        records = [orjson.loads(line) for path in known[-2:] for line in _whole_lines(path)]
        if records:
            self.head = Head(self.chain, records[-1]["seq"], records[-1]["hash"])
            self._remember([line["record"] for line in records if "id" in line["record"]])
            self._num_unsigned = int(records[-1]["record"]["kind"] != HEAD_KIND)


def files(directory: Path, chain: str) -> list[Path]:
    """List the files of a chain, oldest first."""
    return sorted(directory.glob(f"{chain}-{'[0-9]' * 12}.jsonl"))


def file_name(chain: str, first: int) -> str:
    """Name the file that begins with a line."""
    return f"{chain}-{first:012d}.jsonl"


def _parse(record: bytes) -> dict[str, Any]:
    """Read a record that a gateway sends. Raises InvalidRequest."""
    if len(record) > MAX_RECORD_BYTES:
        raise InvalidRequest(f"an audit record has {len(record)} bytes, the limit is {MAX_RECORD_BYTES}")
    try:
        parsed: dict[str, Any] = orjson.loads(record)
        if all(isinstance(parsed[name], str) for name in ("id", "kind", "at")) and parsed["kind"] != HEAD_KIND:
            return parsed
    except (ValueError, KeyError, TypeError):
        pass
    raise InvalidRequest("an audit record is a JSON object with an id, a kind and a time")


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().rpartition(b"\n")[0].splitlines()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

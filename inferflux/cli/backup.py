"""`inferctl admin backup|restore`: the control state in Redis as one file, and back.

The file is lines of JSON: a head with format, version and revisions; one line for each Redis key; a tail with the
SHA-256 of all before it. Values are as they are in Redis: what services seal or encrypt stays so, and needs the same
secrets again. What is only of the moment is left out: leases, what workers say of themselves, whatever expires.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.exceptions import RedisError, WatchError

from inferflux import __version__
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json
from inferflux.cli.plan import redis_socket
from inferflux.paths import Home

FORMAT, VERSION = "inferflux-backup", 1
MOMENTARY = frozenset({"ifx:{registry}:rosters", "ifx:{registry}:plans", "ifx:{registry}:planner-lease"})
FOR_EVER = frozenset({"ifx:{policy}:revoked"})
"""Sets that only grow: what was revoked after a backup stays revoked when it is restored."""
REVISION = ":revision"
MAX_TRIES = 100
TIMEOUT_S = 10.0
T = TypeVar("T")
Value = Any  # bytes, list, set or dict of bytes, as redis-py gives them


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of Redis. `kind`: string, hash, set, list or zset."""

    kind: str
    value: Value


@dataclass(frozen=True, slots=True)
class Backup:
    """The control state at one moment, or a part of it: policy or registry."""

    entries: Mapping[str, Entry]
    part: str = ""
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def revisions(self) -> dict[str, int]:
        """Numbers that only grow, by key."""
        return {key: _number(e.value) for key, e in self.entries.items() if key.endswith(REVISION)}

    def encode(self) -> bytes:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "created_at": self.created_at,
            "part": self.part,
            "inferflux": __version__,
            "revisions": self.revisions,
            "num_keys": len(self.entries),
        }
        records = ({"key": key, "kind": e.kind, "value": _packed(e)} for key, e in sorted(self.entries.items()))
        body = b"".join(_line(document) for document in (head, *records))
        return body + _line({"sha256": hashlib.sha256(body).hexdigest()})

    @classmethod
    def decode(cls, data: bytes) -> Backup:
        """Read what `encode` wrote. Raises CliError for anything else, and for a file that was changed or cut."""
        *lines, tail = data.splitlines(keepends=True) or [b""]
        try:
            head = json.loads(lines[0]) if lines else {}
            if head.get("format") != FORMAT:
                raise CliError("this is no backup of InferFlux")
            if head["version"] != VERSION:
                raise CliError(f"the backup has version {head['version']}, this inferctl reads {VERSION}")
            if json.loads(tail) != {"sha256": hashlib.sha256(b"".join(lines)).hexdigest()}:
                raise CliError("the backup was changed or cut: its checksum is wrong")
            records = [json.loads(line) for line in lines[1:]]
            return cls(
                {r["key"]: Entry(r["kind"], _unpacked(r["kind"], r["value"])) for r in records},
                head["part"],
                head["created_at"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CliError("the backup was changed or cut: it cannot be read") from e


def backup(file: Path, part: str, output: Format) -> None:
    """Write the control state to a new file that only its owner can read."""
    with connected() as client:
        taken = retried(lambda: take(client, part))
    if not taken.entries:
        raise CliError("there is nothing to back up: this Redis has no state of InferFlux")
    write(file, taken.encode())
    tell("backed up", file, taken, output)


def restore(file: Path, output: Format, *, force: bool) -> None:
    """Put a backup in the place of the control state. Refuses to go back behind what is there, unless forced."""
    try:
        saved = Backup.decode(file.read_bytes())
    except OSError as e:
        raise CliError(f"cannot read {file}: {e.strerror}") from e
    with connected() as client:
        retried(lambda: put_back(client, saved, force=force))
    tell("restored", file, saved, output)


def take(client: Any, part: str = "") -> Backup:
    """Read everything as of one moment. Raises WatchError when something changed meanwhile."""
    with client.pipeline(transaction=True) as pipe:
        watched = revision_keys(client, part)
        if watched:
            pipe.watch(*watched)
        kinds = lasting(client, part)
        pipe.multi()
        for key, kind in kinds.items():
            _READ[kind](pipe, key)
        values = pipe.execute()
    found = zip(kinds.items(), values, strict=True)
    return Backup({key: Entry(kind, value) for (key, kind), value in found if value}, part)


def put_back(client: Any, saved: Backup, *, force: bool) -> None:
    """Replace the state in one transaction. Raises WatchError when something changed meanwhile, CliError."""
    with client.pipeline(transaction=True) as pipe:
        watched = {*revision_keys(client, saved.part), *saved.revisions}
        if watched:
            pipe.watch(*watched)
        current = {key: _number(pipe.get(key)) for key in watched}
        newer = {key: n for key, n in current.items() if n > saved.revisions.get(key, 0)}
        if newer and not force:
            details = ", ".join(
                f"{key} is {n}, the backup has {saved.revisions.get(key, 0)}" for key, n in newer.items()
            )
            raise CliError(f"the state is newer than the backup: {details}", hint="--force restores it all the same")
        replaced = [key for key in lasting(client, saved.part) if key not in FOR_EVER]
        pipe.multi()
        if replaced:
            pipe.delete(*replaced)
        for key, entry in saved.entries.items():
            _WRITE[entry.kind](pipe, key, entry.value)
        for key in newer:  # whoever follows a revision takes over what has a higher one
            pipe.set(key, current[key] + 1)
        pipe.execute()


def lasting(client: Any, part: str) -> dict[str, str]:
    """Map the keys that a backup holds to their kinds."""
    keys = sorted(key.decode() for key in client.scan_iter(_pattern(part), count=1000))
    keys = [key for key in keys if key not in MOMENTARY]
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.type(key)
            pipe.pttl(key)
        answers = pipe.execute()
    kinds = {key: (answers[2 * i].decode(), answers[2 * i + 1]) for i, key in enumerate(keys)}
    return {key: kind for key, (kind, ttl_ms) in kinds.items() if ttl_ms == -1 and kind in _READ}


def revision_keys(client: Any, part: str) -> list[str]:
    """List the keys that hold revisions; every change of the state changes one of them."""
    return sorted(key.decode() for key in client.scan_iter(f"{_pattern(part)}{REVISION}", count=1000))


def retried(action: Callable[[], T]) -> T:
    """Do something until nobody interferes."""
    for _ in range(MAX_TRIES):
        try:
            return action()
        except WatchError:
            continue
    raise CliError(f"the state changed {MAX_TRIES} times while it was read: try again")


@contextmanager
def connected() -> Iterator[Any]:
    """Connect to INFERFLUX_REDIS_URL, or to this home's own server. Raises CliError."""
    url = os.environ.get("INFERFLUX_REDIS_URL") or f"unix://{redis_socket(Home.from_env(os.environ))}"
    try:
        client = redis.Redis.from_url(url, protocol=2, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        with client:
            yield client
    except ValueError as e:
        raise CliError("INFERFLUX_REDIS_URL: must be a redis://, rediss:// or unix:// URL") from e
    except (RedisError, OSError) as e:
        raise CliError(f"no Redis to ask: {type(e).__name__}", Exit.NOT_RUNNING) from e


def write(file: Path, data: bytes) -> None:
    """Write a whole new file or nothing, readable for its owner alone. Raises CliError when there is one already."""
    try:
        with tempfile.NamedTemporaryFile(dir=file.absolute().parent, prefix=f".{file.name}.", delete=False) as partial:
            partial.write(data)
            partial.flush()
            os.fsync(partial.fileno())
        try:
            os.link(partial.name, file)  # unlike a rename it never replaces
        finally:
            Path(partial.name).unlink()
    except FileExistsError as e:
        raise CliError(f"{file} is there already") from e
    except OSError as e:
        raise CliError(f"cannot write {file}: {e.strerror}") from e


def tell(done: str, file: Path, state: Backup, output: Format) -> None:
    """Say what was done."""
    if output is Format.JSON:
        document = {"file": str(file), "created_at": state.created_at, "num_keys": len(state.entries)}
        print_json(document | {"revisions": state.revisions})
        return
    note(f"{done} {len(state.entries)} keys of {state.created_at} ({file})")


def _pattern(part: str) -> str:
    """Match the keys of a part, or of all."""
    return f"ifx:{{{part}}}:*" if part else "ifx:*"


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _number(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _packed(entry: Entry) -> Any:
    match entry.kind:
        case "string":
            return _text(entry.value)
        case "hash":
            return {_text(key): _text(value) for key, value in sorted(entry.value.items())}
        case "zset":
            return [[_text(member), score] for member, score in entry.value]
        case _:
            return [_text(member) for member in (entry.value if entry.kind == "list" else sorted(entry.value))]


def _unpacked(kind: str, value: Any) -> Value:
    match kind:
        case "string":
            return base64.b64decode(value)
        case "hash":
            return {base64.b64decode(key): base64.b64decode(text) for key, text in value.items()}
        case "zset":
            return [(base64.b64decode(member), score) for member, score in value]
        case "list" | "set":
            return [base64.b64decode(member) for member in value]
        case _:
            raise ValueError(f"unknown kind {kind!r}")


_READ: dict[str, Callable[[Any, str], Any]] = {
    "string": lambda pipe, key: pipe.get(key),
    "hash": lambda pipe, key: pipe.hgetall(key),
    "set": lambda pipe, key: pipe.smembers(key),
    "list": lambda pipe, key: pipe.lrange(key, 0, -1),
    "zset": lambda pipe, key: pipe.zrange(key, 0, -1, withscores=True),
}
_WRITE: dict[str, Callable[[Any, str, Value], Any]] = {
    "string": lambda pipe, key, value: pipe.set(key, value),
    "hash": lambda pipe, key, value: pipe.hset(key, mapping=value),
    "set": lambda pipe, key, value: pipe.sadd(key, *value),
    "list": lambda pipe, key, value: pipe.rpush(key, *value),
    "zset": lambda pipe, key, value: pipe.zadd(key, dict(value)),
}

"""Settings from the environment and an optional TOML file, all problems reported at once.

Each process declares a frozen dataclass; field `foo_bar` is read from INFERFLUX_FOO_BAR, or from the file that
INFERFLUX_FOO_BAR_FILE names, as secrets come to a pod. The environment wins over the file of settings, that over the
dataclass's defaults; a field without a default is required. Values of plain text fields never
appear in messages: they may be secrets.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from inferflux.errors import ConfigError

PREFIX = "INFERFLUX_"
FILE_SUFFIX = "_FILE"
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every process has. Empty directories mean their place under `home`."""

    instance_id: str
    """Stable over restarts, unique in the cluster, e.g. decode-0."""
    home: Path = Path("~/.inferflux")
    """State directory."""
    pki_dir: Path = Path()
    """CA and role certificates; default home/pki."""
    secrets_dir: Path = Path()
    """Shared keys; default home/secrets."""
    run_dir: Path = Path()
    """Unix sockets; default home/run."""
    bind: str = ""
    """gRPC address to listen on: unix:/path or host:port (port 0 picks one)."""
    ops_address: str = "127.0.0.1:0"
    """Where /livez, /readyz and /metrics answer: unix:/path or host:port."""
    ops_token: str = dataclasses.field(default="", repr=False)
    """What /metrics, and all of /readyz but its status, ask callers for; empty: nothing."""
    policy_address: str = ""
    """gRPC address of the policy service."""
    registry_address: str = ""
    """gRPC address of the registry service."""
    redis_url: str = dataclasses.field(default="", repr=False)
    """redis://, rediss:// or unix:// URL; may carry a password."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""

    def __post_init__(self) -> None:
        home = self.home.expanduser()
        object.__setattr__(self, "home", home)
        for name in ("pki", "secrets", "run"):
            if getattr(self, f"{name}_dir") == Path():
                object.__setattr__(self, f"{name}_dir", home / name)


def load(cls: type[T], environ: Mapping[str, str], file: Path | None = None) -> T:
    """Build `cls` from the environment over the file. Raises ConfigError naming every bad or missing key."""
    problems: list[str] = []
    raw = _read_file(cls, file, problems) | _read_environ(cls, environ, problems)
    values = _convert_all(cls, raw, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return cls(**values)
    except ValueError as e:  # a dataclass's own check in __post_init__
        raise ConfigError(str(e)) from e


def env_name(field_name: str) -> str:
    """Name the environment variable of a field."""
    return PREFIX + field_name.upper()


def _fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _read_environ(cls: type[Any], environ: Mapping[str, str], problems: list[str]) -> dict[str, tuple[str, Any]]:
    raw: dict[str, tuple[str, Any]] = {}
    for name in _fields(cls):
        key, file_key = env_name(name), env_name(name) + FILE_SUFFIX
        if key in environ and file_key in environ:
            problems.append(f"{key}: set together with {file_key}")
        elif key in environ:
            raw[name] = key, environ[key]
        elif file_key in environ:
            raw |= _read_value(name, file_key, Path(environ[file_key]), problems)
    return raw


def _read_value(name: str, file_key: str, path: Path, problems: list[str]) -> dict[str, tuple[str, Any]]:
    """Read one value, which may be a secret, from a file of its own."""
    try:
        return {name: (file_key, path.read_text(encoding="utf-8").strip())}
    except (OSError, UnicodeDecodeError) as e:
        problems.append(f"{file_key}: {path} cannot be read ({type(e).__name__})")
        return {}


def _read_file(cls: type[Any], file: Path | None, problems: list[str]) -> dict[str, tuple[str, Any]]:
    if file is None:
        return {}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        problems.append(f"{file}: cannot be read ({type(e).__name__})")
        return {}
    except tomllib.TOMLDecodeError as e:
        problems.append(f"{file}: {e}")
        return {}
    known = _fields(cls)
    problems.extend(f"{file}: unknown key {key!r}{_suggest(key, known)}" for key in content if key not in known)
    return {key: (f"{file}: {key}", value) for key, value in content.items() if key in known}


def _suggest(key: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert_all(cls: type[Any], raw: Mapping[str, tuple[str, Any]], problems: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in _fields(cls).items():
        if name in raw:
            source, value = raw[name]
            try:
                values[name] = _convert(hints[name], value)
            except ValueError as e:
                problems.append(f"{source}: {e}")
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{env_name(name)}: missing")
    return values


def _convert(hint: Any, value: Any) -> Any:
    """One value to its field's type. Raises ValueError with a message that can be shown."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(args, value)
    if origin is typing.Literal:
        return _one_of(list(args), value)
    if origin is tuple:
        items = value if isinstance(value, list) else _split(value)
        return tuple(_convert(args[0], item) for item in items)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(_one_of([member.value for member in hint], value))
    return _CONVERTERS[hint](value)


def _convert_optional(args: tuple[Any, ...], value: Any) -> Any:
    inner = next(a for a in args if a is not type(None))
    return None if value in ("", None) else _convert(inner, value)


def _one_of(allowed: list[Any], value: Any) -> Any:
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(map(str, allowed))}, is {value!r}")
    return value


def _split(value: Any) -> list[str]:
    return [item.strip() for item in _text(value).split(",") if item.strip()]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, is {type(value).__name__}")  # noqa: TRY004  -- the file's fault, not the code's
    return value


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _integer(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"must be an integer, is {value!r}") from None


def _number(value: Any) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"must be a number, is {value!r}") from None


def _boolean(value: Any) -> bool:
    key = str(value).lower()
    if key not in _BOOLEANS:
        raise ValueError(f"must be true or false, is {value!r}")
    return _BOOLEANS[key]


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    Path: _path,
    int: _integer,
    float: _number,
    bool: _boolean,
}

"""Where a local cluster keeps its files. Everything under the home belongs to one user: directories are 0700."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inferflux.errors import ConfigError

MAX_SOCKET_PATH = 100
"""Bytes. Linux allows 107 for a unix socket; the rest is room for temporary names beside it."""


@dataclass(frozen=True, slots=True)
class Home:
    """The state directory of one local cluster."""

    root: Path

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Home:
        """INFERFLUX_HOME, or ~/.inferflux."""
        return cls(_path(environ, "INFERFLUX_HOME", "~/.inferflux"))

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def redis(self) -> Path:
        return self.root / "redis"

    @property
    def state_file(self) -> Path:
        return self.root / "state.json"

    @property
    def supervisor_socket(self) -> Path:
        return self.run / "supervisor.sock"

    def socket(self, name: str) -> str:
        """Address (gRPC or ops) of the unix socket `name` in the run directory. Raises ConfigError if too long."""
        path = self.run / f"{name}.sock"
        if (length := len(str(path).encode())) > MAX_SOCKET_PATH:
            message = f"INFERFLUX_HOME is too long for unix sockets: {path} has {length} bytes, limit {MAX_SOCKET_PATH}"
            raise ConfigError(message)
        return f"unix:{path}"

    def ensure(self) -> Home:
        """Create all directories; idempotent."""
        for directory in (self.root, self.pki, self.secrets, self.run, self.logs, self.redis):
            private_dir(directory)
        return self


def models_dir(environ: Mapping[str, str]) -> Path:
    """Cache of converted models: INFERFLUX_MODELS, or ~/.cache/inferflux/models. Created when missing."""
    return private_dir(_path(environ, "INFERFLUX_MODELS", "~/.cache/inferflux/models"))


def private_dir(path: Path) -> Path:
    """Create `path` (0700) and its parents; an existing directory keeps its mode."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _path(environ: Mapping[str, str], key: str, default: str) -> Path:
    return Path(environ.get(key) or default).expanduser().absolute()

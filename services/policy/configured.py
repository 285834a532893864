"""The policy document that a cluster is configured with: of a file, and above it of the environment.

It is in force until an administrator applies another one; from then on file and environment have no say.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import orjson

from inferflux.config import env_name
from inferflux.errors import ConfigError, PolicyInvalid
from inferflux.policy.document import canonical, dump

FILE, TEXT = env_name("policy_file"), env_name("policy")


def read_configured(file: Path, text: str) -> bytes | None:
    """Join the file's sections and, in their place, those of the text; None: neither is given. Raises ConfigError."""
    sources = [(FILE, _read(file))] if file != Path() else []
    sources += [(TEXT, text.encode())] if text else []
    if not sources:
        return None
    try:
        sections: dict[str, Any] = {}
        for _, source in sources:
            sections |= orjson.loads(canonical(source))
        return dump(sections)
    except PolicyInvalid as e:
        raise ConfigError(f"{' or '.join(name for name, _ in sources)}: {e.message}") from e


def _read(file: Path) -> bytes:
    """Read a JSON or .toml file as JSON."""
    try:
        content = file.read_bytes()
        return orjson.dumps(tomllib.loads(content.decode())) if file.suffix == ".toml" else content
    except OSError as e:
        raise ConfigError(f"{FILE}: cannot read {file}: {e.strerror}") from e
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{FILE}: {file}: {e}") from e

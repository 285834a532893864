"""How big and how fast the simulated engine is."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from inferflux.errors import ConfigError

DEFAULT = Path(__file__).parent.parent / "sim_profile.json"
INSTANT = Path(__file__).parent.parent / "sim_profile_instant.json"

LINE_BYTES = 32


@dataclass(frozen=True, slots=True)
class SimProfile:
    """One simulated engine. A step takes `step_ms` + its sequences' and new prompt tokens' shares.

    `slot_bytes`: bytes of one KV block. `natural_tokens`: length of an answer that the client did not limit.
    """

    block_size: int
    slot_bytes: int
    max_model_len: int
    natural_tokens: int
    step_ms: float
    step_ms_per_sequence: float
    prefill_ms_per_token: float

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.slot_bytes < 1 or self.slot_bytes % (self.block_size * LINE_BYTES):
            raise ConfigError(
                f"sim profile: slot_bytes {self.slot_bytes} is no multiple of {LINE_BYTES} bytes for each of "
                f"{self.block_size} tokens"
            )

    def step_s(self, num_sequences: int, num_prompt_tokens: int) -> float:
        """Duration of one step."""
        shares = num_sequences * self.step_ms_per_sequence + num_prompt_tokens * self.prefill_ms_per_token
        return (self.step_ms + shares) / 1000


def load(path: Path | None) -> SimProfile:
    """Read a profile; keys that the file leaves out come from the default one. Raises ConfigError."""
    values = {**_read(DEFAULT), **(_read(path) if path else {})}
    unknown = values.keys() - {f.name for f in fields(SimProfile)}
    if unknown:
        raise ConfigError(f"sim profile {path}: unknown keys {', '.join(sorted(unknown))}")
    if not all(isinstance(value, int | float) and value >= 0 for value in values.values()):
        raise ConfigError(f"sim profile {path}: all values must be numbers, 0 or more")
    whole = {f.name for f in fields(SimProfile) if f.type == "int"}
    return SimProfile(**{name: int(value) if name in whole else value for name, value in values.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"sim profile {path}: {type(e).__name__}") from e
    if not isinstance(document, dict):
        raise ConfigError(f"sim profile {path}: not an object")
    return document

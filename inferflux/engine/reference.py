"""What a model must compute: the file against which a worker proves its numerics before it is ready.

Computed once per model with transformers in float32 on CPU (`inferflux.cli.jobs.reference`), read by engines in
`check_numerics`. The file is JSON and holds no prompt text, only token ids of a fixed English paragraph.

With n = len(prompt_token_ids), index i is the model's prediction after prompt_token_ids[: i + 1]:

    top1_ids[i], top1_logprobs[i]   most likely next token and its natural log-probability; n of each
    next_logprobs[i]                log-probability of prompt_token_ids[i + 1]; n - 1 of them
    greedy_ids                      what greedy decoding appends to the prompt; greedy_ids[0] == top1_ids[n - 1]

Of an embedding model there is the vector of the same paragraph instead, as its tokens are pooled.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from inferflux.errors import ConfigError

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NumericsReference:
    """One model's reference; see the module for what each field holds. `source` says what computed it."""

    weights_digest: str
    prompt_token_ids: tuple[int, ...]
    top1_ids: tuple[int, ...]
    top1_logprobs: tuple[float, ...]
    next_logprobs: tuple[float, ...]
    greedy_ids: tuple[int, ...]
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.prompt_token_ids)
        lengths = (len(self.top1_ids), len(self.top1_logprobs), len(self.next_logprobs))
        if n < 2 or lengths != (n, n, n - 1) or not self.greedy_ids:
            raise ConfigError(f"numerics reference: {n} prompt tokens with lists of {lengths} values")


@dataclass(frozen=True, slots=True)
class EmbeddingReference:
    """One embedding model's reference. `source` says what computed it."""

    weights_digest: str
    prompt_token_ids: tuple[int, ...]
    embedding: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not (self.prompt_token_ids and self.embedding):
            raise ConfigError("numerics reference: no prompt tokens or no embedding")


def load(path: Path) -> NumericsReference:
    """Read a reference. Raises ConfigError when the file is not a whole reference of this format."""
    return _load(NumericsReference, path)


def load_embedding(path: Path) -> EmbeddingReference:
    """Read an embedding model's reference. Raises as `load`."""
    return _load(EmbeddingReference, path)


def _load(kind: type[T], path: Path) -> T:
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            raise ConfigError(f"numerics reference {path}: not format {FORMAT}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return kind(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"numerics reference {path}: {type(e).__name__}: {e}") from e


def save(reference: NumericsReference | EmbeddingReference, path: Path) -> None:
    """Write a reference so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"format": FORMAT, **asdict(reference)}, indent=1))
    partial.replace(path)

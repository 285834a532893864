"""What `inferctl admin cache` sends and shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from inferflux.cli.cache import COLUMNS, Prefix, body, row
from inferflux.cli.failure import CliError, Exit


def test_text_is_a_prompt_and_json_a_request(tmp_path: Path) -> None:
    """From the command line or from a file of that name."""
    file = tmp_path / "prefix"
    file.write_text('{"messages": [], "temperature": 0}')

    assert body(Prefix("You are kind.", "m", None)) == {"prompt": "You are kind.", "model": "m"}
    assert body(Prefix(str(file), None, "acme")) == {"messages": [], "temperature": 0, "tenant": "acme"}
    assert body(Prefix('{"prompt": "a"}', None, None)) == {"prompt": "a"}
    assert body(Prefix('{"colour": "red"}', None, None)) == {"prompt": '{"colour": "red"}'}
    assert body(Prefix("[1, 2]", None, None)) == {"prompt": "[1, 2]"}
    assert body(Prefix("a\0b" + "c" * 5000, None, None))["prompt"].startswith("a\0b")


def test_a_prefix_may_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument."""
    monkeypatch.setattr("sys.stdin", io.StringIO("You are kind."))

    assert body(Prefix(None, None, None)) == {"prompt": "You are kind."}


def test_nothing_is_no_prefix() -> None:
    """One line, before anything is sent."""
    with pytest.raises(CliError, match="empty") as failure:
        body(Prefix("  ", None, None))
    assert failure.value.code is Exit.USAGE


def test_each_worker_has_a_row() -> None:
    """Also one that does not answer."""
    store: dict[str, Any] = {
        "worker": "prefill-0",
        "cached_tokens": 256,
        "slots": {"free": 5, "kept": 2, "pinned": 1},
        "requests": {"hit": 3, "partial": 4, "miss": 5},
        "evictions": {"room": 6, "broken": 1},
        "pins": [{"name": "system", "num_tokens": 128}],
    }

    assert row(store) == ("prefill-0", 256, 5, 2, 1, 3, 4, 5, 7, "system (128)")
    assert len(row({"worker": "prefill-1", "error": "WORKER_LOST"})) == len(COLUMNS)

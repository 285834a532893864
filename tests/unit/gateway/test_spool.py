"""Audit records on disk: whole, in order, and no more of them than there is room for."""

from __future__ import annotations

import pytest

from services.gateway.spool import BATCH_BYTES, Spool


def test_records_come_back_in_order_and_the_file_shrinks_when_all_are_taken(tmp_path):
    """Also in several batches, and by another process after a crash."""
    path = tmp_path / "spool/gateway-0.jsonl"
    records = [f'{{"n":{n},"x":"{"a" * 1000}"}}'.encode() for n in range(2500)]
    Spool(path, 1 << 30).put(records)
    spool, seen = Spool(path, 1 << 30), []
    while not spool.is_empty:
        batch = spool.peek()
        assert sum(map(len, batch)) < 2 * BATCH_BYTES
        spool.drop(batch)
        seen += batch

    assert seen == records
    assert path.stat().st_size == 0
    spool.put(records[:1])
    assert spool.peek() == records[:1]


def test_a_full_spool_takes_nothing_of_a_batch(tmp_path):
    """And goes on when there is room."""
    spool = Spool(tmp_path / "s.jsonl", 100)
    spool.put([b"a" * 50])
    with pytest.raises(OSError, match="more than 100 bytes"):
        spool.put([b"b" * 10, b"c" * 50])

    assert spool.peek() == [b"a" * 50]
    spool.drop(spool.peek())
    spool.put([b"c" * 50])
    assert spool.peek() == [b"c" * 50]


def test_what_a_failed_write_has_left_is_cut_off_by_the_next(tmp_path):
    """Nobody was told that it is there."""
    path = tmp_path / "s.jsonl"
    spool = Spool(path, 100)
    spool.put([b"a"])
    with path.open("ab") as file:
        file.write(b"half of a rec")
    spool.put([b"b"])
    with path.open("ab") as file:
        file.write(b"half of a rec")
    Spool(path, 100).put([b"c"])

    assert Spool(path, 100).peek() == [b"a", b"b", b"c"]

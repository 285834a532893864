"""A record is on disk when `append` returns, or nothing of it is."""

from __future__ import annotations

import asyncio
import resource

import orjson
import pytest

from inferflux.audit import Head, verify
from inferflux.clock import ManualClock
from inferflux.errors import AuditUnavailable, InvalidRequest
from inferflux.policy.signature import Signer, Verifier
from services.policy import audit_log
from services.policy.audit_log import AuditLog, files

SIGNER = Signer(b"s" * 32)
VERIFIER = Verifier(SIGNER.public_key)


@pytest.fixture
def open_log():
    """Open logs as a starting service does; at the end they are let go as in a crash."""
    logs: list[AuditLog] = []

    def open_one(directory) -> AuditLog:
        logs.append(AuditLog(directory, "policy-0", SIGNER, ManualClock(1_700_000_000)))
        logs[-1].load()
        return logs[-1]

    yield open_one
    for log in logs:
        log._shut()


def record(number: int, **fields: object) -> bytes:
    return orjson.dumps({"id": f"r{number}", "kind": "admin", "at": f"2026-01-01T00:00:{number:02}", **fields})


def verdict(directory, last: Head | None = None):
    lines = [line for path in files(directory, "policy-0") for line in path.read_bytes().splitlines(keepends=True)]
    return verify(lines, "policy-0", VERIFIER, last)


async def test_records_are_chained_over_restarts_and_heads_are_kept(tmp_path, open_log):
    """In one chain, signed at the end of each run."""
    for run in range(3):
        log = open_log(tmp_path)
        await log.append([record(10 * run), record(10 * run + 1)])
        await log.close()
    head = orjson.loads(log.head_file.read_bytes())

    assert (verdict(tmp_path).problem, verdict(tmp_path).num_heads, verdict(tmp_path).num_unsigned) == ("", 3, 0)
    assert Head("policy-0", head["seq"], head["hash"]).is_signed_by(head["signature"], VERIFIER)
    assert (head["seq"], log.head.seq) == (8, 9)


async def test_a_record_that_comes_twice_is_written_once_even_after_a_restart(tmp_path, open_log):
    """Gateways send again what was not answered."""
    await open_log(tmp_path).append([record(1), record(2)])
    log = open_log(tmp_path)
    await log.append([record(2), record(3)])

    assert log.head.seq == 3
    assert verdict(tmp_path).problem == ""


async def test_a_line_that_a_crash_has_left_unfinished_is_cut_off(tmp_path, open_log):
    """Nobody was told that it is there."""
    await open_log(tmp_path).append([record(1)])
    with files(tmp_path, "policy-0")[0].open("ab") as file:
        file.write(b'{"hash":"12')
    await open_log(tmp_path).append([record(2)])

    assert (verdict(tmp_path).problem, verdict(tmp_path).end.seq) == ("", 2)


async def test_a_full_disk_refuses_records_and_leaves_a_good_log(tmp_path, open_log):
    """Half a batch is no batch; with room again it goes on."""
    log = open_log(tmp_path)
    await log.append([record(1)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        with pytest.raises(AuditUnavailable):
            await log.append([record(2), record(3, text="x" * 1000), record(4)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    await log.append([record(2)])
    await log.close()
    assert (verdict(tmp_path).problem, verdict(tmp_path).end.seq) == ("", 3)


async def test_a_directory_that_cannot_be_used_refuses_records_until_it_can(tmp_path, open_log):
    """The service starts all the same."""
    (tmp_path / "audit").write_text("in the way")
    log = open_log(tmp_path / "audit")
    with pytest.raises(AuditUnavailable):
        await log.append([record(1)])
    (tmp_path / "audit").unlink()
    await log.append([record(1)])

    assert verdict(tmp_path / "audit").end.seq == 1


async def test_files_have_a_bounded_size_and_stay_one_chain(tmp_path, open_log, monkeypatch):
    """Also for a run that begins with a full one."""
    monkeypatch.setattr(audit_log, "MAX_FILE_BYTES", 1000)
    for run in range(2):
        log = open_log(tmp_path)
        for number in range(10):
            await log.append([record(10 * run + number)])
        await log.close()

    assert len(files(tmp_path, "policy-0")) > 3
    assert (verdict(tmp_path).problem, verdict(tmp_path).num_heads) == ("", 2)
    assert len(await log.search({}, "", 100)) == 20


async def test_concurrent_writers_make_one_chain(tmp_path, open_log):
    """And a head comes with every hundredth line."""
    log = open_log(tmp_path)
    await asyncio.gather(*(log.append([record(n)]) for n in range(150)))

    assert (verdict(tmp_path).problem, verdict(tmp_path).end.seq, verdict(tmp_path).num_heads) == ("", 151, 1)


async def test_searching_finds_the_newest_with_these_fields(tmp_path, open_log):
    """Oldest first, not before a time, not more than asked for; heads are no records."""
    log = open_log(tmp_path)
    await log.append([record(n, tenant="acme" if n % 2 else "other") for n in range(10)])
    await log.sign()

    async def found(fields: dict[str, str], since: str = "", limit: int = 100) -> list[str]:
        return [orjson.loads(line)["record"]["id"] for line in await log.search(fields, since, limit)]

    assert await found({"tenant": "acme"}, limit=2) == ["r7", "r9"]
    assert await found({}, since="2026-01-01T00:00:08") == ["r8", "r9"]
    assert await found({"tenant": "nobody"}) == []


@pytest.mark.parametrize("bad", [b"", b"[]", b'{"id":1}', b'{"id":"1","kind":"head","at":"x"}', b"\xff"])
async def test_what_is_no_record_is_refused(tmp_path, open_log, bad):
    """Heads above all: only the log itself signs."""
    log = open_log(tmp_path)
    with pytest.raises(InvalidRequest):
        await log.append([record(1), bad])
    assert log.head.seq == 0

"""Any change of a log breaks its chain at a line that can be named."""

from __future__ import annotations

import pytest

from inferflux.audit import Head, verify
from inferflux.policy.signature import Signer, Verifier

SIGNER = Signer(b"s" * 32)
VERIFIER = Verifier(SIGNER.public_key)
TRICKY = 'a\r\nb\u2028c\u0085\x1b[2J\x00"}\\'


def build(*records: dict[str, object], signed_at: tuple[int, ...] = ()) -> tuple[list[bytes], Head]:
    """Write records, with a head after the lines of these numbers."""
    head, lines = Head("c"), []
    for record in records:
        head, line = head.extend(dict(record))
        lines.append(line)
        if head.seq in signed_at:
            head, line = head.extend(head.sign(SIGNER, "now"))
            lines.append(line)
    return lines, head


RECORDS = [{"kind": "refusal", "n": n, "text": TRICKY} for n in range(6)]


def test_a_log_that_nobody_touched_is_good():
    """Whatever clients put into it: one record is one line."""
    lines, head = build(*RECORDS, signed_at=(3,))
    verdict = verify(lines, "c", VERIFIER, head)

    assert (verdict.problem, verdict.end, verdict.num_heads, verdict.num_unsigned) == ("", head, 1, 3)
    assert all(line.count(b"\n") == 1 and b"\r" not in line for line in lines)


def test_every_changed_byte_of_every_line_is_found_there():
    """Also those that change no value."""
    lines, head = build(*RECORDS[:3], signed_at=(2,))
    for number, line in enumerate(lines, 1):
        for position in range(0, len(line) - 1, 3):
            changed = line[:position] + bytes([line[position] ^ 1]) + line[position + 1 :]
            verdict = verify([*lines[: number - 1], changed, *lines[number:]], "c", VERIFIER, head)
            assert verdict.bad_line == number, (position, verdict.problem)


@pytest.mark.parametrize(
    ("change", "bad_line"),
    [
        (lambda lines: lines[1:], 1),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [lines[0].replace(b'"n":0', b'"n": 0'), *lines[1:]], 1),
        (lambda lines: lines[:-2], 6),
        (lambda lines: lines[:0], 1),
        (lambda lines: build(*RECORDS[: len(lines) - 2], signed_at=(3,))[0], 7),
    ],
)
def test_lines_cut_moved_repeated_or_written_anew_are_found(change, bad_line):
    """The last: a whole new chain of the same kind, and shorter than what was signed."""
    lines, head = build(*RECORDS, signed_at=(3,))

    assert verify(change(lines), "c", VERIFIER, head).bad_line == bad_line


def test_a_chain_written_anew_with_another_key_is_found_at_its_first_head():
    """And with the same key by its last head: it has another hash."""
    lines, head = build(*RECORDS, signed_at=(3,))
    other, other_head = build(*({**record, "n": 9} for record in RECORDS), signed_at=(3,))

    assert verify(lines, "c", Verifier(Signer(b"x" * 32).public_key)).bad_line == 4
    assert verify(lines, "d", VERIFIER).bad_line == 4
    assert verify(other, "c", VERIFIER, other_head).problem == ""
    assert verify(other, "c", VERIFIER, head).bad_line == head.seq


def test_lines_may_follow_the_last_known_head():
    """They are not signed yet."""
    lines, _ = build(*RECORDS, signed_at=(3,))
    _, known = build(*RECORDS[:3])

    assert verify(lines, "c", VERIFIER, known).problem == ""

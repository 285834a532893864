from __future__ import annotations

import os

from inferflux.engine.vllm.transfer import ExpertReport, Report, parse


def test_reports_of_ranks_add_up_to_one() -> None:
    fast, slow = Report("t", "committed", "", 100, 0.1), Report("t", "committed", "", 100, 0.3)

    assert Report.merge([fast, slow]) == Report("t", "committed", "", 200, 0.3)


def test_one_rank_that_failed_is_enough() -> None:
    fine, failed = Report("t", "committed", "", 100, 0.1), Report("t", "recomputed", "digest")

    merged = Report.merge([fine, failed])

    assert (merged.result, merged.reason) == ("recomputed", "digest")


def test_counts_of_many_experts_take_lines_that_do_not_mix() -> None:
    """A line is shorter than what the system writes in one piece."""
    read_fd, write_fd = os.pipe()
    tokens = [10**9 + i for i in range(600)]
    ExpertReport.send_all(tokens, write_fd)
    Report("t", "committed").send(write_fd)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        *counts, last = map(parse, lines := pipe.readlines())

    assert max(map(len, lines)) < 4096
    assert [r.first for r in counts if isinstance(r, ExpertReport)] == [0, 256, 512]
    assert [n for r in counts if isinstance(r, ExpertReport) for n in r.expert_tokens] == tokens
    assert last == Report("t", "committed")

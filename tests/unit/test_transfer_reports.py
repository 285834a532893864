from __future__ import annotations

from inferflux.engine.vllm.transfer import Report


def test_reports_of_ranks_add_up_to_one() -> None:
    fast, slow = Report("t", "committed", "", 100, 0.1), Report("t", "committed", "", 100, 0.3)

    assert Report.merge([fast, slow]) == Report("t", "committed", "", 200, 0.3)


def test_one_rank_that_failed_is_enough() -> None:
    fine, failed = Report("t", "committed", "", 100, 0.1), Report("t", "recomputed", "digest")

    merged = Report.merge([fine, failed])

    assert (merged.result, merged.reason) == ("recomputed", "digest")

"""Reports of several ranks become one."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from kvtiers.integrations.vllm.messages import ChunkCopy, CopyReport, LoadJob, StepJobs, StoreJob

numbers = st.integers(0, 5)
reports = st.builds(
    CopyReport,
    stored=st.dictionaries(numbers, st.just(1)),
    failed=st.sets(numbers),
    load_seconds=st.just(0.5),
    load_bytes=st.integers(0, 9),
    store_seconds=st.just(0.25),
    store_bytes=st.integers(0, 9),
)


@given(st.lists(reports, max_size=4))
def test_all_that_any_rank_has_told_is_in_the_sum(ranks: list[CopyReport]) -> None:
    total = CopyReport()
    for report in ranks:
        total.add(report)
    for number in range(6):
        assert total.stored.get(number, 0) == sum(number in report.stored for report in ranks)
        assert (number in total.failed) == any(number in report.failed for report in ranks)
    assert total.load_bytes == sum(report.load_bytes for report in ranks)
    assert total.store_bytes == sum(report.store_bytes for report in ranks)
    assert total.load_seconds == 0.5 * len(ranks)
    assert total.store_seconds == 0.25 * len(ranks)


def test_empty_report_is_not_sent() -> None:
    assert CopyReport().is_empty
    assert not CopyReport(stored={1: 1}).is_empty
    assert not CopyReport(load_bytes=1).is_empty


def test_jobs_reach_another_process_as_they_are() -> None:
    copy = ChunkCopy((0, 4096), 1, (7, 9))
    jobs = StepJobs([LoadJob("r", b"arena", [copy])], [StoreJob(3, b"arena", [copy])])
    assert pickle.loads(pickle.dumps(jobs)) == jobs

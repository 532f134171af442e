"""The driver over the fake backend: what it submits, notes and counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.interface import BackendFailed, StepOutput, Submission
from bench.decode_step import QUIET_STEPS, decode_step, measure_batches
from bench.drive import Driver
from bench.roofline import Ceiling
from bench.workloads import Workload, alike, mix, repeated
from config import BackendSettings, BatchSettings, CacheSettings, FakeSettings, QueueSettings
from engine.engine import Engine
from engine.opening import open_backend


def open_engine(batch: BatchSettings | None = None, fake: FakeSettings | None = None) -> Engine:
    settings = BackendSettings(
        impl="fake", batch=batch or BatchSettings(), fake=fake or FakeSettings()
    )
    return Engine(open_backend(settings), QueueSettings())


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = open_engine()
    yield engine
    engine.close()


class Watched:
    """An engine that remembers how many submissions were in flight at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.flying: set[str] = set()
        self.most = 0

    def submit(self, submission: Submission) -> None:
        self.flying.add(submission.id)
        self.most = max(self.most, len(self.flying))
        self.engine.submit(submission)

    def step(self, wait: float = 0.0) -> StepOutput:
        output = self.engine.step(wait)
        self.flying -= {delta.id for delta in output.deltas if delta.finish}
        return output


def test_every_request_gets_exactly_its_tokens(engine: Engine) -> None:
    workload = mix(engine.spec.vocabulary)
    told: list[int] = []
    measured = Driver(engine, workload, 32, "run", told.append).run()
    assert [record.output_tokens for record in measured.records] == [
        job.new_tokens for job in workload.jobs
    ]
    assert not any(record.failed for record in measured.records)
    assert sum(told) == workload.new_tokens
    assert engine.idle


def test_every_position_is_computed_once_and_every_context_is_counted(engine: Engine) -> None:
    workload = alike(3, 20, 5, engine.spec.vocabulary, seed=0)
    measured = Driver(engine, workload, 3, "run").run()
    # the last token of an answer is never computed again
    assert sum(work.positions for work in measured.steps) == 3 * (20 + 5 - 1)
    assert sum(work.rows for work in measured.steps) == 3 * 5
    assert sum(work.context for work in measured.steps) == 3 * sum(range(20, 25))
    assert sum(work.interval for work in measured.steps) <= measured.duration_s


@pytest.mark.parametrize("concurrency", [1, 3, 32])
def test_no_more_requests_are_in_flight_than_asked_for(engine: Engine, concurrency: int) -> None:
    watched = Watched(engine)
    Driver(watched, mix(engine.spec.vocabulary), concurrency, "run").run()
    assert watched.most == concurrency


def test_a_flushed_cache_answers_nothing_and_a_full_one_does(engine: Engine) -> None:
    workload = Workload("two", repeated(tuple(range(40)), 2, 1).jobs)

    def cached(label: str) -> int:
        return Driver(engine, workload, 1, label).run().records[0].cached_tokens

    assert cached("cold") == 0
    assert cached("warm") == 32
    engine.flush()
    assert cached("flushed") == 0


def test_a_lost_device_leaves_failed_records_and_ends_the_run() -> None:
    engine = open_engine(fake=FakeSettings(fail_at_step=4))
    measured = Driver(engine, alike(3, 8, 16, engine.spec.vocabulary, seed=0), 3, "run").run()
    assert [record.failed for record in measured.records] == [True] * 3
    with pytest.raises(BackendFailed):
        Driver(engine, alike(1, 8, 16, engine.spec.vocabulary, seed=1), 1, "after").run()


def test_quiet_steps_are_decodes_of_the_whole_batch_around_the_context(engine: Engine) -> None:
    for batch, quiet in measure_batches(engine, engine.spec, repeat=1):
        assert len(quiet) >= QUIET_STEPS // 2
        assert {(work.rows, work.positions) for work in quiet} == {(batch, batch)}
        step = decode_step(batch, quiet, engine.spec, Ceiling(1e9, 1e9))
        assert step.context == pytest.approx(256, abs=8)


def test_a_batch_that_does_not_fit_is_refused_in_one_line() -> None:
    engine = open_engine(batch=BatchSettings(max_running=8))
    with pytest.raises(Exception, match=r"a batch of 32 is wanted, MAX_RUNNING is 8: raise it"):
        list(measure_batches(engine, engine.spec, repeat=1))
    settings = BackendSettings(impl="fake", cache=CacheSettings(budget_tokens=1024))
    engine = Engine(open_backend(settings), QueueSettings())
    with pytest.raises(Exception, match=r"the cache has 64: raise PAGE_TOKEN_BUDGET"):
        list(measure_batches(engine, engine.spec, repeat=1))

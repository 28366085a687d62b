"""Which jobs are taken: by the tokens that wait, by the time that they would take, and what the refused are told."""

import threading
import time

import pytest

from serve.batcher import Batcher, DeadlineExceeded, QueueFull
from tests.jobs import Launcher, Portions, blocked, counted


def test_admission_counts_tokens_and_tells_when_to_come_back(batcher, clock, gate):
    batcher.submit(counted([], "a", 1), 85)
    with pytest.raises(QueueFull, match="95 tokens wait already, at most 100 may") as caught:
        batcher.submit(counted([], "b", 1), 6)
    assert caught.value.retry_after_seconds == 1.0
    batcher.submit(counted([], "c", 1), 5)
    assert batcher.queue_tokens == 100


def test_retry_after_follows_the_measured_drain_rate(batcher, clock):
    def steps():
        clock.now += 2.0
        yield 40
        clock.now += 1.0

    batcher.submit(steps(), 60).result(10)
    # 40 tokens in 2 s, then 20 in 1 s: 20 tokens a second
    assert batcher.tokens_per_second == pytest.approx(20.0)
    started, gate = threading.Event(), threading.Event()
    batcher.submit(blocked(started, gate), 100)
    assert started.wait(10)
    with pytest.raises(QueueFull) as caught:
        batcher.submit(counted([], "late", 1), 30)
    gate.set()
    assert caught.value.retry_after_seconds == pytest.approx(30 / 20.0)


@pytest.fixture
def busy(clock):
    """At 20 tokens a second 40 tokens run and 20 wait."""
    batcher = Batcher(max_queue_tokens=1000, clock=clock)

    def steps():
        clock.now += 2.0
        return 40
        yield

    batcher.submit(steps(), 40).result(10)
    assert batcher.tokens_per_second == pytest.approx(20.0)
    started, gate = threading.Event(), threading.Event()
    batcher.submit(blocked(started, gate, 40), 40)
    assert started.wait(10)
    batcher.submit(counted([], "waits", 1), 20)
    yield batcher
    gate.set()
    batcher.close()


def test_what_would_take_too_long_is_refused(busy, clock):
    soon = clock.now + 4.0
    with pytest.raises(
        QueueFull, match="would take about 4050 ms with what waits already, 4000 ms are"
    ) as caught:
        busy.submit(counted([], "late", 1), 21, expected_by=soon)
    assert caught.value.retry_after_seconds == pytest.approx(0.05)
    with pytest.raises(QueueFull, match="this request alone takes about 4500 ms, 4000 ms are left") as caught:
        busy.submit(counted([], "long", 1), 90, expected_by=soon)
    assert caught.value.retry_after_seconds == pytest.approx(60 / 20.0)
    assert busy.submit(counted([], "timely", 1), 20, expected_by=soon) is not None
    assert busy.queue_tokens == 80


def test_what_would_pass_its_deadline_is_refused_at_once(busy, clock):
    with pytest.raises(QueueFull, match="3500 ms with what waits already, 3000 ms are left"):
        busy.submit(counted([], "late", 1), 10, deadline=clock.now + 3.0, expected_by=clock.now + 9.0)
    with pytest.raises(QueueFull, match="3500 ms with what waits already, 3000 ms are left"):
        busy.check_room(5, arriving=5, expected_by=clock.now + 3.0, deadline=clock.now + 9.0)
    with pytest.raises(DeadlineExceeded):
        busy.submit(counted([], "over", 1), 1, deadline=clock.now)
    assert busy.submit(counted([], "timely", 1), 10, deadline=clock.now + 3.6) is not None


def test_a_large_job_delays_others_by_its_turns_only(clock):
    launcher = Launcher()
    batcher = Batcher(max_queue_tokens=10**6, launcher=launcher, launch_tokens=4, clock=clock)
    launcher.gate.set()
    clock.now = 0.0
    real_run = launcher.run

    def run(launch, members):
        failed = real_run(launch, members)
        clock.now += 1.0
        return failed

    launcher.run = run
    batcher.submit(Portions("first", 8), 8).result(10)
    assert batcher.tokens_per_second == pytest.approx(4.0)
    launcher.gate.clear()
    launcher.started.clear()
    large = batcher.submit(Portions("large", 4000), 4000)
    assert launcher.started.wait(10)
    with pytest.raises(QueueFull, match="would take about 1500 ms"):
        batcher.submit(Portions("small", 2), 2, expected_by=clock.now + 1.4)
    with pytest.raises(QueueFull, match="this request alone"):
        batcher.submit(Portions("wide", 8), 8, expected_by=clock.now + 1.4)
    clock.now += 0.5  # half of the launch is done
    small = batcher.submit(Portions("small", 2), 2, expected_by=clock.now + 1.1)
    large.cancel()
    launcher.gate.set()
    assert small.result(10).value == "small"
    batcher.close()


def test_nothing_is_too_late_where_nothing_waits(batcher, clock):
    batcher.submit(counted([], "first", 1), 10).result(10)
    clock.now += 1.0
    assert (
        batcher.submit(counted([], "large", 1), 5000, deadline=clock.now + 1e-6).result(10).value == "large"
    )


def test_a_job_larger_than_the_queue_runs_when_nothing_waits(batcher):
    assert batcher.submit(counted([], "huge", 1), 5000).result(10).value == "huge"
    assert batcher.queue_tokens == 0


def test_two_launches_of_one_job_do_not_count_as_time_won(clock):
    launcher = Launcher()
    batcher = Batcher(max_queue_tokens=10**6, launcher=launcher, num_threads=2, launch_tokens=4, clock=clock)
    launcher.gate.set()
    real_run = launcher.run

    def run(launch, members):
        failed = real_run(launch, members)
        clock.now += 1.0
        return failed

    launcher.run = run
    batcher.submit(Portions("first", 4), 4).result(10)
    assert batcher.tokens_per_second == pytest.approx(4.0)
    launcher.gate.clear()
    large = Portions("large", 4000)
    future = batcher.submit(large, 4000)
    give_up = time.monotonic() + 10
    while large.portions > 3992 and time.monotonic() < give_up:
        time.sleep(0.01)
    clock.now += (
        3.0  # both launches are late: of the large job's turn nothing is left, and no more than nothing
    )
    with pytest.raises(QueueFull, match="would take about 1500 ms"):
        batcher.check_room(2, arriving=4, expected_by=clock.now + 1.4)
    future.cancel()
    launcher.gate.set()
    batcher.close()

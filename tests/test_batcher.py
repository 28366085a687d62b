import concurrent.futures
import threading

import numpy as np
import pytest

from serve.batcher import Batcher, DeadlineExceeded, QueueFull, Stopped


class Clock:
    """Seconds that only pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def batcher(clock):
    batcher = Batcher(max_queue_tokens=100, clock=clock)
    yield batcher
    batcher.close()


def blocked(started, gate, tokens=10):
    """One step that waits for the gate."""

    def steps():
        started.set()
        gate.wait(10)
        return tokens
        yield

    return steps()


@pytest.fixture
def gate(batcher):
    """The device thread is busy until the gate is set."""
    started, gate = threading.Event(), threading.Event()
    batcher.submit(blocked(started, gate), 10)
    assert started.wait(10)
    yield gate
    gate.set()


def counted(log, name, num_steps, tokens=10):
    for step in range(num_steps):
        if step:
            yield tokens
        log.append((name, step))
    return name


def test_jobs_take_turns_step_by_step(batcher, gate):
    log = []
    long = batcher.submit(counted(log, "long", 3), 30)
    short = batcher.submit(counted(log, "short", 1), 10)
    gate.set()
    assert long.result(10).value == "long"
    assert short.result(10).value == "short"
    assert log == [("long", 0), ("short", 0), ("long", 1), ("long", 2)]
    assert batcher.queue_tokens == 0


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


def test_what_would_take_too_long_is_refused(busy):
    soon = busy._clock() + 4.0
    with pytest.raises(
        QueueFull, match="would take about 4050 ms with what waits already, 4000 ms are"
    ) as caught:
        busy.submit(counted([], "late", 1), 21, expected_by=soon)
    assert caught.value.retry_after_seconds == pytest.approx(0.05)
    with pytest.raises(
        QueueFull, match="this request alone takes about 4500 ms, 4000 ms are allowed"
    ) as caught:
        busy.submit(counted([], "long", 1), 90, expected_by=soon)
    assert caught.value.retry_after_seconds == pytest.approx(60 / 20.0)
    assert busy.submit(counted([], "timely", 1), 20, expected_by=soon) is not None
    assert busy.queue_tokens == 80


def test_what_would_pass_its_deadline_is_refused_at_once(busy, clock):
    with pytest.raises(QueueFull, match="3500 ms with what waits already, 3000 ms are allowed"):
        busy.submit(counted([], "late", 1), 10, deadline=clock.now + 3.0, expected_by=clock.now + 9.0)
    with pytest.raises(QueueFull, match="3500 ms with what waits already, 3000 ms are allowed"):
        busy.check_room(5, arriving=5, expected_by=clock.now + 3.0, deadline=clock.now + 9.0)
    with pytest.raises(DeadlineExceeded):
        busy.submit(counted([], "over", 1), 1, deadline=clock.now)
    assert busy.submit(counted([], "timely", 1), 10, deadline=clock.now + 3.6) is not None


def test_a_large_job_delays_others_by_its_turns_only(clock):
    launcher = Launcher()
    batcher = Batcher(max_queue_tokens=10**6, launcher=launcher, turn_tokens=4, clock=clock)
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


def test_a_cancelled_job_is_dropped_and_gives_its_tokens_back(batcher, gate):
    log = []
    gone = batcher.submit(counted(log, "gone", 2), 90)
    assert gone.cancel()
    stays = batcher.submit(counted(log, "stays", 1), 0)
    gate.set()
    stays.result(10)
    assert log == [("stays", 0)]
    assert batcher.queue_tokens == 0


def test_a_job_past_its_deadline_is_not_begun(batcher, clock, gate):
    log = []
    late = batcher.submit(counted(log, "late", 1), 10, deadline=5.0)
    timely = batcher.submit(counted(log, "timely", 1), 10, deadline=50.0)
    clock.now = 6.0
    gate.set()
    assert timely.result(10).queue_seconds == 6.0
    with pytest.raises(DeadlineExceeded):
        late.result(10)
    assert log == [("timely", 0)]
    assert batcher.queue_tokens == 0


def test_a_failing_job_leaves_the_thread_alive(batcher):
    def steps():
        yield 5
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        batcher.submit(steps(), 10).result(10)
    assert batcher.submit(counted([], "next", 1), 10).result(10).value == "next"
    assert batcher.queue_tokens == 0


def test_closing_finishes_what_was_accepted_and_takes_nothing_more():
    batcher = Batcher(max_queue_tokens=1000)
    started, gate = threading.Event(), threading.Event()
    batcher.submit(blocked(started, gate), 10)
    accepted = [batcher.submit(counted([], name, 3), 30) for name in "abc"]
    assert started.wait(10)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.set()
    closing.join(10)
    assert [future.result(0).value for future in accepted] == ["a", "b", "c"]
    with pytest.raises(Stopped):
        batcher.submit(counted([], "late", 1), 10)


def test_many_threads_may_submit(batcher):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda _: batcher.submit(counted([], "x", 2), 0), range(200)))
    assert all(future.result(10).value == "x" for future in futures)


class Portions:
    """Work of some portions of one token each."""

    def __init__(self, name, portions):
        self.name, self.portions = name, portions

    @property
    def is_waiting(self):
        return self.portions > 0

    def join(self, launch, member):
        taken = min(self.portions, launch["room"])
        launch["room"] -= taken
        self.portions -= taken
        if taken:
            launch["members"].append((member, self.name, taken))
        return taken

    def result(self):
        return self.name


class Launcher:
    """Launches of four portions; one with "bad" in it fails, and none runs while the gate is closed."""

    def __init__(self):
        self.launches, self.seconds = [], []
        self.gate, self.started = threading.Event(), threading.Event()

    def open(self):
        return {"room": 4, "members": []}

    def run(self, launch, members):
        self.started.set()
        self.gate.wait(10)
        assert [member for member, _, _ in launch["members"]] == list(range(len(members)))
        self.launches.append([(name, taken) for _, name, taken in launch["members"]])
        if members[0].name == "broken":
            raise RuntimeError("device lost")
        return {i: RuntimeError("bad input") for i, work in enumerate(members) if work.name == "bad"}

    def count(self, launch, seconds):
        self.seconds.append(seconds)


@pytest.fixture
def sharing(clock):
    launcher = Launcher()
    batcher = Batcher(max_queue_tokens=1000, launcher=launcher, clock=clock)
    yield batcher, launcher
    launcher.gate.set()
    batcher.close()


def test_requests_share_launches_and_take_turns(sharing):
    batcher, launcher = sharing
    futures = [batcher.submit(Portions("first", 4), 4)]
    assert launcher.started.wait(10)
    futures += [
        batcher.submit(Portions(name, size), size) for name, size in (("long", 9), ("a", 1), ("b", 2))
    ]
    launcher.gate.set()
    assert [future.result(10).value for future in futures] == ["first", "long", "a", "b"]
    assert launcher.launches == [
        [("first", 4)],
        [("long", 4)],
        [("a", 1), ("b", 2), ("long", 1)],
        [("long", 4)],
    ]
    assert batcher.queue_tokens == 0


def test_who_got_only_the_room_that_was_left_is_first_in_the_next_launch(sharing):
    batcher, launcher = sharing
    futures = [batcher.submit(Portions("first", 4), 4)]
    assert launcher.started.wait(10)
    futures += [batcher.submit(Portions(name, 3), 3) for name in "abc"]
    launcher.gate.set()
    assert [future.result(10).value for future in futures] == ["first", "a", "b", "c"]
    assert launcher.launches[1:] == [[("a", 3), ("b", 1)], [("b", 2), ("c", 2)], [("c", 1)]]


def test_a_failing_launch_fails_who_is_in_it_and_nobody_else(sharing):
    batcher, launcher = sharing
    first = batcher.submit(Portions("first", 4), 4)
    assert launcher.started.wait(10)
    works = [Portions(name, size) for name, size in (("broken", 9), ("bad", 2), ("good", 2))]
    broken, bad, good = [batcher.submit(work, work.portions) for work in works]
    launcher.gate.set()
    assert [first.result(10).value, good.result(10).value] == ["first", "good"]
    with pytest.raises(RuntimeError, match="device lost"):
        broken.result(10)
    with pytest.raises(RuntimeError, match="bad input"):
        bad.result(10)
    assert launcher.launches == [[("first", 4)], [("broken", 4)], [("bad", 2), ("good", 2)]]
    assert batcher.queue_tokens == 0


def test_a_client_that_leaves_is_not_launched_again(sharing):
    batcher, launcher = sharing
    gone = batcher.submit(Portions("gone", 40), 40)
    assert launcher.started.wait(10)
    assert gone.cancel()
    stays = batcher.submit(Portions("stays", 2), 2)
    launcher.gate.set()
    assert stays.result(10).value == "stays"
    assert launcher.launches == [[("gone", 4)], [("stays", 2)]]
    assert batcher.queue_tokens == 0


def test_two_threads_run_two_launches_at_once(clock):
    launcher = Launcher()
    both = threading.Barrier(2, timeout=10)

    def run(launch, members):
        both.wait()
        return {}

    launcher.run = run
    batcher = Batcher(max_queue_tokens=100, launcher=launcher, num_threads=2, clock=clock)
    assert batcher.submit(Portions("wide", 8), 8).result(10).value == "wide"
    batcher.close()
    assert batcher.queue_tokens == 0


def test_a_second_thread_helps_only_where_much_waits(clock):
    launcher = Launcher()
    at_once, most = [], []

    def run(launch, members):
        at_once.append(1)
        most.append(len(at_once))
        launcher.started.set()
        launcher.gate.wait(0.2)
        at_once.pop()
        return {}

    launcher.run = run
    for portions, expected in ((9, 1), (40, 2)):
        launcher.started.clear()
        most.clear()
        batcher = Batcher(max_queue_tokens=100, launcher=launcher, num_threads=2, busy_tokens=8, clock=clock)
        assert batcher.submit(Portions("wide", portions), portions).result(30).value == "wide"
        batcher.close()
        assert max(most) == expected


def test_two_threads_with_failures_and_clients_that_leave_lose_nothing():
    class Unsteady(Launcher):
        def run(self, launch, members):
            if sum(taken for _, _, taken in launch["members"]) == 3:
                raise RuntimeError("device lost")
            return {i: RuntimeError("bad input") for i, work in enumerate(members) if work.name == "bad"}

    launcher = Unsteady()
    batcher = Batcher(max_queue_tokens=10**6, launcher=launcher, num_threads=2)
    random = np.random.default_rng(0)
    futures = []
    for number in range(400):
        size, kind = int(random.integers(1, 9)), random.choice(["good", "bad", "steps"])
        work = counted([], "steps", size, 1) if kind == "steps" else Portions(str(kind), size)
        futures.append(batcher.submit(work, size))
        if number % 7 == 0:
            futures[-1].cancel()
    batcher.close()
    assert all(future.done() for future in futures)
    assert batcher.queue_tokens == 0
    served = [future for future in futures if not future.cancelled() and future.exception() is None]
    assert {future.result().value for future in served} == {"good", "steps"}
    assert batcher.tokens_per_second > 0


def test_work_that_cannot_be_launched_fails_alone(sharing):
    batcher, launcher = sharing

    class Broken(Portions):
        def join(self, launch, member):
            raise ValueError("no such item")

    class Unfinished(Portions):
        def result(self):
            raise ValueError("no result")

    launcher.gate.set()
    futures = [
        batcher.submit(work, 2)
        for work in (Broken("broken", 2), Unfinished("unfinished", 2), Portions("good", 2))
    ]
    assert futures[2].result(10).value == "good"
    for future, message in zip(futures, ("no such item", "no result"), strict=False):
        with pytest.raises(ValueError, match=message):
            future.result(10)
    assert batcher.queue_tokens == 0

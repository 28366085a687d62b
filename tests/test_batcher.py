import concurrent.futures
import threading

import numpy as np
import pytest

from serve.batcher import Batcher, DeadlineExceeded, QueueFull, Stopped
from tests.jobs import Launcher, Portions, blocked, counted


def test_jobs_take_turns_step_by_step(batcher, gate):
    log = []
    long = batcher.submit(counted(log, "long", 3), 30)
    short = batcher.submit(counted(log, "short", 1), 10)
    gate.set()
    assert long.result(10).value == "long"
    assert short.result(10).value == "short"
    assert log == [("long", 0), ("short", 0), ("long", 1), ("long", 2)]
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


def test_a_step_beside_a_launch_leaves_each_its_own_time(clock):
    launcher = Launcher()
    batcher = Batcher(max_queue_tokens=1000, launcher=launcher, num_threads=2, launch_tokens=1, clock=clock)
    started, gate = threading.Event(), threading.Event()
    launched = batcher.submit(Portions("launched", 4), 4)
    assert launcher.started.wait(10)
    clock.now = 3.0
    stepped = batcher.submit(blocked(started, gate), 10)
    assert started.wait(10)
    clock.now = 4.0
    gate.set()
    stepped.result(10)
    clock.now = 10.0
    launcher.gate.set()
    launched.result(10)
    batcher.close()
    assert launcher.seconds == [10.0]
    with pytest.raises(QueueFull, match="takes about 2000 ms"):  # 20 tokens at 10 a second
        batcher.check_room(20, arriving=1, expected_by=11.0, has_steps=True)


def test_what_fails_after_a_launch_leaves_the_thread_alive(clock):
    class Counting(Launcher):
        def count(self, launch, seconds):
            raise ValueError("nobody counts")

    launcher = Counting()
    launcher.gate.set()
    batcher = Batcher(max_queue_tokens=1000, launcher=launcher, clock=clock)
    for name in ("first", "second"):
        assert batcher.submit(Portions(name, 2), 2).result(10).value == name
    batcher.close()


def test_a_step_that_runs_wakes_no_second_thread(clock):
    batcher = Batcher(
        max_queue_tokens=1000, launcher=Launcher(), num_threads=2, launch_tokens=100, clock=clock
    )
    started, gate = threading.Event(), threading.Event()
    long = batcher.submit(blocked(started, gate, 300), 300)
    assert started.wait(10)
    log = []
    short = batcher.submit(counted(log, "short", 1), 2)
    assert not concurrent.futures.wait([short], timeout=0.2).done
    gate.set()
    assert long.result(10).value == 300
    assert short.result(10).value == "short"
    batcher.close()


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
        batcher = Batcher(
            max_queue_tokens=100, launcher=launcher, num_threads=2, launch_tokens=8, clock=clock
        )
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

"""The queue in front of the device threads: admission by tokens, fair turns, deadlines, clients that left.

Work that can share launches is put into one together with other requests'; all else runs step by step: a generator that
does one batch per step and yields the tokens it has just done. Jobs take turns launch by launch, so a request with a
thousand items does not hold up one with two. No JAX here: what a launch or a step does is the engine's business.
"""

import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

Steps = Generator[int, None, Any]

DEFAULT_RETRY_SECONDS = 1.0
"""Told to clients before anything was measured."""
RATE_WEIGHT = 0.05
"""Weight of the newest launch in the sums of tokens and seconds whose quotient is the drain rate. Of two launches at
once one may end right after the other: at overload, what a rate too high for a moment lets in is late."""
LATE = "the request's time passed while it waited"
log = logging.getLogger("jaxsearch.serve")


class Shareable(Protocol):
    """Work that goes into launches in portions. One thread at a time calls `join`; `result` comes after the last."""

    @property
    def is_waiting(self) -> bool:
        """Whether some of it is in no launch yet."""
        ...

    def join(self, launch: Any, member: int) -> int:
        """Puts what fits into the launch, as its `member`, and says how many tokens; 0 where it rather waits."""
        ...

    def result(self) -> Any: ...


class Launcher(Protocol):
    """Who opens launches, runs them for the work that joined, in the order of joining, and is told how long it took.

    What failed is told by member. `seconds` count from the launch's begin or the end of the one that ended last,
    whichever was later: where several run at once they share the time.
    """

    def open(self) -> Any: ...
    def run(self, launch: Any, members: Sequence[Any]) -> Mapping[int, Exception]: ...
    def count(self, launch: Any, seconds: float) -> None: ...


class QueueFull(Exception):
    """So much waits that a request is refused; `retry_after_seconds` is when there should be room."""

    def __init__(self, why: str, retry_after_seconds: float) -> None:
        super().__init__(f"{why}; retry in {math.ceil(retry_after_seconds)} s")
        self.retry_after_seconds = retry_after_seconds


class _Rate:
    """Tokens per second of the last launches or steps; None before the first one."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if tokens:
            self._tokens += tokens - RATE_WEIGHT * self._tokens
            self._seconds += seconds - RATE_WEIGHT * self._seconds

    @property
    def value(self) -> float | None:
        return self._tokens / self._seconds if self._seconds else None


class DeadlineExceeded(Exception):
    """The request's time was over before all of it was launched."""


class Stopped(Exception):
    """The batcher takes no more jobs."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A job's return value, the time it waited before its first launch, and the time from there to its end."""

    value: Any
    queue_seconds: float
    compute_seconds: float


@dataclasses.dataclass(eq=False)
class _Job:
    work: Steps | Shareable
    tokens_left: int
    deadline: float | None
    submitted: float
    future: Future = dataclasses.field(default_factory=Future)
    started: float | None = None
    in_flight: int = 0
    """Launches with some of it that run now; of steps at most one."""

    @property
    def has_steps(self) -> bool:
        return isinstance(self.work, Generator)


class Batcher:
    """Runs jobs on threads of its own.

    Args:
      max_queue_tokens: tokens that may wait; a job larger than this is taken when nothing else waits.
      launcher: for jobs that share launches.
      num_threads: launches that run at once; they share the device, so that each takes longer.
      launch_tokens: what fills a launch, and so a job's turn; 0: a turn is all that the job has. Threads beyond the
        first help only while so many tokens wait: then all finish sooner, otherwise a request would only be slowed
        down by the next one.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        max_queue_tokens: int,
        launcher: Launcher | None = None,
        num_threads: int = 1,
        launch_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_queue_tokens = max_queue_tokens
        self._launch_tokens = launch_tokens
        self._live: set[_Job] = set()
        self._launcher, self._clock = launcher, clock
        self._jobs: collections.deque[_Job] = collections.deque()
        self._wake = threading.Condition()
        self._queue_tokens = self._num_running = self._running_tokens = 0
        self._rates = {has_steps: _Rate() for has_steps in (False, True)}
        self._running_since = -math.inf
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"device-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queue_tokens(self) -> int:
        return self._queue_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """The drain rate while busy, of launches where there were any, else of steps; None before the first one."""
        return self._rates[False].value or self._rates[True].value

    @property
    def running_seconds(self) -> float:
        """How long launches that run now had the device so far; `Launcher.count` is told when they end."""
        return self._clock() - self._running_since if self._running_tokens else 0.0

    def submit(
        self,
        work: Steps | Shareable,
        tokens: int,
        *,
        deadline: float | None = None,
        expected_by: float | None = None,
    ) -> Future:
        """Queues a job; the future gives an `Outcome`. Cancelling it drops what is not launched yet.

        Args: `tokens` are all that it has; after `deadline`, on `clock`, the future raises DeadlineExceeded;
        `expected_by`: see `check_room`.
        Raises: QueueFull; DeadlineExceeded; Stopped.
        """
        has_steps = isinstance(work, Generator)
        assert has_steps or self._launcher is not None, "shared launches need a launcher"
        with self._wake:
            if self._is_stopping:
                raise Stopped("the server is shutting down")
            self.check_room(tokens, deadline=deadline, expected_by=expected_by, has_steps=has_steps)
            job = _Job(work, tokens, deadline, self._clock())
            self._jobs.append(job)
            self._live.add(job)
            self._queue_tokens += tokens
            self._wake.notify()
        return job.future

    def close(self) -> None:
        """Finishes what is queued, takes nothing more, and waits for the threads to end."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def check_room(
        self,
        tokens: int,
        *,
        arriving: int = 0,
        deadline: float | None = None,
        expected_by: float | None = None,
        has_steps: bool = False,
    ) -> None:
        """Whether a job of so many tokens may come, where `arriving` ones are on their way; before all others, always.

        Args: `deadline` and `expected_by`, on the clock: by what is measured so far, it must probably end before.
        Raises: QueueFull; DeadlineExceeded when the deadline is over.
        """
        with self._wake:
            waiting, rate = self._queue_tokens + arriving, self.tokens_per_second
            now = self._clock()
            if deadline is not None and deadline <= now:
                raise DeadlineExceeded(LATE)
            if not waiting:
                return
            if (excess := waiting + tokens - self.max_queue_tokens) > 0:
                retry = min(waiting, excess) / rate if rate else DEFAULT_RETRY_SECONDS
                raise QueueFull(f"{waiting} tokens wait already, at most {self.max_queue_tokens} may", retry)
            limits = [limit for limit in (deadline, expected_by) if limit is not None]
            if not limits or not rate:
                return
            most = max(min(limits) - now, 0.0)
            alone = tokens / (self._rates[has_steps].value or rate)
            before = arriving / rate + self._seconds_before(tokens, rate)
        needed, left = before + alone, f"{1000 * most:.0f} ms are left"
        if alone > most:
            raise QueueFull(f"this request alone takes about {1000 * alone:.0f} ms, {left}", before)
        if needed > most:
            why = f"the answer would take about {1000 * needed:.0f} ms with what waits already"
            raise QueueFull(f"{why}, {left}", needed - most)

    def _seconds_before(self, tokens: int, rate: float) -> float:
        """What all jobs take while a new one of so many tokens has its turns; `rate` where none of their kind is."""
        turns = max(tokens, self._launch_tokens or math.inf)
        rates = {kind: measured.value or rate for kind, measured in self._rates.items()}
        left = sum(min(job.tokens_left, turns) / rates[job.has_steps] for job in self._live)
        return left - min(left, self._running_tokens / rate, self._clock() - self._running_since)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._is_due() and (self._jobs or self._num_running or not self._is_stopping):
                    self._wake.wait()
                if not self._jobs:
                    return
                launch, members = self._gather()
                tokens = sum(tokens for _, tokens in members)
                if not self._running_tokens:
                    self._running_since = self._clock()
                self._num_running += 1
                self._running_tokens += tokens
                self._wake.notify()
            begun = self._clock()
            for job, _ in members:
                job.started = begun if job.started is None else job.started
            try:
                if launch is not None and members:
                    self._launch(launch, members)
                for job, _ in members if launch is None else ():
                    self._step(job, begun)
            except Exception:  # the thread must live: others wait for it
                log.exception("what ran is done, what comes after it failed")
            finally:
                with self._wake:
                    self._num_running -= 1
                    self._running_tokens -= tokens
                    self._wake.notify_all()

    def _is_due(self) -> bool:
        """Whether a thread should take something up."""
        steps = sum(job.tokens_left for job in self._live if job.in_flight and job.has_steps)
        waiting = self._queue_tokens - self._running_tokens - steps
        return bool(self._jobs) and (not self._num_running or waiting >= self._launch_tokens)

    def _gather(self) -> tuple[Any, list[tuple[_Job, int]]]:
        """What runs next: a launch with the jobs that joined it and their tokens, or one job for a step alone.

        A launch is its first job's turn: what that has left waits behind all others. Who got only the room that was
        left keeps its place, and is first in the next one.
        """
        launch, members = None, []
        skipped: list[_Job] = []
        again: list[_Job] = []
        while self._jobs:
            job = self._jobs.popleft()
            if self._is_over(job):
                continue
            if isinstance(job.work, Generator):
                if launch is None:
                    members.append((job, 0))
                    break
                skipped.append(job)
                continue
            try:
                launch = self._launcher.open() if launch is None and self._launcher is not None else launch
                tokens = job.work.join(launch, len(members))
            except Exception as error:  # what fails must not take the thread with it
                self._fail(job, error)
                continue
            if tokens:
                members.append((job, tokens))
            if job.work.is_waiting:
                (again if members and members[0][0] is job else skipped).append(job)
        for job, _ in members:
            job.in_flight += 1
        self._jobs.extendleft(reversed(skipped))
        self._jobs.extend(again)
        return launch, members

    def _is_over(self, job: _Job) -> bool:
        """Whether its client left, its time has passed or it has failed; then nothing more of it runs."""
        if not job.future.done():
            if job.deadline is None or self._clock() <= job.deadline:
                return False
            _resolve(job.future, error=DeadlineExceeded(LATE))
        self._drop(job)
        if isinstance(job.work, Generator):
            with contextlib.suppress(Exception):
                job.work.close()
        return True

    def _launch(self, launch: Any, members: list[tuple[_Job, int]]) -> None:
        assert self._launcher is not None
        try:
            failed = self._launcher.run(launch, [job.work for job, _ in members])
        except Exception as error:  # what fails must not take the thread with it
            failed = dict.fromkeys(range(len(members)), error)
        with self._wake:
            done = sum(self._forget(job, tokens) for job, tokens in members)
            now = self._clock()
            seconds, self._running_since = now - self._running_since, now
            self._rates[False].add(done, seconds)
            for member, (job, _) in enumerate(members):
                job.in_flight -= 1
                if member in failed:
                    self._fail(job, failed[member])
                elif not job.in_flight and not job.work.is_waiting:  # pyright: ignore[reportAttributeAccessIssue]
                    self._finish(job, job.work.result)  # pyright: ignore[reportAttributeAccessIssue]
        self._launcher.count(launch, seconds)

    def _step(self, job: _Job, begun: float) -> None:
        done, value, error = None, None, None
        try:
            done = next(job.work)  # pyright: ignore[reportArgumentType]
        except StopIteration as stop:
            value = stop.value
        except Exception as raised:  # a job that fails must not take the thread with it
            error = raised
        with self._wake:
            job.in_flight -= 1
            if error is not None:
                self._fail(job, error)
                return
            tokens = self._forget(job, job.tokens_left if done is None else done)
            self._rates[True].add(tokens, self._clock() - begun)
            if done is None:
                self._finish(job, lambda: value)
            else:
                self._jobs.append(job)

    def _finish(self, job: _Job, result: Callable[[], Any]) -> None:
        started = job.submitted if job.started is None else job.started
        self._drop(job)
        try:
            outcome = Outcome(result(), started - job.submitted, self._clock() - started)
        except Exception as error:  # what fails must not take the thread with it
            self._fail(job, error)
        else:
            _resolve(job.future, outcome)

    def _fail(self, job: _Job, error: Exception) -> None:
        self._drop(job)
        _resolve(job.future, error=error)

    def _drop(self, job: _Job) -> None:
        self._forget(job, job.tokens_left)
        self._live.discard(job)

    def _forget(self, job: _Job, tokens: int) -> int:
        """Takes tokens of a job out of the queue and says how many; a prefix that ran twice counts once."""
        tokens = min(tokens, job.tokens_left)
        job.tokens_left -= tokens
        self._queue_tokens -= tokens
        return tokens


def _resolve(future: Future, value: Outcome | None = None, *, error: Exception | None = None) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)

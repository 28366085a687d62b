"""The queue in front of the one device thread: admission by tokens, fair turns, deadlines, clients that left.

A job is a generator that does one batch per step and yields the tokens it has just done; after its last batch
it returns the answer instead. Jobs take turns step by step, so a request with a thousand items does not hold
up one with two. No JAX here: what a step does is the engine's business.
"""

import collections
import concurrent.futures
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

Steps = Generator[int, None, Any]

DEFAULT_RETRY_SECONDS = 1.0
"""Told to clients before anything was measured."""
RATE_WEIGHT = 0.2
"""Weight of the newest step in the moving average of the drain rate."""


class QueueFull(Exception):
    """More tokens wait than are allowed; `retry_after_seconds` is when there should be room."""

    def __init__(self, queue_tokens: int, max_queue_tokens: int, retry_after_seconds: float) -> None:
        super().__init__(
            f"{queue_tokens} tokens wait already, at most {max_queue_tokens} may; "
            f"retry in {math.ceil(retry_after_seconds)} s"
        )
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(Exception):
    """The request's time was over before its last step began."""


class Stopped(Exception):
    """The batcher takes no more jobs."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A job's return value with the time it waited before its first step and the time its steps took."""

    value: Any
    queue_seconds: float
    compute_seconds: float


@dataclasses.dataclass
class _Job:
    steps: Steps
    tokens_left: int
    deadline: float | None
    submitted: float
    future: concurrent.futures.Future
    queue_seconds: float | None = None
    compute_seconds: float = 0.0


class Batcher:
    """Runs jobs on one thread of its own.

    Args:
      max_queue_tokens: tokens that may wait; a job larger than this is taken when nothing else waits.
      clock: seconds, monotonic.
    """

    def __init__(self, *, max_queue_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_queue_tokens = max_queue_tokens
        self._clock = clock
        self._jobs: collections.deque[_Job] = collections.deque()
        self._wake = threading.Condition()
        self._queue_tokens = 0
        self._tokens_per_second: float | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def queue_tokens(self) -> int:
        return self._queue_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Moving average of the drain rate while busy; None before the first step."""
        return self._tokens_per_second

    def submit(
        self, steps: Steps, tokens: int, *, deadline: float | None = None
    ) -> concurrent.futures.Future:
        """Queues a job; the future gives an `Outcome`. Cancelling it drops the job before its next step.

        Args:
          tokens: what all steps do together, the last one included.
          deadline: on `clock`; after it the future raises DeadlineExceeded.
        Raises: QueueFull; Stopped.
        """
        with self._wake:
            if self._is_stopping:
                raise Stopped("the server is shutting down")
            self._check_room(tokens)
            job = _Job(steps, tokens, deadline, self._clock(), concurrent.futures.Future())
            self._jobs.append(job)
            self._queue_tokens += tokens
            self._wake.notify()
        return job.future

    def close(self) -> None:
        """Finishes what is queued, takes nothing more, and waits for the thread to end."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def _check_room(self, tokens: int) -> None:
        waiting = self._queue_tokens
        if waiting and waiting + tokens > self.max_queue_tokens:
            excess = min(waiting, waiting + tokens - self.max_queue_tokens)
            rate = self._tokens_per_second
            raise QueueFull(waiting, self.max_queue_tokens, excess / rate if rate else DEFAULT_RETRY_SECONDS)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._is_stopping:
                    self._wake.wait()
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            is_done = self._step(job)
            with self._wake:
                if is_done:
                    self._queue_tokens -= job.tokens_left
                else:
                    self._jobs.append(job)

    def _step(self, job: _Job) -> bool:
        """One step of one job; True when the job has ended, one way or another."""
        now = self._clock()
        if job.future.cancelled():
            job.steps.close()
            return True
        if job.deadline is not None and now > job.deadline:
            job.steps.close()
            _resolve(job.future, error=DeadlineExceeded("the request's timeout_ms passed while it waited"))
            return True
        if job.queue_seconds is None:
            job.queue_seconds = now - job.submitted
        try:
            done = next(job.steps)
        except StopIteration as stop:
            self._count(job, job.tokens_left, self._clock() - now)
            _resolve(job.future, Outcome(stop.value, job.queue_seconds, job.compute_seconds))
            return True
        except Exception as error:  # a job that fails must not take the thread with it
            _resolve(job.future, error=error)
            return True
        self._count(job, done, self._clock() - now)
        return False

    def _count(self, job: _Job, done: int, seconds: float) -> None:
        job.compute_seconds += seconds
        with self._wake:
            job.tokens_left -= done
            self._queue_tokens -= done
        if done and seconds > 0:
            rate, old = done / seconds, self._tokens_per_second
            self._tokens_per_second = rate if old is None else old + RATE_WEIGHT * (rate - old)


def _resolve(
    future: concurrent.futures.Future, value: Outcome | None = None, *, error: Exception | None = None
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)

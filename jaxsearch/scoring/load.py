"""Load on a scorer: requests that never repeat, arrivals, timed replies, percentiles, and what a queue costs.

Shared by whoever measures a scorer or a server. What is sent, and over which protocol, is the caller's business.
"""

import asyncio
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxsearch.errors import InputError

REFUSED = 429
"""The status of a server that has too much to do."""
PAUSE_SECONDS = 0.02
"""Between an error and the next request of the same connection."""
DRAWS = 8
"""Attempts at a text that was not drawn before, until a running number makes it one."""


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """A query with the items to score for it."""

    query: str
    items: tuple[str, ...]


class TextSource:
    """Endless requests in the words of given texts; no query and no item comes twice.

    A query is a few neighbouring words of a text. An item is the beginning of one text and the rest of another one,
    cut at the same share of both, so that it is about as long as they are. Where the texts are too few for that, a
    running number is added.

    Args:
      texts: at least one with a word in it.
      items_per_request: items of each request.
      query_words: most words of a query; the least are two, where a text has them.
    Raises: InputError when no text has a word.
    """

    def __init__(
        self, texts: Sequence[str], *, items_per_request: int, query_words: int = 8, seed: int = 0
    ) -> None:
        self._words = [words for text in texts if (words := text.split())]
        if not self._words:
            raise InputError("no text to draw requests from; give at least one that is not empty")
        self.items_per_request = items_per_request
        self.query_words = query_words
        self._rng = np.random.default_rng(seed)
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[TextRequest]:
        return self

    def __next__(self) -> TextRequest:
        query = self._new(self._query)
        return TextRequest(query, tuple(self._new(self._item) for _ in range(self.items_per_request)))

    def _new(self, draw: Callable[[], str]) -> str:
        text, draws = draw(), 1
        while text in self._seen:
            text = draw() if draws < DRAWS else f"{text} {len(self._seen)}"
            draws += 1
        self._seen.add(text)
        return text

    def _query(self) -> str:
        words = self._any()
        count = min(int(self._rng.integers(min(2, self.query_words), self.query_words + 1)), len(words))
        start = int(self._rng.integers(len(words) - count + 1))
        return " ".join(words[start : start + count])

    def _item(self) -> str:
        one, other, share = self._any(), self._any(), self._rng.random()
        return " ".join([*one[: round(share * len(one))], *other[round(share * len(other)) :]]) or one[0]

    def _any(self) -> list[str]:
        return self._words[int(self._rng.integers(len(self._words)))]


def poisson_arrivals(rate: float, seconds: float, rng: np.random.Generator) -> Float[np.ndarray, "q"]:
    """Arrival times of independent clients, in seconds from 0, in order.

    Args:
      rate: mean arrivals per second.
      seconds: all arrivals are before.
    """
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back for a request.

    `tokens` are those that the server says it computed for it, padding included; None when it does not say.
    """

    status: int
    retry_after_seconds: float | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One request: when it was due, sent and answered, in seconds since its phase began; status 0 is no reply."""

    scheduled_seconds: float
    started_seconds: float
    ended_seconds: float
    reply: Reply

    @property
    def is_ok(self) -> bool:
        return 200 <= self.reply.status < 300

    @property
    def latency_seconds(self) -> float:
        """From the time it was due, however late it was sent; infinite for an error."""
        return self.ended_seconds - self.scheduled_seconds if self.is_ok else math.inf


Send = Callable[[int], Awaitable[Reply]]
"""Sends the request with this number, counted from 0, and waits for its reply."""


async def drive(arrivals: Float[np.ndarray, "q"], send: Send) -> list[Sample]:
    """Open loop: sends each request when it is due, whether or not earlier ones are answered.

    What `send` raises becomes status 0.

    Args:
      arrivals: seconds from now, in order.
    Returns: a sample for each arrival, in their order.
    Source: latency from the schedule avoids coordinated omission, as in wrk2 by Gil Tene.
    """
    begun = time.perf_counter()
    waiting = []
    for number, due in enumerate(arrivals.tolist()):
        await asyncio.sleep(max(due - (time.perf_counter() - begun), 0))
        waiting.append(asyncio.create_task(_timed(send, number, begun, due)))
    return list(await asyncio.gather(*waiting))


async def drive_in_turn(connections: int, seconds: float, send: Send) -> list[Sample]:
    """Closed loop: each connection sends its next request when its last one is answered; one is due when it is sent.

    After an error or a refusal a connection pauses only shortly, whatever it is told, so that the server stays busy. No
    request begins after `seconds`.
    """
    begun = time.perf_counter()
    samples: list[Sample] = []
    numbers = iter(range(2**62))

    async def connection() -> None:
        while (now := time.perf_counter() - begun) < seconds:
            sample = await _timed(send, next(numbers), begun, now)
            samples.append(sample)
            await asyncio.sleep(0 if sample.is_ok else PAUSE_SECONDS)

    await asyncio.gather(*(connection() for _ in range(connections)))
    return samples


async def _timed(send: Send, number: int, begun: float, due: float) -> Sample:
    started = time.perf_counter() - begun
    try:
        reply = await send(number)
    except Exception:  # whatever it is, the request was not answered and the others go on
        reply = Reply(0)
    return Sample(due, started, time.perf_counter() - begun, reply)


def percentile(values: Sequence[float] | Float[np.ndarray, "q"], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed; infinities are values.

    Raises: InputError when there are no values.

    Example:
        >>> percentile([3.0, 1.0, 2.0, math.inf], 50.0), percentile([3.0, 1.0, 2.0, math.inf], 99.0)
        (2.0, inf)
    """
    if not len(values):
        raise InputError("no request was sent; make the phase longer")
    return float(np.sort(values)[max(math.ceil(percent / 100 * len(values)) - 1, 0)])


@dataclasses.dataclass(frozen=True)
class Summary:
    """A phase in numbers. Latencies are infinite where so many requests failed.

    `num_errors` counts what was neither answered nor refused; rates are of answered requests, over the time from 0 to
    the last reply; `goodput_items_per_second` counts those within the service level only; `lag_p99_ms` is how late
    requests were sent.
    """

    num_requests: int
    num_refused: int
    num_errors: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests_per_second: float
    items_per_second: float
    goodput_items_per_second: float
    lag_p99_ms: float


def summarize(samples: Sequence[Sample], *, items_per_request: int, slo_seconds: float = math.inf) -> Summary:
    """Args: `slo_seconds` is the longest latency of the service level. Raises: InputError when there are no samples."""
    latencies = [sample.latency_seconds for sample in samples]
    p50, p95, p99 = (1000 * percentile(latencies, percent) for percent in (50.0, 95.0, 99.0))
    seconds = max(sample.ended_seconds for sample in samples)
    num_ok = sum(sample.is_ok for sample in samples)
    num_refused = sum(sample.reply.status == REFUSED for sample in samples)
    num_good = sum(sample.is_ok and sample.latency_seconds <= slo_seconds for sample in samples)
    return Summary(
        num_requests=len(samples),
        num_refused=num_refused,
        num_errors=len(samples) - num_ok - num_refused,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        requests_per_second=num_ok / seconds,
        items_per_second=num_ok * items_per_request / seconds,
        goodput_items_per_second=num_good * items_per_request / seconds,
        lag_p99_ms=1000
        * percentile([sample.started_seconds - sample.scheduled_seconds for sample in samples], 99.0),
    )


def simulate_queue(
    arrivals: Float[np.ndarray, "q"],
    tokens_per_request: Int[np.ndarray, "q"],
    launch_seconds: Callable[[int], float],
    max_batch_tokens: int,
) -> Float[np.ndarray, "q"]:
    """Latencies in seconds if one device served its queue in order of arrival and nothing else took time.

    A launch takes the tokens that wait when it begins, the oldest request's first, up to `max_batch_tokens`: small
    requests share a launch, a large one takes several. A request is answered when the launch of its last token ends.

    Args:
      arrivals: seconds, in order.
      tokens_per_request: at least 1 each.
      launch_seconds: how long a launch with so many tokens takes.
    Accuracy: with one request a launch it is the M/D/1 queue; its mean wait within 3 % of theory, `tests/test_load.py`.
    Source: mean wait of M/D/1, load·service / (2·(1 - load)): Pollaczek-Khinchine formula.

    Example: tokens 3 and 2 wait for a device that takes 4 at a time, one second a launch.
        >>> simulate_queue(np.array([0.0, 0.0]), np.array([3, 2]), lambda tokens: 1.0, 4).tolist()
        [1.0, 2.0]
    """
    due, left = arrivals.tolist(), tokens_per_request.tolist()
    latencies = np.zeros(len(due))
    free_at, first = 0.0, 0
    while first < len(due):
        begun = max(free_at, due[first])
        room, place = max_batch_tokens, first
        while place < len(due) and due[place] <= begun and left[place] <= room:
            room -= left[place]
            place += 1
        if place < len(due) and due[place] <= begun:
            left[place] -= room
            room = 0
        free_at = begun + launch_seconds(max_batch_tokens - room)
        latencies[first:place] = free_at - arrivals[first:place]
        first = place
    return latencies


def simulate_requests(
    arrivals: Float[np.ndarray, "q"], service_seconds: Float[np.ndarray, "q"]
) -> Float[np.ndarray, "q"]:
    """Latencies in seconds if one server took whole requests one after another, in order of arrival.

    Args:
      arrivals: seconds, in order.
      service_seconds: how long each takes alone.

    Example: the second waits for the first, the third finds the server free.
        >>> simulate_requests(np.array([0.0, 1.0, 9.0]), np.array([4.0, 2.0, 1.0])).tolist()
        [4.0, 5.0, 1.0]
    """
    served = np.cumsum(service_seconds)
    begun = np.maximum.accumulate(arrivals - served + service_seconds)  # less what was served before
    return begun + served - arrivals


@dataclasses.dataclass(frozen=True)
class RatePoint:
    """p99 latencies at one request rate, in seconds, one for each repeat."""

    rate: float
    p99_seconds: tuple[float, ...]


def highest_rate(
    measure: Callable[[float], float],
    low: float,
    high: float,
    *,
    slo_seconds: float,
    repeats: int = 3,
    precision: float = 0.05,
) -> tuple[float, list[RatePoint]]:
    """The highest request rate whose p99 is within the service level, by bisection.

    A rate holds when the median of its repeats does.

    Args:
      measure: p99 latency in seconds at a rate in requests per second.
      low, high: requests per second between which to look, both above 0.
      precision: share of the answer by which it may be too low.
    Returns: the rate, 0 when `low` does not hold and `high` when it does; and every point, in the order measured.
    """
    points: list[RatePoint] = []

    def holds(rate: float) -> bool:
        points.append(RatePoint(rate, tuple(measure(rate) for _ in range(repeats))))
        return percentile(points[-1].p99_seconds, 50.0) <= slo_seconds

    if not holds(low):
        return 0.0, points
    if holds(high):
        return high, points
    while high > low * (1 + precision):
        middle = math.sqrt(low * high)
        if holds(middle):
            low = middle
        else:
            high = middle
    return low, points

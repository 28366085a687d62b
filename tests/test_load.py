"""Arrivals, drivers, percentiles and the simulated queue against a clock, by hand, and against theory."""

import asyncio
import math
import time

import numpy as np
import pytest

from jaxsearch.errors import InputError
from jaxsearch.scoring.load import (
    Reply,
    Sample,
    TextSource,
    drive,
    drive_in_turn,
    highest_rate,
    percentile,
    poisson_arrivals,
    simulate_queue,
    simulate_requests,
    summarize,
)

TEXTS = ["Bake bread at night.", "Write code and test it.", "Care for patients in hospitals."]


def test_requests_never_repeat_and_follow_the_seed():
    def requests(seed):
        source = TextSource(TEXTS, items_per_request=3, query_words=4, seed=seed)
        return [next(source) for _ in range(300)]

    drawn = requests(0)
    queries = [request.query for request in drawn]
    items = [item for request in drawn for item in request.items]
    assert len(set(queries)) == 300
    assert len(set(items)) == 900
    assert drawn == requests(0)
    assert drawn != requests(1)
    known = {word for text in TEXTS for word in text.split()}
    assert {word for request in drawn[:10] for word in request.query.split() if not word.isdigit()} <= known
    assert all(request.query.strip() and all(request.items) for request in drawn)


def test_one_word_is_enough_for_requests_and_none_is_not():
    source = TextSource(["", "word"], items_per_request=2, query_words=1)
    assert len({next(source).query for _ in range(20)}) == 20
    with pytest.raises(InputError, match="no text to draw requests from"):
        TextSource(["", " "], items_per_request=2)


def test_items_are_about_as_long_as_the_texts():
    texts = [" ".join(["word"] * length) for length in (10, 20, 60)]
    source = TextSource(texts, items_per_request=200, query_words=3)
    lengths = [len(item.split()) for item in next(source).items]
    assert abs(np.mean(lengths) - 30) < 3 + 1  # 3 standard errors, and the running number


def test_poisson_arrivals_have_their_rate_and_independent_gaps():
    arrivals = poisson_arrivals(50.0, 400.0, np.random.default_rng(0))
    gaps = np.diff(arrivals)
    assert abs(len(arrivals) - 20_000) < 4 * math.sqrt(20_000)
    assert gaps.min() >= 0
    assert arrivals[-1] < 400
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # exponential: both are equal
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.03)
    np.testing.assert_array_equal(arrivals, poisson_arrivals(50.0, 400.0, np.random.default_rng(0)))


def test_latency_counts_from_the_schedule_when_the_client_is_slow():
    async def send(number):
        time.sleep(0.1)  # the client itself is busy: nobody else can send meanwhile
        return Reply(200)

    samples = asyncio.run(drive(np.array([0.0, 0.01, 0.02]), send))
    assert [sample.scheduled_seconds for sample in samples] == [0.0, 0.01, 0.02]
    latencies = [sample.latency_seconds for sample in samples]
    for latency, least in zip(latencies, (0.1, 0.19, 0.28), strict=True):
        assert least <= latency < least + 2
    assert samples[2].started_seconds - samples[2].scheduled_seconds >= 0.17


def test_open_loop_does_not_wait_for_answers():
    async def send(number):
        await asyncio.sleep(1.0)
        return Reply(200)

    samples = asyncio.run(drive(np.linspace(0, 0.1, 20), send))
    first_end = min(sample.scheduled_seconds + sample.latency_seconds for sample in samples)
    assert max(sample.started_seconds for sample in samples) < first_end
    assert all(0.99 < sample.latency_seconds < 5 for sample in samples)


def test_errors_are_samples_with_infinite_latency():
    async def send(number):
        if number == 1:
            raise OSError("connection refused")
        return Reply(429, 2.0) if number == 2 else Reply(200)

    samples = asyncio.run(drive(np.zeros(4), send))
    assert [sample.reply.status for sample in samples] == [200, 0, 429, 200]
    assert [math.isinf(sample.latency_seconds) for sample in samples] == [False, True, True, False]
    assert samples[2].reply.retry_after_seconds == 2.0
    summary = summarize(samples, items_per_request=10)
    assert (summary.num_requests, summary.num_refused, summary.num_errors) == (4, 1, 1)
    assert math.isfinite(summary.p50_ms)
    assert summary.p95_ms == summary.p99_ms == math.inf


def test_closed_loop_keeps_its_connections_busy():
    flying = []

    async def send(number):
        flying.append(number)
        most.append(len(flying))
        await asyncio.sleep(0.02)
        flying.remove(number)
        return Reply(200)

    most = []
    samples = asyncio.run(drive_in_turn(3, 0.4, send))
    assert max(most) == 3
    assert 6 <= len(samples) <= 60
    assert all(sample.started_seconds < 0.4 for sample in samples)

    async def refuse(number):
        return Reply(429, 30.0)

    assert 2 <= len(asyncio.run(drive_in_turn(1, 0.2, refuse))) <= 11


def sample(latency, status=200):
    return Sample(1.0, 1.0, 1.0 + latency, Reply(status))


def test_summary_by_hand():
    samples = [sample(0.1), sample(0.2), sample(0.3), sample(1.0)]
    summary = summarize(samples, items_per_request=5, slo_seconds=0.25)
    assert (summary.p50_ms, summary.p95_ms, summary.p99_ms) == pytest.approx((200, 1000, 1000))
    assert summary.requests_per_second == 4 / 2.0
    assert summary.items_per_second == 20 / 2.0
    assert summary.goodput_items_per_second == 10 / 2.0
    assert summary.lag_p99_ms == 0
    with pytest.raises(InputError, match="no request was sent"):
        summarize([], items_per_request=5)


@pytest.mark.parametrize("percent", [1.0, 50.0, 95.0, 99.0, 100.0])
def test_percentile_is_numpys_inverted_cdf(percent):
    values = np.random.default_rng(0).exponential(size=137)
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


def test_queue_by_hand():
    """Device: 10 tokens a launch, 1 s + 0.1 s a token.

    Launch 1 takes 4 and ends at 1.4; launch 2 takes 6 and 4 of the 7, ends at 3.4; launch 3 takes the other 3 and 5,
    ends at 5.2; nothing waits until 9, launch 4 ends at 10.2.
    """
    arrivals = np.array([0.0, 0.5, 1.0, 2.0, 9.0])
    tokens = np.array([4, 6, 7, 5, 2])
    launched = []

    def launch_seconds(count):
        launched.append(count)
        return 1 + 0.1 * count

    latencies = simulate_queue(arrivals, tokens, launch_seconds, 10)
    assert launched == [4, 10, 8, 2]
    np.testing.assert_allclose(latencies, [1.4, 2.9, 4.2, 3.2, 1.2], atol=1e-12)
    np.testing.assert_array_equal(tokens, [4, 6, 7, 5, 2])


def test_a_request_larger_than_a_launch_takes_several():
    latencies = simulate_queue(np.array([0.0, 0.0]), np.array([25, 5]), lambda tokens: 1.0, 10)
    np.testing.assert_array_equal(latencies, [3.0, 3.0])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_queue_is_the_one_of_theory(load):
    """M/D/1: mean wait = load · service / (2 (1 - load)). Measured difference: at most 1.6 % over 200,000 requests."""
    service = 0.01
    arrivals = poisson_arrivals(load / service, 200_000 * service / load, np.random.default_rng(0))
    tokens = np.full(len(arrivals), 8)
    waits = simulate_queue(arrivals, tokens, lambda tokens: service, 8) - service
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.03)


def test_sharing_launches_shortens_the_queue():
    arrivals = poisson_arrivals(80.0, 50.0, np.random.default_rng(0))
    tokens = np.full(len(arrivals), 8)
    alone = simulate_queue(arrivals, tokens, lambda tokens: 0.01, 8)
    shared = simulate_queue(arrivals, tokens, lambda tokens: 0.01, 32)
    assert percentile(shared, 99.0) < percentile(alone, 99.0) / 2


def test_requests_one_after_another_by_hand():
    """Ends: 3, 5, 6, then idle until 10, 14, 15."""
    arrivals = np.array([0.0, 1.0, 4.5, 10.0, 11.0])
    service = np.array([3.0, 2.0, 1.0, 4.0, 1.0])
    np.testing.assert_allclose(simulate_requests(arrivals, service), [3.0, 4.0, 1.5, 4.0, 4.0], atol=1e-12)
    assert simulate_requests(arrivals[:0], service[:0]).size == 0


def test_one_server_is_the_queue_of_theory():
    """M/M/1: mean latency = service / (1 - load); measured difference 0.2 % over 400,000 requests."""
    rng = np.random.default_rng(0)
    arrivals = poisson_arrivals(0.5, 800_000.0, rng)
    latencies = simulate_requests(arrivals, rng.exponential(1.0, len(arrivals)))
    assert latencies.mean() == pytest.approx(2.0, rel=0.03)


def test_highest_rate_of_a_known_function():
    """M/D/1-like: 1 / (100 - rate) seconds; 0.1 s is reached at 90 requests a second."""
    rate, points = highest_rate(
        lambda rate: 1 / max(100 - rate, 1e-9), 1.0, 1000.0, slo_seconds=0.1, repeats=2
    )
    assert 90 / 1.05 <= rate <= 90
    assert all(len(point.p99_seconds) == 2 for point in points)
    assert highest_rate(lambda rate: 1.0, 1.0, 8.0, slo_seconds=0.1)[0] == 0
    assert highest_rate(lambda rate: 0.01, 1.0, 8.0, slo_seconds=0.1)[0] == 8


def test_highest_rate_takes_the_median_of_its_repeats():
    values = iter([0.01, math.inf, 0.01] * 2)
    rate, points = highest_rate(lambda rate: next(values), 1.0, 8.0, slo_seconds=0.1)
    assert rate == 8
    assert points[0].p99_seconds == (0.01, math.inf, 0.01)

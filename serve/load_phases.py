"""The phases of a load test, and what is seen around each: latencies, launches, the server's memory, the client's CPU.

What must hold, and the command, are `loadtest`'s.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import rich.progress
from jaxtyping import Float, Int

from jaxsearch.errors import InputError
from jaxsearch.scoring.load import (
    REFUSED,
    Reply,
    Sample,
    Summary,
    TextSource,
    drive,
    drive_in_turn,
    percentile,
    poisson_arrivals,
    simulate_queue,
    summarize,
)
from serve.load_client import Target

SLO_FACTOR = 5
"""The service level, in medians of a request alone, where neither operator nor server states one. One server that is
busy for 60 % of the time, with Poisson arrivals that all cost the same, has a p99 of four such times (M/D/1)."""
NORMAL_REQUESTS = 5
"""So many requests in a row within the service level are a server back to normal."""
MEMORY_READINGS = 40
"""About so many in each phase."""
THINK_SECONDS = 0.2
"""Pause of the patient client between two of its requests."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase: its requests, and what was seen around it.

    `client_cpu_share` is of one core, `memory_bytes` are readings over the phase; `device_busy_share` and `recompiles`
    are None where the server does not say. `launches` are {padded tokens: (launches, their seconds)} of those that
    ended in the phase, also where they began before it.
    """

    name: str
    samples: Sequence[Sample]
    summary: Summary
    client_cpu_share: float
    launches: Mapping[int, tuple[float, float]]
    device_busy_share: float | None
    memory_bytes: Sequence[float]
    recompiles: float | None

    @property
    def memory_growth_share(self) -> float | None:
        """What the last quarter of the readings is on average above the first; single ones swing with what runs."""
        if not self.memory_bytes:
            return None
        part = max(len(self.memory_bytes) // 4, 1)
        return float(np.mean(self.memory_bytes[-part:]) / np.mean(self.memory_bytes[:part]) - 1)

    def to_dict(self) -> dict[str, Any]:
        left_out = ("samples", "summary", "launches")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in left_out} | {
            "memory_growth_share": self.memory_growth_share,
            **dataclasses.asdict(self.summary),
            "launch_seconds": {
                str(tokens): seconds / count for tokens, (count, seconds) in self.launches.items()
            },
        }


@dataclasses.dataclass(frozen=True)
class Patience:
    """What a client went through that waits as it is told."""

    attempts: int
    seconds: float
    is_served: bool


class LoadTest:
    """The phases against one target, in the order of their methods."""

    def __init__(
        self,
        target: Target,
        source: TextSource,
        options: argparse.Namespace,
        progress: rich.progress.Progress,
        *,
        slo_ms: float | None,
    ) -> None:
        self.target = target
        self.source = source
        self.options = options
        self.progress = progress
        self.rng = np.random.default_rng(options.seed)
        self.has_slo = slo_ms is not None
        self.slo_seconds = float("inf") if slo_ms is None else slo_ms / 1000
        self.patient: list[Patience] = []
        self.recovery_seconds: float | None = None

    async def alone(self) -> Phase:
        """One request after another; sets the service level unless it is stated."""
        seconds = self.options.alone_seconds
        phase = await self._measure("alone", seconds, drive_in_turn(1, seconds, self._send_new))
        if not self.has_slo:
            self.slo_seconds = SLO_FACTOR * phase.summary.p50_ms / 1000
        if phase.summary.p50_ms == float("inf"):
            raise InputError(f"{self.target.url} answers less than half of the requests that come one by one")
        return dataclasses.replace(phase, summary=self._summary(phase.samples))

    async def saturation(self) -> Phase:
        """As many requests as the connections can keep in flight."""
        seconds = self.options.saturation_seconds
        run = drive_in_turn(self.options.connections, seconds, self._send_new)
        phase = await self._measure("saturation", seconds, run)
        if not phase.summary.items_per_second:
            raise InputError(f"{self.target.url} answered no request at saturation; lower --connections")
        return phase

    async def load(self, capacity: Phase) -> tuple[Phase, Float[np.ndarray, "q"]]:
        """Independent clients at a part of the capacity; also their arrivals."""
        arrivals, run = self._schedule(self.options.load_share, self.options.load_seconds, capacity)
        return await self._measure("load", self.options.load_seconds, run), arrivals

    async def overload(self, capacity: Phase) -> tuple[Phase, Phase]:
        """Far more than the capacity, beside it one client that waits as it is told; then recovery."""
        seconds, end = self.options.overload_seconds, self.options.recovery_seconds
        _, run = self._schedule(self.options.overload_share, seconds, capacity)
        until = time.perf_counter() + seconds
        patient = asyncio.create_task(self._be_patient(until, until + end))
        overload = asyncio.create_task(self._measure("overload", seconds, run))
        await asyncio.sleep(seconds)
        recovery = await self._measure("recovery", end, self._recover(end))
        self.patient = await patient
        return await overload, recovery

    def _schedule(
        self, share: float, seconds: float, capacity: Phase
    ) -> tuple[Float[np.ndarray, "q"], Awaitable[list[Sample]]]:
        """Arrivals and what sends them; every body is made before the first one is due."""
        arrivals = poisson_arrivals(share * capacity.summary.requests_per_second, seconds, self.rng)
        bodies = [self.target.body(next(self.source)) for _ in arrivals]
        return arrivals, drive(arrivals, lambda number: self.target.send(bodies[number]))

    async def _send_new(self, _: int) -> Reply:
        return await self.target.send(self.target.body(next(self.source)))

    async def _be_patient(self, until: float, give_up: float) -> list[Patience]:
        found = []
        while time.perf_counter() < until:
            body, begun, attempts = self.target.body(next(self.source)), time.perf_counter(), 1
            while (
                reply := await self._send_safely(body)
            ).status == REFUSED and time.perf_counter() < give_up:
                attempts += 1
                await asyncio.sleep(reply.retry_after_seconds or THINK_SECONDS)
            found.append(Patience(attempts, time.perf_counter() - begun, 200 <= reply.status < 300))
            await asyncio.sleep(THINK_SECONDS)
        return found

    async def _send_safely(self, body: bytes) -> Reply:
        try:
            return await self.target.send(body)
        except Exception:
            return Reply(0)

    async def _recover(self, seconds: float) -> list[Sample]:
        """One request after another until enough in a row are within the service level, or the time is over."""
        begun = time.perf_counter()
        samples: list[Sample] = []
        normal: list[float] = []
        while len(normal) < NORMAL_REQUESTS and (due := time.perf_counter() - begun) < seconds:
            reply = await self._send_safely(self.target.body(next(self.source)))
            sample = Sample(due, due, time.perf_counter() - begun, reply)
            samples.append(sample)
            normal = [*normal, due] if sample.latency_seconds <= self.slo_seconds else []
            await asyncio.sleep(0 if sample.is_ok else THINK_SECONDS)
        self.recovery_seconds = normal[0] if len(normal) == NORMAL_REQUESTS else None
        return samples

    async def _measure(self, name: str, seconds: float, run: Awaitable[list[Sample]]) -> Phase:
        before, begun, cpu = await self.target.metrics(), time.perf_counter(), time.process_time()
        memory: list[float] = []
        async with _shown(self.progress, name, seconds), _meanwhile(self._read_memory(seconds, memory)):
            samples = await run
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        after = await self.target.metrics()
        return Phase(
            name=name,
            samples=samples,
            summary=self._summary(samples),
            client_cpu_share=cpu / wall,
            launches=after.launches_since(before),
            device_busy_share=after.busy_share_since(before),
            memory_bytes=memory,
            recompiles=_difference(after.recompiles, before.recompiles),
        )

    async def _read_memory(self, seconds: float, into: list[float]) -> None:
        while True:
            if (now := (await self.target.metrics()).memory_bytes) is not None:
                into.append(now)
            await asyncio.sleep(seconds / MEMORY_READINGS)

    def _summary(self, samples: Sequence[Sample]) -> Summary:
        return summarize(
            samples, items_per_request=self.source.items_per_request, slo_seconds=self.slo_seconds
        )


def expected_tail(
    alone: Phase, load: Phase, arrivals: Float[np.ndarray, "q"], max_batch_tokens: int | None
) -> float | None:
    """p99 over p50 of the load phase if the device alone made requests wait; None when the server says too little.

    The queue is simulated with the phase's own arrivals and mean launch times, linear between sizes and beyond the
    largest. Where replies do not say what each request cost, all cost the same. What a request alone takes outside
    the device is added to every latency.
    """
    if not load.launches or not max_batch_tokens:
        return None
    sizes = sorted(load.launches)
    means = [load.launches[size][1] / load.launches[size][0] for size in sizes]

    def launch_seconds(tokens: int) -> float:
        return float(np.interp(tokens, sizes, means)) * max(tokens / sizes[-1], 1.0)

    tokens = _spread_tokens(load)
    middle = np.array([int(np.median(tokens))])
    on_device = float(simulate_queue(np.zeros(1), middle, launch_seconds, max_batch_tokens)[0])
    elsewhere = max(alone.summary.p50_ms / 1000 - on_device, 0.0)
    latencies = simulate_queue(arrivals, tokens, launch_seconds, max_batch_tokens) + elsewhere
    return percentile(latencies, 99.0) / percentile(latencies, 50.0)


def _spread_tokens(phase: Phase) -> Int[np.ndarray, "q"]:
    """Tokens of each request, in the shares that the replies say, so that together they are what was launched."""
    launched = sum(tokens * count for tokens, (count, _) in phase.launches.items())
    said = [sample.reply.tokens for sample in phase.samples]
    weights = np.array([value or 0 for value in said] if all(said) else [1] * len(said), float)
    return np.maximum(np.round(weights * launched / weights.sum()), 1).astype(int)


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` beside the body, no longer than that."""
    running = asyncio.create_task(work)
    try:
        yield
    finally:
        running.cancel()


@contextlib.asynccontextmanager
async def _shown(progress: rich.progress.Progress, name: str, seconds: float) -> AsyncIterator[None]:
    """A bar that fills in the phase's time."""
    shown = progress.add_task(name, total=seconds)

    async def advance() -> None:
        while True:
            await asyncio.sleep(0.5)
            progress.advance(shown, 0.5)

    async with _meanwhile(advance()):
        yield
    progress.update(shown, completed=seconds)

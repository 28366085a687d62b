"""What the server counts, in Prometheus form, and the watch for compilations that must not happen."""

import jax.monitoring
import prometheus_client
from prometheus_client import Counter, Gauge, Histogram, ProcessCollector, Summary

from jaxsearch.buckets import COMPILE_EVENT

STAGE_SECONDS = tuple(base * 10.0**power for power in range(-3, 2) for base in (1, 1.5, 2, 3, 5, 7.5))
"""Upper ends of the histograms' buckets, close enough for percentiles."""


class Telemetry:
    """Metrics of one server, in a registry of their own.

    `recompiles` counts every XLA compilation of the process after `arm()`; it must stay 0.
    """

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.items_scored = Counter("items_scored", "Items that got a score", registry=registry)
        self.tokens = Counter(
            "tokens", "Tokens by kind: real, padding, shared_saved", ["kind"], registry=registry
        )
        self.truncated_items = Counter("truncated_items", "Items whose text was cut", registry=registry)
        self.recompiles = Counter("recompiles", "Compilations after ready", registry=registry)
        self.programs = Gauge("programs", "Programs compiled before ready", registry=registry)
        self.queue_tokens = Gauge("queue_tokens", "Tokens that wait or run", registry=registry)
        self.is_ready = Gauge("ready", "1 once every program is compiled and tested", registry=registry)
        self.batch_fill = Histogram(
            "batch_fill_ratio",
            "Real tokens over padded tokens of a batch",
            buckets=[i / 10 for i in range(1, 11)],
            registry=registry,
        )
        self.batch_seconds = Summary(
            "batch_seconds",
            "Seconds that a launch had the device, by its padded tokens",
            ["tokens"],
            registry=registry,
        )
        self.running_seconds = Gauge(
            "batch_running_seconds",
            "Seconds that the launch which runs now had the device",
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "stage_seconds", "Seconds per stage", ["stage"], buckets=STAGE_SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "request_seconds",
            "Seconds from a request's headers to its answer, by path",
            ["path"],
            buckets=STAGE_SECONDS,
            registry=registry,
        )
        ProcessCollector(registry=registry)
        self._is_armed = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def arm(self) -> None:
        """From now on every compilation is one too many."""
        self._is_armed = True
        self.is_ready.set(1)

    def close(self) -> None:
        """Stops listening; the metrics stay readable."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return prometheus_client.generate_latest(self.registry)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if self._is_armed and event == COMPILE_EVENT:
            self.recompiles.inc()

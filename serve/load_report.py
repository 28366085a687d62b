"""What a load test found, for people and for programs: a table, Markdown, JSON, every request, and a picture.

How it is measured, and what must hold, is `loadtest`'s.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import rich.box
import rich.table

from jaxsearch.scoring.load import REFUSED, Sample
from serve.load_phases import Phase

ROWS = (
    "requests",
    "p50, ms",
    "p95, ms",
    "p99, ms",
    "sent late, p99, ms",
    "429",
    "errors",
    "items/s",
    "items/s within SLO",
    "device busy",
    "client CPU",
)
FINDINGS = {
    "p99_over_p50": "p99 over p50 at load",
    "p99_over_p50_simulated": "the same if requests waited for the device only (simulated)",
    "refused_share": "share of 429 at overload",
    "answered_share": "items/s answered at overload, share of capacity",
    "in_time_share": "of them within the SLO, share of capacity",
    "patient_wait_seconds": "longest time until a client that waits as told was served, seconds",
    "recovery_seconds": "recovery, seconds",
}
"""What each finding is, for people."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that must hold, whether it does, and the numbers."""

    name: str
    is_passed: bool
    told: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a load test found. `settings`, `server` and `findings` hold what JSON knows.

    `capacity` is the answered items per second at saturation.
    """

    url: str
    date: str
    settings: Mapping[str, Any]
    server: Mapping[str, Any]
    slo_seconds: float
    capacity: float
    phases: Sequence[Phase]
    findings: Mapping[str, Any]
    checks: Sequence[Check]

    def lines(self) -> list[str]:
        """The findings that no table has, a sentence each, and the checks."""
        unpromised = (
            "the server promises no service level: at overload an answer waits as long as the queue is"
        )
        return [
            f"SLO: p99 within {1000 * self.slo_seconds:.1f} ms; capacity {self.capacity:.1f} items/s",
            *(
                []
                if self.server.get("slo_ms", True)  # other servers do not say
                else [f"{unpromised}; start it with --slo-ms to have one kept"]
            ),
            *(f"{FINDINGS[name]}: {_told(value)}" for name, value in self.findings.items()),
            *(
                f"{'ok' if check.is_passed else 'FAILED'}: {check.name} ({check.told})"
                for check in self.checks
            ),
        ]


def table(report: Report) -> rich.table.Table:
    """The phases for a terminal."""
    shown = rich.table.Table(title=f"{report.url}, {report.date}", box=rich.box.SIMPLE_HEAD)
    shown.add_column("")
    for phase in report.phases:
        shown.add_column(phase.name, justify="right")
    for row in _rows(report):
        shown.add_row(*row)
    return shown


def write_report(report: Report, directory: Path) -> str:
    """Writes `loadtest.json`, `loadtest.md`, `samples.jsonl` and `loadtest.png`; says where.

    The folder exists. Infinite latencies are null in JSON. Without matplotlib there is no picture, which is said too.
    """
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    fields |= {"phases": [phase.to_dict() for phase in report.phases]}
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    (directory / "loadtest.json").write_bytes(orjson.dumps(fields, option=options) + b"\n")
    with (directory / "samples.jsonl").open("wb") as file:
        for phase in report.phases:
            file.writelines(orjson.dumps(_sample(phase.name, sample)) + b"\n" for sample in phase.samples)
    has_plot = _plot(report, directory / "loadtest.png")
    (directory / "loadtest.md").write_text(_markdown(report, has_plot=has_plot), encoding="utf-8")
    missing = "" if has_plot else "; no picture, since matplotlib is not installed"
    return f"report in {directory}{missing}"


def _sample(phase: str, sample: Sample) -> dict[str, Any]:
    times = {
        name: round(getattr(sample, name), 6)
        for name in ("scheduled_seconds", "started_seconds", "ended_seconds")
    }
    return {"phase": phase, **times, **dataclasses.asdict(sample.reply)}


def _markdown(report: Report, *, has_plot: bool) -> str:
    names = [phase.name for phase in report.phases]
    rows = [["", *names], ["---", *["---:"] * len(names)], *_rows(report)]
    parts = [
        f"# Load test of {report.url}",
        f"{report.date}. {_told(report.settings)}.",
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        "\n".join(f"- {line}" for line in report.lines()),
    ]
    if has_plot:
        parts.append("![Latency of every request](loadtest.png)")
    return "\n\n".join(parts) + "\n"


def _rows(report: Report) -> list[tuple[str, ...]]:
    columns = []
    for phase in report.phases:
        found = phase.summary
        latencies = [f"{value:.1f}" for value in (found.p50_ms, found.p95_ms, found.p99_ms, found.lag_p99_ms)]
        counts = [str(found.num_refused), str(found.num_errors)]
        rates = [f"{value:.1f}" for value in (found.items_per_second, found.goodput_items_per_second)]
        shares = [_percent(phase.device_busy_share), _percent(phase.client_cpu_share)]
        columns.append([str(found.num_requests), *latencies, *counts, *rates, *shares])
    return list(zip(ROWS, *columns, strict=True))


def _percent(share: float | None) -> str:
    return "not said" if share is None else f"{share:.0%}"


def _told(value: Any) -> str:
    if value is None:
        return "not said"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(part)}" for name, part in value.items() if part is not None)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plot(report: Report, path: Path) -> bool:
    """Latency of every request over the phases, one after another; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axis = figure.subplots()
    offset = 0.0
    for phase, color in zip(
        report.phases, ("#0b6e4f", "#3b6ea5", "#7b4ea3", "#b5532a", "#666666"), strict=True
    ):
        answered = [sample for sample in phase.samples if sample.is_ok]
        axis.plot(
            [offset + sample.scheduled_seconds for sample in answered],
            [1000 * sample.latency_seconds for sample in answered],
            ".", color=color, markersize=4, alpha=0.6, label=f"{phase.name}, answered",
        )  # fmt: skip
        refused = [sample for sample in phase.samples if sample.reply.status == REFUSED]
        if refused:
            axis.plot(
                [offset + sample.scheduled_seconds for sample in refused],
                [1000 * (sample.ended_seconds - sample.scheduled_seconds) for sample in refused],
                "x", color="0.6", markersize=3, alpha=0.5, label=f"{phase.name}, 429",
            )  # fmt: skip
        offset += max(sample.ended_seconds for sample in phase.samples)
    axis.axhline(1000 * report.slo_seconds, color="0.4", linewidth=0.9, linestyle=(0, (4, 3)), label="SLO")
    axis.set_yscale("log")
    axis.set_xlabel("seconds, phases one after another", color="0.35", fontsize=9)
    axis.set_ylabel("milliseconds since the request was due", color="0.35", fontsize=9)
    axis.set_title(f"Latency under load, {report.url}", loc="left", fontweight="bold")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axis.grid(axis="y", color="0.92", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, facecolor="white")
    return True

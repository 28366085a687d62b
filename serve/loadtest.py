"""Drives a running server: how fast it is alone, what it takes, and how it behaves at 60 % and at 300 % of that.

    python -m serve.loadtest --url http://127.0.0.1:8000 --out work/loadtest

Phases: alone (one request after another), saturation (some connections, each sends again when it is answered), load
and overload (independent clients, at a share of the capacity that saturation showed), recovery (one after another
again, from the moment when overload ends). Requests do not repeat. Other servers of the same dialects are driven too;
what they do not say about themselves is left out. Exit code: 0 when every check holds, 1 when one fails, 2 on wrong
input.
"""

import argparse
import asyncio
import collections
import contextlib
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.console
import rich.progress

from jaxsearch.errors import InputError
from jaxsearch.scoring.load import REFUSED, TextSource
from serve.load_client import DIALECTS, Target, read_label_token_ids, read_texts
from serve.load_phases import SLO_FACTOR, LoadTest, Phase, expected_tail
from serve.load_report import Check, Report, table, write_report
from serve.protocol import number_above

WARM_UP_REQUESTS = 3
MAX_CLIENT_CPU = 0.8
"""Share of one core above which the client may be what is measured."""

SERVER = ("name", "model_revision", "lattice", "limits", "slo_ms")
"""What of `/info` the report keeps."""


def _told_statuses(statuses: Mapping[int, int]) -> str:
    counts = (f"{count} x {status or 'no reply'}" for status, count in sorted(statuses.items()))
    return ", ".join(counts) or "every request answered or refused"


def _checks(test: LoadTest, phases: Sequence[Phase], share: float, *, is_promised: bool) -> list[Check]:
    """Args: `share` is what was answered per second at overload, over the capacity: in time, where that is promised."""
    options = test.options
    load = phases[2]
    statuses = collections.Counter(
        sample.reply.status for phase in phases for sample in phase.samples if not sample.is_ok
    )
    del statuses[REFUSED]
    refused = [sample for phase in phases for sample in phase.samples if sample.reply.status == REFUSED]
    untold = sum(sample.reply.retry_after_seconds is None for sample in refused)
    unserved = sum(not patience.is_served for patience in test.patient)
    most = max((patience.attempts for patience in test.patient), default=0)
    busiest = max(phases, key=lambda phase: phase.client_cpu_share)
    cpu = busiest.client_cpu_share
    recovery = test.recovery_seconds
    p99_ms, slo_ms = load.summary.p99_ms, 1000 * test.slo_seconds
    checks = [
        Check("no errors", not statuses, _told_statuses(statuses)),
        Check("p99 at load within SLO", p99_ms <= slo_ms, f"{p99_ms:.1f} ms of {slo_ms:.1f}"),
        Check(
            f"answered {'in time ' if is_promised else ''}at overload",
            share >= options.min_answered,
            f"{share:.0%} of capacity",
        ),
        Check("every 429 has Retry-After", not untold, f"{untold} of {len(refused)} have none"),
        Check(
            "clients that wait are served",
            not unserved,
            f"{unserved} of {len(test.patient)} were not; at most {most} attempts",
        ),
        Check(
            "recovery",
            recovery is not None,
            "not back to normal" if recovery is None else f"after {recovery:.2f} s",
        ),
        Check("client not the bottleneck", cpu <= MAX_CLIENT_CPU, f"{cpu:.0%} of a core, {busiest.name}"),
    ]
    if (growth := load.memory_growth_share) is not None:
        told = f"{growth:+.1%} of {max(load.memory_bytes) / 2**20:.0f} MiB"
        checks.append(Check("memory growth at load", growth <= options.max_growth, told))
    recompiles = [phase.recompiles for phase in phases if phase.recompiles is not None]
    if recompiles:
        checks.append(Check("no compilation", not any(recompiles), f"{sum(recompiles):.0f} compilations"))
    return checks


async def measure(options: argparse.Namespace, progress: rich.progress.Progress) -> Report:
    """All phases.

    Raises: InputError when the server cannot be reached, is not ready, or does not answer such requests, and when the
    report has no place.
    """
    fields = {} if options.model is None else {"model": options.model}
    if options.label_token_ids is not None:
        fields["label_token_ids"] = read_label_token_ids(options.label_token_ids)
    target = Target(options.url, options.format, fields=fields)
    async with contextlib.aclosing(target):
        await target.check_ready()
        info = await target.info()
        texts = await target.texts(info) if options.texts is None else read_texts(options.texts)
        source = TextSource(
            texts, items_per_request=options.items, query_words=options.query_words, seed=options.seed
        )
        for _ in range(WARM_UP_REQUESTS):
            await target.check_answer(target.body(next(source)))
        _make_folder(options.out)
        is_promised = options.slo_ms is None and info.get("slo_ms") is not None
        slo_ms = info["slo_ms"] if is_promised else options.slo_ms
        test = LoadTest(target, source, options, progress, slo_ms=slo_ms)
        alone = await test.alone()
        saturation = await test.saturation()
        load, arrivals = await test.load(saturation)
        overload, recovery = await test.overload(saturation)
    phases = [alone, saturation, load, overload, recovery]
    capacity = saturation.summary.items_per_second
    answered = overload.summary.items_per_second / capacity
    in_time = overload.summary.goodput_items_per_second / capacity
    waits = [patience.seconds for patience in test.patient]
    max_batch_tokens = max(info.get("lattice", {}).get("launches", [0]))
    findings = {
        "p99_over_p50": load.summary.p99_ms / load.summary.p50_ms,
        "p99_over_p50_simulated": expected_tail(alone, load, arrivals, max_batch_tokens),
        "refused_share": overload.summary.num_refused / overload.summary.num_requests,
        "answered_share": answered,
        "in_time_share": in_time,
        "patient_wait_seconds": max(waits, default=None),
        "recovery_seconds": test.recovery_seconds,
    }
    return Report(
        url=options.url,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        settings={name: value for name, value in vars(options).items() if name not in ("url", "out")},
        server={name: info[name] for name in SERVER if name in info},
        slo_seconds=test.slo_seconds,
        capacity=capacity,
        phases=phases,
        findings=findings,
        checks=_checks(test, phases, in_time if is_promised else answered, is_promised=is_promised),
    )


def _make_folder(path: str) -> None:
    """Before anything is measured. Raises: InputError when nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {path} ({error.strerror}); choose another --out") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.loadtest", description=(__doc__ or "").split("\n")[0]
    )
    seconds, count = number_above(0, float), number_above(0, int)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the running server (default %(default)s)")
    add("--out", default="work/loadtest", help="folder for report and samples (default %(default)s)")
    add("--format", choices=DIALECTS, default="rerank", help="dialect of the requests (default %(default)s)")
    add(
        "--texts", help='file of texts, a line each, or .jsonl with "text" (default: the server\'s documents)'
    )
    add("--model", help="model name in every request")
    add("--label-token-ids", help="token ids in every request, such as 9454,2753")
    add("--items", type=count, default=10, help="items of a request (default %(default)s)")
    add("--query-words", type=count, default=8, help="most words of a query (default %(default)s)")
    add("--seed", type=number_above(-1, int), default=0, help="of texts and arrivals (default %(default)s)")
    add("--connections", type=count, default=8, help="at saturation (default %(default)s)")
    add(
        "--slo-ms",
        type=seconds,
        help=f"longest p99 at load (default: the server's, or {SLO_FACTOR} x p50 alone)",
    )
    add("--load-share", type=seconds, default=0.6, help="of the capacity (default %(default)s)")
    add("--overload-share", type=seconds, default=3.0, help="of the capacity (default %(default)s)")
    add(
        "--min-answered",
        type=seconds,
        default=0.8,
        help="items/s at overload, of the capacity (default %(default)s)",
    )
    add(
        "--max-growth",
        type=seconds,
        default=0.05,
        help="of the server's memory from the first to the last quarter of load, a share (default %(default)s; "
        "it swings by 0.03 in a minute, less in ten)",
    )
    for name, default in (
        ("--alone-seconds", 10.0), ("--saturation-seconds", 20.0), ("--load-seconds", 60.0),
        ("--overload-seconds", 30.0), ("--recovery-seconds", 30.0),
    ):  # fmt: skip
        add(name, type=seconds, default=default, help="of the phase (default %(default)s)")
    return parser


def main() -> None:
    options = _parser().parse_args()
    console = rich.console.Console()
    columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.TimeElapsedColumn())
    progress = rich.progress.Progress(*columns, console=console, refresh_per_second=2)
    try:
        with progress:
            report = asyncio.run(measure(options, progress))
        told = write_report(report, Path(options.out))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    console.print(table(report))
    for line in [*report.lines(), told]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if failed := [check.name for check in report.checks if not check.is_passed]:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

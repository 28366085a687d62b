"""The ladder of scoring: one ranker with its trained weights, every way to run it, each measured in quality and speed.

    python -m train.ladder --config configs/ladder.py --workdir work/ladder

A request is a query with the first stage's best documents; a rung is a way to score it, from texts to scores. Rungs
that compute the same must agree. Each is timed on requests back to back, the rungs taking turns. The highest rate of
independent clients that meets a service level (SLO, p99) is simulated from those times and then tried for real. Torch
has its rungs where it is installed: `make ladder`. Writes `report.json`, `report.md` and a picture.
"""

import asyncio
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.metrics import bootstrap_ci, paired_bootstrap
from jaxsearch.ranker import TextRanker
from jaxsearch.scoring import load
from train.config import Bound, Count, Rate
from train.first_stage import draw, open_first_stage
from train.inputs import check_view, load_data, load_retriever
from train.ladder_report import in_ratios, markdown
from train.memory import added_bytes
from train.options import progress, run, say
from train.plots import plot_ladder
from train.rungs import (
    Rung,
    Stage,
    encoder_rungs,
    our_rungs,
    pruned_names,
    ranker_of,
    shared_prefix_rungs,
    short_view_rungs,
    torch_rungs,
)
from train.speed import commit, spread, take_turns
from train.ways import LIBRARIES, Request, check_agreement, missing_libraries

REFERENCE = "one by one"
"""Whose scores the others that compute the same must equal, and whose NDCG shares are stated of."""
MOST_LOAD = 0.95
"""Of what a rung does back to back; where the SLO is long against a request, this and not the SLO limits the rate."""
SIMULATED_REQUESTS, SIMULATED_SLOS = 5_000, 100
"""A simulation has at least so many requests and lasts at least so many times the SLO."""
LEAST_REQUESTS = 20
"""Of the real run at that rate, however short its window."""


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """The ranker, what it is measured on, and for how long."""

    ranker: str = "work/demo/ranker/model"
    """Folder of the ranker; it reads the view that it was trained on, its full text here."""
    retriever: str = "work/demo/encoder/model"
    """Asset, hub name or folder of the first stage's encoder, which finds a query's documents beside BM25."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    view: str = "short"
    """Which view of a document the encoders read."""
    encoder: str = "work/demo/encoder/model"
    """The rung `encoder alone`: asset, hub name or folder, in float32; empty: no such rung."""
    pruned: tuple[str, ...] = ()
    """A rung for each of these folders of rankers that are smaller (`train.prune`, or healed after it)."""
    short_view: str = ""
    """The rung `shared prefix, short view`: a view that is shorter than the ranker's own; empty: no such rung."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the rankers' computation; beside float32 the shared prefix runs in bfloat16 too."""
    num_queries: Count = 100
    """Test queries that NDCG@10 is measured on, drawn by the seed."""
    depth: Count = 10
    """Documents of a request: the first stage's best."""
    timed_queries: Count = 20
    """Of the queries, those whose scoring is timed."""
    repeats: Annotated[int, Bound(3)] = 3
    """Passes over the timed queries."""
    window_seconds: Rate = 60.0
    """How long each rung is tried at its rate."""
    has_memory: bool = True
    """Measure memory too, on CPU: each rung in a process of its own, some ten seconds each."""
    slo_factor: Rate = 3.0
    """The SLO, one for all rungs: p99 within so many times the median of a request alone on the slowest rung."""
    seed: int = 0


def make_rungs(config: LadderConfig, stage: Stage, ranker: TextRanker) -> list[Rung]:
    """All rungs from the bottom up, the neighbours last; a further kind is a further list here."""
    theirs = torch_rungs(stage, config.ranker, config.dtype) if has_torch_rungs() else []
    ours = our_rungs(stage, config.ranker, config.dtype)
    pruned = {f"pruned: {name}": path for name, path in pruned_names(config.pruned).items()}
    wide = {ours[-1].name: config.ranker} | pruned if config.dtype == "float32" else {}
    narrow = {f"{name}, bfloat16": path for name, path in wide.items()}
    return [
        *theirs,
        *ours,
        *shared_prefix_rungs(stage, pruned, "pruned", config.dtype),
        *shared_prefix_rungs(stage, narrow, "bfloat16", "bfloat16"),
        *short_view_rungs(stage, config.ranker, config.dtype, config.short_view),
        *encoder_rungs(stage, ranker, config.encoder, config.view),
    ]


def has_torch_rungs() -> bool:
    return jax.default_backend() == "cpu" and not {"torch", "transformers"} & set(missing_libraries())


def left_out() -> str:
    """A sentence where rungs are missing because of what is installed, or where this runs."""
    if jax.default_backend() != "cpu":
        return "torch runs on the CPU here, so that its rungs are left out on this device."
    if missing := missing_libraries():
        return f"{', '.join(missing)} not installed here: left out; `make ladder` runs this where they are."
    return ""


def quality(stage: Stage, rungs: Sequence[Rung], dtype: str) -> dict[str, dict[str, Any]]:
    """NDCG@10 of each rung and what it computes for an item; every shape that a rung will need is compiled here.

    Raises: InputError when rungs that compute the same disagree.
    """
    scores: dict[str, list[np.ndarray]] = {}
    with progress("scoring all queries", len(rungs)) as advance:
        for rung in rungs:
            scores[rung.name] = [rung.way.score(request) for request in rung.requests]
            advance(text=rung.name)
    same = {(dtype, rung.name): np.concatenate(scores[rung.name]) for rung in rungs if rung.is_same}
    differences = check_agreement(same, REFERENCE)
    values = {rung.name: stage.ndcg(scores[rung.name]) for rung in rungs}
    reference = bootstrap_ci(values[REFERENCE]).value
    found: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        interval = bootstrap_ci(values[rung.name])
        row: dict[str, Any] = {
            "ndcg@10": list(interval),
            "difference": list(paired_bootstrap(values[rung.name], values[REFERENCE])),
        }
        if reference > 0:
            row["retained"] = interval.value / reference
        if rung.is_same:
            row["largest_difference"] = differences[dtype, rung.name]
        if rung.way.places is not None:
            places = [rung.way.places(request) for request in rung.requests]
            filled, padded = (sum(numbers) for numbers in zip(*places, strict=True))
            row["computed_tokens"] = padded / sum(len(request.documents) for request in rung.requests)
            row["padding"] = 1 - filled / padded
        found[rung.name] = row
    return found


def memory_of(config: LadderConfig, rungs: Sequence[Rung]) -> dict[str, int | None]:
    """By rung, what it adds to a process that scores the timed requests."""
    theirs = [name.replace("-", "_") for name in LIBRARIES if name not in missing_libraries()]
    found: dict[str, int | None] = {}
    with progress("memory", len(rungs)) as advance:
        for rung in rungs:
            requests = rung.requests[: config.timed_queries]
            found[rung.name] = added_bytes(rung.make, requests, theirs if rung.kind == "torch" else ())
            advance(text=rung.name)
    return found


def time_alone(
    config: LadderConfig, rungs: Sequence[Rung]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By rung, the seconds of each pass over the timed requests, back to back, and those of each request in them."""
    single: dict[str, list[float]] = {rung.name: [] for rung in rungs}

    def score_timed(rung: Rung) -> None:
        for request in rung.requests[: config.timed_queries]:
            started = time.perf_counter()
            rung.way.score(request)
            single[rung.name].append(time.perf_counter() - started)

    calls = {rung.name: functools.partial(score_timed, rung) for rung in rungs}
    with progress("timing", config.repeats * len(rungs)) as advance:
        passes = take_turns(calls, config.repeats, advance)
    return passes, single


def simulated_rate(service_seconds: Sequence[float], slo_seconds: float, seed: int) -> float:
    """The highest rate of Poisson arrivals, in requests a second, with p99 within the SLO, 0 where there is none.

    One server takes requests in order of arrival; each takes one of the measured times, drawn with replacement.
    """
    services, rng = np.array(service_seconds), np.random.default_rng(seed)
    most = 1 / services.mean()

    def p99(rate: float) -> float:
        seconds = max(SIMULATED_REQUESTS / rate, SIMULATED_SLOS * slo_seconds)
        arrivals = load.poisson_arrivals(rate, seconds, rng)
        drawn = rng.choice(services, len(arrivals))
        return load.percentile(load.simulate_requests(arrivals, drawn), 99.0)

    low, high = MOST_LOAD / 100 * most, MOST_LOAD * most
    return load.highest_rate(p99, low, high, slo_seconds=slo_seconds, precision=0.02)[0]


def try_rate(
    rung: Rung, requests: Sequence[Request], rate: float, *, seconds: float, slo_seconds: float, seed: int
) -> load.Summary:
    """Real requests at that rate, sent when they are due whether or not earlier ones are answered; one worker."""
    rng = np.random.default_rng((seed, 1))
    arrivals = load.poisson_arrivals(rate, max(seconds, LEAST_REQUESTS / rate), rng)
    chosen = rng.integers(len(requests), size=len(arrivals))

    async def send_all(pool: concurrent.futures.Executor) -> list[load.Sample]:
        loop = asyncio.get_running_loop()

        async def send(number: int) -> load.Reply:
            await loop.run_in_executor(pool, rung.way.score, requests[chosen[number]])
            return load.Reply(200)

        return await load.drive(arrivals, send)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        samples = asyncio.run(send_all(pool))
    items = len(requests[0].documents)
    return load.summarize(samples, items_per_request=items, slo_seconds=slo_seconds)


def speed(config: LadderConfig, rungs: Sequence[Rung]) -> tuple[float, dict[str, dict[str, Any]]]:
    """The SLO in seconds, and of each rung what it does back to back, alone, and at the rate that the SLO allows."""
    passes, single = time_alone(config, rungs)
    slo = config.slo_factor * max(load.percentile(seconds, 50.0) for seconds in single.values())
    found: dict[str, dict[str, Any]] = {}
    with progress("under load", len(rungs)) as advance:
        for rung in rungs:
            requests = rung.requests[: config.timed_queries]
            items, per_request = (
                sum(len(request.documents) for request in requests),
                len(requests[0].documents),
            )
            alone = single[rung.name]
            rate = simulated_rate(alone, slo, config.seed)
            row: dict[str, Any] = {
                "items_per_second": spread([items / seconds for seconds in passes[rung.name]]),
                "alone_ms": {
                    f"p{percent:.0f}": 1000 * load.percentile(alone, percent) for percent in (50.0, 99.0)
                },
                "holds": False,
                "simulated": {
                    "requests_per_second": rate,
                    "items_per_second": rate * per_request,
                    "load": rate * float(np.mean(alone)),
                },
            }
            if rate > 0:
                summary = try_rate(
                    rung,
                    requests,
                    rate,
                    seconds=config.window_seconds,
                    slo_seconds=slo,
                    seed=config.seed,
                )
                numbers = dataclasses.asdict(summary).items()
                row["measured"] = {name: value if math.isfinite(value) else None for name, value in numbers}
                row["holds"] = summary.p99_ms <= 1000 * slo
            found[rung.name] = row
            advance(text=rung.name)
    return slo, found


def main(config: LadderConfig, workdir: Path) -> None:
    pruned_names(config.pruned)
    ranker = ranker_of(config.ranker, config.dtype)
    collection, vertical = load_data(config, needs=("test",), view=config.view)
    check_view(collection, vertical, ranker.view, field="ranker")
    if config.short_view == ranker.view:
        raise InputError(f"short_view: the ranker reads {ranker.view!r} anyway; name another view or none")
    if config.short_view:
        check_view(collection, vertical, config.short_view, field="short_view")
    queries = draw(collection.split("test"), config.num_queries, config.seed)
    retriever = load_retriever(config.retriever)
    first_stage = open_first_stage(collection, vertical, retriever, view=config.view)
    candidates = first_stage.mine(queries, depth=config.depth, seen_only=False)
    stage = Stage(collection, vertical, queries, candidates)
    if sentence := left_out():
        say(sentence)
    rungs = make_rungs(config, stage, ranker)
    memory = memory_of(config, rungs) if config.has_memory else {}
    qualities = quality(stage, rungs, config.dtype)
    slo, speeds = speed(config, rungs)
    packages = ["jax"]
    if has_torch_rungs():
        packages += [name for name in LIBRARIES if name not in missing_libraries()]
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        "ranker": ranker.version,
        "retriever": retriever.version,
        "collection": collection.fingerprint(),
        "left_out": left_out(),
        "reference": REFERENCE,
        "most_load": MOST_LOAD,
        "least_requests": LEAST_REQUESTS,
        "num_queries": len(queries),
        "depth": len(rungs[0].requests[0].documents),
        "timed_queries": min(config.timed_queries, len(queries)),
        "slo_ms": 1000 * slo,
        **{name: getattr(config, name) for name in ("dtype", "repeats", "window_seconds", "slo_factor")},
        "rows": [
            {"name": rung.name, "kind": rung.kind, "memory_bytes": memory.get(rung.name)}
            | qualities[rung.name]
            | speeds[rung.name]
            for rung in rungs
        ],
    }
    write_json(workdir / "report.json", report)
    shown = in_ratios(report)
    (workdir / "report.md").write_text(markdown(shown), encoding="utf-8")
    plot_ladder(workdir / "report.png", shown)
    say(markdown(shown))


if __name__ == "__main__":
    run(main, LadderConfig)

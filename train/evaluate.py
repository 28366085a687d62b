"""One table of what a bundle serves and of all that it is made of: who ranks best, by how much, more than by chance?

    python -m train.evaluate --config configs/demo/evaluate.py --workdir work/demo/evaluate

Rows: `bm25` (a row for every view; `bm25:<view>` one of them), `minilm` (an encoder as it comes), the orders of a
bundle (`encoder`, `rrf`, `sum`, `ranker`, `sum+ranker`), `judge`, `served` (what the bundle's own search answers, its
default order), `server` (what a running server answers to the same questions), and further rankers by name. Rankers and
judge sort the first stage's best documents, as many as the bundle ranks; the rest keeps its order below. The judge,
being slow, grades a fixed subset of the queries, which every system repeats. Two more tables say what the first stage
finds and, where queries have kinds, how each system does by kind. Writes report.html (with the training's curves and
sample queries), report.json, report.md and report.png, and puts the table into the bundle's model card.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import rich.console

from jaxsearch.bundle import CARD, Bundle, document_bundle, load_bundle, revision_of, serving_dtype
from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.search.candidates import RETRIEVE_DEPTH
from jaxsearch.search.orders import NAMES
from train import plots, report, report_stages
from train.card import with_quality
from train.config import Count, CountOrNone
from train.first_stage import draw
from train.inputs import check_view, load_data
from train.options import run
from train.report_html import Shown, training_curves, write_html
from train.systems import Systems, check_server, order_runs, served_run, server_run

FIRST_STAGES = ("encoder", "rrf", "sum")
ROWS_OF_BUNDLE = (*NAMES[1:], "judge", "served", "server")
"""Rows that a bundle is needed for; `bm25` has a row for every view instead of the bundle's own."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which systems are compared, on which queries."""

    systems: tuple[str, ...] = (
        *("bm25", "minilm", "encoder", "rrf", "sum"),
        *("judge", "ranker", "sum+ranker", "served"),
    )
    """Rows of the table, in order: bm25 (every view), bm25:<view>, minilm, encoder, rrf, sum, judge, ranker,
    sum+ranker, served, server."""
    bundle: str = "work/export/bundle"
    """What train.export made; the rows bm25 and minilm need none."""
    server: str = ""
    """Address of a server of that bundle, for the row `server`; for example http://127.0.0.1:8000."""
    judge: str = "work/judge/model"
    """Folder of the judge."""
    other_rankers: tuple[str, ...] = ()
    """Further rows, each `name=folder` of a ranker, for example one trained on the judge's labels alone."""
    retriever: str = "minilm"
    """Asset, hub name or folder of the encoder that the row `minilm` shows untuned."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    view: str = "short"
    """Which view of a document the row `minilm` reads; judge and rankers read the one that they were trained on."""
    split: str = "test"
    """The split whose queries are reported."""
    num_queries: CountOrNone = 0
    """How many of them, drawn by the seed; 0: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the judge's and the further rankers' computation; the bundle computes as its server does."""
    judge_queries: Count = 100
    """Queries that the judge grades too, drawn by the seed; every system is reported on them once more."""
    baseline: str = ""
    """The row that every other is compared with; empty: sum, or the first one where it is not among the rows."""
    num_samples: Count = 10_000
    """Resamples of the bootstrap."""
    seed: int = 0


def open_bundle(config: EvaluateConfig, collection: Collection, vertical: Vertical) -> Bundle | None:
    """The bundle in the dtype that its server computes in; None where no row needs one.

    Raises: InputError when it was made from other documents, queries, grades or another vertical.
    """
    if not (config.other_rankers or set(config.systems) & set(ROWS_OF_BUNDLE)):
        return None
    bundle = load_bundle(config.bundle, dtype=serving_dtype())
    if bundle.index.metadata.get("data") != collection.fingerprint():
        raise InputError(
            f"{config.bundle} was made from other data than {config.collection}; run train.index and train.export again"
        )
    if bundle.vertical.fingerprint() != vertical.fingerprint():
        raise InputError(
            f"{config.bundle} was made with another vertical than {config.vertical}; export it again"
        )
    return bundle


def resolved(config: EvaluateConfig, collection: Collection, vertical: Vertical) -> EvaluateConfig:
    """With `bm25` written out and `server` added where one is named.

    Raises: InputError for a view that no document can be read through.
    """
    views = tuple(f"bm25:{view}" for view in vertical.views)
    systems = [row for system in config.systems for row in (views if system == "bm25" else (system,))]
    if config.server and "server" not in systems:
        systems.append("server")
    for system in systems:
        if system.startswith("bm25:"):
            check_view(collection, vertical, system.partition(":")[2], field="systems=bm25:<view>")
    return dataclasses.replace(config, systems=tuple(dict.fromkeys(systems)))


def with_orders(config: EvaluateConfig, bundle: Bundle | None) -> EvaluateConfig:
    """Without the rows for which the bundle has no order, and with the baseline named.

    Raises: InputError for a baseline that does not rank all queries.
    """
    systems = config.systems
    if bundle is not None:
        systems = tuple(name for name in systems if name not in NAMES or name in bundle.orders.orders)
    whole = [system for system in systems if system != "judge"]
    baseline = config.baseline or ("sum" if "sum" in whole else whole[0] if whole else "")
    if baseline not in whole:
        advice = f"set baseline to {' or '.join(whole)}" if whole else "add one to systems, for example bm25"
        raise InputError(f"baseline {baseline!r} must be one of the systems that rank all queries: {advice}")
    return dataclasses.replace(config, systems=systems, baseline=baseline)


def check(config: EvaluateConfig, vertical: Vertical) -> dict[str, str]:
    """The further rankers by name; InputError for a system that does not exist or a folder that is not given."""
    parts = [entry.partition("=") for entry in config.other_rankers]
    others = {name: folder for name, _, folder in parts}
    if wrong := [name for name, folder in others.items() if not folder]:
        raise InputError(f"other_rankers: write name=folder, not {wrong[0]!r}")
    lexical = [f"bm25:{view}" for view in vertical.views]
    known = [*lexical, "minilm", *ROWS_OF_BUNDLE]
    if wrong := [system for system in config.systems if system not in known]:
        raise InputError(f"unknown system {wrong[0]!r}: set systems to some of {', '.join(known)}")
    if clash := [name for name in others if name in known]:
        raise InputError(f"other_rankers: {clash[0]!r} is a system already; choose another name")
    needs = {"bundle": ROWS_OF_BUNDLE, "judge": ("judge",), "server": ("server",)}
    for field, systems in needs.items():
        if not getattr(config, field) and (wanted := [name for name in systems if name in config.systems]):
            raise InputError(f"system {wanted[0]!r} needs {field}: set {field}=… or leave the system out")
    if others and not config.bundle:
        raise InputError("other_rankers sort what a bundle finds: set bundle=DIR")
    return others


def collect_runs(
    config: EvaluateConfig,
    systems: Systems,
    queries: Sequence[Query],
    subset: Sequence[Query],
    others: dict[str, str],
) -> tuple[dict[str, Run], dict[str, Run], dict[str, Any]]:
    """Runs of all queries by system, those of the subset alone (the judge's), and facts for the notes."""
    bundle = systems.bundle
    facts: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    subset_runs: dict[str, Run] = {}
    seconds: dict[str, float] = {}
    by_order: dict[str, Run] = {}
    if bundle is not None:
        orders = bundle.orders
        wanted = {*config.systems, *FIRST_STAGES}
        names = [name for name in orders.orders if name in wanted]
        started = time.monotonic()
        by_order = order_runs(bundle.searcher, queries, names)
        seconds["orders of the bundle"] = time.monotonic() - started
        facts |= {
            "order": orders.default,
            "order_reason": orders.reason,
            "rank_depth": orders.rank_depth,
        }
        facts |= {"models": {"encoder": bundle.encoder.version, "ranker": bundle.ranker.version}}
        facts["bundle"] = bundle.revision
    for system in config.systems:
        started = time.monotonic()
        if system.startswith("bm25:"):
            runs[system] = systems.lexical(queries, system.partition(":")[2])
        elif system == "minilm":
            runs[system] = systems.dense(queries)
        elif bundle is not None and system == "served":
            runs[system] = served_run(bundle, queries)
        elif bundle is not None and system == "server":
            runs[system] = server_run(config.server, queries)
        elif bundle is not None and system == "judge":
            first = {query.id: by_order[bundle.orders.first_stage.name][query.id] for query in subset}
            graded, facts["judge"] = systems.judge(config.judge, report.top(first, bundle.orders.rank_depth))
            subset_runs[system] = report.overlay(first, graded)
        elif system in by_order:
            runs[system] = by_order[system]
            continue
        seconds[system] = time.monotonic() - started
    for name, folder in others.items():
        started = time.monotonic()
        runs[name] = systems.by_other_ranker(queries, name, folder)
        seconds[name] = time.monotonic() - started
    facts["data"] = systems.collection.fingerprint()
    facts["seconds"] = {system: round(value, 2) for system, value in seconds.items()}
    qrels, threshold = systems.collection.qrels_of(queries), systems.vertical.relevant_threshold
    first_stages = {name: run for name, run in runs.items() if name.startswith("bm25:") or name == "minilm"}
    first_stages |= {name: by_order[name] for name in FIRST_STAGES if name in by_order}
    facts["first_stage"] = report_stages.first_stage_rows(first_stages, qrels, threshold=threshold)
    bootstrap = {"num_samples": config.num_samples, "seed": config.seed}
    facts["kinds"] = report_stages.kind_rows(
        runs, qrels, systems.collection, threshold=threshold, **bootstrap
    )
    found_nothing = {name: sum(not found for found in run.values()) for name, run in runs.items()}
    facts["found_nothing"] = {name: count for name, count in found_nothing.items() if count}
    return runs, subset_runs, facts


def build_groups(
    config: EvaluateConfig,
    collection: Collection,
    runs: dict[str, Run],
    subset_runs: dict[str, Run],
    queries: Sequence[Query],
    subset: Sequence[Query],
    threshold: int,
) -> list[report.GroupResult]:
    """All queries and, where a system ranked only the subset, the subset with every system."""
    columns = report.document_columns(collection)
    options = {
        "threshold": threshold,
        "baseline": config.baseline,
        "num_samples": config.num_samples,
        "seed": config.seed,
    }
    name, qrels = f"{config.split} queries", collection.qrels_of(queries)
    groups = [report.evaluate_group(name, runs, qrels, columns, **options)]
    if subset_runs:
        both = runs | subset_runs
        order = [name for name in (*config.systems, *runs) if name in both]
        own = {name: both[name] for name in dict.fromkeys(order)}
        qrels = collection.qrels_of(subset)
        groups.append(
            report.evaluate_group("queries that the judge ranked too", own, qrels, columns, **options)
        )
    return groups


def notes_of(
    config: EvaluateConfig, collection: Collection, threshold: int, facts: dict[str, Any]
) -> list[str]:
    notes = [
        f"collection {collection.name} ({collection.fingerprint()}), {len(collection.documents)} documents; "
        f"relevant: grade {threshold} or above; NDCG has linear gain, NDCG exp 2^grade - 1",
        collection.notice or "grades are the collection's own",
        f"each column counts its own documents only; every system gives its best {RETRIEVE_DEPTH} of the whole corpus",
        *report.LEGEND,
    ]
    if "order" in facts:
        notes += [
            facts["order_reason"],
            f"served: bundle {facts['bundle']}, order {facts['order']}, as its own search answers",
            f"judge and rankers sort the first stage's best {facts['rank_depth']}, the rest keeps its order below",
        ]
    if absent := facts.get("absent"):
        notes.append(
            f"the bundle has no order {', '.join(absent)}: nothing could be fitted when it was exported"
        )
    if silent := facts.get("found_nothing"):
        told = ", ".join(f"{name} for {count} queries" for name, count in silent.items())
        notes.append(
            f"nothing was found by {told}; a ranker refuses queries that are too long for its prompt"
        )
    if judged := facts.get("judge"):
        value, low, high = judged["weighted_kappa"]
        notes.append(
            f"judge against the collection's grades: weighted kappa {value:z.3f} [{low:z.3f}, {high:z.3f}], "
            f"{judged['num_pairs']} pairs from the first stage's best {facts['rank_depth']}"
        )
    return notes


def folders_of(config: EvaluateConfig, bundle: Bundle | None) -> dict[str, Path]:
    """Work folders of the trainings whose models are compared, as far as they are known."""
    models = {"judge": config.judge} if "judge" in config.systems else {}
    models |= {name: folder for name, _, folder in (entry.partition("=") for entry in config.other_rankers)}
    if bundle is not None:
        beside = bundle.directory.parent.parent
        models = {name: str(beside / name / "model") for name in ("encoder", "ranker")} | models
    return {name: Path(model).parent for name, model in models.items() if Path(model).name == "model"}


def shown_system(runs: dict[str, Run]) -> str:
    """The system whose queries the report shows: what is served, else the last one."""
    return "served" if "served" in runs else list(runs)[-1]


def put_into_card(config: EvaluateConfig, bundle: Bundle, written: dict[str, Any]) -> str:
    """Puts the table into the bundle's model card and status page; returns a sentence that says so, or why not.

    Only a table of all test queries with what is served and all of the bundle's orders belongs there.
    """
    lacking = {"served", *bundle.orders.orders} - {"bm25", *config.systems}
    kept = "not put into the bundle's card, which keeps what it has: its table is for"
    if (config.split, config.num_queries) != ("test", 0):
        return f"{kept} all test queries, and this one is for {config.num_queries or 'all'} of split {config.split}"
    if lacking:
        return f"{kept} served and all orders of the bundle, and this one lacks {', '.join(sorted(lacking))}"
    try:
        if revision_of(config.bundle) != bundle.revision:
            return f"not put into the card of {config.bundle}: it was exported again meanwhile"
        card = (Path(config.bundle) / CARD).read_text(encoding="utf-8")
        rows = report.quality_rows(written)
        document_bundle(config.bundle, card=with_quality(card, written), quality=rows)
    except (InputError, OSError) as error:
        return f"not put into the bundle's card: {error}"
    return f"the table is in {config.bundle}/{CARD} too"


def main(config: EvaluateConfig, workdir: Path) -> None:
    collection, vertical = load_data(config, view=config.view)
    config = resolved(config, collection, vertical)
    others = check(config, vertical)
    queries = draw(collection.split(config.split), config.num_queries, config.seed)
    if not queries:
        raise InputError(f"{collection.name} has no queries in split {config.split!r}")
    subset = draw(queries, config.judge_queries, config.seed)
    bundle, wanted = open_bundle(config, collection, vertical), config.systems
    if bundle is not None and "server" in config.systems:
        check_server(config.server, bundle.revision)
    config = with_orders(config, bundle)
    systems = Systems(
        collection,
        vertical,
        bundle,
        view=config.view,
        retriever=config.retriever,
        dtype=config.dtype,
        num_samples=config.num_samples,
        seed=config.seed,
    )
    runs, subset_runs, facts = collect_runs(config, systems, queries, subset, others)
    facts["absent"] = [name for name in wanted if name not in config.systems]
    threshold = vertical.relevant_threshold
    groups = build_groups(config, collection, runs, subset_runs, queries, subset, threshold)
    notes = notes_of(config, collection, threshold, facts)
    title = f"{vertical.name}: {config.split} queries"
    written = report.to_json(groups, {"text": notes, **facts})
    write_json(workdir / "report.json", written)
    text = report.to_markdown(title, groups, notes)
    (workdir / "report.md").write_text(f"{text}\n{report_stages.stage_markdown(facts)}", encoding="utf-8")
    plots.plot(
        workdir / "report.png", title, groups, baseline=config.baseline,
        footer=f"Dots: mean; bars: 95 % bootstrap interval over queries; dashed: {config.baseline}. "
        f"{collection.notice}",
    )  # fmt: skip
    write_html(
        workdir / "report.html", title, groups, notes,
        picture=workdir / "report.png", curves=training_curves(folders_of(config, bundle)),
        shown=Shown(shown_system(runs), runs[shown_system(runs)], systems.judged, config.view),
        collection=collection, vertical=vertical, tables=report_stages.stage_tables(facts),
    )  # fmt: skip
    console = rich.console.Console()
    for group in groups:
        for table in report.to_rich(group):
            console.print(table)
    for header, rows in report_stages.stage_tables(facts):
        console.print(report.plain_table(header, rows))
    for note in notes:
        console.print(f"· {note}", highlight=False, markup=False)
    console.print(f"written: {workdir}/report.html, report.json, report.md, report.png", highlight=False)
    if bundle is not None:
        console.print(put_into_card(config, bundle, written), highlight=False, markup=False)


if __name__ == "__main__":
    run(main, EvaluateConfig)

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

import numpy as np
import rich.console

from jaxsearch.bundle import CARD, Bundle, document_bundle, load_bundle, serving_dtype
from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.judge import load_judge, predicted_grade
from jaxsearch.metrics import kappa_interval
from jaxsearch.ranker import load_ranker
from jaxsearch.retrieval import to_run
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.search.orders import NAMES
from jaxsearch.search.searcher import Searcher
from train import plots, report, report_stages
from train.card import with_quality
from train.config import Count, CountOrNone
from train.inputs import check_view, draw, load_data, load_retriever, offline_scorer, qrels_of
from train.label import label_pairs
from train.options import progress, run
from train.report_html import Shown, training_curves, write_html
from train.served import order_runs, served_run, server_run

FIRST_STAGES = ("encoder", "rrf", "sum")
QUERIES_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which systems are compared, on which queries."""

    systems: tuple[str, ...] = (
        "bm25", "minilm", "encoder", "rrf", "sum", "judge", "ranker", "sum+ranker", "served",
    )  # fmt: skip
    """Rows of the table, in order: bm25 (every view), bm25:<view>, minilm, encoder, rrf, sum, judge, ranker,
    sum+ranker, served, server."""
    bundle: str = "work/export/bundle"
    """What train.export made; empty: only rows that need none (bm25, minilm)."""
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
    """Whose queries are reported."""
    num_queries: CountOrNone = 0
    """How many of them, drawn by the seed; 0: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the judge's and the further rankers' computation; the bundle computes as its server does."""
    run_depth: Count = 1_000
    """Documents that bm25 and minilm return; what a bundle returns is cut at 100, as its server does."""
    judge_queries: Count = 100
    """Queries that the judge grades too, drawn by the seed; every system is reported on them once more."""
    baseline: str = ""
    """The row that every other is compared with; empty: sum, or the first one where it is not among the rows."""
    num_samples: Count = 10_000
    """Of the bootstrap."""
    seed: int = 0


class Stage:
    """The collection and the bundle, and the runs that are made with them."""

    def __init__(self, config: EvaluateConfig, collection: Collection, vertical: Vertical):
        self.config, self.collection, self.vertical = config, collection, vertical
        self.document_ids = list(collection.documents)
        self.judged: Run = {}
        self.bundle: Bundle | None = None
        if config.bundle:
            self.bundle = load_bundle(config.bundle, dtype=serving_dtype())
            check_bundle(config, self.bundle, collection, vertical)

    def texts(self, view: str) -> list[str]:
        return [
            self.vertical.document_text(document, view) for document in self.collection.documents.values()
        ]

    def lexical(self, queries: Sequence[Query], view: str) -> Run:
        index = Bm25Index(self.texts(view), self.document_ids)
        hits = index.search([query.text for query in queries], min(self.config.run_depth, len(index.ids)))
        return to_run(hits, [query.id for query in queries], index.ids)

    def dense(self, queries: Sequence[Query]) -> Run:
        """The exhaustive search of an encoder as it comes."""
        encoder = load_retriever(self.config.retriever)
        index = ExactIndex(encoder.embed_documents(self.texts(self.config.view)), self.document_ids)
        embeds = encoder.embed_queries([query.text for query in queries])
        hits = index.search(embeds, min(self.config.run_depth, len(index.ids)))
        return to_run(hits, [query.id for query in queries], index.ids)

    def by_other_ranker(self, queries: Sequence[Query], name: str, folder: str) -> Run:
        """The order `ranker` with another ranker behind the bundle's first stage."""
        assert self.bundle is not None
        ours = self.bundle.searcher
        ranker = load_ranker(folder, dtype=self.config.dtype)
        searcher = Searcher(
            ours.documents,
            ours.vertical,
            encoder=ours.encoder,
            index=ours.index,
            bm25=ours.bm25,
            orders=ours.orders,
            ranker=ranker,
            scorer=offline_scorer(ranker),
        )
        return order_runs(searcher, queries, ["ranker"], name)["ranker"]

    def judge(self, folder: str, candidates: Run) -> tuple[Run, dict[str, Any]]:
        """The judge's expected grades of the candidates, and its agreement with the collection's grades."""
        judge = load_judge(folder, dtype=self.config.dtype)
        scorer = offline_scorer(judge)
        labels = []
        queries = list(candidates)
        with progress("judge", len(queries)) as advance:
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                part = queries[start : start + QUERIES_AT_ONCE]
                pairs = [(query, document) for query in part for document in candidates[query]]
                labels += label_pairs(judge, scorer, self.collection, self.vertical, pairs)
                advance(len(part))
        self.judged = {query: {} for query in queries}
        for label in labels:
            self.judged[label.query_id][label.document_id] = label.expected_grade
        kappa = kappa_interval(
            predicted_grade(np.array([label.grade_probs for label in labels])),
            [self.collection.grade(label.query_id, label.document_id) for label in labels],
            groups=[label.query_id for label in labels],
            num_samples=self.config.num_samples,
            seed=self.config.seed,
        )
        agreement = {"weighted_kappa": kappa, "num_pairs": len(labels), "version": judge.version}
        return self.judged, agreement


def check_bundle(config: EvaluateConfig, bundle: Bundle, collection: Collection, vertical: Vertical) -> None:
    """Raises: InputError when the bundle was made from other documents, queries, grades or another vertical."""
    if bundle.index.metadata.get("data") != collection.fingerprint():
        raise InputError(
            f"{config.bundle} was made from other data than {config.collection}; run train.index and train.export again"
        )
    if bundle.vertical.fingerprint() != vertical.fingerprint():
        raise InputError(
            f"{config.bundle} was made with another vertical than {config.vertical}; export it again"
        )


def resolved(config: EvaluateConfig, collection: Collection, vertical: Vertical) -> EvaluateConfig:
    """With `bm25` written out and the baseline named; InputError for a view that no document can be read through."""
    views = tuple(f"bm25:{view}" for view in vertical.views)
    systems = [row for system in config.systems for row in (views if system == "bm25" else (system,))]
    if config.server and "server" not in systems:
        systems.append("server")
    for system in systems:
        if system.startswith("bm25:"):
            check_view(collection, vertical, system.partition(":")[2], field="systems=bm25:<view>")
    whole = [system for system in systems if system != "judge"]
    baseline = config.baseline or ("sum" if "sum" in whole else whole[0] if whole else "")
    return dataclasses.replace(config, systems=tuple(dict.fromkeys(systems)), baseline=baseline)


def check(config: EvaluateConfig, vertical: Vertical) -> dict[str, str]:
    """The further rankers by name; InputError for a system that does not exist or a folder that is not given."""
    parts = [entry.partition("=") for entry in config.other_rankers]
    others = {name: folder for name, _, folder in parts}
    if wrong := [name for name, folder in others.items() if not folder]:
        raise InputError(f"other_rankers: write name=folder, not {wrong[0]!r}")
    lexical = [f"bm25:{view}" for view in vertical.views]
    of_bundle = [*NAMES[1:], "served", "server"]
    known = [*lexical, "minilm", "judge", *of_bundle]
    if wrong := [system for system in config.systems if system not in known]:
        raise InputError(f"unknown system {wrong[0]!r}: set systems to some of {', '.join(known)}")
    if clash := [name for name in others if name in known]:
        raise InputError(f"other_rankers: {clash[0]!r} is a system already; choose another name")
    needs = {"bundle": (*of_bundle, "judge"), "judge": ("judge",), "server": ("server",)}
    for field, systems in needs.items():
        if not getattr(config, field) and (wanted := [name for name in systems if name in config.systems]):
            raise InputError(f"system {wanted[0]!r} needs {field}: set {field}=… or leave the system out")
    if others and not config.bundle:
        raise InputError("other_rankers sort what a bundle finds: set bundle=DIR")
    whole = [system for system in config.systems if system != "judge"]
    if config.baseline not in whole:
        advice = f"set baseline to {' or '.join(whole)}" if whole else "add one to systems, for example bm25"
        raise InputError(
            f"baseline {config.baseline!r} must be one of the systems that rank all queries: {advice}"
        )
    return others


def collect_runs(
    stage: Stage, queries: Sequence[Query], subset: Sequence[Query], others: dict[str, str]
) -> tuple[dict[str, Run], dict[str, Run], dict[str, Any]]:
    """Runs of all queries by system, those of the subset alone (the judge's), and facts for the notes."""
    config, bundle, facts = stage.config, stage.bundle, {}
    runs: dict[str, Run] = {}
    subset_runs: dict[str, Run] = {}
    seconds: dict[str, float] = {}
    by_order: dict[str, Run] = {}
    if bundle is not None:
        orders = bundle.orders
        wanted = {*config.systems, *FIRST_STAGES, orders.first_stage.name}
        names = [name for name in orders.orders if name in wanted]
        started = time.monotonic()
        by_order = order_runs(bundle.searcher, queries, names)
        seconds["orders of the bundle"] = time.monotonic() - started
        facts |= {
            "orders": list(orders.orders),
            "order": orders.default,
            "order_reason": orders.reason,
            "rank_depth": orders.rank_depth,
        }
        facts |= {"models": {"encoder": bundle.encoder.version, "ranker": bundle.ranker.version}}
        facts["bundle"] = bundle.revision
    for system in config.systems:
        started = time.monotonic()
        if system.startswith("bm25:"):
            runs[system] = stage.lexical(queries, system.partition(":")[2])
        elif system == "minilm":
            runs[system] = stage.dense(queries)
        elif bundle is not None and system == "served":
            runs[system] = served_run(bundle, queries)
        elif bundle is not None and system == "server":
            runs[system] = server_run(config.server, queries, bundle.revision)
        elif bundle is not None and system == "judge":
            first = {query.id: by_order[bundle.orders.first_stage.name][query.id] for query in subset}
            graded, facts["judge"] = stage.judge(config.judge, report.top(first, bundle.orders.rank_depth))
            subset_runs[system] = report.overlay(first, graded)
        elif system in by_order:
            runs[system] = by_order[system]
        seconds[system] = time.monotonic() - started
    for name, folder in others.items():
        runs[name] = stage.by_other_ranker(queries, name, folder)
    facts["data"] = stage.collection.fingerprint()
    facts["seconds"] = {system: round(value, 2) for system, value in seconds.items()}
    qrels, threshold = qrels_of(stage.collection, queries), stage.vertical.relevant_threshold
    found = {
        name: run for name, run in runs.items() if name.startswith("bm25:") or name in ("minilm", *by_order)
    }
    found |= {name: by_order[name] for name in FIRST_STAGES if name in by_order}
    found = {name: run for name, run in found.items() if "ranker" not in name}
    facts["first_stage"] = report_stages.first_stage_rows(found, qrels, threshold=threshold)
    facts["kinds"] = report_stages.kind_rows(runs, qrels, stage.collection, threshold=threshold)
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
    name, qrels = f"{config.split} queries", qrels_of(collection, queries)
    groups = [report.evaluate_group(name, runs, qrels, columns, **options)]
    if subset_runs:
        both = runs | subset_runs
        order = [name for name in (*config.systems, *runs) if name in both]
        own = {name: both[name] for name in dict.fromkeys(order)}
        qrels = qrels_of(collection, subset)
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
        "what a bundle answers is measured down to its first 100 documents; judge and rankers sort the first stage's "
        f"best {facts.get('rank_depth', 0)}, the rest keeps its order below",
        "each column counts its own documents only; candidates come from the whole corpus",
        *report.LEGEND,
    ]
    if "order" in facts:
        notes.append(facts["order_reason"])
        notes.append(f"served: bundle {facts['bundle']}, order {facts['order']}, as its own search answers")
        absent = [name for name in config.systems if name in NAMES and name not in facts["orders"]]
        if absent:
            notes.append(
                f"the bundle has no order {', '.join(absent)}: nothing could be fitted when it was exported"
            )
    if judged := facts.get("judge"):
        value, low, high = judged["weighted_kappa"]
        notes.append(
            f"judge against the collection's grades: weighted kappa {value:z.3f} [{low:z.3f}, {high:z.3f}], "
            f"{judged['num_pairs']} pairs from the first stage's best {facts['rank_depth']}"
        )
    return notes


def folders_of(config: EvaluateConfig) -> dict[str, Path]:
    """Work folders of the trainings whose models are compared, as far as they are known."""
    models = {"judge": config.judge} if "judge" in config.systems else {}
    models |= {name: folder for name, _, folder in (entry.partition("=") for entry in config.other_rankers)}
    if config.bundle:
        beside = Path(config.bundle).parent.parent
        models = {name: str(beside / name / "model") for name in ("encoder", "ranker")} | models
    return {name: Path(model).parent for name, model in models.items() if Path(model).name == "model"}


def shown_system(runs: dict[str, Run]) -> str:
    """The system whose queries the report shows: what is served, else the last one."""
    return "served" if "served" in runs else list(runs)[-1]


def main(config: EvaluateConfig, workdir: Path) -> None:
    collection, vertical = load_data(config, view=config.view)
    config = resolved(config, collection, vertical)
    others = check(config, vertical)
    queries = draw(collection.split(config.split), config.num_queries, config.seed)
    if not queries:
        raise InputError(f"{collection.name} has no queries in split {config.split!r}")
    subset = draw(queries, config.judge_queries, config.seed)
    stage = Stage(config, collection, vertical)
    runs, subset_runs, facts = collect_runs(stage, queries, subset, others)
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
        picture=workdir / "report.png", curves=training_curves(folders_of(config)),
        shown=Shown(shown_system(runs), runs[shown_system(runs)], stage.judged, config.view),
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
    if stage.bundle is not None:
        card = (Path(config.bundle) / CARD).read_text(encoding="utf-8")
        document_bundle(config.bundle, card=with_quality(card, written), quality=report.quality_rows(written))
        console.print(f"the table is in {config.bundle}/{CARD} too", highlight=False)
    console.print(f"written: {workdir}/report.html, report.json, report.md, report.png", highlight=False)


if __name__ == "__main__":
    run(main, EvaluateConfig)

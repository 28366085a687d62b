"""One table for any set of systems: who ranks best, by how much, and whether that is more than chance.

    python -m train.evaluate --config configs/demo/evaluate.py --workdir work/demo/evaluate

Systems: `bm25` (a row for every view; `bm25:<view>` one of them), `minilm` (as it comes), `encoder`, `judge`, `ranker`,
`ranker+encoder` (weight fitted on validation queries), and further rankers by name. Judge and rankers reorder the first
stage's best `depth` documents; the rest keeps its order below. The judge, being slow, grades a fixed subset of the
queries, which every system repeats. Writes report.html (with the training's curves and sample queries), report.json,
report.md and report.png.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.console

from jaxsearch.data.records import Collection, Qrels, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import TextEncoder
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.judge import load_judge, predicted_grade
from jaxsearch.metrics import kappa_interval, restrict
from jaxsearch.ranker import TextRanker, load_ranker
from jaxsearch.retrieval import to_run
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.fusion import FittedWeight, fit_weight, weighted_fusion
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.scoring.prefill import PrefillScorer
from train import plots, report
from train.config import Count, CountOrNone
from train.inputs import check_view, load_data, load_retriever, offline_scorer
from train.label import label_pairs
from train.options import progress, run
from train.ranker import rerank
from train.report_html import Shown, training_curves, write_html

FUSED = "ranker+encoder"
QUERIES_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which systems are compared, on which queries."""

    systems: tuple[str, ...] = ("bm25", "minilm", "encoder", "judge", "ranker", FUSED)
    """Rows of the table, in order: bm25 (every view), bm25:<view>, minilm, encoder, judge, ranker, ranker+encoder."""
    encoder: str = "work/encoder/model"
    """Folder of the trained encoder, the first stage that judge and rankers reorder; empty: the retriever is it."""
    judge: str = "work/judge/model"
    """Folder of the judge."""
    ranker: str = "work/ranker/model"
    """Folder of the ranker."""
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
    """Which view of a document the encoders read; judge and rankers read the one that they were trained on."""
    split: str = "test"
    """Whose queries are reported."""
    num_queries: CountOrNone = 0
    """How many of them, drawn by the seed; 0: all."""
    depth: Count = 20
    """Documents of the first stage that judge and rankers reorder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the judge's and the rankers' computation; encoders are float32."""
    run_depth: Count = 1_000
    """Documents that a first stage returns; columns are cut from these."""
    judge_queries: Count = 100
    """Queries that the judge grades too, drawn by the seed; every system is reported on them once more."""
    validation_queries: Count = 60
    """Queries of the validation split on which the weight of ranker+encoder is fitted."""
    baseline: str = ""
    """The row that every other is compared with; empty: bm25 on `view`."""
    num_samples: Count = 10_000
    """Of the bootstrap."""
    seed: int = 0


class Stage:
    """The collection, and the runs of its queries that systems share."""

    def __init__(self, config: EvaluateConfig, collection: Collection, vertical: Vertical):
        self.config, self.collection, self.vertical = config, collection, vertical
        self.document_ids = list(collection.documents)
        self._encoders: dict[str, tuple[TextEncoder, ExactIndex]] = {}
        self.judged: Run = {}
        self._rankers: dict[str, tuple[TextRanker, PrefillScorer]] = {}

    def texts(self, view: str) -> list[str]:
        return [
            self.vertical.document_text(document, view) for document in self.collection.documents.values()
        ]

    def lexical(self, queries: Sequence[Query], view: str) -> Run:
        index = Bm25Index(self.texts(view), self.document_ids)
        hits = index.search([query.text for query in queries], min(self.config.run_depth, len(index.ids)))
        return to_run(hits, [query.id for query in queries], index.ids)

    def dense(self, queries: Sequence[Query], folder: str) -> Run:
        """An encoder's exhaustive search; its documents are embedded once."""
        if folder not in self._encoders:
            encoder = load_retriever(folder)
            embeds = encoder.embed_documents(self.texts(self.config.view))
            self._encoders[folder] = encoder, ExactIndex(embeds, self.document_ids)
        encoder, index = self._encoders[folder]
        embeds = encoder.embed_queries([query.text for query in queries])
        hits = index.search(embeds, min(self.config.run_depth, len(index.ids)))
        return to_run(hits, [query.id for query in queries], index.ids)

    def first_stage(self, queries: Sequence[Query]) -> Run:
        return self.dense(queries, self.config.encoder or self.config.retriever)

    @property
    def versions(self) -> dict[str, str]:
        """Of the encoder and the ranker that were measured, as far as they were."""
        loaded = {
            "encoder": self._encoders.get(self.config.encoder),
            "ranker": self._rankers.get(self.config.ranker),
        }
        return {kind: pair[0].version for kind, pair in loaded.items() if pair is not None}

    def rerank(self, folder: str, candidates: Run, description: str) -> Run:
        """A ranker's scores of the candidates."""
        if folder not in self._rankers:
            ranker = load_ranker(folder, dtype=self.config.dtype)
            self._rankers[folder] = ranker, offline_scorer(ranker)
        ranker, scorer = self._rankers[folder]
        return in_parts(
            candidates, description, lambda part: rerank(ranker, scorer, self.collection, self.vertical, part)
        )

    def judge(self, folder: str, candidates: Run) -> tuple[Run, dict[str, Any]]:
        """The judge's expected grades of the candidates, and its agreement with the collection's grades."""
        judge = load_judge(folder, dtype=self.config.dtype)
        scorer = offline_scorer(judge)
        labels = []

        def grade(part: Run) -> Run:
            pairs = [(query, document) for query, documents in part.items() for document in documents]
            found = label_pairs(judge, scorer, self.collection, self.vertical, pairs)
            labels.extend(found)
            graded: Run = {query: {} for query in part}
            for label in found:
                graded[label.query_id][label.document_id] = label.expected_grade
            return graded

        graded = in_parts(candidates, "judge", grade)
        self.judged = graded
        kappa = kappa_interval(
            predicted_grade(np.array([label.grade_probs for label in labels])),
            [self.collection.grade(label.query_id, label.document_id) for label in labels],
            groups=[label.query_id for label in labels],
            num_samples=self.config.num_samples,
            seed=self.config.seed,
        )
        agreement = {"weighted_kappa": kappa, "num_pairs": len(labels), "version": judge.version}
        return graded, agreement


def in_parts(candidates: Run, description: str, score: Callable[[Run], Run]) -> Run:
    """Scores a run a few queries at a time, with a progress bar."""
    queries, scored = list(candidates), {}
    with progress(description, len(queries)) as advance:
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = {query: candidates[query] for query in queries[start : start + QUERIES_AT_ONCE]}
            scored |= score(part)
            advance(len(part))
    return scored


def draw(queries: Sequence[Query], count: int, seed: int) -> list[Query]:
    """`count` of the queries, fixed by the seed, in their own order; 0 or too many gives all."""
    if not 0 < count < len(queries):
        return list(queries)
    chosen = np.random.default_rng(seed).permutation(len(queries))[:count]
    return [queries[position] for position in sorted(chosen)]


def qrels_of(collection: Collection, queries: Sequence[Query]) -> Qrels:
    return {query.id: collection.qrels.get(query.id, {}) for query in queries}


def fuse(stage: Stage, ranked: Run, candidates: Run) -> tuple[Run, FittedWeight]:
    """The ranker's and the encoder's scores with the weight that is best on validation queries and seen documents."""
    config, collection = stage.config, stage.collection
    queries = draw(collection.split("validation"), config.validation_queries, config.seed)
    if not queries:
        raise InputError(
            f"{collection.name} has no validation queries, which ranker+encoder needs for its weight"
        )
    seen = collection.documents.keys() - collection.unseen_documents
    first = report.top(restrict(stage.first_stage(queries), seen), config.depth)
    fitted = fit_weight(
        stage.rerank(config.ranker, first, "ranker, validation"),
        first,
        restrict(qrels_of(collection, queries), seen),
        threshold=stage.vertical.relevant_threshold,
        metric=report.HEADLINE,
    )
    return weighted_fusion([ranked, candidates], [fitted.weight, 1.0 - fitted.weight]), fitted


def resolved(config: EvaluateConfig, collection: Collection, vertical: Vertical) -> EvaluateConfig:
    """With `bm25` written out and the baseline named; InputError for a view that no document can be read through."""
    views = tuple(f"bm25:{view}" for view in vertical.views)
    systems = [row for system in config.systems for row in (views if system == "bm25" else (system,))]
    for system in systems:
        if system.startswith("bm25:"):
            check_view(collection, vertical, system.partition(":")[2], field="systems=bm25:<view>")
    baseline = config.baseline or f"bm25:{config.view}"
    return dataclasses.replace(config, systems=tuple(dict.fromkeys(systems)), baseline=baseline)


def check(config: EvaluateConfig, vertical: Vertical) -> dict[str, str]:
    """The further rankers by name; InputError for a system that does not exist or a folder that is not given."""
    parts = [entry.partition("=") for entry in config.other_rankers]
    others = {name: folder for name, _, folder in parts}
    if wrong := [name for name, folder in others.items() if not folder]:
        raise InputError(f"other_rankers: write name=folder, not {wrong[0]!r}")
    plain = ("minilm", "encoder", "judge", "ranker", FUSED)
    known = [*(f"bm25:{view}" for view in vertical.views), *plain]
    if wrong := [system for system in config.systems if system not in known]:
        raise InputError(f"unknown system {wrong[0]!r}: set systems to some of {', '.join(known)}")
    if clash := [name for name in others if name in known]:
        raise InputError(f"other_rankers: {clash[0]!r} is a system already; choose another name")
    needs = {"encoder": ("encoder",), "judge": ("judge",), "ranker": ("ranker", FUSED)}
    for field, systems in needs.items():
        if not getattr(config, field) and (wanted := [name for name in systems if name in config.systems]):
            raise InputError(f"system {wanted[0]!r} needs a folder: set {field}=DIR or leave the system out")
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
    config, facts = stage.config, {}
    runs: dict[str, Run] = {}
    subset_runs: dict[str, Run] = {}
    seconds: dict[str, float] = {}
    is_reranked = bool({"judge", "ranker", FUSED} & set(config.systems)) or bool(others)
    first = stage.first_stage(queries) if is_reranked else {}
    candidates = report.top(first, config.depth)
    ranked: Run = {}
    if {"ranker", FUSED} & set(config.systems):
        started = time.monotonic()
        ranked = stage.rerank(config.ranker, candidates, "ranker")
        seconds["ranker"] = time.monotonic() - started
    for system in config.systems:
        started = time.monotonic()
        if system.startswith("bm25:"):
            runs[system] = stage.lexical(queries, system.partition(":")[2])
        elif system in ("minilm", "encoder"):
            runs[system] = stage.dense(queries, config.retriever if system == "minilm" else config.encoder)
        elif system == "ranker":
            runs[system] = report.overlay(first, ranked)
        elif system == FUSED:
            fused, facts["fusion"] = fuse(stage, ranked, candidates)
            runs[system] = report.overlay(first, fused)
        else:
            graded, facts["judge"] = stage.judge(
                config.judge, {query.id: candidates[query.id] for query in subset}
            )
            subset_runs[system] = report.overlay({query.id: first[query.id] for query in subset}, graded)
        seconds[system] = seconds.get(system, 0.0) + time.monotonic() - started
    for name, folder in others.items():
        runs[name] = report.overlay(first, stage.rerank(folder, candidates, name))
    facts |= {"data": stage.collection.fingerprint(), "models": stage.versions}
    facts["seconds"] = {system: round(value, 2) for system, value in seconds.items()}
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
        f"encoders read the {config.view} view; judge and rankers, where shown, reorder the best {config.depth} of "
        f"{'encoder' if config.encoder else 'minilm'}, in {config.dtype}",
        "each column counts its own documents only; candidates come from the whole corpus",
        *report.LEGEND,
    ]
    if fitted := facts.get("fusion"):
        notes.append(
            f"ranker+encoder: weight {fitted.weight:.2f} on the ranker, fitted on validation queries "
            f"(NDCG@10 {fitted.value:.3f} there)"
        )
    if judged := facts.get("judge"):
        value, low, high = judged["weighted_kappa"]
        notes.append(
            f"judge against the collection's grades: weighted kappa {value:z.3f} [{low:z.3f}, {high:z.3f}], "
            f"{judged['num_pairs']} pairs from the first stage's best {config.depth}"
        )
    return notes


def folders_of(config: EvaluateConfig) -> dict[str, Path]:
    """Work folders of the trainings whose models are compared, as far as they are there."""
    used = {part for system in config.systems for part in system.split("+")}
    models = {"judge": config.judge, "encoder": config.encoder, "ranker": config.ranker}
    models = {name: model for name, model in models.items() if name in used}
    models |= {name: folder for name, _, folder in (entry.partition("=") for entry in config.other_rankers)}
    return {name: Path(model).parent for name, model in models.items() if Path(model).name == "model"}


def shown_system(runs: dict[str, Run]) -> str:
    """The system whose queries the report shows: the last stage that there is."""
    return next((name for name in (FUSED, "ranker", "encoder") if name in runs), next(iter(runs)))


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
    write_json(workdir / "report.json", report.to_json(groups, {"text": notes, **facts}))
    (workdir / "report.md").write_text(report.to_markdown(title, groups, notes), encoding="utf-8")
    plots.plot(
        workdir / "report.png", title, groups, baseline=config.baseline,
        footer=f"Dots: mean; bars: 95 % bootstrap interval over queries; dashed: {config.baseline}. "
        f"{collection.notice}",
    )  # fmt: skip
    write_html(
        workdir / "report.html", title, groups, notes,
        picture=workdir / "report.png", curves=training_curves(folders_of(config)),
        shown=Shown(shown_system(runs), runs[shown_system(runs)], stage.judged, config.view),
        collection=collection, vertical=vertical,
    )  # fmt: skip
    console = rich.console.Console()
    for group in groups:
        for table in report.to_rich(group):
            console.print(table)
    for note in notes:
        console.print(f"· {note}", highlight=False)
    console.print(f"written: {workdir}/report.html, report.json, report.md, report.png", highlight=False)


if __name__ == "__main__":
    run(main, EvaluateConfig)

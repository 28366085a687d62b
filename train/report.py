"""From systems' runs to the table: metrics by column, intervals, comparisons, and how they look.

Pure functions of runs and qrels, no models. A group is a set of queries that every one of its systems has
ranked; a column restricts runs and qrels to its own documents (all, seen, unseen). `train.evaluate` makes the
runs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import rich.box
import rich.table

from jaxsearch.data.records import Collection, Qrels, Run
from jaxsearch.errors import InputError
from jaxsearch.metrics import (
    HEADLINE,
    METRICS,
    Interval,
    bootstrap_ci,
    paired_bootstrap,
    poor_match_floor,
    rank_documents,
    rank_metrics,
    restrict,
)

TABLE_METRICS = ("ndcg@10", "recall@100", "mrr@10", "poor_match_rate@10")
TITLES = {
    "ndcg@10": "NDCG@10",
    "ndcg_exp@10": "NDCG@10 exp",
    "recall@100": "recall@100",
    "mrr@10": "MRR@10",
    "precision@10": "precision@10",
    "poor_match_rate@10": "poor@10",
}
LEGEND = (
    "poor@10: share of the first ten places without a document of grade 2 or above (grade 1 where that is relevant), "
    "empty ones included; no system has less than a perfect ranking",
    "NDCG@10 differences: a star where the 95 % interval, paired over queries, excludes 0 before rounding",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Mean over queries of system - against in the headline metric, with its 95 % paired bootstrap interval."""

    system: str
    against: str
    difference: Interval

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 before it is rounded; never where all three numbers are shown as 0."""
        is_seen = any(round(value, 3) for value in self.difference)
        return is_seen and (self.difference.low > 0 or self.difference.high < 0)


@dataclasses.dataclass(frozen=True)
class ColumnResult:
    """One column: `means[system][metric]`, `headline[system]`, and over how many queries each metric is a mean."""

    num_documents: int
    num_queries: dict[str, int]
    poor_match_floor: float
    means: dict[str, dict[str, float]]
    headline: dict[str, Interval]
    comparisons: list[Comparison]


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """One set of queries and what its systems reached, by column."""

    name: str
    num_queries: int
    columns: dict[str, ColumnResult]

    @property
    def systems(self) -> list[str]:
        return list(next(iter(self.columns.values())).means)


def document_columns(collection: Collection) -> dict[str, frozenset[str]]:
    """Columns by name: all documents and, where the collection keeps some out of training, seen and unseen."""
    everything = frozenset(collection.documents)
    columns = {"all": everything}
    if collection.unseen_documents:
        columns["seen"] = everything - collection.unseen_documents
        columns["unseen"] = frozenset(collection.unseen_documents)
    return columns


def overlay(base: Run, scores: Run) -> Run:
    """Documents that have a score ranked by it, above all others, which keep their order in `base`.

    Example:
        >>> overlay({"q": {"a": 0.9, "b": 0.8, "c": 0.7}}, {"q": {"b": -5.0, "a": -7.0}})
        {'q': {'b': 0.0, 'a': -1.0, 'c': -2.0}}
    """
    merged: Run = {}
    for query, ranked in base.items():
        top = rank_documents(scores.get(query, {}))
        rest = [document for document in rank_documents(ranked) if document not in set(top)]
        merged[query] = {document: float(-rank) for rank, document in enumerate([*top, *rest])}
    return merged


def top(run: Run, depth: int) -> Run:
    """The best `depth` documents of each query."""
    return {
        query: {document: scores[document] for document in rank_documents(scores)[:depth]}
        for query, scores in run.items()
    }


def comparison_pairs(systems: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Every system against the baseline, and what is served against every other."""
    if baseline not in systems:
        raise InputError(f"baseline {baseline!r} is not among the systems: {', '.join(systems)}")
    pairs = [(system, baseline) for system in systems if system != baseline]
    if "served" in systems:
        pairs += [("served", other) for other in systems if other != "served"]
    return list(dict.fromkeys(pairs))


def evaluate_group(
    name: str,
    runs: Mapping[str, Run],
    qrels: Qrels,
    columns: Mapping[str, AbstractSet[str]],
    *,
    threshold: int,
    baseline: str,
    num_samples: int = 10_000,
    seed: int = 0,
) -> GroupResult:
    """Metrics, intervals and comparisons of systems over the same queries.

    Args:
      name: what the queries are, for headings.
      runs: {system: run}; each has every query of `qrels`.
      qrels: the queries of the group; one without grades stays in it with an empty dict.
      columns: {column: its documents}; runs and qrels are restricted to them.
      threshold: least grade that is relevant.
      baseline: the system that every other is compared with.
      num_samples, seed: of the bootstrap.

    Raises:
      InputError: no queries, a run that lacks some, an unknown baseline, a column where no query has any
      grade.
    """
    if not qrels:
        raise InputError(f"{name}: no queries to evaluate")
    for system, run in runs.items():
        if lacking := [query for query in qrels if query not in run]:
            raise InputError(
                f"{name}: the run of {system} lacks {len(lacking)} queries, the first {lacking[0]!r}"
            )
    pairs = comparison_pairs(list(runs), baseline)
    results = {}
    for column, documents in columns.items():
        own = restrict(qrels, documents)
        values = {
            system: rank_metrics(own, restrict(run, documents), threshold=threshold)
            for system, run in runs.items()
        }
        if not values[baseline][HEADLINE]:
            raise InputError(f"{name}: no query has a graded document among the {column} documents")
        results[column] = ColumnResult(
            num_documents=len(documents),
            num_queries={metric: len(values[baseline][metric]) for metric in METRICS},
            poor_match_floor=poor_match_floor(own, threshold=threshold),
            means={
                system: {
                    metric: float(np.mean(list(scores.values()))) if scores else math.nan
                    for metric, scores in metrics.items()
                }
                for system, metrics in values.items()
            },
            headline={
                system: bootstrap_ci(metrics[HEADLINE], num_samples=num_samples, seed=seed)
                for system, metrics in values.items()
            },
            comparisons=[
                Comparison(
                    system,
                    against,
                    paired_bootstrap(
                        values[system][HEADLINE],
                        values[against][HEADLINE],
                        num_samples=num_samples,
                        seed=seed,
                    ),
                )
                for system, against in pairs
            ],
        )
    return GroupResult(name, len(qrels), results)


def to_json(groups: Sequence[GroupResult], notes: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON values; a mean over no query is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return value._asdict()
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: plain(getattr(value, name)) for name in names}
        return value

    return {"notes": plain(notes), "groups": [plain(group) for group in groups]}


def short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:z.3f}".replace("0.", ".", 1)


def _signed(value: float) -> str:
    """+.012, always with its sign; what rounds to 0 is +.000."""
    return ("-" if round(value, 3) < 0 else "+") + short(abs(value))


def table_rows(group: GroupResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each metric over each column, then the row of the poor match rate's floor."""
    cells = [(metric, column) for metric in TABLE_METRICS for column in group.columns]
    header = ["system", *(f"{TITLES[metric]} {column}" for metric, column in cells), "NDCG@10 exp all"]
    rows = [
        [
            system,
            *(short(group.columns[column].means[system][metric]) for metric, column in cells),
            short(group.columns["all"].means[system]["ndcg_exp@10"]),
        ]
        for system in group.systems
    ]
    floor = [
        short(group.columns[column].poor_match_floor) if metric == "poor_match_rate@10" else ""
        for metric, column in cells
    ]
    return header, [*rows, ["perfect ranking", *floor, ""]]


def comparison_rows(group: GroupResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of NDCG@10 differences with their intervals; a star where `is_significant`."""
    rows = []
    for position, first in enumerate(group.columns["all"].comparisons):
        row = [f"{first.system} − {first.against}"]
        for column in group.columns.values():
            comparison = column.comparisons[position]
            value, low, high = map(_signed, comparison.difference)
            row.append(f"{value} [{low}, {high}]{' *' if comparison.is_significant else ''}")
        rows.append(row)
    return ["NDCG@10 difference", *group.columns], rows


def to_rich(group: GroupResult) -> list[rich.table.Table]:
    """The two tables of a group for a console of 80 characters: a section per column of documents."""
    style: dict[str, Any] = {"title_justify": "left", "box": rich.box.SIMPLE_HEAD, "pad_edge": False}
    caption = "exp: exponential gain; poor: poor match rate@10, ≥ a perfect ranking's"
    table = rich.table.Table(
        title=f"{group.name}: {group.num_queries} queries", caption=caption, caption_justify="left", **style
    )
    metrics = ("recall@100", "mrr@10", "poor_match_rate@10")
    table.add_column("system", no_wrap=True)
    for header in ("NDCG@10", "95 %", "exp", "R@100", "MRR@10", "poor"):
        table.add_column(header, justify="right", no_wrap=True)
    for column, result in group.columns.items():
        table.add_row(
            f"[bold]{column} documents[/]",
            "",
            "",
            "",
            "",
            "",
            f"[dim]≥ {short(result.poor_match_floor)}[/]",
        )
        for system, means in result.means.items():
            value, low, high = result.headline[system]
            cells = [short(value), f"[dim]{short(low)}–{short(high)}[/]", short(means["ndcg_exp@10"])]
            table.add_row(f"  {system}", *cells, *(short(means[metric]) for metric in metrics))
        table.add_section()
    differences = rich.table.Table(
        title="NDCG@10, paired 95 % interval; * excludes 0 before rounding", **style
    )
    header, rows = comparison_rows(group)
    for number, name in enumerate(header):
        differences.add_column(name, justify="right" if number else "left")
    for row in rows:
        differences.add_row(
            *(cell.replace(" [", "\n\\[") if number else cell for number, cell in enumerate(row))
        )
    return [table, differences]


def quality_rows(written: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first group of a report.json, a row per system: headline with interval, then by part, then other metrics."""
    columns = written["groups"][0]["columns"]
    everything, parts = columns["all"], [name for name in columns if name != "all"]

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    return [
        {
            "system": system,
            "NDCG@10": rounded(means[HEADLINE]),
            "low": rounded(everything["headline"][system]["low"]),
            "high": rounded(everything["headline"][system]["high"]),
            **{f"NDCG@10 {part}": rounded(columns[part]["means"][system][HEADLINE]) for part in parts},
            **{
                TITLES[metric]: rounded(means[metric])
                for metric in ("recall@100", "mrr@10", "poor_match_rate@10")
            },
        }
        for system, means in everything["means"].items()
    ]


def compact(written: Mapping[str, Any]) -> rich.table.Table:
    """`quality_rows` for a console of 100 characters."""
    group, rows = written["groups"][0], quality_rows(written)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.title = f"{group['num_queries']} {group['name']}"
    for name in rows[0]:
        table.add_column(
            name.replace("NDCG@10 ", ""), justify="left" if name == "system" else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(
            *(v if isinstance(v, str) else short(math.nan if v is None else v) for v in row.values())
        )
    return table


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> rich.table.Table:
    """A table for a console: the first column to the left, the others to the right."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first column to the left."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def to_markdown(title: str, groups: Sequence[GroupResult], notes: Sequence[str]) -> str:
    """The report as Markdown: notes first, then per group its table and its comparisons."""
    lines = [f"# {title}", "", *(f"* {note}" for note in notes), ""]
    for group in groups:
        counts = "; ".join(
            f"{column}: {result.num_documents} documents, NDCG over {result.num_queries[HEADLINE]} queries, "
            f"recall over {result.num_queries['recall@100']}"
            for column, result in group.columns.items()
        )
        lines += [f"## {group.name} ({group.num_queries} queries)", "", counts, ""]
        for header, rows in (table_rows(group), comparison_rows(group)):
            lines += [*markdown_table(header, rows), ""]
    return "\n".join(lines)

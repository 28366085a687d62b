"""The two tables beside a report's main one: how much of the relevant the first stage finds, and systems by kind of
query. Pure functions of runs and qrels."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsearch.data.records import Collection, Qrels, Run
from jaxsearch.metrics import HEADLINE, PerQuery, bootstrap_ci, rank_documents, rank_metrics
from train.report import markdown_table, short

DEPTHS = (20, 40, 100)


def first_stage_rows(runs: Mapping[str, Run], qrels: Qrels, *, threshold: int) -> list[dict[str, Any]]:
    """By system, recall at each of `DEPTHS`, and the NDCG@10 of the best order that its documents down to there allow.

    That ceiling is what a perfect ranker would reach behind this first stage at this depth.
    """
    rows = []
    for system, run in runs.items():
        row: dict[str, Any] = {"system": system}
        for depth in DEPTHS:
            name = f"recall@{depth}"
            best: Run = {
                query: {d: float(grades.get(d, 0)) for d in rank_documents(run[query])[:depth]}
                for query, grades in qrels.items()
            }
            row[name] = _mean(rank_metrics(qrels, run, threshold=threshold, metrics=(name,))[name])
            row[f"ceiling@{depth}"] = _mean(
                rank_metrics(qrels, best, threshold=threshold, metrics=(HEADLINE,))[HEADLINE]
            )
        rows.append(row)
    return rows


def kind_rows(
    runs: Mapping[str, Run],
    qrels: Qrels,
    collection: Collection,
    *,
    threshold: int,
    num_samples: int = 10_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """By kind of query, the number of queries and every system's NDCG@10 with its interval; empty without kinds."""
    kinds = collection.query_kinds
    rows = []
    for kind in sorted({kinds[query] for query in qrels if query in kinds}):
        own = {query: grades for query, grades in qrels.items() if kinds.get(query) == kind}
        values = {
            system: rank_metrics(own, run, threshold=threshold, metrics=(HEADLINE,))[HEADLINE]
            for system, run in runs.items()
        }
        if all(values.values()):
            found = {
                system: bootstrap_ci(per_query, num_samples=num_samples, seed=seed)._asdict()
                for system, per_query in values.items()
            }
            rows.append({"kind": kind, "queries": len(own), "systems": found})
    return rows


def stage_tables(notes: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of both parts, as far as the notes of a report have them."""
    tables = []
    if rows := notes.get("first_stage"):
        names = [name for depth in DEPTHS for name in (f"recall@{depth}", f"ceiling@{depth}")]
        shown = [name.replace("recall", "R") for name in names]
        cells = [[row["system"], *(short(_number(row[name])) for name in names)] for row in rows]
        tables.append((["first stage", *shown], cells))
    if rows := notes.get("kinds"):
        systems = list(rows[0]["systems"])
        header = ["NDCG@10 by kind of query", *(f"{row['kind']} ({row['queries']})" for row in rows)]
        cells = [[s, *(short(row["systems"][s]["value"]) for row in rows)] for s in systems]
        tables.append((header, cells))
    return tables


def stage_markdown(notes: Mapping[str, Any]) -> str:
    """The same tables as Markdown."""
    return "\n\n".join("\n".join(markdown_table(*table)) for table in stage_tables(notes))


def _mean(values: PerQuery) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

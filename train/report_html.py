"""The report as one HTML file that asks no other host: tables, curves, best and worst queries with their grades."""

import base64
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsearch.data.records import Collection, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.metrics import HEADLINE, rank_documents, rank_metrics
from train import plots
from train.report import GroupResult, comparison_rows, table_rows

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES, SAMPLE_DEPTH, MAX_CHARS = 5, 5, 240


@dataclasses.dataclass(frozen=True)
class Sample:
    """One query with the documents that a system ranks first."""

    query: str
    value: float
    num_relevant: int
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The system whose queries are shown; `judged` are the judge's grades, where there are any."""

    system: str
    run: Run
    judged: Run
    view: str


def samples(shown: Shown, collection: Collection, vertical: Vertical) -> list[tuple[str, list[Sample]]]:
    """The best and the worst queries by NDCG@10; those that the judge graded, if it graded some."""
    queries = [query for query in shown.run if not shown.judged or query in shown.judged]
    qrels = {query: collection.qrels.get(query, {}) for query in queries}
    run = {query: shown.run[query] for query in queries}
    threshold = vertical.relevant_threshold
    values = rank_metrics(qrels, run, threshold=threshold, metrics=(HEADLINE,))[HEADLINE]
    order = sorted(values, key=lambda query: (-values[query], query))

    def sample(query: str) -> Sample:
        rows = [
            {
                "rank": rank,
                "text": _cut(vertical.document_text(collection.documents[document], shown.view)),
                "grade": collection.grade(query, document),
                "judged": shown.judged.get(query, {}).get(document),
            }
            for rank, document in enumerate(rank_documents(run[query])[:SAMPLE_DEPTH], start=1)
        ]
        relevant = sum(grade >= threshold for grade in qrels[query].values())
        return Sample(collection.queries[query].text, values[query], relevant, rows)

    half = min(SAMPLES, (len(order) + 1) // 2)
    best, worst = order[:half], order[::-1][: min(SAMPLES, len(order) // 2)]
    return [("Best", [sample(query) for query in best]), ("Worst", [sample(query) for query in worst])]


def training_curves(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A picture of every `metrics.jsonl` below the named folders."""
    curves = []
    for name, folder in folders.items():
        for path in sorted(folder.glob("**/metrics.jsonl")):
            records = list(_records(path))
            if records:
                part = path.parent.relative_to(folder).as_posix()
                title = name if part == "." else f"{name}, {part}"
                curves.append({"name": title, "picture": plots.curves(records)})
    return curves


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: a training may be writing the last one."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def write_html(
    path: Path,
    title: str,
    groups: Sequence[GroupResult],
    notes: Sequence[str],
    *,
    picture: Path,
    curves: Sequence[Mapping[str, Any]],
    shown: Shown,
    collection: Collection,
    vertical: Vertical,
    tables: Sequence[tuple[list[str], list[list[str]]]] = (),
) -> None:
    """Writes the file; `picture` is the PNG that is shown first, `tables` stand below those of the groups."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    text = environment.get_template("report.html").render(
        title=title,
        notes=notes,
        picture=base64.b64encode(picture.read_bytes()).decode(),
        groups=[
            {
                "name": group.name,
                "num_queries": group.num_queries,
                "tables": [table_rows(group), comparison_rows(group)],
            }
            for group in groups
        ],
        tables=tables,
        curves=curves,
        system=shown.system,
        has_judge=bool(shown.judged),
        num_judged=len(shown.judged),
        samples=samples(shown, collection, vertical),
    )
    path.write_text(text, encoding="utf-8")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"

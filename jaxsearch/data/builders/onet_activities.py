"""O*NET activity search: which occupations do this work activity? As a TFDS data set and as a `Collection`.

A query is a detailed work activity (id: its O*NET element id), a document an occupation (id: its O*NET-SOC
code; fields title, description, tasks, family, num_tasks). O*NET analysts linked tasks to activities; the grades 0-4
are derived from these links here, see `derive_grades`. Nothing here knows views or prompts; read on in `verticals`.
"""

import contextlib
import csv
import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsearch.data import assets
from jaxsearch.data.records import SPLITS, Collection, Document, Qrels, Query, hash_share, split_by_hash
from jaxsearch.errors import InputError

with warnings.catch_warnings():  # its dependencies warn about themselves at import
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

NAME = "onet_activities"
NOTICE = (
    "This collection includes information from the O*NET database by the U.S. Department of Labor, Employment and "
    "Training Administration (USDOL/ETA), used under the CC BY 4.0 license. O*NET is a trademark of USDOL/ETA. The "
    "information was modified: grades 0-4 are derived from the links between tasks and activities, not given by "
    "people; USDOL/ETA has not approved, endorsed or tested this."
)
UNSEEN_SHARE = 0.15
"""Share of the SOC minor groups whose occupations no training, mining or calibration may see."""
# One of some twenty salts tried: with it the shares come closest to 70/10/20 % and 15 %. Never to be changed.
_SALT = "query/"
FAMILIES = {
    "11": "Management",
    "13": "Business and financial operations",
    "15": "Computer and mathematical",
    "17": "Architecture and engineering",
    "19": "Life, physical and social science",
    "21": "Community and social service",
    "23": "Legal",
    "25": "Education and library",
    "27": "Arts, design, sports and media",
    "29": "Healthcare practitioners",
    "31": "Healthcare support",
    "33": "Protective service",
    "35": "Food preparation and serving",
    "37": "Cleaning and maintenance",
    "39": "Personal care and service",
    "41": "Sales",
    "43": "Office and administrative support",
    "45": "Farming, fishing and forestry",
    "47": "Construction and extraction",
    "49": "Installation and repair",
    "51": "Production",
    "53": "Transportation and material moving",
    "55": "Military",
}
"""Major groups of the Standard Occupational Classification 2018, names shortened, by the first two digits of a code."""
_TASK_COLUMNS = ("O*NET-SOC Code", "Title", "Task ID", "Task", "DWA ID", "DWA Title")
_OCCUPATION_COLUMNS = ("O*NET-SOC Code", "Title", "Description")
_UNSEEN_SPLITS = {False: "seen", True: "unseen"}


def load() -> Collection:
    """The collection, from the cache; the first call fetches the two wheels and writes the ArrayRecord files.

    Raises:
        InputError: the assets cannot be fetched, or the cache cannot be written.
    """
    data_dir = assets.cache_dir() / "tfds"
    queries, qrels, query_split = {}, {}, {}
    documents, unseen = {}, set()
    for split, examples in _read_config("queries", data_dir).items():
        for example in examples:
            query_id = _text(example["id"])
            queries[query_id] = Query(query_id, _text(example["text"]))
            query_split[query_id] = split
            grades = zip(example["document_ids"], example["grades"], strict=True)
            qrels[query_id] = {_text(document_id): int(grade) for document_id, grade in grades}
    for split, examples in _read_config("documents", data_dir).items():
        for example in examples:
            document_id = _text(example["id"])
            fields = {"title": _text(example["title"]), "description": _text(example["description"])}
            tasks = [_text(task) for task in example["tasks"]]
            described = {"family": FAMILIES[document_id[:2]], "num_tasks": len(tasks)}
            documents[document_id] = Document(document_id, {**fields, "tasks": tasks, **described})
            if split == _UNSEEN_SPLITS[True]:
                unseen.add(document_id)
    return Collection(
        name=NAME,
        queries=dict(sorted(queries.items())),
        documents=dict(sorted(documents.items())),
        qrels=dict(sorted(qrels.items())),
        query_split=dict(sorted(query_split.items())),
        unseen_documents=frozenset(unseen),
        notice=NOTICE,
    )


def derive_grades(links: Iterable[tuple[str, str, str]]) -> Qrels:
    """Grades from the links between tasks and activities.

    4, 3, 2: three or more, two, one of the occupation's tasks carry the activity; 1: none does, but one
    carries a sibling, an activity with the same `parent`; 0, left out: otherwise.

    Args:
        links: (activity id, occupation code, task id), in any order, repeats allowed.

    Example:
        >>> derive_grades([("4.A.1.D01", "11-1011.00", "7"), ("4.A.1.D02", "11-1021.00", "8")])["4.A.1.D01"]
        {'11-1011.00': 2, '11-1021.00': 1}
    """
    unique = sorted(set(links))
    tasks = Counter((activity, occupation) for activity, occupation, _ in unique)
    siblings = defaultdict(set)
    for activity, occupation in tasks:
        siblings[parent(activity)].add(occupation)
    return {
        activity: {
            occupation: 1 + min(3, tasks[activity, occupation])
            for occupation in sorted(siblings[parent(activity)])
        }
        for activity in sorted({activity for activity, _ in tasks})
    }


def parent(activity: str) -> str:
    """The intermediate work activity above a detailed one: the id before `.D`."""
    return activity.partition(".D")[0]


def is_unseen(occupation: str) -> bool:
    """Whether an occupation is kept out of training; decided per SOC minor group, such as `11-10`."""
    return hash_share(_SALT + occupation[:5]) < UNSEEN_SHARE


def split_of(activity: str) -> str:
    """The split of an activity; siblings share tasks, so they share their split too."""
    return split_by_hash(_SALT + parent(activity))


class OnetActivities(tfds.core.GeneratorBasedBuilder):
    """TFDS builder with one config per table: `queries` (by query split) and `documents` (seen, unseen).

    Works without TensorFlow: `builder.download_and_prepare(file_format="array_record")`,
    `builder.as_data_source(split)`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads it from the class)
        tfds.core.BuilderConfig(name="queries", description="Activities with their graded occupations."),
        tfds.core.BuilderConfig(name="documents", description="Occupation profiles."),
    ]

    @property
    def _has_queries(self) -> bool:
        return self.builder_config is not None and self.builder_config.name == "queries"

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        if self._has_queries:
            grades = {
                "document_ids": tfds.features.Sequence(text),
                "grades": tfds.features.Sequence(np.int64),
            }
            features = {"id": text, "text": text, **grades}
        else:
            features = {
                "id": text,
                "title": text,
                "description": text,
                "tasks": tfds.features.Sequence(text),
            }
        return tfds.core.DatasetInfo(
            builder=self,
            description=NOTICE,
            features=tfds.features.FeaturesDict(features),
            homepage="https://www.onetcenter.org/database.html",
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[str, dict[str, Any]]]]:
        del dl_manager  # pinned wheels come through `assets`, which checks them
        splits = SPLITS if self._has_queries else _UNSEEN_SPLITS.values()
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = _read_table(assets.fetch("onet_tasks"), _TASK_COLUMNS, delimiter=",")
        if self._has_queries:
            yield from _query_examples(rows, split)
        else:
            occupations = _read_table(assets.fetch("onet_occupations"), _OCCUPATION_COLUMNS, delimiter="\t")
            yield from _document_examples(rows, occupations, split)


def _query_examples(rows: list[dict[str, str]], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    texts = {row["DWA ID"]: row["DWA Title"] for row in rows}
    qrels = derive_grades((row["DWA ID"], row["O*NET-SOC Code"], row["Task ID"]) for row in rows)
    for query_id, graded in qrels.items():
        if split_of(query_id) == split:
            example = {"document_ids": list(graded), "grades": list(graded.values())}
            yield query_id, {"id": query_id, "text": texts[query_id], **example}


def _document_examples(
    rows: list[dict[str, str]], occupations: list[dict[str, str]], split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    profiles = {row["O*NET-SOC Code"]: row for row in occupations}
    tasks: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        tasks[row["O*NET-SOC Code"]][row["Task ID"]] = row["Task"]
    for code in sorted(tasks):
        if _UNSEEN_SPLITS[is_unseen(code)] == split:
            profile = profiles[code]
            texts = {"title": profile["Title"], "description": profile["Description"]}
            yield code, {"id": code, **texts, "tasks": list(tasks[code].values())}


def _read_table(file: Path, columns: tuple[str, ...], *, delimiter: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig")), delimiter=delimiter))
    missing = set(columns) - set(rows[0] if rows else ())
    if missing:
        raise InputError(f"{file} lacks the columns {sorted(missing)}: delete it, it will be fetched again")
    return [{column: row[column].strip() for column in columns} for row in rows]


def _read_config(config: str, data_dir: Path) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The splits of one table, written first where the cache lacks them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder: Any = OnetActivities(config=config, data_dir=data_dir, file_format="array_record")
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with assets.file_lock(data_dir / f".{NAME}.lock"):
                if not builder.data_path.exists():
                    for name in ("onet_tasks", "onet_occupations"):
                        assets.fetch(name)
                    tfds.disable_progress_bar()
                    with contextlib.redirect_stdout(
                        io.StringIO()
                    ):  # it prints several lines for four seconds' work
                        builder.download_and_prepare()
        except OSError as error:
            raise InputError(
                f"cannot write {NAME} to {data_dir}: {error}. Make room, or set JAXSEARCH_CACHE to another disk."
            ) from error
        return {split: builder.as_data_source(split) for split in builder.info.splits}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value

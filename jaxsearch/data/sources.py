"""Readers: a named builder, a BEIR folder, or a folder of JSONL or Parquet files becomes a `Collection`.

Every line that cannot be used is reported, all of them at once, with file, line and reason. What a collection
holds is in `records`; the builders are in `builders`.
"""

import dataclasses
import importlib
import json
import math
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, overload

from jaxsearch.data import builders
from jaxsearch.data.records import (
    MAX_GRADE,
    SPLITS,
    Collection,
    Document,
    FieldValue,
    Qrels,
    Query,
    split_by_hash,
)
from jaxsearch.errors import InputError

_SPLIT_NAMES = {**{split: split for split in SPLITS}, "dev": "validation", "valid": "validation"}
_KINDS = (".jsonl", ".parquet")
_WHOLE = re.compile(r"-?[0-9]{1,9}")
_RESERVED = {"id", "_id", "split"}


@dataclasses.dataclass
class BadLines:
    """Collects what is wrong with input files; `settle` turns it into one error, or into a count.

    Attributes:
        shown: how many lines a report names; the rest is counted by reason.
    """

    shown: int = 1000
    lines: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)

    def add(self, file: Path, number: int, reason: str) -> None:
        """Notes that line `number` (from 1 on) of `file` cannot be used."""
        self.lines.append((str(file), number, reason))

    def report(self) -> str:
        """All bad lines in reading order, one each: file:line: reason."""
        report = [f"{file}:{number}: {reason}" for file, number, reason in self.lines[: self.shown]]
        if rest := Counter(reason for _, _, reason in self.lines[self.shown :]):
            report.append(f"and {rest.total()} more:")
            report += [f"  {count} x {reason}" for reason, count in rest.most_common(20)]
        return "\n".join(report)

    def settle(self, *, skip: bool) -> str:
        """Ends the reading.

        Returns:
            "" when all lines were good, else one sentence with the number of lines left out.

        Raises:
            InputError: there are bad lines and `skip` is False.
        """
        if not self.lines:
            return ""
        if not skip:
            raise InputError(
                f"bad lines: {len(self.lines)}; mend them, or go on without them (--skip-bad-lines):\n{self.report()}"
            )
        per_file = Counter(file for file, _, _ in self.lines)
        files = ", ".join(f"{count} of {file}" for file, count in per_file.items())
        return f"Bad lines left out: {len(self.lines)} ({files})."


def load_collection(spec: str | os.PathLike[str], *, skip_bad_lines: bool = False) -> Collection:
    """Reads a collection.

    Args:
        spec: the name of a builder ("onet_activities"), or a folder. A BEIR folder has `corpus.jsonl`,
        `queries.jsonl`
            and `qrels/{train,dev,test}.tsv`, which give the splits. Another folder has `documents`, `queries`
            and `grades`, each as `.jsonl` or `.parquet`: documents with `id` and any fields, queries with
            `id`, `text` and, if they like, `split` and `kind`; grades with `query_id`, `document_id`, `grade` 0..4
            (no file: nothing is graded yet).
            Queries without a split get theirs by a hash of their id: 70 % train, 10 % validation, 20 % test; those
            without a grade are train queries, since nothing else can use them.
        skip_bad_lines: leave bad lines out; the collection's `notice` then says how many.

    Returns:
        The collection. Queries without any grade are in it (a judge can label them), and the notice counts them.

    Raises:
        InputError: no such builder or folder, a file is missing, nothing usable in it, or bad lines: no id,
        an id or
            pair twice, a grade out of range, an unknown query or document, not UTF-8, not JSON, a field of no
            known type. All bad lines are in the message.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(builders.__path__))
    folder = Path(spec).expanduser()
    if str(spec) in names and not folder.is_dir():
        return importlib.import_module(f"{builders.__name__}.{spec}").load()
    if not folder.is_dir():
        raise InputError(
            f"no collection {spec}: there is no such folder, and no builder of that name ({', '.join(names)})"
        )
    bad = BadLines()
    is_beir = (folder / "corpus.jsonl").is_file()
    documents = _read_documents(_find(folder, "corpus" if is_beir else "documents"), bad)
    queries, stated, kinds = _read_queries(_find(folder, "queries"), bad)
    for what, found in (("document", documents), ("query", queries)):
        if not found:
            raise InputError(f"{folder} holds no usable {what}. {bad.report()}".strip())
    qrels: Qrels = {}
    if is_beir:
        stated = _read_beir_grades(folder / "qrels", queries, documents, qrels, bad)
    elif file := _find(folder, "grades", is_optional=True):
        for number, record in _records(file, bad):
            pair = (record.get("query_id"), record.get("document_id"), record.get("grade"))
            _add_grade(qrels, pair, queries, documents, partial(bad.add, file, number))
    return _assemble(folder, documents, queries, stated, kinds, qrels, bad.settle(skip=skip_bad_lines))


def read_pairs(
    path: str | os.PathLike[str], collection: Collection, *, skip_bad_lines: bool = False
) -> tuple[list[tuple[str, str]], str]:
    """The (query id, document id) pairs of a JSONL or Parquet file with `query_id` and `document_id`, each once.

    Returns:
        The pairs, and one sentence with the number of lines left out ("" when all were good).

    Raises:
        InputError: no such file, no pair in it, or bad lines (an id is missing, or is not in the collection), all in
            one.
    """
    file, bad = Path(path), BadLines()
    if not file.is_file() or file.suffix not in _KINDS:
        reason = "is not read" if file.is_file() else "no such file"
        raise InputError(f"{file}: {reason}; give pairs as a {' or '.join(_KINDS)} file")
    pairs: dict[tuple[str, str], None] = {}
    for number, record in _records(file, bad):
        query_id, document_id = _id(record.get("query_id")), _id(record.get("document_id"))
        if query_id is None or document_id is None:
            bad.add(file, number, "query_id and document_id must be there, as text or whole numbers")
        elif query_id not in collection.queries:
            bad.add(file, number, f"unknown query {query_id}")
        elif document_id not in collection.documents:
            bad.add(file, number, f"unknown document {document_id}")
        else:
            pairs[query_id, document_id] = None
    notice = bad.settle(skip=skip_bad_lines)
    if not pairs:
        raise InputError(f"{file} holds no usable pair. {notice}".strip())
    return list(pairs), notice


def _assemble(
    folder: Path,
    documents: dict[str, Document],
    queries: dict[str, Query],
    stated: dict[str, str],
    kinds: dict[str, str],
    qrels: Qrels,
    notice: str,
) -> Collection:
    if ungraded := len(queries) - len(qrels):
        notice = (
            f"{notice} Queries without a grade: {ungraded}; only labels of a judge make use of them.".strip()
        )
    return Collection(
        name=folder.resolve().name,
        queries=queries,
        documents=documents,
        qrels=qrels,
        query_split={
            query_id: stated.get(query_id) or (split_by_hash(query_id) if query_id in qrels else "train")
            for query_id in queries
        },
        notice=notice,
        query_kinds=kinds,
    )


def _read_documents(file: Path, bad: BadLines) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    for number, record in _records(file, bad):
        document_id = _new_id(record, documents, partial(bad.add, file, number))
        if document_id is None:
            continue
        stated = {key: value for key, value in record.items() if key not in _RESERVED and key != "metadata"}
        metadata = record.get("metadata")
        stated |= (
            metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata}
        )
        fields = {key: value for key, value in stated.items() if value is not None}
        wrong = sorted(key for key, value in fields.items() if not _is_field_value(value))
        if wrong or not fields:
            reason = f"fields {', '.join(wrong)} are not text, a number, true/false, or a list of texts"
            bad.add(file, number, reason if wrong else "a document needs one field at least")
            continue
        documents[document_id] = Document(document_id, fields)
    return documents


def _read_queries(file: Path, bad: BadLines) -> tuple[dict[str, Query], dict[str, str], dict[str, str]]:
    """Queries, and by id the splits and kinds that are stated."""
    queries: dict[str, Query] = {}
    splits: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for number, record in _records(file, bad):
        query_id = _new_id(record, queries, partial(bad.add, file, number))
        text, split, kind = record.get("text"), record.get("split"), record.get("kind")
        if query_id is None:
            continue
        if not isinstance(text, str) or not text.strip():
            bad.add(file, number, "text is missing or empty")
        elif split is not None and not (isinstance(split, str) and split in _SPLIT_NAMES):
            bad.add(file, number, f"split {split!r} is none of {', '.join(_SPLIT_NAMES)}")
        elif kind is not None and not (isinstance(kind, str) and kind.strip()):
            bad.add(file, number, f"kind {kind!r} is not a text")
        else:
            queries[query_id] = Query(query_id, text)
            if split is not None:
                splits[query_id] = _SPLIT_NAMES[split]
            if kind is not None:
                kinds[query_id] = kind.strip()
    return queries, splits, kinds


def _read_beir_grades(
    folder: Path, queries: dict[str, Query], documents: dict[str, Document], qrels: Qrels, bad: BadLines
) -> dict[str, str]:
    """Fills `qrels` and returns the split of each query: the file in which its first grade stands."""
    files = [(folder / f"{name}.tsv", split) for name, split in _SPLIT_NAMES.items()]
    files = [(file, split) for file, split in files if file.is_file()]
    if not files:
        raise InputError(f"{folder} holds none of {', '.join(f'{name}.tsv' for name in _SPLIT_NAMES)}")
    splits: dict[str, str] = {}
    for file, split in files:
        for number, line in _lines(file, bad):
            cells = line.split("\t")
            if number == 1 and cells[0] in {"query-id", "query_id", "qid"}:
                continue
            if len(cells) != 3:
                bad.add(file, number, f"{len(cells)} columns, not the three query-id, corpus-id, score")
                continue
            query_id, document_id, score = (cell.strip() for cell in cells)
            if splits.get(query_id, split) != split:
                bad.add(file, number, f"query {query_id} has grades in split {splits[query_id]} already")
                continue
            pair = (query_id, document_id, int(score) if _WHOLE.fullmatch(score) else score)
            if _add_grade(qrels, pair, queries, documents, partial(bad.add, file, number)):
                splits[query_id] = split
    return splits


def _add_grade(
    qrels: Qrels,
    pair: tuple[Any, Any, Any],
    queries: dict[str, Query],
    documents: dict[str, Document],
    complain: Callable[[str], None],
) -> bool:
    """Adds one grade to `qrels`, or says what is wrong with it."""
    query_id, document_id, grade = _id(pair[0]), _id(pair[1]), pair[2]
    if isinstance(grade, float) and grade.is_integer():
        grade = int(grade)
    if query_id is None or document_id is None:
        complain("query_id and document_id must be there, as text or whole numbers")
    elif query_id not in queries:
        complain(f"unknown query {query_id}")
    elif document_id not in documents:
        complain(f"unknown document {document_id}")
    elif not isinstance(grade, int) or isinstance(grade, bool) or not 0 <= grade <= MAX_GRADE:
        complain(f"grade {grade!r} is not a whole number 0..{MAX_GRADE}")
    elif document_id in qrels.get(query_id, {}):
        complain(f"pair ({query_id}, {document_id}) has a grade already")
    else:
        qrels.setdefault(query_id, {})[document_id] = grade
        return True
    return False


@overload
def _find(folder: Path, stem: str) -> Path: ...
@overload
def _find(folder: Path, stem: str, *, is_optional: bool) -> Path | None: ...
def _find(folder: Path, stem: str, *, is_optional: bool = False) -> Path | None:
    found = [folder / f"{stem}{kind}" for kind in _KINDS if (folder / f"{stem}{kind}").is_file()]
    names = " or ".join(f"{stem}{kind}" for kind in _KINDS)
    if not found and is_optional:
        if others := sorted(file.name for file in folder.glob(f"{stem}.*")):
            raise InputError(f"{folder / others[0]} is not read: make it {names}")
        return None
    if len(found) != 1:
        raise InputError(f"{folder} needs one file {names}; it has {len(found)}")
    return found[0]


def _new_id(record: dict[str, Any], known: dict[str, Any], complain: Callable[[str], None]) -> str | None:
    found = _id(record.get("id", record.get("_id")))
    if found is None:
        complain("no id: a text or a whole number under id or _id")
    elif found in known:
        complain(f"id {found} is there twice")
    else:
        return found
    return None


def _id(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _is_field_value(value: Any) -> TypeGuard[FieldValue]:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | bool)


def _records(file: Path, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL or Parquet file with their line, or row, from 1 on."""
    if file.suffix == ".parquet":
        yield from enumerate(_parquet_rows(file), start=1)
        return
    for number, line in _lines(file, bad):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.add(file, number, f"not JSON: {error}")
            continue
        if not isinstance(record, dict):
            bad.add(file, number, "not a JSON object")
        elif "\\ud" in line.lower() and not _is_utf8(record):
            bad.add(file, number, "not UTF-8: half of a surrogate pair")
        else:
            yield number, record


def _is_utf8(record: dict[str, Any]) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: Path, bad: BadLines) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, without a byte order mark."""
    with file.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad.add(file, number, f"not UTF-8 at byte {error.start + 1} of the line")
                continue
            if line.strip():
                yield number, line


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {file} needs the package pyarrow: pip install -e '.[data]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} is not a whole Parquet file: {error}") from error

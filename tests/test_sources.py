"""Readers on real files: BEIR, JSONL and Parquet give the same collection; every bad line is in one report."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from jaxsearch.data.records import SPLITS, Document, split_by_hash
from jaxsearch.data.sources import BadLines, load_collection, read_pairs
from jaxsearch.errors import InputError

DOCUMENTS: list[dict[str, Any]] = [
    {"id": "d1", "title": "Baker", "skills": ["mix", "bake"], "openings": 3, "remote": False, "pay": 20.5},
    {"id": "d2", "title": "Tour guide", "skills": [], "openings": 1, "remote": True, "pay": 18.0},
    {"id": "d3", "title": "北京 guide", "skills": ["speak"], "openings": 0, "remote": False, "pay": 1e3},
]
QUERIES: list[dict[str, Any]] = [
    {"id": "q1", "text": "Bake bread.", "split": "train"},
    {"id": "q2", "text": "Plan tours.", "split": "test"},
    {"id": "q3", "text": "Nobody judged this.", "split": "test"},
]
GRADES: list[dict[str, Any]] = [
    {"query_id": "q1", "document_id": "d1", "grade": 4},
    {"query_id": "q1", "document_id": "d2", "grade": 0},
    {"query_id": "q2", "document_id": "d2", "grade": 3},
    {"query_id": "q2", "document_id": "d3", "grade": 1},
]


def write_lines(file: Path, records: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(record, ensure_ascii=False) if isinstance(record, dict) else record for record in records
    ]
    file.write_bytes(
        b"".join(line.encode() + b"\n" if isinstance(line, str) else line + b"\n" for line in lines)
    )


def write_jsonl(folder: Path) -> Path:
    for name, records in (("documents", DOCUMENTS), ("queries", QUERIES), ("grades", GRADES)):
        write_lines(folder / f"{name}.jsonl", records)
    return folder


def write_parquet(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, records in (("documents", DOCUMENTS), ("queries", QUERIES), ("grades", GRADES)):
        parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"{name}.parquet")
    return folder


def write_beir(folder: Path) -> Path:
    corpus = []
    for document in DOCUMENTS:
        metadata = {key: document[key] for key in ("skills", "openings", "remote", "pay")}
        corpus.append({"_id": document["id"], "title": document["title"], "metadata": metadata})
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(
        folder / "queries.jsonl",
        [{"_id": query["id"], "text": query["text"], "metadata": {}} for query in QUERIES],
    )
    for split, query_id in (("train", "q1"), ("test", "q2")):
        rows = [
            f"{grade['query_id']}\t{grade['document_id']}\t{grade['grade']}"
            for grade in GRADES
            if grade["query_id"] == query_id
        ]
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
    return folder


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_beir])
def test_every_format_gives_the_same_collection(write: Callable[[Path], Path], tmp_path: Path):
    collection = load_collection(write(tmp_path / "mine"))
    assert collection.name == "mine"
    fields = {document.id: dict(document.fields) for document in collection.documents.values()}
    assert fields == {
        document["id"]: {key: value for key, value in document.items() if key != "id"}
        for document in DOCUMENTS
    }
    assert collection.qrels == {"q1": {"d1": 4, "d2": 0}, "q2": {"d2": 3, "d3": 1}}
    assert [collection.queries[key].text for key in ("q1", "q2")] == ["Bake bread.", "Plan tours."]
    assert {key: collection.query_split[key] for key in ("q1", "q2")} == {"q1": "train", "q2": "test"}
    assert [query.id for name in SPLITS for query in collection.split(name)] == ["q1", "q2"]
    assert {query.id for name in SPLITS for query in collection.split(name, is_graded=False)} == {
        "q1",
        "q2",
        "q3",
    }
    assert collection.notice == "Queries without a grade: 1; only labels of a judge make use of them."
    # BEIR states no split for a query without grades, so that one query may differ.
    again = load_collection(write_jsonl(tmp_path / "again"))
    pinned = dataclasses.replace(collection, query_split={**collection.query_split, "q3": "test"})
    assert pinned.fingerprint() == again.fingerprint()


def test_queries_without_a_split_get_one_for_good(tmp_path: Path):
    write_lines(tmp_path / "documents.jsonl", DOCUMENTS)
    write_lines(
        tmp_path / "queries.jsonl", [{"id": f"q{index}", "text": f"query {index}"} for index in range(2000)]
    )
    grades = [{"query_id": f"q{index}", "document_id": "d1", "grade": 2} for index in range(2000)]
    write_lines(tmp_path / "grades.jsonl", grades)
    collection = load_collection(str(tmp_path))
    assert collection.query_split == {f"q{index}": split_by_hash(f"q{index}") for index in range(2000)}
    sizes = [len(collection.split(split)) for split in SPLITS]
    assert sizes == [1405, 204, 391]
    assert [split_by_hash(key) for key in ("0", "1", "2", "3")] == ["train", "train", "test", "train"]


def broken(folder: Path) -> tuple[Path, list[str]]:
    """A folder with every kind of bad line, and what the report must say, in order."""
    documents: list[Any] = [
        *DOCUMENTS,
        {"title": "no id"},
        {"id": "d1", "title": "again"},
        {"id": "d4", "title": {"en": "nested"}},
        {"id": "d5"},
        '{"id": "d6", "title": ',
        "[1, 2]",
        b'{"id": "d7", "title": "\xff"}',
        '{"id": "d8", "pay": NaN}',
        '{"id": "d9", "title": "\\ud800"}',
        {"id": True, "title": "x"},
    ]
    queries: list[Any] = [
        *QUERIES,
        {"id": "q4"},
        {"id": "q5", "text": "x", "split": "later"},
        {"id": "q6", "text": "x", "kind": 3},
    ]
    grades: list[Any] = [
        *GRADES,
        "",
        {"query_id": "q9", "document_id": "d1", "grade": 1},
        {"query_id": "q1", "document_id": "d9", "grade": 1},
        {"query_id": "q1", "document_id": "d3", "grade": 5},
        {"query_id": "q1", "document_id": "d3", "grade": 1.5},
        {"query_id": "q1", "document_id": "d3"},
        {"query_id": "q1", "document_id": "d1", "grade": 4},
        {"document_id": "d1", "grade": 4},
    ]
    write_lines(folder / "documents.jsonl", documents)
    write_lines(folder / "queries.jsonl", queries)
    write_lines(folder / "grades.jsonl", grades)
    return folder, [
        "documents.jsonl:4: no id",
        "documents.jsonl:5: id d1 is there twice",
        "documents.jsonl:6: fields title are not",
        "documents.jsonl:7: a document needs one field",
        "documents.jsonl:8: not JSON",
        "documents.jsonl:9: not a JSON object",
        "documents.jsonl:10: not UTF-8 at byte 24",
        "documents.jsonl:11: fields pay are not",
        "documents.jsonl:12: not UTF-8: half",
        "documents.jsonl:13: no id",
        "queries.jsonl:4: text is missing",
        "queries.jsonl:5: split 'later'",
        "queries.jsonl:6: kind 3 is not a text",
        "grades.jsonl:6: unknown query q9",
        "grades.jsonl:7: unknown document d9",
        "grades.jsonl:8: grade 5 is not",
        "grades.jsonl:9: grade 1.5 is not",
        "grades.jsonl:10: grade None is not",
        "grades.jsonl:11: pair (q1, d1) has a grade already",
        "grades.jsonl:12: query_id and document_id must be there",
    ]


def test_all_bad_lines_are_in_one_report(tmp_path: Path):
    folder, expected = broken(tmp_path)
    with pytest.raises(InputError, match="bad lines: 20; mend them, or go on without them") as caught:
        load_collection(folder)
    report = str(caught.value).splitlines()[1:]
    assert len(report) == len(expected)
    for line, start in zip(report, expected, strict=True):
        assert line.startswith(f"{folder}/{start}")


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path: Path):
    folder, _ = broken(tmp_path / "broken")
    collection = load_collection(folder, skip_bad_lines=True)
    assert collection.fingerprint() == load_collection(write_jsonl(tmp_path / "good")).fingerprint()
    assert collection.notice.startswith("Bad lines left out: 20 (10 of ")


def test_bad_lines_of_beir_grades(tmp_path: Path):
    write_beir(tmp_path)
    rows = ["q2\td1\t2", "q1\td3", "q1\td3\tx", "q1\td3\t--3", "q1\td3\t-1", "q1\td3\t2"]
    write_lines(tmp_path / "qrels/dev.tsv", ["q3\td1\t4"])
    write_lines(tmp_path / "qrels/train.tsv", rows)
    with pytest.raises(InputError, match="bad lines: 6") as caught:
        load_collection(tmp_path)
    reasons = [
        "qrels/train.tsv:2: 2 columns, not",
        "qrels/train.tsv:3: grade 'x' is not",
        "qrels/train.tsv:4: grade '--3' is not",
        "qrels/train.tsv:5: grade -1 is not",
        "qrels/test.tsv:2: query q2 has grades in split train already",
        "qrels/test.tsv:3: query q2 has grades in split train already",
    ]
    report = str(caught.value).splitlines()[1:]
    assert [
        line.removeprefix(f"{tmp_path}/")[: len(r)] for line, r in zip(report, reasons, strict=True)
    ] == reasons
    # The query of dev.tsv is in the validation split, by either of the two names that BEIR folders use.
    write_beir(tmp_path)
    assert load_collection(tmp_path).query_split == {"q1": "train", "q2": "test", "q3": "validation"}


def test_a_very_long_report_ends_in_counts(tmp_path: Path):
    bad = BadLines(shown=2)
    for number in range(1, 8):
        bad.add(tmp_path, number, "odd" if number % 2 else "even")
    assert bad.report().splitlines() == [
        f"{tmp_path}:1: odd",
        f"{tmp_path}:2: even",
        "and 5 more:",
        "  3 x odd",
        "  2 x even",
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path):
    folder = write_jsonl(tmp_path)
    for file in folder.glob("*.jsonl"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(load_collection(folder).documents) == 3


def test_what_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"there is no such folder, and no builder of that name \(onet_activities\)"
    ):
        load_collection(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"needs one file documents\.jsonl or documents\.parquet; it has 0"):
        load_collection(tmp_path)
    folder = write_jsonl(tmp_path)
    (folder / "grades.jsonl").write_text("")
    assert load_collection(folder).qrels == {}
    (folder / "grades.jsonl").unlink()
    assert load_collection(folder).qrels == {}
    (folder / "grades.csv").touch()
    with pytest.raises(
        InputError, match=r"grades\.csv is not read: make it grades\.jsonl or grades\.parquet"
    ):
        load_collection(folder)
    (folder / "grades.csv").unlink()
    (folder / "grades.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is not a whole Parquet file"):
        load_collection(folder)
    write_lines(folder / "corpus.jsonl", [{"_id": "d1", "text": "x"}])
    with pytest.raises(InputError, match=r"qrels holds none of train\.tsv"):
        load_collection(folder)


def test_pairs(tmp_path: Path):
    file, collection = tmp_path / "pairs.jsonl", load_collection(write_jsonl(tmp_path / "data"))
    extra = Document("7", {"title": "Seventh"})
    collection = dataclasses.replace(collection, documents={**collection.documents, "7": extra})
    write_lines(file, [{"query_id": "q1", "document_id": 7}, {"query_id": "q1", "document_id": "d2"}])
    assert read_pairs(file, collection) == ([("q1", "7"), ("q1", "d2")], "")
    rows = [
        {"query_id": "q1", "document_id": 7},
        {"query_id": "q1"},
        {"query_id": "q1", "document_id": "7"},
        {"query_id": "q9", "document_id": "d1"},
        {"query_id": "q1", "document_id": "d9"},
        "{",
    ]
    write_lines(file, rows)
    with pytest.raises(InputError, match="bad lines: 4") as caught:
        read_pairs(file, collection)
    reasons = [
        ":2: query_id and document_id must be",
        ":4: unknown query q9",
        ":5: unknown document d9",
        ":6: not JSON",
    ]
    lines = str(caught.value).splitlines()[1:]
    assert all(line.startswith(f"{file}{reason}") for line, reason in zip(lines, reasons, strict=True))
    left_out = f"Bad lines left out: 4 (4 of {file})."
    assert read_pairs(file, collection, skip_bad_lines=True) == ([("q1", "7")], left_out)


def test_a_file_without_pairs_is_said(tmp_path: Path):
    file, collection = tmp_path / "pairs.jsonl", load_collection(write_jsonl(tmp_path / "data"))
    with pytest.raises(InputError, match=r"pairs\.jsonl: no such file"):
        read_pairs(file, collection)
    write_lines(file, [{"query_id": "q9", "document_id": "d1"}])
    with pytest.raises(InputError, match=r"holds no usable pair\. Bad lines left out: 1"):
        read_pairs(file, collection, skip_bad_lines=True)
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(
        InputError, match=r"pairs\.csv: is not read; give pairs as a \.jsonl or \.parquet file"
    ):
        read_pairs(tmp_path / "pairs.csv", collection)


def test_queries_without_grade_and_split_are_train_queries(tmp_path: Path):
    folder = write_jsonl(tmp_path / "data")
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(json.dumps({"id": f"log{i}", "text": "from a log"}) + "\n" for i in range(20))
    collection = load_collection(folder)
    assert {collection.query_split[f"log{i}"] for i in range(20)} == {"train"}

"""What launchers start from: messages about data, views and validation queries that cannot work."""

import dataclasses
import json

import pytest

from jaxsearch.data.records import Collection, Document, Query
from jaxsearch.errors import InputError
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train.inputs import load_data, validate


@dataclasses.dataclass(frozen=True)
class Data:
    collection: str
    vertical: str
    skip_bad_lines: bool = False


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    root = tmp_path_factory.mktemp("data")
    return Data(str(write_collection(root / "data")), str(write_parts(root)["vertical"]))


def test_an_unknown_view_is_refused_with_the_known_ones(data):
    with pytest.raises(InputError, match="no view 'long': set view to short or full"):
        load_data(data, view="long")


def test_a_field_that_no_document_has_is_named(data, tmp_path):
    (tmp_path / "documents.jsonl").write_text(
        '{"id": "1", "tasks": ["Bake."]}\n{"id": "2", "name": "Baker"}\n'
    )
    (tmp_path / "queries.jsonl").write_text('{"id": "q", "text": "bread"}\n')
    own = dataclasses.replace(data, collection=str(tmp_path))
    with pytest.raises(
        InputError, match=r"'full' of .* reads title, which no document .* they have name, tasks"
    ):
        load_data(own, view="full")


def test_a_field_that_some_documents_lack_is_empty_there(data, tmp_path):
    (tmp_path / "documents.jsonl").write_text(
        '{"id": "1", "title": "Baker", "tasks": null}\n{"id": "2", "tasks": ["Bake."]}\n'
    )
    (tmp_path / "queries.jsonl").write_text('{"id": "q", "text": "bread"}\n')
    collection, vertical = load_data(dataclasses.replace(data, collection=str(tmp_path)), view="full")
    texts = [vertical.document_text(document, "full") for document in collection.documents.values()]
    assert texts == ["Baker.", "Bake."]


def test_fields_of_several_types_and_documents_without_text_are_told(data, tmp_path, capsys):
    rows = (
        {"id": "1", "title": "Baker", "pay": 30, "remote": False},
        {"id": "2", "title": 5, "pay": 31.5, "tasks": ["Bake."]},
        {"id": "3", "title": "Smith", "pay": "long", "tasks": "Forge."},
        {"id": "4", "title": " ", "remote": 1},
    )
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "queries.jsonl").write_text('{"id": "q", "text": "bread", "split": "train"}\n')
    (tmp_path / "grades.jsonl").write_text('{"query_id": "q", "document_id": "1", "grade": 4}\n')
    load_data(dataclasses.replace(data, collection=str(tmp_path)), view="short")
    why = "no filter compares it by size and no facet counts it until all have one type"
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path.name}: {line}"
        for line in (
            f"field pay is a number in 2 documents but text in 1 (first 3): {why}",
            f"field remote is true/false in 1 documents but a number in 1 (first 4): {why}",
            f"field tasks is a list in 1 documents but text in 1 (first 3): {why}",
            f"field title is text in 3 documents but a number in 1 (first 2): {why}",
            "1 of 4 documents have no text in view short (first 4): no words find them",
        )
    ]
    load_data(data, view="short")
    assert capsys.readouterr().err == ""


def test_a_split_without_queries_is_named(data, tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"id": "1", "title": "Baker"}\n')
    (tmp_path / "queries.jsonl").write_text('{"id": "q", "text": "bread", "split": "train"}\n')
    (tmp_path / "grades.jsonl").write_text('{"query_id": "q", "document_id": "1", "grade": 4}\n')
    own = dataclasses.replace(data, collection=str(tmp_path))
    with pytest.raises(InputError, match="no graded queries in validation and test"):
        load_data(own, needs=("train", "validation", "test"))


def test_validation_counts_seen_documents_only_and_needs_a_relevant_one(data):
    _, vertical = load_data(data)
    collection = Collection(
        name="tiny",
        queries={"q": Query("q", "bread")},
        documents={key: Document(key, {"title": key}) for key in ("seen", "unseen")},
        qrels={"q": {"seen": 1, "unseen": 4}},
        query_split={"q": "validation"},
        unseen_documents=frozenset({"unseen"}),
    )
    with pytest.raises(InputError, match=r"none of the 1 validation queries .* grade 2 or above"):
        validate(collection, vertical, list(collection.queries.values()), {"q": {"seen": 1.0}})
    graded = dataclasses.replace(collection, qrels={"q": {"seen": 2, "unseen": 4}})
    queries = list(graded.queries.values())
    assert validate(graded, vertical, queries, {"q": {"seen": 1.0}}) == {"ndcg@10": 1.0}
    assert validate(graded, vertical, queries, {"q": {"unseen": 1.0}}) == {"ndcg@10": 0.0}

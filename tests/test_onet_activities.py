"""The O*NET activity collection: grades by the rule, numbers as documented, files without TensorFlow."""

import csv
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsearch.data import assets
from jaxsearch.data.builders import onet_activities
from jaxsearch.data.records import SPLIT_SHARES, SPLITS, Collection, Document
from jaxsearch.data.sources import load_collection
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.data.verticals import load_vertical


@pytest.fixture(scope="module")
def collection() -> Collection:
    return load_collection("onet_activities")


@pytest.fixture(scope="module")
def links() -> list[tuple[str, str, str]]:
    with assets.fetch("onet_tasks").open(encoding="utf-8-sig", newline="") as file:
        return [(row["DWA ID"], row["O*NET-SOC Code"], row["Task ID"]) for row in csv.DictReader(file)]


ACTIVITIES = st.sampled_from(["4.A.1.D01", "4.A.1.D02", "4.A.2.D01", "4.B.1.D07"])


@given(st.lists(st.tuples(ACTIVITIES, st.sampled_from("ABC"), st.sampled_from("123456")), max_size=30))
def test_grades_follow_the_rule(links: list[tuple[str, str, str]]):
    qrels = onet_activities.derive_grades(links)
    assert set(qrels) == {activity for activity, _, _ in links}
    for activity in qrels:
        for occupation in "ABC":
            carrying = {task for a, o, task in links if (a, o) == (activity, occupation)}
            related = any(o == occupation and a[:5] == activity[:5] for a, o, _ in links)
            expected = {0: int(related), 1: 2, 2: 3}.get(len(carrying), 4)
            assert qrels[activity].get(occupation, 0) == expected


def test_numbers(collection: Collection):
    assert (len(collection.queries), len(collection.documents)) == (2085, 923)
    sizes = [len(collection.split(split)) for split in SPLITS]
    assert sizes == [1441, 227, 417]
    for size, share in zip(sizes, SPLIT_SHARES, strict=True):
        assert size / 2085 == pytest.approx(share, abs=0.02)  # largest difference 0.009
    assert len(collection.unseen_documents) == 138  # 15.0 %
    grades = Counter(grade for graded in collection.qrels.values() for grade in graded.values())
    assert grades == {1: 138_878, 2: 14_338, 3: 2_449, 4: 1_115}
    # Splits, grades and texts are fixed for good: another fingerprint means that numbers can no longer be compared.
    texts = {
        key: Document(key, {name: document.fields[name] for name in ("title", "description", "tasks")})
        for key, document in collection.documents.items()
    }
    assert dataclasses.replace(collection, documents=texts).fingerprint() == "f8f6a05abe35"


def test_it_agrees_with_the_published_links(collection: Collection, links: list[tuple[str, str, str]]):
    assert collection.qrels == onet_activities.derive_grades(links)
    tasks = Counter(occupation for occupation, _ in {(occupation, task) for _, occupation, task in links})
    for document in collection.documents.values():
        assert set(document.fields) == {"title", "description", "tasks", "family", "num_tasks"}
        assert len(document.fields["tasks"]) == tasks[document.id]
        assert all(document.fields.values())
    assert "CC BY 4.0" in collection.notice
    assert "derived" in collection.notice


def test_what_belongs_together_stays_together(collection: Collection):
    splits, seen = {}, {}
    for query in collection.queries.values():
        splits.setdefault(onet_activities.parent(query.id), set()).add(collection.query_split[query.id])
    for document in collection.documents.values():
        seen.setdefault(document.id[:5], set()).add(document.id in collection.unseen_documents)
    assert (len(splits), len(seen)) == (332, 110)
    assert all(len(values) == 1 for values in (*splits.values(), *seen.values()))


def test_lengths_of_the_views_in_tokens(collection: Collection):
    vertical = load_vertical(Path(__file__).parents[1] / "configs/verticals/onet_activities")
    tokenizer = Tokenizer.from_path(assets.fetch("smollm2"))

    def mean_length(texts: list[str]) -> float:
        tokens = tokenizer.encode_batch(texts)
        return sum(map(len, tokens)) / len(tokens)

    documents = collection.documents.values()
    short = mean_length([vertical.document_text(document, "short") for document in documents])
    full = mean_length([vertical.document_text(document, "full") for document in documents])
    queries = mean_length([query.text for query in collection.queries.values()])
    # Measured: 47.0, 398.9, 7.7.
    assert short == pytest.approx(47.0, abs=0.1)
    assert full == pytest.approx(398.9, abs=0.1)
    assert queries == pytest.approx(7.7, abs=0.1)


LOAD = """
import sys, time
start = time.process_time()
from jaxsearch.data.sources import load_collection
collection = load_collection("onet_activities")
seconds = time.process_time() - start
assert "tensorflow" not in sys.modules
print(collection.fingerprint(), seconds)
"""


def test_loading_again_is_quick_and_needs_neither_tensorflow_nor_network(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    run = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)
    fingerprint, seconds = run.stdout.split()
    assert fingerprint == collection.fingerprint()
    assert float(seconds) < 3  # of processor; measured: 1.6


def test_tfds_gives_the_same_table(collection: Collection):
    builder = onet_activities.OnetActivities(
        config="documents", data_dir=assets.cache_dir() / "tfds", file_format="array_record"
    )
    unseen = builder.as_data_source("unseen")
    assert {bytes(example["id"]).decode() for example in unseen} == collection.unseen_documents

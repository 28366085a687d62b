"""The HTML report: which queries it shows, with which grades, and the curves of a training."""

import json

import pytest

from jaxsearch.data.records import Collection, Document, Query
from jaxsearch.data.verticals import load_vertical
from tests.tiny_bundle import write_parts
from train import plots
from train.report_html import Shown, samples, training_curves, write_html

RUN = {
    "good": {"a": 2.0, "b": 1.0},
    "poor": {"b": 2.0, "a": 1.0},
    "half": {"b": 2.0, "a": 1.0},
}


@pytest.fixture
def vertical(tmp_path):
    return load_vertical(write_parts(tmp_path)["vertical"])


@pytest.fixture
def collection():
    return Collection(
        name="tiny",
        queries={name: Query(name, f"<{name}> query") for name in RUN},
        documents={name: Document(name, {"title": f"<b>{name}</b>"}) for name in ("a", "b")},
        qrels={"good": {"a": 4}, "poor": {"a": 2}, "half": {"a": 4, "b": 2}},
        query_split=dict.fromkeys(RUN, "test"),
    )


def test_best_and_worst_queries_come_with_their_documents(collection, vertical):
    chosen = dict(samples(Shown("ranker", RUN, {}, "short"), collection, vertical))
    assert [sample.query for sample in chosen["Best"]] == ["<good> query", "<half> query"]
    assert [sample.query for sample in chosen["Worst"]] == ["<poor> query"]
    best = chosen["Best"][0]
    assert (best.value, best.num_relevant) == (1.0, 1)
    assert [(row["rank"], row["grade"], row["judged"]) for row in best.rows] == [(1, 4, None), (2, 0, None)]


def test_queries_that_the_judge_graded_come_first(collection, vertical):
    judged = {"poor": {"a": 3.5}}
    chosen = dict(samples(Shown("ranker", RUN, judged, "short"), collection, vertical))
    assert [sample.query for sample in chosen["Best"]] == ["<poor> query"]
    assert chosen["Worst"] == []
    assert [row["judged"] for row in chosen["Best"][0].rows] == [None, 3.5]


def test_curves_are_drawn_for_every_training_that_is_there(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "evaluate/ndcg@10": 0.5}]
    for name in ("round-0", "round-1"):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in records)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 3, "lo')  # still being written
    found = training_curves({"encoder": tmp_path, "judge": tmp_path / "nothing"})
    assert [curve["name"] for curve in found] == ["encoder, round-0", "encoder, round-1"]
    drawn = plots.curves(records)
    assert drawn.startswith("<svg")
    assert ">loss<" in drawn
    assert ">ndcg@10<" in drawn


def test_documents_are_text_and_never_markup(tmp_path, collection, vertical):
    (tmp_path / "report.png").write_bytes(b"png")
    write_html(
        tmp_path / "report.html",
        "a <title>",
        [],
        ["<note>"],
        picture=tmp_path / "report.png",
        curves=[],
        shown=Shown("ranker", RUN, {}, "short"),
        collection=collection,
        vertical=vertical,
    )
    page = (tmp_path / "report.html").read_text()
    for text in ("&lt;note&gt;", "a &lt;title&gt;", "&lt;good&gt; query", "&lt;b&gt;a&lt;/b&gt;"):
        assert text in page

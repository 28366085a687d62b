"""From trained folders to a bundle that loads: calibration, known answers, model card, and what is refused."""

import dataclasses
import json
import shutil
import sys

import pytest

from jaxsearch.bundle import load_bundle
from jaxsearch.encoder import load_encoder, save_encoder
from jaxsearch.errors import InputError
from jaxsearch.files import read_json
from jaxsearch.ranker import load_ranker, save_ranker
from jaxsearch.search.orders import NAMES
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection, write_words
from train import export, index
from train.first_stage import MOST_QUERIES


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """Config values of an export whose index is there."""
    root = tmp_path_factory.mktemp("export")
    parts = write_parts(root / "parts")
    values = {
        "encoder": str(parts["encoder"]),
        "vertical": str(parts["vertical"]),
        "collection": str(write_collection(root / "data")),
    }
    index.main(index.IndexConfig(**values), root)
    return values | {"ranker": str(parts["ranker"]), "index": str(root / "index")}


def test_the_bundle_holds_what_it_was_made_from(made, tmp_path):
    export.main(export.ExportConfig(rank_depth=4, max_batch_tokens=256, **made), tmp_path)
    bundle = load_bundle(tmp_path / "bundle")
    assert len(bundle.documents) == 12
    assert set(bundle.orders.orders) == set(NAMES)
    assert all(order.calibration and order.validation for order in bundle.orders.orders.values())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["num_queries"] == 3
    assert report["served"] == bundle.orders.default
    assert report["known_answers"] == len(bundle.known_answers)
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert f"Version {bundle.ranker.version}." in card
    assert "- num_queries: 3" in card


def test_an_index_of_other_data_is_refused(made, tmp_path):
    other = write_collection(tmp_path / "data")
    with (other / "documents.jsonl").open("a") as file:
        file.write('{"id": "new", "title": "new worker", "tasks": ["Begin."]}\n')
    config = export.ExportConfig(**made | {"collection": str(other)})
    with pytest.raises(InputError, match=r"made from other data .* run train\.index again"):
        export.main(config, tmp_path)


@pytest.fixture(scope="module")
def words(made, tmp_path_factory) -> export.ExportConfig:
    """24 validation queries, which words alone answer, and a ranker with random weights."""
    root = tmp_path_factory.mktemp("words")
    values = made | {
        "collection": str(write_words(root / "data", num_queries=72)),
        "index": str(root / "index"),
    }
    names = ("encoder", "vertical", "collection")
    index.main(index.IndexConfig(**{name: values[name] for name in names}), root)
    return export.ExportConfig(rank_depth=12, max_batch_tokens=256, **values)


def test_a_ranker_with_random_weights_is_not_served_unless_it_is_wanted(words, tmp_path, capsys):
    export.main(words, tmp_path)
    orders = load_bundle(tmp_path / "bundle").orders
    assert not orders[orders.default].uses_ranker
    said = f"Served: {orders.default}, without the ranker, which has not earned its place"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert orders["ranker"].validation.value < orders[orders.default].validation.value
    with pytest.raises(InputError, match=r"search would be worse with it; .* --allow-worse"):
        export.main(dataclasses.replace(words, order="ranker"), tmp_path)
    export.main(dataclasses.replace(words, allow_worse=True), tmp_path)
    forced = load_bundle(tmp_path / "bundle").orders
    assert forced[forced.default].uses_ranker
    assert "as it was asked for" in forced.reason
    export.main(dataclasses.replace(words, order="ranker", allow_worse=True), tmp_path)
    assert load_bundle(tmp_path / "bundle").orders.default == "ranker"


def test_queries_too_long_for_the_ranker_are_left_out_of_the_fit_and_counted(words, tmp_path, capsys):
    data = shutil.copytree(words.collection, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] *= 20 if row["split"] == "validation" and row["id"] not in ("q02", "q05", "q08") else 1
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index.main(
        index.IndexConfig(encoder=words.encoder, vertical=words.vertical, collection=str(data)), tmp_path
    )
    export.main(dataclasses.replace(words, collection=str(data), index=str(tmp_path / "index")), tmp_path)
    assert "21 validation queries are too long for the ranker" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["num_queries"] == 3
    assert len(read_json(tmp_path / "bundle" / "selftest.json")) == report["known_answers"] <= 3


def test_where_every_query_is_too_long_that_is_the_reason(words, tmp_path):
    data = shutil.copytree(words.collection, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"text": 20 * row["text"]}) + "\n" for row in rows]
    (data / "queries.jsonl").write_text("".join(lines))
    index.main(
        index.IndexConfig(encoder=words.encoder, vertical=words.vertical, collection=str(data)), tmp_path
    )
    export.main(dataclasses.replace(words, collection=str(data), index=str(tmp_path / "index")), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["served"], report["known_answers"]) == ("rrf", 0)
    assert (
        "none of the 24 validation queries that were drawn is short enough for the ranker" in report["reason"]
    )


def test_a_bundle_needs_words(words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'jaxsearch\[search\]'"):
        export.main(words, tmp_path)


def test_orders_are_fitted_on_queries_that_the_sum_was_fitted_on(words, tmp_path):
    data = str(write_words(tmp_path / "data", num_queries=3 * (MOST_QUERIES + 20)))
    made_of = {"collection": data, "encoder": words.encoder, "vertical": words.vertical}
    index.main(index.IndexConfig(**made_of), tmp_path)
    changes = {"rank_depth": 2, "validation_queries": MOST_QUERIES + 10, "index": str(tmp_path / "index")}
    export.main(dataclasses.replace(words, collection=data, **changes), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["num_queries"] == MOST_QUERIES


def test_a_handful_of_queries_decides_nothing(words, tmp_path):
    export.main(dataclasses.replace(words, validation_queries=10), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["calibration"]["num_queries"], report["served"]) == (10, "sum")
    assert "too few to tell" in report["reason"]


def test_without_grades_nothing_is_fitted_and_that_is_told(made, tmp_path, capsys):
    data = write_collection(tmp_path / "data")
    (data / "grades.jsonl").unlink()
    values = made | {"collection": str(data)}
    index.main(
        index.IndexConfig(**{name: values[name] for name in ("encoder", "vertical", "collection")}), tmp_path
    )
    config = export.ExportConfig(max_batch_tokens=256, **values | {"index": str(tmp_path / "index")})
    export.main(config, tmp_path)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.orders.default == "rrf"
    assert "there are no graded validation queries, so that nothing" in " ".join(
        capsys.readouterr().out.split()
    )
    assert len(bundle.search("work with bread").results) == 10
    export.main(dataclasses.replace(config, order="bm25"), tmp_path)
    assert load_bundle(tmp_path / "bundle").orders.default == "bm25"
    export.main(dataclasses.replace(config, allow_worse=True), tmp_path)
    assert load_bundle(tmp_path / "bundle").orders.default == "ranker"
    with pytest.raises(InputError, match="unknown order 'best': set order to one of bm25, encoder"):
        export.main(dataclasses.replace(config, order="best"), tmp_path)


def test_a_ranker_of_other_data_or_another_vertical_is_told_and_stands_in_the_card(made, tmp_path, capsys):
    trained = {"collection": "123456789abc", "vertical": "cba987654321"}
    save_ranker(tmp_path / "other", load_ranker(made["ranker"]), trained=trained)
    config = export.ExportConfig(**made | {"ranker": str(tmp_path / "other")})
    export.main(config, tmp_path)
    said = "was trained on collection 123456789abc, not data ("
    assert f"other: {said}" in capsys.readouterr().out
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert f"This ranker {said}" in card
    assert "and vertical cba987654321, not jobs (" in card
    assert "This encoder" not in card


def test_an_index_of_another_encoder_is_refused_before_any_work(made, tmp_path):
    encoder = load_encoder(made["encoder"])
    encoder.query_instruction = "Another: "
    save_encoder(tmp_path / "other", encoder, trained={})
    with pytest.raises(InputError, match=r"run train\.index again with --set encoder="):
        export.main(export.ExportConfig(**made | {"encoder": str(tmp_path / "other")}), tmp_path)

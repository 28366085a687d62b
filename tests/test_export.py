"""From trained folders to a bundle that loads: calibration, known answers, model card, and what is refused."""

import dataclasses
import json

import pytest

from jaxsearch.bundle import load_bundle
from jaxsearch.encoder import load_encoder, save_encoder
from jaxsearch.errors import InputError
from jaxsearch.ranker import load_ranker, save_ranker
from jaxsearch.search.orders import NAMES
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train import export, index


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


def test_a_ranker_with_random_weights_is_not_served_unless_it_is_wanted(made, tmp_path, capsys):
    """Its order is told, and stands in the bundle's card."""
    config = export.ExportConfig(rank_depth=12, max_batch_tokens=256, **made)
    export.main(config, tmp_path)
    orders = load_bundle(tmp_path / "bundle").orders
    assert not orders[orders.default].uses_ranker
    said = f"Served: {orders.default}, without the ranker, which has not earned its place"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert orders["ranker"].validation.value < orders[orders.default].validation.value
    with pytest.raises(InputError, match=r"search would be worse with it; .* --allow-worse"):
        export.main(dataclasses.replace(config, order="ranker"), tmp_path)
    export.main(dataclasses.replace(config, allow_worse=True), tmp_path)
    forced = load_bundle(tmp_path / "bundle").orders
    assert forced[forced.default].uses_ranker
    assert "as it was asked for" in forced.reason
    export.main(dataclasses.replace(config, order="ranker", allow_worse=True), tmp_path)
    assert load_bundle(tmp_path / "bundle").orders.default == "ranker"


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
    assert "no graded validation queries" in " ".join(capsys.readouterr().out.split())
    assert len(bundle.search("work with bread").results) == 10
    export.main(dataclasses.replace(config, order="bm25"), tmp_path)
    assert load_bundle(tmp_path / "bundle").orders.default == "bm25"
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

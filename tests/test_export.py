"""From trained folders to a bundle that loads: calibration, known answers, model card, and what is refused."""

import json

import pytest

from jaxsearch.bundle import load_bundle
from jaxsearch.encoder import load_encoder, save_encoder
from jaxsearch.errors import InputError
from jaxsearch.ranker import load_ranker, save_ranker
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
    export.main(export.ExportConfig(calibration_depth=4, max_batch_tokens=256, **made), tmp_path)
    bundle = load_bundle(tmp_path / "bundle")
    assert len(bundle.documents) == 12
    assert bundle.calibration is not None
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["num_queries"] == 3
    assert report["calibration"]["num_pairs"] == 3 * 4
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


def test_a_report_of_another_launcher_is_refused_at_once(made, tmp_path):
    (tmp_path / "report.json").write_text('{"validation": {}}')
    with pytest.raises(InputError, match=r"is not a report of train\.evaluate"):
        export.main(export.ExportConfig(report=str(tmp_path / "report.json"), **made), tmp_path)


def test_an_unknown_lexical_view_is_refused_before_any_work(made, tmp_path):
    with pytest.raises(InputError, match="no view 'long'"):
        export.main(export.ExportConfig(lexical_view="long", **made), tmp_path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            {"ranker": "other"},
            r"measured ranker other, .*give the report of train\.evaluate with these models",
        ),
        ({"encoder": "older"}, "measured encoder older"),
    ],
)
def test_a_report_of_other_models_is_refused(made, tmp_path, models, message):
    (tmp_path / "report.json").write_text(json.dumps({"groups": [{}], "notes": {"models": models}}))
    with pytest.raises(InputError, match=message):
        export.main(export.ExportConfig(report=str(tmp_path / "report.json"), **made), tmp_path)


def test_a_report_of_other_data_is_refused(made, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"groups": [{}], "notes": {"data": "elsewhere"}}))
    with pytest.raises(
        InputError, match=r"report\.json was made from other data than .*run train\.evaluate again"
    ):
        export.main(export.ExportConfig(report=str(tmp_path / "report.json"), **made), tmp_path)


def test_a_ranker_of_other_data_or_another_vertical_is_told_and_stands_in_the_card(made, tmp_path, capsys):
    trained = {"collection": "123456789abc", "vertical": "cba987654321"}
    save_ranker(tmp_path / "other", load_ranker(made["ranker"]), trained=trained)
    config = export.ExportConfig(**made | {"ranker": str(tmp_path / "other")}, calibration_queries=0)
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

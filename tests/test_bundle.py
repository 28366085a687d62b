import json
import shutil

import numpy as np
import pytest

from jaxsearch.bundle import MANIFEST, document_bundle, load_bundle, revision_of, write_bundle
from jaxsearch.errors import InputError
from jaxsearch.scoring.prefill import ScoreRequest
from tests.tiny_bundle import (
    DOCUMENTS,
    ORDERS,
    change_json,
    relist,
    tiny_index,
    write_parts,
    write_tiny_bundle,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "bundle")


def test_what_is_written_is_read_back(written):
    bundle = load_bundle(written)
    assert bundle.documents == DOCUMENTS
    assert bundle.index.ids == [document.id for document in DOCUMENTS]
    assert bundle.orders == ORDERS
    assert bundle.vertical.name == "jobs"
    assert (written / "MODEL_CARD.md").read_text() == "# tiny\n"
    embeds = bundle.encoder.embed_documents(["Nurse."])
    assert bundle.index.search(embeds, 1).positions.tolist() == [[2]]


def test_known_answers_are_what_the_loaded_ranker_says(written):
    bundle = load_bundle(written)
    assert len(bundle.known_answers) == 1
    known = bundle.known_answers[0]
    assert known.scores[0] > known.scores[1]
    prompt = bundle.ranker.request(known.query, list(known.documents))
    logits = bundle.scorer().score([ScoreRequest(prompt.prefix, prompt.items)])[0]
    # measured maximum: 1.5e-8 (other neighbours in the batch)
    np.testing.assert_allclose(bundle.ranker.scores(logits), known.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "path", ["orders.json", "vertical/vertical.toml", "vertical/policy.md", "documents.jsonl"]
)
def test_the_revision_changes_with_all_that_answers_depend_on(written, copy, path):
    (copy / path).write_text((copy / path).read_text() + " ")
    relist(copy)
    assert revision_of(copy) != revision_of(written)


def test_a_bundle_is_documented_in_one_step_and_stays_what_it_is(written, copy):
    (copy / "programs").mkdir()
    (copy / "programs" / "one").write_bytes(b"compiled")
    before = (copy / "documents.jsonl").stat().st_ino
    document_bundle(copy, card="# measured\n", quality=[{"system": "served", "NDCG@10": 0.5}])
    bundle = load_bundle(copy)
    assert (copy / "MODEL_CARD.md").read_text() == "# measured\n"
    assert bundle.quality == [{"system": "served", "NDCG@10": 0.5}]
    assert bundle.revision == load_bundle(written).revision
    assert (copy / "documents.jsonl").stat().st_ino == before
    assert (copy / "programs" / "one").read_bytes() == b"compiled"
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]
    assert (written / "MODEL_CARD.md").read_text() == "# tiny\n"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"orders": [], "default": "sum", "reason": "", "rank_depth": 1, "plain": "sum"}']
)
def test_broken_orders_are_one_clear_error(copy, content):
    (copy / "orders.json").write_text(content)
    relist(copy)
    with pytest.raises(InputError, match=r"orders\.json holds no orders|unknown order 'sum'"):
        load_bundle(copy)


def test_every_damaged_missing_and_foreign_file_is_named_in_one_error(copy):
    weights = copy / "ranker" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    (copy / "documents.jsonl").unlink()
    (copy / "index" / "extra.pickle").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_bundle(copy)
    message = str(caught.value)
    assert "changed: ranker/model.safetensors" in message
    assert "missing: documents.jsonl" in message
    assert "not in the manifest: index/extra.pickle" in message


@pytest.mark.parametrize("path", ["encoder/model.safetensors", "selftest.json", "index/embeds.npy"])
def test_one_flipped_bit_is_found(copy, path):
    content = bytearray((copy / path).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / path).write_bytes(content)
    with pytest.raises(InputError, match=f"changed: {path}"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_version": "0" * 12}, "the manifest's encoder: 000000000000, the encoder folder"),
        ({"prompt_fingerprint": "0" * 12}, "the manifest's prompt: 000000000000, the ranker's prompt"),
        ({"label_ids": [1, 2]}, r"the manifest's labels: \[1, 2\], the ranker's labels"),
        ({"format": 99}, "not a bundle of format 4"),
        ({"lexical_view": "long"}, "BM25's view is known: False"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(copy, change, message):
    change_json(copy / MANIFEST, **change)
    with pytest.raises(InputError, match=message):
        load_bundle(copy)


def test_an_index_of_another_encoder_is_refused(copy):
    header = copy / "index" / "index.json"
    metadata = json.loads(header.read_text())["metadata"]
    change_json(header, metadata={**metadata, "encoder": "f" * 12})
    relist(copy)
    with pytest.raises(InputError, match="the index was made by encoder: ffffffffffff"):
        load_bundle(copy)


def test_an_index_of_other_documents_is_refused(copy):
    lines = (copy / "documents.jsonl").read_text().replace("Baker", "Banker")
    (copy / "documents.jsonl").write_text(lines)
    relist(copy)
    with pytest.raises(InputError, match="the index's corpus"):
        load_bundle(copy)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 1}'])
def test_a_broken_manifest_is_one_clear_error(copy, content):
    (copy / MANIFEST).unlink()
    if content is not None:
        (copy / MANIFEST).write_text(content)
    with pytest.raises(
        InputError, match="export (it|the bundle) again" if content is not None else "holds no bundle"
    ):
        load_bundle(copy)


def test_a_directory_with_other_things_is_not_overwritten(tmp_path):
    parts = write_parts(tmp_path / "parts")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    arguments = {
        "name": "tiny",
        "encoder_directory": parts["encoder"],
        "ranker_directory": parts["ranker"],
        "vertical_directory": parts["vertical"],
        "documents": DOCUMENTS,
        "index": tiny_index(parts),
        "lexical_view": "short",
    }
    with pytest.raises(InputError, match="not empty and not a bundle"):
        write_bundle(tmp_path / "home", **arguments)
    with pytest.raises(InputError, match="the index has other documents"):
        write_bundle(tmp_path / "new", **{**arguments, "documents": DOCUMENTS[:-1]})
    arguments["index"].metadata["encoder"] = "f" * 12
    with pytest.raises(InputError, match="the index was made by encoder ffffffffffff"):
        write_bundle(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "parts"]

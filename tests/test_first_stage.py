"""The first stage that launchers mine with: unseen documents stay unseen, what is missing is said."""

import dataclasses
import sys

import pytest
from flax import nnx

from jaxsearch.data.sources import load_collection
from jaxsearch.data.verticals import load_vertical
from jaxsearch.encoder import Encoder, load_encoder
from jaxsearch.nn.bert import Bert
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_words
from train.encoder import SeenCorpus
from train.first_stage import open_first_stage

UNSEEN = frozenset(f"d{number:02}" for number in range(0, 40, 4))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    folders = write_parts(root)
    collection = load_collection(str(write_words(root / "collection", num_queries=72)))
    collection = dataclasses.replace(collection, unseen_documents=UNSEEN)
    return collection, load_vertical(folders["vertical"]), load_encoder(folders["encoder"])


def test_unseen_documents_are_neither_mined_nor_fitted_on(parts):
    collection, vertical, encoder = parts
    stage = open_first_stage(collection, vertical, encoder, view="short")
    queries = collection.split("validation")
    mined = stage.mine(queries, depth=40)
    assert not any(UNSEEN & found.keys() for found in mined.values())
    assert all(UNSEEN & found.keys() for found in stage.mine(queries, depth=40, seen_only=False).values())
    graded = stage.graded(queries)
    for query in queries:
        found = {graded.ids[position] for position in graded.candidates[query.id].positions.tolist()}
        assert not UNSEEN & (found | graded.qrels[query.id].keys())
    blind = {
        query: {document: 4 - grade if document in UNSEEN else grade for document, grade in grades.items()}
        for query, grades in collection.qrels.items()
    }
    other = open_first_stage(dataclasses.replace(collection, qrels=blind), vertical, encoder, view="short")
    assert other.order == stage.order


def test_mined_documents_are_the_best_of_the_fitted_sum(parts):
    collection, vertical, encoder = parts
    stage = open_first_stage(collection, vertical, encoder, view="short")
    assert stage.order.name == "sum"
    [query] = collection.split("validation")[:1]
    [mined] = stage.mine([query], depth=5).values()
    assert list(mined.values()) == sorted(mined.values(), reverse=True)
    found = stage.candidates([query])[query.id]
    scores = dict(zip(found.positions.tolist(), stage.order.scores(found).tolist(), strict=True))
    best = sorted(scores, key=lambda position: (-scores[position], position))[:5]
    assert list(mined) == [stage.searcher.index.ids[position] for position in best]


def test_without_graded_queries_candidates_are_those_of_rank_fusion(parts, capsys):
    collection, vertical, encoder = parts
    stage = open_first_stage(dataclasses.replace(collection, qrels={}), vertical, encoder, view="short")
    assert (stage.order.name, len(stage.queries)) == ("rrf", 0)
    assert "there are no graded validation queries" in " ".join(capsys.readouterr().out.split())


def test_without_bm25s_embeddings_find_candidates_alone(parts, monkeypatch, capsys):
    collection, vertical, encoder = parts
    monkeypatch.setitem(sys.modules, "bm25s", None)
    stage = open_first_stage(collection, vertical, encoder, view="short")
    assert stage.order.name == "encoder"
    assert "bm25s is not installed" in capsys.readouterr().out
    [query] = collection.split("validation")[:1]
    [mined] = stage.mine([query], depth=3).values()
    hits = stage.searcher.index.search(encoder.embed_queries([query.text]), 3, stage.seen())
    assert list(mined) == [stage.searcher.index.ids[position] for position in hits.positions[0].tolist()]


def test_an_encoder_mines_with_the_weights_that_it_has_now(parts):
    collection, vertical, encoder = parts
    corpus = SeenCorpus(encoder, collection, vertical, view="short")
    queries = collection.split("validation")[:3]
    before = corpus.mine(queries, depth=5)
    assert not any(UNSEEN & found.keys() for found in before.values())
    other = Encoder(Bert(encoder.encoder.backbone.config, rngs=nnx.Rngs(9)))
    corpus.use_weights(other)
    changed = corpus.mine(queries, depth=5)
    assert changed != before
    assert changed == SeenCorpus(encoder, collection, vertical, view="short").mine(queries, depth=5)
    corpus.use_weights(encoder.encoder)
    assert corpus.mine(queries, depth=5) == before

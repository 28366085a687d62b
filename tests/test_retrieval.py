"""Retrieval: exact against NumPy float64, real ScaNN, real bm25s, filters, shards, files, fusion."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsearch.errors import InputError
from jaxsearch.retrieval import NO_DOCUMENT, Hits, fusion, pad_hits, starved, to_run
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.retrieval.scann import ScannIndex


def unit(rng, *shape):
    embeds = rng.normal(size=shape).astype(np.float32)
    return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)


def names(count):
    return [f"d{number:05}" for number in range(count)]


def reference(scores, k, mask=None):
    """Stable float64 top k of dense scores [q n]."""
    scores = np.where(True if mask is None else mask, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    return best, np.where(np.isneginf(best), NO_DOCUMENT, order)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return unit(rng, 10, 24), unit(rng, 1003, 24), rng


@pytest.mark.parametrize("budget", [2**28, 64 * 4 * 100, 1])
def test_exact_equals_float64(data, budget):
    queries, documents, _ = data
    index = ExactIndex(documents, names(1003), memory_budget_bytes=budget)
    assert index.chunk_size * index.max_queries * 4 <= max(budget, index.max_queries * 4)
    scores, positions = index.search(queries, 20)
    expected = reference(queries.astype(np.float64) @ documents.T.astype(np.float64), 20)
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_allclose(scores, expected[0], atol=2e-6)  # measured max 6.3e-8
    assert (scores.dtype, positions.dtype) == (np.float32, np.int32)


def test_exact_on_eight_devices_equals_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    script = Path(__file__).with_name("eight_devices_retrieval.py")
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["150", "150"]  # 3 chunks of 50 rows on every device, 1,003 rows in all


@pytest.mark.parametrize("kind", ["shared", "per_query"])
def test_exact_filters_are_exact(data, kind):
    queries, documents, rng = data
    mask = rng.uniform(size=1003 if kind == "shared" else (10, 1003)) < 0.02
    scores, positions = ExactIndex(documents, names(1003)).search(queries, 40, mask)
    expected = reference(queries @ documents.T, 40, mask)
    np.testing.assert_array_equal(positions, expected[1])
    assert (positions[:, -1] == NO_DOCUMENT).all()
    assert np.isneginf(scores[positions == NO_DOCUMENT]).all()
    nothing = ExactIndex(documents, names(1003)).search(queries, 5, np.zeros(1003, bool))
    assert (nothing.positions == NO_DOCUMENT).all()


def test_exact_adds_weighted_features(data):
    queries, documents, rng = data
    features = rng.uniform(size=(1003, 2)).astype(np.float32)
    index = ExactIndex(documents, names(1003), features=features, weights=(2.0, 0.5, -0.25))
    expected = reference(2.0 * queries @ documents.T + features @ np.array([0.5, -0.25]), 15)
    scores, positions = index.search(queries, 15)
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_allclose(scores, expected[0], atol=2e-6)  # measured max 2.7e-7


def test_exact_breaks_ties_by_document_order():
    index = ExactIndex(np.ones((50, 4), np.float32), names(50), memory_budget_bytes=64 * 4 * 3)
    np.testing.assert_array_equal(
        index.search(np.ones((2, 4), np.float32), 12).positions, [list(range(12))] * 2
    )


def test_exact_compiles_ahead_and_never_after(data):
    queries, documents, rng = data
    index = ExactIndex(documents, names(1003), max_queries=8)
    count = index.compile(8, 100)
    assert count == index.num_compilations == 8
    mask = rng.uniform(size=(10, 1003)) < 0.5
    for number in (1, 2, 3, 5, 8, 10):
        for k in (1, 10, 99, 100):
            for chosen in (None, mask[0], mask[:number]):
                scores, positions = index.search(queries[:number], k, chosen)
                expected = reference(queries[:number] @ documents.T, k, chosen)
                np.testing.assert_array_equal(positions, expected[1])
                assert scores.shape == (number, k)
    assert index.num_compilations == count


def test_exact_k_beyond_the_corpus_and_no_queries():
    rng = np.random.default_rng(1)
    index = ExactIndex(unit(rng, 3, 4), names(3))
    hits = index.search(unit(rng, 2, 4), 5)
    assert hits.positions.shape == (2, 5)
    np.testing.assert_array_equal((hits.positions == NO_DOCUMENT).sum(1), [2, 2])
    assert index.search(np.zeros((0, 4), np.float32), 5).scores.shape == (0, 5)


def test_exact_in_bfloat16_stays_near(data):
    queries, documents, _ = data
    index = ExactIndex(documents, names(1003), dtype=jax.numpy.bfloat16)
    scores, _ = index.search(queries, 1)
    expected, _ = reference(queries @ documents.T, 1)
    np.testing.assert_allclose(scores, expected, atol=8e-3)  # measured max 2.0e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a", "a"]}, "more than once"),
        ({"ids": ["a"]}, "1 document ids for 2 rows"),
        ({"embeds": np.array([[np.nan, 0], [0, 1]], np.float32)}, "finite"),
        ({"weights": (1.0, 2.0)}, "weights"),
        ({"embeds": np.zeros((0, 2), np.float32), "ids": []}, "at least one document"),
    ],
)
def test_exact_refuses_what_does_not_fit(change, message):
    arguments = {"embeds": np.eye(2, dtype=np.float32), "ids": ["a", "b"]} | change
    with pytest.raises(InputError, match=message):
        ExactIndex(arguments.pop("embeds"), arguments.pop("ids"), **arguments)


@pytest.mark.parametrize("make", [ExactIndex, ScannIndex])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((1, 3), np.float32), 1), "queries must have shape"),
        ((np.ones((1, 2), np.float32), 0), "k must be at least 1"),
        ((np.ones((1, 2), np.float32), 1, np.ones(3, bool)), "filter mask must have shape"),
        ((np.ones((1, 2), np.float32), 1, np.ones(2, np.int32)), "filter mask must be boolean"),
    ],
)
def test_wrong_requests_are_refused(make, arguments, message):
    with pytest.raises(InputError, match=message):
        make(np.eye(2, dtype=np.float32), ["a", "b"]).search(*arguments)


@pytest.fixture(scope="module")
def clustered():
    """6,000 documents around 60 centres: what a tree with quantisation is made for."""
    rng = np.random.default_rng(2)
    centres = unit(rng, 60, 32)
    documents = centres[rng.integers(0, 60, 6000)] + 0.3 * unit(rng, 6000, 32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries = documents[rng.integers(0, 6000, 20)] + 0.1 * unit(rng, 20, 32)
    return queries.astype(np.float32), documents.astype(np.float32)


@pytest.fixture(scope="module")
def scann_index(clustered):
    return ScannIndex(clustered[1], names(6000), leaves_to_search=30, max_fetch=500)


def overlap(first, second):
    return np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(first, second, strict=True)])


def test_scann_finds_what_exact_finds(clustered, scann_index):
    queries, documents = clustered
    exact = ExactIndex(documents, names(6000)).search(queries, 10)
    hits = scann_index.search(queries, 10)
    assert overlap(exact.positions, hits.positions) >= 0.9  # measured 1.0
    expected = np.take_along_axis(queries @ documents.T, hits.positions, 1)
    np.testing.assert_allclose(hits.scores, expected, atol=1e-5)  # measured max 2.4e-7
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    assert not starved(hits, 6000).any()


def test_scann_over_fetches_under_a_filter_and_says_when_starved(clustered, scann_index):
    queries, documents = clustered
    rng = np.random.default_rng(3)
    mask = rng.uniform(size=6000) < 0.3
    exact = ExactIndex(documents, names(6000)).search(queries, 10, mask)
    hits = scann_index.search(queries, 10, mask)
    assert mask[hits.positions].all()
    assert overlap(exact.positions, hits.positions) >= 0.9  # measured 1.0
    assert not starved(hits, 6000, mask).any()
    far = np.zeros((20, 6000), bool)
    far[np.arange(20)[:, None], np.argsort(queries @ documents.T, axis=1)[:, :50]] = True
    far[0] = True
    hits = scann_index.search(queries, 10, far)
    np.testing.assert_array_equal(starved(hits, 6000, far), [False] + [True] * 19)
    few = np.zeros(6000, bool)
    exact = ExactIndex(documents, names(6000)).search(queries, 10, few)
    assert not starved(exact, 6000, few).any()


def test_scann_is_exhaustive_on_small_corpora(data):
    queries, documents, rng = data
    index = ScannIndex(documents[:923], names(923))
    exact = ExactIndex(documents[:923], names(923))
    mask = rng.uniform(size=923) < 0.2
    for k, chosen in ((10, None), (923, None), (1000, None), (30, mask)):
        found, expected = index.search(queries, k, chosen), exact.search(queries, k, chosen)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)  # measured max 1.5e-7
        np.testing.assert_array_equal(np.sort(found.positions), np.sort(expected.positions))


TEXTS = ["Negotiate labor disputes", "Repair aircraft engines and engines", "Labor law", "", "Repair shoes"]


def test_bm25_ranks_by_words_and_omits_the_rest():
    index = Bm25Index(TEXTS, names(5))
    scores, positions = index.search(["labor disputes", "ENGINES repair", "unheard-of", "the", ""], 3)
    np.testing.assert_array_equal(positions, [[0, 2, -1], [1, 4, -1], [-1] * 3, [-1] * 3, [-1] * 3])
    # Lucene's form by hand: idf = log(1 + (5 - 2 + .5) / 2.5) for "labor" in 2 of 5; lengths 3,4,2,0,2, mean
    # 2.2
    idf_labor, idf_disputes = np.log(1 + 3.5 / 2.5), np.log(1 + 4.5 / 1.5)
    expected = (idf_labor + idf_disputes) / (1 + 1.5 * (1 - 0.75 + 0.75 * 3 / 2.2))
    assert scores[0, 0] == pytest.approx(expected, rel=2e-7)  # measured 1.8e-8


def test_bm25_filters_and_ties():
    index = Bm25Index(["apple pear"] * 6, names(6))
    np.testing.assert_array_equal(index.search(["pear"], 4).positions, [[0, 1, 2, 3]])
    mask = np.array([[False, True, False, True, True, False], [True] + [False] * 5])
    np.testing.assert_array_equal(index.search(["pear", "pear"], 2, mask).positions, [[1, 3], [0, -1]])
    np.testing.assert_array_equal(index.search(["pear"], 2, mask[0]).positions, [[1, 3]])
    with pytest.raises(InputError, match="no document holds a word"):
        Bm25Index(["", "the"], names(2))


@pytest.mark.parametrize("kind", ["exact", "scann", "bm25"])
def test_saved_index_answers_the_same_and_holds_no_pickle(tmp_path, data, kind):
    queries, documents, rng = data
    folder = tmp_path / "index"
    if kind == "exact":
        features = rng.uniform(size=(1003, 1)).astype(np.float32)
        index = ExactIndex(
            documents, names(1003), features=features, weights=(1.0, 0.5), metadata={"encoder": "x"}
        )
    elif kind == "scann":
        index = ScannIndex(documents[:900], names(900), metadata={"encoder": "x"})
    else:
        index, queries = Bm25Index(TEXTS, names(5), metadata={"encoder": "x"}), ["labor disputes", "repair"]
    for _ in range(2):
        index.save(folder)
    loaded = type(index).load(folder)
    assert (list(loaded.ids), loaded.metadata) == (index.ids, {"encoder": "x"})
    first, second = index.search(queries, 5), loaded.search(queries, 5)
    np.testing.assert_array_equal(first.positions, second.positions)
    np.testing.assert_array_equal(first.scores, second.scores)
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in {".json", ".npy"}
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


def test_damaged_index_folders_are_refused(tmp_path):
    folder = tmp_path / "index"
    with pytest.raises(InputError, match="not a readable index"):
        ExactIndex.load(folder)
    ExactIndex(np.eye(3, dtype=np.float32), names(3)).save(folder)
    with pytest.raises(InputError, match="'exact' index"):
        ScannIndex.load(folder)
    array = (folder / "embeds.npy").read_bytes()
    (folder / "embeds.npy").write_bytes(array[:-5])
    with pytest.raises(InputError, match="damaged"):
        ExactIndex.load(folder)
    (folder / "embeds.npy").write_bytes(array)
    (folder / "ids.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(InputError, match="2 document ids for 3 rows"):
        ExactIndex.load(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("keep me")
    with pytest.raises(InputError, match="choose another directory"):
        ExactIndex(np.eye(3, dtype=np.float32), names(3)).save(other)
    assert (other / "precious.txt").exists()


def test_to_run_leaves_empty_places_out():
    hits = pad_hits(Hits(np.array([[2.0, 1.0]], np.float32), np.array([[1, 0]], np.int32)), 4)
    assert hits.scores.shape == (1, 4)
    assert to_run(hits, ["q"], ["a", "b"]) == {"q": {"b": 2.0, "a": 1.0}}


def test_reciprocal_rank_fusion_sums_over_the_systems_that_found_a_document():
    ranks = np.array([[1, 2, 0], [0, 1, 0]])
    expected = [1 / 61, 1 / 62 + 1 / 61, 0.0]
    np.testing.assert_allclose(fusion.reciprocal_rank_fusion(ranks), expected, rtol=1e-15)


def test_signals_of_chosen_documents_are_those_of_a_search():
    rng = np.random.default_rng(6)
    features = rng.normal(size=(40, 2)).astype(np.float32)
    embeds = rng.normal(size=(40, 8)).astype(np.float32)
    index = ExactIndex(embeds, names(40), features=features, weights=(0.5, 2.0, -1.0))
    query = rng.normal(size=8).astype(np.float32)
    hits = index.search(query[None], 40)
    own = index.similarity(query, hits.positions[0])
    np.testing.assert_allclose(own, hits.scores[0], atol=1e-5)  # measured maximum: 9e-7
    lexical = Bm25Index(["bake bread", "bake", "write code"], names(3))
    found = lexical.search(["bake bread"], 3)
    scores = lexical.scores("bake bread")
    assert scores[found.positions[0][:2]].tolist() == found.scores[0][:2].tolist()
    assert scores[2] == 0
    assert lexical.scores("zzz").tolist() == [0, 0, 0]


def test_exact_scans_a_large_corpus_in_bounded_time():
    rng = np.random.default_rng(5)
    index = ExactIndex(
        rng.normal(size=(100_000, 32)).astype(np.float32), names(100_000), memory_budget_bytes=2**22
    )
    queries = rng.normal(size=(16, 32)).astype(np.float32)
    index.compile(16, 100)
    started = time.monotonic()
    hits = index.search(queries, 100)
    assert time.monotonic() - started < 10  # measured .03 s
    assert len(set(hits.positions[0].tolist())) == 100

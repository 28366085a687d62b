"""A bundle's search in one process: orders, sources and depths that go together, filters that only remove."""

import numpy as np
import pytest

from jaxsearch.bundle import load_bundle
from jaxsearch.errors import InputError
from jaxsearch.search.candidates import find_candidates
from jaxsearch.search.requests import SearchRequest
from tests.tiny_bundle import DOCUMENTS, write_tiny_bundle

QUERIES = ("write code", "bake bread", "dig for iron data", "zzz")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


def ids(reply):
    return [result.id for result in reply.results]


def test_the_default_is_the_bundles_order(bundle):
    reply = bundle.search("write code")
    assert (reply.order, reply.depth_used) == ("ranker", {"retrieve": 5, "rank": 5})
    raw = [result.scores["relevance"]["raw"] for result in reply.results]
    assert raw == sorted(raw, reverse=True)
    assert [result.score for result in reply.results] == pytest.approx(np.interp(raw, [-1, 1], [0.1, 0.9]))
    assert ids(bundle.search("write code", top_k=2)) == ids(reply)[:2]


@pytest.mark.parametrize(
    ("options", "order", "first", "depth"),
    [
        ({}, "ranker", "rrf", 5),
        ({"rank_depth": 0}, "rrf", "rrf", 0),
        ({"rank_depth": 2}, "ranker", "rrf", 2),
        ({"order": "bm25"}, "bm25", "bm25", 0),
        ({"order": "encoder"}, "encoder", "encoder", 0),
        ({"order": "rrf", "rank_depth": 0}, "rrf", "rrf", 0),
        ({"sources": ["bm25"]}, "bm25", "bm25", 0),
        ({"sources": ["embedding"]}, "encoder", "encoder", 0),
        ({"sources": ["bm25"], "rank_depth": 3}, "ranker", "bm25", 3),
        ({"sources": ["embedding", "bm25"]}, "ranker", "rrf", 5),
        ({"order": "ranker", "sources": ["embedding"]}, "ranker", "encoder", 5),
    ],
)
def test_what_is_left_out_follows_from_what_is_said(bundle, options, order, first, depth):
    plan = bundle.searcher.plan(SearchRequest("q", **options))
    assert (plan.order.name, plan.first.name, plan.rank_depth) == (order, first, depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "best"}, "unknown order 'best'; there are bm25, encoder, rrf, ranker"),
        ({"order": "bm25", "sources": ["embedding"]}, "order 'bm25' reads bm25, which sources leave out"),
        ({"order": "ranker", "rank_depth": 0}, "order 'ranker' needs a rank depth of 1 or more, not 0"),
        ({"order": "rrf", "rank_depth": 3}, "order 'rrf' uses no ranker: leave the rank depth out, or set 0"),
        ({"sources": []}, "sources is empty; give some of embedding, bm25, or leave it out"),
        ({"sources": ["words"]}, "unknown source 'words'; sources are embedding, bm25"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"retrieve_depth": 0}, "retrieve_depth must be at least 1, not 0"),
        ({"rank_depth": -1}, "rank_depth must be at least 0, not -1"),
        ({"facets": ["salary"]}, "unknown field 'salary' in facets"),
        ({"fields": ["salary"]}, "unknown field 'salary' in fields"),
        ({"filter": {"field": "pay", "near": 3}}, "needs exactly one of eq"),
    ],
)
def test_what_does_not_go_together_is_refused(bundle, options, message):
    with pytest.raises(InputError, match=message):
        bundle.search("q", **options)


@pytest.mark.parametrize("order", ["bm25", "encoder", "rrf", "ranker"])
@pytest.mark.parametrize("query", QUERIES)
def test_a_filter_removes_documents_and_moves_none_in_orders_by_signals(bundle, order, query):
    whole = bundle.search(query, order=order)
    condition = {"field": "pay", "gte": 45}
    passing = {document.id for document in DOCUMENTS if document.fields["pay"] >= 45}
    left = bundle.search(query, order=order, filter=condition)
    assert set(ids(left)) == passing & set(ids(whole))
    if order != "rrf":  # whose ranks are those of what is left
        assert ids(left) == [key for key in ids(whole) if key in passing]
    assert left.starved
    assert not bundle.search(query, order=order, filter={"field": "pay", "exists": True}).starved


def test_a_query_too_long_for_the_ranker_is_refused_only_where_it_reads_it(bundle):
    query = "write code " * 60
    with pytest.raises(InputError, match="query"):
        bundle.search(query)
    assert ids(bundle.search(query, order="bm25")) == ids(bundle.search("write code", order="bm25"))


def test_signals_are_known_whichever_source_found_a_document(bundle):
    searcher = bundle.searcher
    embed = bundle.encoder.embed_queries(["write code"])[0]
    nearest = searcher.nearest(embed, 1, None)
    found = find_candidates(
        "write code", depth=5, bm25=searcher.bm25, index=searcher.index, query_embed=embed, nearest=nearest
    )
    assert (found.ranks["embedding"] > 0).sum() == 1
    hits = bundle.index.search(embed[None], 5)
    scores = dict(zip(hits.positions[0].tolist(), hits.scores[0].tolist(), strict=True))
    expected = [scores[position] for position in found.positions.tolist()]
    np.testing.assert_allclose(found.signals["similarity"], expected, atol=1e-5)  # measured maximum: 6e-8
    assert found.signals["bm25"].max() == 1.0
    assert found.signals["bm25"].min() >= 0.0
    lexical = searcher.bm25.scores("write code")
    assert (lexical[found.positions] > 0).tolist() == (found.signals["bm25"] > 0).tolist()


def test_searching_many_queries_finds_what_searching_one_does(bundle):
    searcher = bundle.searcher
    for query, found in zip(QUERIES, searcher.find_all(QUERIES, 3), strict=True):
        embed = bundle.encoder.embed_queries([query])[0]
        nearest = searcher.nearest(embed, 3, None)
        alone = find_candidates(
            query, depth=3, bm25=searcher.bm25, index=searcher.index, query_embed=embed, nearest=nearest
        )
        assert found.positions.tolist() == alone.positions.tolist()
        np.testing.assert_allclose(found.signals["similarity"], alone.signals["similarity"], atol=1e-5)
        assert {name: ranks.tolist() for name, ranks in found.ranks.items()} == {
            name: ranks.tolist() for name, ranks in alone.ranks.items()
        }


def test_explanations_state_signals_places_and_tokens(bundle):
    reply = bundle.search("write code", rank_depth=2, explain=True, fields=["title"])
    assert reply.order == "ranker"
    for result in reply.results:
        assert result.explain is not None
        assert result.explain["fused"]["order"] == "rrf"
        assert set(result.explain["signals"]) == {"similarity", "bm25", "ranker"}
        assert (result.explain["signals"]["ranker"] is None) == (result.score is None) == (result.rank > 2)
        assert (result.explain["tokens"] is None) == (result.rank > 2)
        assert set(result.fields) == {"title"}
    assert sorted(result.explain["fused"]["rank"] for result in reply.results) == [1, 2, 3, 4, 5]
    assert bundle.search("write code").results[0].explain is None
    assert bundle.search("zzz", order="bm25").results == []

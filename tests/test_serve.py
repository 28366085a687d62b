"""The server over real HTTP on loopback, with a real bundle of tiny random models."""

import base64
import json
import re

import numpy as np
import pytest

from jaxsearch.bundle import load_bundle
from jaxsearch.scoring.prefill import ScoreRequest
from tests.live_server import running, wait_for, wait_until_ready
from tests.tiny_bundle import DOCUMENTS, MAX_ITEM_TOKENS, write_tiny_bundle
from tests.wrong_requests import EMBED, LONG, WRONG_REQUESTS


@pytest.fixture(scope="module")
def bundle_directory(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def bundle(bundle_directory):
    return load_bundle(bundle_directory)


@pytest.fixture(scope="module")
def server(bundle_directory, tmp_path_factory):
    with running(bundle_directory, tmp_path_factory.mktemp("serve") / "log") as (_, client):
        assert client.get("/health").status_code == 200
        early = client.post("/v1/rerank", json={"query": "bread", "documents": ["Baker"]})
        assert early.status_code == 503
        assert int(early.headers["retry-after"]) >= 1
        wait_until_ready(client)
        yield client


def metric(client, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


@pytest.fixture(scope="module")
def scorer(bundle):
    return bundle.scorer()


def ranker_scores(bundle, scorer, query, texts):
    prompt = bundle.ranker.request(query, texts)
    return bundle.ranker.scores(scorer.score([ScoreRequest(prompt.prefix, prompt.items)])[0])


TEXTS = ["Baker.", "Nurse.", "Someone who bakes bread all night long."]


def test_rerank_orders_documents_by_the_rankers_score(server, bundle, scorer):
    reply = server.post(
        "/v1/rerank",
        json={"query": "bread", "documents": [*TEXTS[:2], {"text": TEXTS[2]}], "return_documents": True},
    ).json()
    expected = 1 / (1 + np.exp(-ranker_scores(bundle, scorer, "bread", TEXTS)))
    assert [result["index"] for result in reply["results"]] == np.argsort(-expected).tolist()
    for result in reply["results"]:
        # measured maximum: 6e-8 (same programs, other padding)
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)
        assert result["document"] == {"text": TEXTS[result["index"]]}
    assert reply["usage"]["prompt_tokens"] > reply["usage"]["shared_prefix_tokens"] > 0
    assert set(reply["timings_ms"]) == {"tokenize", "queue", "compute", "total"}
    assert reply["warnings"] == []


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_top_n_nulls_and_unknown_fields(server, path):
    body = {"query": "bread", "documents": TEXTS, "top_n": 2, "model": None, "rank_fields": ["text"]}
    reply = server.post(path, json=body)
    assert reply.status_code == 200
    assert len(reply.json()["results"]) == 2
    assert "document" not in reply.json()["results"][0]
    assert reply.json()["warnings"] == ["unknown field 'rank_fields' was ignored"]
    strict = server.post(path, params={"strict": "1"}, json=body)
    assert strict.status_code == 400
    assert "rank_fields" in strict.json()["message"]


def test_rerank_as_mixedbread_and_tei_say_it(server, bundle, scorer):
    raw = ranker_scores(bundle, scorer, "bread", TEXTS)
    order, probs = np.argsort(-raw).tolist(), 1 / (1 + np.exp(-raw))
    body = {"query": "bread", "input": TEXTS, "top_k": 2, "return_input": True}
    reply = server.post("/v1/reranking", json=body).json()
    assert [(row["index"], row["input"]) for row in reply["data"]] == [(i, TEXTS[i]) for i in order[:2]]
    assert [row["score"] for row in reply["data"]] == pytest.approx(probs[order[:2]].tolist(), abs=1e-5)
    listed = server.post("/rerank", json={"query": "bread", "texts": TEXTS, "raw_scores": True}).json()
    assert [row["index"] for row in listed] == order
    assert [row["score"] for row in listed] == pytest.approx(raw[order].tolist(), abs=1e-5)
    refused = server.post("/rerank", json={"query": "bread", "texts": TEXTS, "truncate": False})
    assert refused.status_code == 422
    assert "truncate" in refused.json()["error"]
    assert refused.json()["error_type"] == "Validation"
    empty = server.post("/rerank", json={"query": "bread", "texts": []})
    assert (empty.status_code, empty.json()["error_type"]) == (400, "Empty")


def test_score_with_the_rankers_prompt_in_two_dialects(server, bundle, scorer):
    expected = ranker_scores(bundle, scorer, "bread", TEXTS)
    ours = server.post("/v1/score", json={"query": "bread", "items": TEXTS}).json()
    np.testing.assert_allclose(ours["logits"], expected, atol=1e-5)  # measured maximum: 2e-7
    pairs = server.post("/score", json={"text_1": "bread", "text_2": TEXTS}).json()
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx(ours["scores"])


def test_score_of_raw_tokens_with_the_clients_labels(server, bundle, scorer):
    tokenizer = bundle.ranker.tokenizer
    labels = [3, 1, 4]
    body = {"query": "<|im_start|>a", "items": ["bc", "d"], "label_token_ids": labels, "apply_softmax": True}
    reply = server.post("/v1/score", json=body).json()
    items = [tokenizer.encode_template(text) for text in ("bc", "d")]
    prefix = tuple(tokenizer.encode_template("<|im_start|>a"))
    logits = scorer.score([ScoreRequest(prefix, items, tuple(labels))])[0]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(reply["scores"], probs, atol=1e-6)  # measured maximum: 1e-7
    as_ids = {"query": list(prefix), "items": items, "label_token_ids": labels, "apply_softmax": True}
    assert server.post("/v1/score", json=as_ids).json()["scores"] == reply["scores"]
    refused = server.post("/v1/score", json={**body, "apply_softmax": False})
    assert refused.status_code == 400
    assert "label rows" in refused.json()["message"]


def test_embeddings_as_floats_and_base64(server, bundle):
    texts = [f"text number {i}" for i in range(70)]
    floats = server.post("/v1/embeddings", json={"input": texts, "encoding_format": "float"}).json()
    embeds = np.array([entry["embedding"] for entry in floats["data"]], np.float32)
    np.testing.assert_allclose(embeds, bundle.encoder.embed_documents(texts), atol=1e-6)  # measured: 1e-7
    packed = server.post("/v1/embeddings", json={"input": texts[0], "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, embeds[0], atol=1e-6)  # measured maximum: 1e-7
    query = server.post("/v1/embeddings", json={"input": "bread", "input_type": "query"}).json()
    np.testing.assert_allclose(
        query["data"][0]["embedding"], bundle.encoder.embed_queries(["bread"])[0], atol=1e-6
    )  # measured 0 over 60 queries: the same program
    assert floats["usage"]["total_tokens"] > 70


def test_search_retrieves_ranks_and_calibrates(server, bundle, scorer):
    reply = server.post("/v1/search", json={"query": "write code", "top_k": 3, "explain": True}).json()
    texts = [bundle.vertical.document_text(document, "short") for document in DOCUMENTS]
    raw = dict(
        zip((d.id for d in DOCUMENTS), ranker_scores(bundle, scorer, "write code", texts), strict=True)
    )
    order = sorted(raw, key=lambda name: -raw[name])[:3]
    assert [result["id"] for result in reply["results"]] == order
    assert [result["rank"] for result in reply["results"]] == [1, 2, 3]
    for result in reply["results"]:
        scores = result["scores"]["relevance"]
        assert scores["raw"] == pytest.approx(raw[result["id"]], abs=1e-5)  # measured maximum: 2e-7
        assert scores["calibrated"] == pytest.approx(np.interp(scores["raw"], [-1, 1], [0.1, 0.9]))
        assert result["score"] == scores["calibrated"]
        assert ("bm25" in result["matched"]) == (result["id"] in ("coder", "miner"))
        assert result["explain"]["sources"].keys() == set(result["matched"])
        terms = [found["fusion_term"] for found in result["explain"]["sources"].values()]
        assert sum(terms) == pytest.approx(result["explain"]["fused"]["score"], rel=1e-12)
    assert reply["results"][0]["fields"] == dict(bundle.documents[[*raw].index(order[0])].fields)
    assert reply["total"] == 5
    assert reply["starved"] is False
    assert set(reply["timings_ms"]) == {"encode", "retrieve", "queue", "fuse", "tokenize", "rank", "total"}
    assert reply["model_revision"] == bundle.revision


def ids(reply):
    assert reply.status_code == 200, reply.text
    return {result["id"] for result in reply.json()["results"]}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"field": "pay", "gte": 50}, {"coder", "nurse", "miner"}),
        ({"field": "pay", "lt": 80.5}, {"baker", "nurse", "miner", "smith"}),
        ({"field": "remote", "eq": True}, {"coder"}),
        ({"field": "remote", "ne": True}, {"baker", "nurse", "miner", "smith"}),
        ({"field": "remote", "exists": False}, {"miner"}),
        ({"field": "tasks", "eq": "Write code."}, {"coder", "miner"}),
        ({"field": "title", "in": ["Baker", "Nurse", "Pilot"]}, {"baker", "nurse"}),
        ({"field": "title", "gt": "Nurse"}, {"coder", "smith"}),
        ({"not": {"field": "pay", "gt": 40}}, {"baker", "smith"}),
        (
            {"and": [{"field": "pay", "gt": 40}, {"or": [{"field": "pay", "eq": 70}, {"field": "pay", "gt": 80}]}]},
            {"coder", "miner"},
        ),
        ({"field": "title", "in": []}, set()),
    ],
)  # fmt: skip
def test_filters(server, condition, expected):
    reply = server.post("/v1/search", json={"query": "work", "filter": condition})
    assert ids(reply) == expected
    assert reply.json()["starved"] is True


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"field": "salary", "eq": 1}, "unknown field 'salary' in filter; known fields: pay, remote, tasks, title"),
        ({"field": "pay", "eq": "much"}, "field 'pay' in filter needs a number, not 'much'; known fields: pay"),
        ({"field": "pay", "eq": True}, "field 'pay' in filter needs a number, not True"),
        ({"field": "title", "in": [3]}, "field 'title' in filter needs a text, not 3"),
        ({"field": "title", "in": "Baker"}, "'in' on 'title' needs a list"),
        ({"field": "pay", "near": 3}, "needs exactly one of eq, ne, in"),
        ({"field": "pay", "lt": 3, "gt": 1}, "needs exactly one of eq, ne, in"),
        ({"field": "tasks", "lt": "a"}, "'lt' needs a number or text field"),
        ({"field": "pay", "exists": 1}, "'exists' on 'pay' needs true or false"),
        ({"and": []}, "'and' in a filter needs a list of at least one filter"),
        ({"and": [3]}, "a filter must be an object, not 3"),
        ({"and": [], "or": []}, "no other key"),
        ({"not": {}}, "a filter needs 'field', 'and', 'or' or 'not'"),
        ({"field": ["pay"], "eq": 1}, "unknown field ['pay']"),
    ],
)  # fmt: skip
def test_a_wrong_filter_is_400_and_names_what_is_known(server, condition, message):
    reply = server.post("/v1/search", json={"query": "work", "filter": condition})
    assert reply.status_code == 400
    assert message in reply.json()["message"]
    assert reply.json()["param"] == "filter"


def test_a_filter_nested_without_end_is_refused(server):
    condition = {"field": "pay", "gt": 1}
    for _ in range(200):
        condition = {"not": condition}
    reply = server.post("/v1/search", json={"query": "work", "filter": condition})
    assert reply.status_code == 400
    assert "nested at most 32 deep" in reply.json()["message"]


def test_facets_count_the_values_of_the_candidates(server):
    body = {"query": "work", "facets": ["remote", "tasks"], "filter": {"field": "pay", "gte": 50}}
    facets = server.post("/v1/search", json=body).json()["facets"]
    assert facets["remote"] == [{"value": False, "count": 1}, {"value": True, "count": 1}]
    assert facets["tasks"][0] == {"value": "Write code.", "count": 2}
    refused = server.post("/v1/search", json={"query": "work", "facets": ["salary"]})
    assert (refused.status_code, refused.json()["param"]) == (400, "facets")
    assert "known fields: pay, remote, tasks, title" in refused.json()["message"]


def test_a_cursor_pages_through_one_ranked_list(server):
    whole = server.post("/v1/search", json={"query": "work", "top_k": 5}).json()
    assert whole["cursor"] is None
    page = server.post("/v1/search", json={"query": "work", "top_k": 2}).json()
    seen = [result["id"] for result in page["results"]]
    while page["cursor"]:
        page = server.post("/v1/search", json={"query": "work", "top_k": 2, "cursor": page["cursor"]}).json()
        seen += [result["id"] for result in page["results"]]
    assert seen == [result["id"] for result in whole["results"]]
    gone = server.post("/v1/search", json={"query": "work", "cursor": "0123456789abcdef-2"})
    assert gone.status_code == 410
    assert server.post("/v1/search", json={"query": "work", "cursor": "x"}).status_code == 400


def test_search_without_ranking_or_with_one_source(server):
    plain = server.post("/v1/search", json={"query": "write code", "rank": {"depth": 0}}).json()
    scores = [result["score"] for result in plain["results"]]
    assert scores == sorted(scores, reverse=True)
    assert plain["depth_used"] == {"retrieve": 5, "rank": 0}
    words = {"query": "write code", "retrieve": {"sources": ["bm25"]}}
    assert ids(server.post("/v1/search", json=words)) == {"coder", "miner"}
    nothing = server.post("/v1/search", json={**words, "query": "zzz"}).json()
    assert nothing["results"] == []
    shallow = server.post("/v1/search", json={"query": "work", "rank": {"depth": 2}}).json()
    assert [result["score"] is None for result in shallow["results"]] == [False, False, True, True, True]


def test_search_returns_the_fields_that_are_asked_for(server):
    body = {"query": "bread", "fields": ["title"]}
    assert all(
        set(result["fields"]) == {"title"}
        for result in server.post("/v1/search", json=body).json()["results"]
    )
    wrong = server.post("/v1/search", json={**body, "fields": ["salary"]})
    assert (wrong.status_code, "unknown field 'salary' in fields" in wrong.json()["message"]) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    WRONG_REQUESTS,
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_wrong_request_gets_its_status_and_the_server_lives_on(server, path, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = server.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text[:500]
    told = reply.json()["error"] if path == EMBED else reply.json()
    assert message in told["message"]
    assert told["type"]
    assert told["code"]
    assert server.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"order": "best"}, "order"),
        ({"order": "rrf", "rank": {"depth": 3}}, "rank.depth"),
        ({"order": "ranker", "rank": {"depth": 0}}, "rank.depth"),
        ({"order": "ranker", "retrieve": {"sources": []}}, "retrieve.sources"),
        ({"order": "bm25", "retrieve": {"sources": ["embedding"]}}, "order"),
    ],
)
def test_a_search_that_cannot_be_is_blamed_on_its_field(server, options, param):
    reply = server.post("/v1/search", json={"query": "a", **options})
    assert (reply.status_code, reply.json()["param"]) == (400, param)


def test_a_query_that_does_not_fit_is_blamed(server):
    for path, more in (("/v1/search", {}), ("/v1/rerank", {"documents": ["b"]})):
        for query in ("q" * 300, LONG):
            reply = server.post(path, json={"query": query, **more})
            assert (reply.status_code, reply.json()["param"]) == (400, "query")


def test_a_document_of_ten_megabytes_is_cut_and_scored(server):
    reply = server.post("/v1/rerank", json={"query": "a", "documents": [LONG, "short"]})
    assert reply.status_code == 200, reply.text[:500]
    results = {result["index"]: result for result in reply.json()["results"]}
    assert results[0]["truncated"] is True
    assert results[1]["truncated"] is False
    assert reply.json()["usage"]["prompt_tokens"] <= 80 + 2 * MAX_ITEM_TOKENS
    assert server.post("/v1/embeddings", json={"input": [LONG]}).status_code == 200


def test_unknown_paths_and_methods(server):
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/rerank").status_code == 405
    assert server.get("/v1/nothing").json()["object"] == "error"
    assert server.get("/v1/rerank").json()["code"] == "method_not_allowed"
    assert "/v1/nothing: not found; /docs lists" in server.get("/v1/nothing").json()["message"]
    assert "/v1/rerank: not allowed, use POST; /docs lists" in server.get("/v1/rerank").json()["message"]
    assert (server.head("/").status_code, server.head("/").content) == (200, b"")
    assert server.get("/v1/embeddings").json()["error"]["code"] == "method_not_allowed"
    assert server.get("/embed").json()["error_type"] == "Validation"


def test_openapi_describes_the_bodies(server):
    described = server.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    assert schemas["SearchBody"]["properties"]["top_k"]["maximum"] == 1000
    assert [schemas[name]["additionalProperties"] for name in ("SearchBody", "RankOptions")] == [False, False]
    answered = described["paths"]["/v1/search"]["post"]["responses"]["200"]["content"]["application/json"]
    assert answered["schema"]["$ref"].endswith("/SearchReplyBody")
    for path in ("/v1/search", "/v1/rerank", "/v1/score", "/v1/embeddings"):
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for reference in schema.get("anyOf", [schema]):
            assert reference["$ref"].rpartition("/")[2] in schemas


def test_info_models_and_request_ids(server, bundle):
    info = server.get("/info").json()
    assert info["state"] == "ready"
    assert info["model_revision"] == bundle.revision
    assert info["fields"] == ["pay", "remote", "tasks", "title"]
    assert info["num_known_answers"] == 1
    assert [entry["id"] for entry in server.get("/v1/models").json()["data"]] == ["tiny", "encoder", "ranker"]
    reply = server.post("/v1/search", json={"query": "a"}, headers={"x-request-id": "r1"})
    assert reply.headers["x-request-id"] == "r1"
    assert reply.headers["x-model-revision"] == bundle.revision


def test_two_hundred_random_requests_compile_nothing(server):
    random = np.random.default_rng(0)
    programs = server.get("/info").json()["num_programs"]

    def text(most):
        return "".join(random.choice(list("abc de"), int(random.integers(1, most)))) + "x"

    def ask(_):
        kind = int(random.integers(4))
        documents = [text(90) for _ in range(int(random.integers(1, 30)))]
        if kind == 0:
            return server.post("/v1/rerank", json={"query": text(20), "documents": documents})
        if kind == 1:
            return server.post("/v1/embeddings", json={"input": documents})
        if kind == 2:
            labels = random.integers(0, 200, int(random.integers(1, 16))).tolist()
            items = [document[:60] for document in documents]
            return server.post(
                "/v1/score", json={"query": text(70), "items": items, "label_token_ids": labels}
            )
        chosen = {"field": "pay", "gt": int(random.integers(100))}
        body = {"query": text(20), "top_k": int(random.integers(1, 6))}
        return server.post("/v1/search", json=body | ({"filter": chosen} if random.integers(2) else {}))

    before = metric(server, "items_scored_total")
    assert {ask(i).status_code for i in range(200)} == {200}
    assert metric(server, "items_scored_total") > before
    assert metric(server, "recompiles_total") == 0
    assert metric(server, "ready") == 1
    # The last launch is counted after its reply.
    wait_for(lambda: metric(server, "batch_running_seconds") == 0)
    assert server.get("/info").json()["num_programs"] == programs

"""Requests that cannot be answered: path, body, status, and what the message says."""

LONG = "word " * 2_000_000
SEARCH, RERANK, SCORE, EMBED = "/v1/search", "/v1/rerank", "/v1/score", "/v1/embeddings"


def nested(depth):
    return b'{"query": ' + b"[" * depth + b"]" * depth + b"}"


WRONG_REQUESTS = [
    (RERANK, {"query": "", "documents": ["a"]}, 400, "query is empty; give some text"),
    (RERANK, {"query": " \n", "documents": ["a"]}, 400, "query is empty"),
    (RERANK, {"query": "a", "documents": []}, 400, "documents is empty"),
    (SEARCH, {"query": "a", "filters": {}}, 400, "unknown fields: filters; did you mean filter?"),
    (SEARCH, {"query": "a", "rank": {"dept": 3}}, 400, "unknown fields: rank.dept; did you mean depth?"),
    (RERANK, {"query": "a"}, 400, "documents: field required"),
    (RERANK, {"query": "a", "documents": ["b"] * 1_000_000}, 413, "documents has 1000000 entries, at most 1000"),
    (RERANK, {"query": LONG, "documents": ["b"]}, 400, "10000000 characters; with the prompt at most 80 tokens fit"),
    (RERANK, {"query": "q" * 300, "documents": ["b"]}, 400, "at most 80 are allowed: shorten the query"),
    (RERANK, {"query": 3, "documents": ["b"]}, 400, "query: must be a text"),
    (RERANK, {"query": "a", "documents": "b"}, 400, "documents: must be a list"),
    (RERANK, {"query": "a", "documents": [None]}, 400, "documents.0: "),
    (RERANK, {"query": "a", "documents": [{"title": "b"}]}, 400, "documents.0"),
    (RERANK, {"query": "a", "documents": ["b"], "top_n": 0}, 400, "top_n: "),
    (RERANK, {"query": "a", "documents": ["b"], "model": "gpt"}, 404, "model 'gpt' is not served here"),
    (RERANK, b"{", 400, "not valid JSON"),
    (RERANK, b"", 400, "not valid JSON"),
    (RERANK, b"\xff\xfe", 400, "not valid JSON"),
    (RERANK, b"[1]", 400, "must be a JSON object"),
    (RERANK, b'{"query": "\\ud800", "documents": ["a"]}', 400, "not valid JSON"),
    (RERANK, nested(100_000), 400, "not valid JSON"),
    (RERANK, b'{"query": "a", "documents": ["b"], "top_n": NaN}', 400, "not valid JSON"),
    (RERANK, b'{"query": "a", "documents": ["b"], "top_n": 1e999}', 400, ""),
    (RERANK, b" " * (33 * 2**20), 413, "at most 33554432 are allowed"),
    (SCORE, {"query": "a", "items": []}, 400, "items is empty"),
    (SCORE, {"query": "a", "items": [[1, 2]]}, 400, "token ids need label_token_ids"),
    (SCORE, {"query": "a", "items": ["b"], "label_token_ids": []}, 400, "1 to 16 label tokens"),
    (SCORE, {"query": "a", "items": ["b"], "label_token_ids": [-1]}, 400, "label token ids must be in"),
    (SCORE, {"query": [5], "items": [[999999]], "label_token_ids": [1]}, 400, "token ids must be in"),
    (SCORE, {"query": "a", "items": ["b" * 99], "label_token_ids": [1]}, 400, "an item of 99 tokens does not fit"),
    (SCORE, {"query": "a", "items": [""], "label_token_ids": [1]}, 400, "item without tokens"),
    (SCORE, {"query": "a", "items": ["b"], "item_first": True}, 400, "item_first is not supported"),
    (SCORE, {"text_1": "a"}, 400, "text_2: field required"),
    (EMBED, {"input": []}, 400, "input is empty"),
    (EMBED, {"input": ["a", ""]}, 400, "input.1 is empty"),
    (EMBED, {"input": ["a"] * 1001}, 413, "input has 1001 entries"),
    (EMBED, {"input": "a", "dimensions": 7}, 400, "dimensions must be 16"),
    (EMBED, {"input": [[1, 2], [3]]}, 400, "input: token ids are not taken; send texts"),
    (EMBED, {"input": [1, 2, 3]}, 400, "input: token ids are not taken; send texts"),
    (EMBED, {"input": " "}, 400, "input is empty"),
    (SEARCH, {"query": ""}, 400, "query is empty; give some text"),
    (SEARCH, {}, 400, "query: field required"),
    (SEARCH, {"query": "a", "vertical": "people"}, 404, "unknown vertical 'people'; this server has 'jobs'"),
    (SEARCH, {"query": "a", "top_k": 0}, 400, "top_k: "),
    (SEARCH, {"query": "a", "top_k": 1.5}, 400, "top_k: "),
    (SEARCH, {"query": "a", "filter": [1]}, 400, "filter: "),
    (SEARCH, {"query": "a", "retrieve": {"sources": []}}, 400, "sources is empty"),
    (SEARCH, {"query": "a", "retrieve": {"sources": ["google"]}}, 400, "retrieve.sources.0"),
    (SEARCH, {"query": "a", "rank": {"objective": {"click": 1}}}, 400, "this server has 'relevance' only"),
    (SEARCH, {"query": "a", "order": "best"}, 400, "unknown order 'best'; there are bm25"),
    (SEARCH, {"query": "a", "timeout_ms": 0.0001}, 504, "time passed"),
    (SEARCH, {"query": "a", "order": "bm25", "timeout_ms": 0.0001}, 504, "time passed"),
]  # fmt: skip

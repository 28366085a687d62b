"""What the sender of a wrong body is told, word for word."""

import pytest

from serve.dialects import CohereEmbedBody, EmbeddingsBody, RerankBody, TeiRerankBody
from serve.protocol import PairsBody, RequestError, ScoreBody, SearchBody, validate


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (RerankBody, {"query": "a", "documents": [1, 2]}, "documents.0, documents.1: must be a text or an object"),
        (RerankBody, {"query": "a", "documents": [*range(50)]},
         "documents.0, documents.1, documents.2 and 47 more: must be a text or an object"),
        (RerankBody, {"query": "a", "documents": [{"title": "b"}]}, "documents.0.text: field required"),
        (RerankBody, {"query": 3, "documents": "b"}, "query: must be a text; documents: must be a list"),
        (ScoreBody, {"query": "a", "items": ["x", None]}, "items.1: must be a text"),
        (ScoreBody, {"query": "a", "items": [[1, "a"]]}, "items.0.1: must be a whole number"),
        (ScoreBody, {"query": "a", "items": [None]}, "items.0: must be a text or a list"),
        (SearchBody, {"query": "a", "filter": []}, "filter: must be an object"),
        (SearchBody, {"query": "a", "top_k": 1001}, "top_k: must be less than or equal to 1000"),
        (SearchBody, {"query": "a", "explain": 1, "timeout_ms": "x", "top_k": 1.5, "facets": 1, "filter": 1},
         "top_k: must be a whole number; filter: must be an object; facets: must be a list and 2 more"),
        (TeiRerankBody, {"query": "a", "texts": ["b"], "truncate": False}, "truncate: must be true"),
        (EmbeddingsBody, {"input": ["a", 1]}, "input.1: must be a text"),
        (CohereEmbedBody, {"texts": ["a"], "embedding_types": ["int8"]},
         "embedding_types.0: must be 'float' or 'base64'"),
    ],
)  # fmt: skip
def test_a_complaint_is_short_and_names_the_field(kind, body, message):
    with pytest.raises(RequestError) as caught:
        validate(kind, body)
    assert caught.value.message == message
    assert message.startswith(caught.value.param)


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(RerankBody, "query"), (ScoreBody, "query"), (SearchBody, "query"), (PairsBody, "text_1")],
)
def test_nothing_and_blanks_are_told_alike(kind, key, text):
    with pytest.raises(RequestError) as caught:
        validate(kind, {key: text})
    told = caught.value
    assert (told.message, told.code, told.param) == (f"{key} is empty; give some text", "empty_input", key)

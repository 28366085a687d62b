"""The bodies and replies of other services' clients, so that they can talk to this server unchanged.

A rerank body is told by its keys: TEI says `texts`, Mixedbread `input`, Voyage `top_k` or `truncation`; Cohere and Jina
are the rest. What is common to all, and how bodies are checked, is in `protocol`.
"""

import base64
import dataclasses
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from serve.protocol import Body, Text

TopN = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One document after ranking, best first in a list; `index` is its place in the request."""

    index: int
    score: float
    raw: float
    text: str
    is_truncated: bool


class DocumentObject(Body):
    text: str


class RerankBody(Body):
    """Cohere v1 and v2, Jina."""

    items_key: ClassVar[str] = "documents"
    query: Text
    documents: list[str | DocumentObject]
    top_n: TopN | None = None
    return_documents: bool | None = None
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        return [entry.text if isinstance(entry, DocumentObject) else entry for entry in self.documents]

    def reply(self, ranked: Sequence[Ranked], *, model: str, usage: dict[str, Any]) -> Any:
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "rerank",
            "model": model,
            "results": self._results(ranked[: self.top_n]),
            "usage": usage,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }

    def _results(self, ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
        results = []
        for entry in ranked:
            result = {
                "index": entry.index,
                "relevance_score": entry.score,
                "truncated": entry.is_truncated,
            }
            if self.return_documents:
                result["document"] = {"text": entry.text}
            results.append(result)
        return results


class VoyageRerankBody(RerankBody):
    """Voyage: `top_k`; documents come back as texts, and the list is called `data`."""

    top_k: TopN | None = None
    truncation: Literal[True] | None = None
    """Texts are always cut to the model's limit, at their end."""

    def reply(self, ranked: Sequence[Ranked], *, model: str, usage: dict[str, Any]) -> Any:
        kept = ranked[: self.top_k or self.top_n]
        data = [{"index": entry.index, "relevance_score": entry.score} for entry in kept]
        if self.return_documents:
            data = [{**row, "document": entry.text} for row, entry in zip(data, kept, strict=True)]
        return {
            "object": "list",
            "data": data,
            "results": self._results(kept),
            "model": model,
            "usage": usage,
        }


class MixedbreadRerankBody(Body):
    """Mixedbread."""

    items_key: ClassVar[str] = "input"
    query: Text
    input: list[str]
    top_k: TopN | None = None
    return_input: bool | None = None
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        return self.input

    def reply(self, ranked: Sequence[Ranked], *, model: str, usage: dict[str, Any]) -> Any:
        data = [
            {"index": entry.index, "score": entry.score, "object": "rank_result"}
            | ({"input": entry.text} if self.return_input else {})
            for entry in ranked[: self.top_k]
        ]
        asked = {"top_k": self.top_k or len(ranked), "return_input": bool(self.return_input)}
        return {"object": "list", "data": data, "model": model, "usage": usage, **asked}


class TeiRerankBody(Body):
    """Text Embeddings Inference: a bare list of all texts."""

    items_key: ClassVar[str] = "texts"
    query: Text
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: Literal[True] | None = None
    truncation_direction: Literal["Right"] | None = None
    model: str | None = None

    def reply(self, ranked: Sequence[Ranked], *, model: str, usage: dict[str, Any]) -> Any:
        return [
            {"index": entry.index, "score": entry.raw if self.raw_scores else entry.score}
            | ({"text": entry.text} if self.return_text else {})
            for entry in ranked
        ]


AnyRerankBody = RerankBody | VoyageRerankBody | MixedbreadRerankBody | TeiRerankBody


def rerank_kind(body: dict[str, Any]) -> type[AnyRerankBody]:
    """Which dialect a body speaks."""
    if "texts" in body:
        return TeiRerankBody
    if "input" in body:
        return MixedbreadRerankBody
    return VoyageRerankBody if {"top_k", "truncation"} & body.keys() else RerankBody


class EmbeddingsBody(Body):
    """OpenAI, Voyage; `input_type` "query" puts the encoder's instruction before each text."""

    items_key: ClassVar[str] = "input"
    input: str | list[str]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    input_type: Literal["query", "document"] | None = None
    user: str | None = None
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        return _listed(self.input)

    @property
    def is_query(self) -> bool:
        return self.input_type == "query"

    def reply(self, embeds: np.ndarray, *, model: str, tokens: int) -> Any:
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(row, self.encoding_format)}
            for index, row in enumerate(embeds)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}


class CohereEmbedBody(Body):
    """Cohere v2: one list for every type of number asked for."""

    items_key: ClassVar[str] = "texts"
    texts: list[str]
    input_type: str | None = None
    embedding_types: list[Literal["float", "base64"]] | None = None
    truncate: Literal["END"] | None = None
    dimensions: int | None = None
    model: str | None = None

    @property
    def is_query(self) -> bool:
        return self.input_type == "search_query"

    def reply(self, embeds: np.ndarray, *, model: str, tokens: int) -> Any:
        kinds = self.embedding_types or ["float"]
        return {
            "id": f"embed-{uuid.uuid4().hex}",
            "embeddings": {kind: [_encoded(row, kind) for row in embeds] for kind in kinds},
            "texts": self.texts,
            "response_type": "embeddings_by_type",
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
        }


class TeiEmbedBody(Body):
    """Text Embeddings Inference, Hugging Face's `InferenceClient`: a bare list of vectors."""

    items_key: ClassVar[str] = "inputs"
    inputs: str | list[str]
    normalize: Literal[True] | None = None
    """Vectors have length 1 here."""
    truncate: Literal[True] | None = None
    truncation_direction: Literal["Right"] | None = None
    prompt_name: Literal["query", "document"] | None = None
    dimensions: int | None = None
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        return _listed(self.inputs)

    @property
    def is_query(self) -> bool:
        return self.prompt_name == "query"

    def reply(self, embeds: np.ndarray, *, model: str, tokens: int) -> Any:
        return embeds.tolist()


AnyEmbedBody = EmbeddingsBody | CohereEmbedBody | TeiEmbedBody


def embed_kind(path: str) -> type[AnyEmbedBody]:
    """Which dialect a path speaks."""
    return {"/v2/embed": CohereEmbedBody, "/embed": TeiEmbedBody}.get(path, EmbeddingsBody)


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _encoded(row: np.ndarray, encoding: str | None) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return row.tolist()

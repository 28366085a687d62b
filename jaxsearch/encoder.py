"""The bi-encoder: one network for queries and documents, its pooling, its loss, and its host-side use.

`Encoder` is the trained module, `TextEncoder` puts a tokenizer and fixed shapes around it: texts in, unit vectors out.
Which documents stand against a query is decided in `data.batches`; searching is `retrieval`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxsearch import checkpoints, losses
from jaxsearch.data.batches import pad_tokens
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.nn.bert import Bert
from jaxsearch.nn.layers import last_hidden
from jaxsearch.nn.transformer import Decoder
from jaxsearch.sharding import on_one_device

POOLINGS = ("mean", "last")
ROWS = (1, 8, 64)
"""Batch sizes that `TextEncoder` compiles: one query, a few, many."""
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
"""Padded lengths that it compiles, up to its maximum."""


class Encoder(nnx.Module):
    """Token ids to one embedding a row: backbone, pooling over real tokens, L2 normalisation."""

    def __init__(self, backbone: Bert | Decoder, *, pooling: str = "mean"):
        if pooling not in POOLINGS:
            raise InputError(f"unknown pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
        self.backbone = backbone
        self.pooling = pooling

    def __call__(self, tokens: Int[Array, "b t"], where: Bool[Array, "b t"]) -> Float[Array, "b e"]:
        """Unit vectors in float32. A row without any real token gives a zero vector."""
        hidden = self.backbone(tokens, where=where)
        if self.pooling == "last":
            last = last_hidden(hidden, where).astype(jnp.float32)
            return _unit(jnp.where(where.any(axis=-1, keepdims=True), last, 0.0))
        weights = where.astype(jnp.float32)
        total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weights)
        return _unit(total / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1.0))

    def packed(
        self, tokens: Int[Array, "w t"], segment_ids: Int[Array, "w t"], ends: Int[Array, "m"]
    ) -> Float[Array, "m e"]:
        """The same vectors for m texts that `data.batches.pack_tokens` has put one after another into w rows."""
        hidden = self.backbone(tokens, where=segment_ids > 0, segment_ids=segment_ids)
        states = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
        flat, most = segment_ids.reshape(-1), ends.shape[0] + 1
        sizes = jax.ops.segment_sum(jnp.ones(flat.shape, jnp.float32), flat, num_segments=most)[1:, None]
        if self.pooling == "last":
            return _unit(jnp.where(sizes > 0, states[ends], 0.0))
        return _unit(jax.ops.segment_sum(states, flat, num_segments=most)[1:] / jnp.maximum(sizes, 1.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderBatch:
    """q queries with c documents each, m = q * c in all, a query's first document its positive.

    Queries and then documents stand in rows as `data.batches.pack_tokens` puts one list there: `segment_ids` from 1
    (0: padding), `ends` the places of their last tokens in the rows put end to end. `allowed` (see
    `data.batches.allowed_in_batch`) says which of the m may stand against a query.
    The rows are one group, so this batch is not cut into microbatches.
    """

    tokens: Int[Any, "w t"]
    segment_ids: Int[Any, "w t"]
    query_ends: Int[Any, "q"]
    document_ends: Int[Any, "q c"]
    allowed: Bool[Any, "q m"]


@dataclasses.dataclass(frozen=True)
class EncoderLoss:
    """InfoNCE over the batch plus a margin between a query's positive and its own negatives.

    The published system states neither value; these are starting values, not tuned yet.
    """

    temperature: float = 0.05
    margin: float = 0.1
    margin_weight: float = 0.2

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be above 0, not {self.temperature}")

    def __call__(self, encoder: Encoder, batch: EncoderBatch):
        ends = jnp.concatenate([batch.query_ends, batch.document_ends.reshape(-1)])
        embeds = encoder.packed(batch.tokens, batch.segment_ids, ends)
        num_queries = batch.query_ends.shape[0]
        total, count, metrics = self.of_vectors(embeds[:num_queries], embeds[num_queries:], batch.allowed)
        return total, count, metrics | losses.token_counts(batch.segment_ids > 0)

    def of_vectors(
        self, queries: Float[Array, "q e"], flat: Float[Array, "m e"], allowed: Bool[Array, "q m"]
    ):
        """The same from unit vectors: Σ over queries, their number, means of the terms, in nats."""
        num_queries = queries.shape[0]
        per_query = flat.shape[0] // num_queries
        positive_index = jnp.arange(num_queries, dtype=jnp.int32) * per_query
        contrastive = losses.info_nce(
            queries, flat, positive_index, temperature=self.temperature, where=allowed
        )
        own = jnp.einsum("qe,qce->qc", queries, flat.reshape(num_queries, per_query, -1))
        positives, negatives = jnp.broadcast_to(own[:, :1], own[:, 1:].shape), own[:, 1:]
        margins = losses.margin_loss(positives, negatives, margin=self.margin).mean(axis=-1)
        hits = (positives > negatives).all(axis=-1)
        count = jnp.asarray(num_queries, jnp.float32)
        metrics = {
            "info_nce": contrastive.mean(),
            "margin": margins.mean(),
            "own_accuracy": hits.mean(dtype=jnp.float32),
        }
        return (contrastive + self.margin_weight * margins).sum(), count, metrics


def _unit(vectors: Float[Array, "b e"]) -> Float[Array, "b e"]:
    return vectors * jax.lax.rsqrt(jnp.maximum((vectors**2).sum(axis=-1, keepdims=True), 1e-12))


class TextEncoder:
    """Texts to unit vectors, in compiled fixed shapes.

    Args: `query_instruction` is put before every query (never before documents); longer texts are cut at
    `max_query_tokens` / `max_document_tokens`.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        *,
        query_instruction: str = "",
        max_query_tokens: int = 64,
        max_document_tokens: int = 256,
        version: str = "",
    ):
        longest, backbone = max(max_query_tokens, max_document_tokens), encoder.backbone
        if isinstance(backbone, Bert) and longest > backbone.config.max_positions:
            raise InputError(
                f"this encoder has {backbone.config.max_positions} positions: texts of {longest} tokens do not fit, "
                "lower max_query_tokens or max_document_tokens"
            )
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.query_instruction = query_instruction
        self.max_query_tokens = max_query_tokens
        self.max_document_tokens = max_document_tokens
        self.version = version
        self._graphdef, state = nnx.split(encoder)
        self._state = on_one_device(state)
        self._programs: dict[tuple[int, int], Callable] = {}

    @property
    def embed_dim(self) -> int:
        return self.encoder.backbone.config.embed_dim

    @property
    def num_compilations(self) -> int:
        return len(self._programs)

    def compile(self, *, rows: Sequence[int] = ROWS, documents: bool = False) -> int:
        """Compiles every query shape (with `documents`, every document shape too), so that no later call compiles.

        Returns: the number of programs.
        """
        lengths = {*self._lengths(self.max_query_tokens)}
        if documents:
            lengths |= {*self._lengths(self.max_document_tokens)}
        for length in sorted(lengths):
            for count in rows:
                self._program(count, length)
        return self.num_compilations

    def use_weights(self, encoder: Encoder) -> None:
        """Embeds with this encoder's weights from now on, wherever they are; same shapes: nothing is compiled again."""
        self._state = on_one_device(nnx.state(encoder))

    def embed_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "q e"]:
        return self.embed_encoded(self.encode_queries(texts), is_query=True)

    def embed_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "c e"]:
        return self.embed_encoded(self.encode_documents(texts), is_query=False)

    def encode_queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids as the network sees them, instruction and special tokens included."""
        return self._encode([self.query_instruction + text for text in texts], self.max_query_tokens)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, self.max_document_tokens)

    def _encode(self, texts: Sequence[str], maximum: int) -> list[list[int]]:
        """Cut to `maximum`, the closing special token (where the tokenizer has one) kept."""
        rows = self.tokenizer.encode_batch(texts, special=True)
        closing = self.tokenizer.encode_batch([""], special=True)[0][-1:]
        return [row if len(row) <= maximum else [*row[: maximum - len(closing)], *closing] for row in rows]

    @staticmethod
    def _lengths(maximum: int) -> tuple[int, ...]:
        return (*(length for length in LENGTHS if length < maximum), maximum)

    def embed_encoded(self, rows: Sequence[list[int]], *, is_query: bool) -> Float[np.ndarray, "c e"]:
        """Embeddings of what `encode_queries` or, without `is_query`, `encode_documents` gave."""
        lengths = self._lengths(self.max_query_tokens if is_query else self.max_document_tokens)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = np.zeros((len(rows), self.embed_dim), np.float32)
        start = 0
        while start < len(order):
            left = len(order) - start
            count = next((size for size in ROWS if size >= left), ROWS[-1])
            picked = order[start : start + count]
            chosen = [rows[i] for i in picked] + [[self.tokenizer.pad_id]] * (count - len(picked))
            tokens, where = pad_tokens(chosen, pad_id=self.tokenizer.pad_id, lengths=lengths)
            embeds = self._program(count, tokens.shape[1])(self._state, tokens, where)
            out[picked] = np.asarray(embeds)[: len(picked)]
            start += count
        return out

    def _program(self, count: int, length: int) -> Callable:
        key = (count, length)
        if key not in self._programs:

            def embed(state, tokens, where):
                return nnx.merge(self._graphdef, state)(tokens, where)

            tokens = jax.ShapeDtypeStruct((count, length), jnp.int32)
            where = jax.ShapeDtypeStruct((count, length), jnp.bool_)
            self._programs[key] = jax.jit(embed).lower(self._state, tokens, where).compile()
        return self._programs[key]


def load_encoder(directory: str | Path, *, dtype=jnp.float32) -> TextEncoder:
    """Reads an encoder folder written by `save_encoder`, or any BERT folder in the HF layout as it comes.

    A folder without a card gets mean pooling and no instruction (what all-MiniLM-L6-v2 was trained with).
    Raises: InputError when the folder holds another kind of model.
    """
    loaded = checkpoints.load_model(directory, dtype=dtype)
    card = loaded.card or {"kind": "encoder"}
    if card["kind"] != "encoder":
        raise InputError(f"{directory} holds a model of kind {card['kind']}, not of kind encoder")
    if not loaded.card and not isinstance(loaded.model, Bert):
        raise InputError(
            f"{directory} holds a decoder that was not trained to embed: run python -m train.encoder on it"
        )
    most = loaded.model.config.max_positions
    return TextEncoder(
        Encoder(loaded.model, pooling=card.get("pooling", "mean")),
        loaded.tokenizer,
        query_instruction=card.get("query_instruction", ""),
        max_query_tokens=card.get("max_query_tokens", min(64, most)),
        max_document_tokens=card.get("max_document_tokens", min(256, most)),
        version=checkpoints.model_version(directory),
    )


def save_encoder(directory: str | Path, text_encoder: TextEncoder, *, trained: dict[str, Any]) -> None:
    """Writes the folder that `load_encoder` reads; `trained` says on what and how."""
    card = {
        "kind": "encoder",
        "pooling": text_encoder.encoder.pooling,
        "query_instruction": text_encoder.query_instruction,
        "max_query_tokens": text_encoder.max_query_tokens,
        "max_document_tokens": text_encoder.max_document_tokens,
        "trained": trained,
    }
    checkpoints.save_model(directory, text_encoder.encoder.backbone, text_encoder.tokenizer, card)

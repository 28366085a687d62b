"""The ranker: a small decoder that reads query and document together and answers yes or no.

The query's part of the prompt is one prefix shared by all its candidates, in training as in serving. `Ranker` is the
trained module, `TextRanker` makes prompts from texts. Scoring at speed is `scoring.prefill`.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxsearch import checkpoints, losses
from jaxsearch.data.prompts import PromptEncoder, PromptTokens
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.nn.layers import at_ends
from jaxsearch.nn.transformer import Decoder

LABELS = ("Yes", "No")


class RankerOutput(NamedTuple):
    """Of a batch: the candidates' hidden states after the final norm, and one float32 logit each."""

    hidden: Float[Array, "b w t d"]
    logits: Float[Array, "b q c"]


class Ranker(nnx.Module):
    """Prompt tokens to one logit a candidate: `l_yes - l_no` at its last token, so that p = sigmoid(logit)."""

    def __init__(self, decoder: Decoder, *, label_ids: tuple[int, int]):
        self.decoder = decoder
        self.label_ids = label_ids

    def __call__(
        self,
        prefix_tokens: Int[Array, "b p"],
        prefix_ids: Int[Array, "b p"],
        item_tokens: Int[Array, "b w t"],
        segment_ids: Int[Array, "b w t"],
        ends: Int[Array, "b q c"],
    ) -> RankerOutput:
        """The arguments are those of `RankerBatch`."""
        _, prefix = self.decoder.prefill(prefix_tokens, prefix_ids > 0, segment_ids=prefix_ids)
        per_query = ends.shape[-1]
        hidden = self.decoder.attend_prefix(
            item_tokens,
            segment_ids > 0,
            prefix,
            segment_ids=segment_ids,
            prefix_ids=(segment_ids + per_query - 1) // per_query,
        )
        logits = self.decoder.logits(at_ends(hidden, ends), jnp.asarray(self.label_ids, jnp.int32))
        return RankerOutput(hidden, logits[..., 0] - logits[..., 1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankerBatch:
    """b groups of q queries with c candidates each; every label has its own `where`, so that any may be missing.

    A group's prefixes stand one after another in one row, told apart by `prefix_ids` (1 for the first query; 0:
    padding). Its candidates stand so in w rows, told apart by `segment_ids` (1 to c for the first query, and so on);
    `ends` are the places of their last tokens in the rows put end to end, any place for one that is missing.
    `teacher` is a judge's soft label or another ranker's probability, in [0, 1]; `gold` is the human or derived grade
    divided by 4.
    """

    prefix_tokens: Int[Any, "b p"]
    prefix_ids: Int[Any, "b p"]
    item_tokens: Int[Any, "b w t"]
    segment_ids: Int[Any, "b w t"]
    ends: Int[Any, "b q c"]
    teacher: Float[Any, "b q c"]
    teacher_where: Bool[Any, "b q c"]
    gold: Float[Any, "b q c"]
    gold_where: Bool[Any, "b q c"]


@dataclasses.dataclass(frozen=True)
class RankerLoss:
    """Distillation from a teacher + gold + list-wise term, each with its weight.

    The point-wise terms compare sigmoid(logit) with a soft label. The list-wise term compares the softmax over a
    query's candidates with that of its targets (gold where there is gold, else the teacher) divided by
    `list_temperature`. Where a ranker alone teaches, without gold, the softmax of its own logits takes their place:
    then both terms are least where the answers are the teacher's.

    `hidden_weight` is that of a fourth term, where a ranker of the same width teaches: `losses.relative_error` of the
    student's hidden states, its mean over all tokens of a group's candidates, for each of the group's queries.
    """

    teacher_weight: float = 0.5
    gold_weight: float = 0.5
    list_weight: float = 1.0
    list_temperature: float = 0.25
    hidden_weight: float = 0.0

    def __post_init__(self):
        if not 0 < self.list_temperature < math.inf:
            raise InputError(f"list_temperature must be above 0, not {self.list_temperature}")
        for name in ("teacher_weight", "gold_weight", "list_weight", "hidden_weight"):
            if not 0 <= (weight := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, not {weight}")

    def __call__(self, ranker: Ranker, batch: RankerBatch, teacher: RankerOutput | None = None):
        """Σ over queries, their number, metrics. `teacher` is what a ranker that teaches makes of the same batch."""
        hidden, logits = ranker(
            batch.prefix_tokens, batch.prefix_ids, batch.item_tokens, batch.segment_ids, batch.ends
        )
        total, count, metrics = self.of_logits(logits, batch, None if teacher is None else teacher.logits)
        is_token = batch.segment_ids > 0
        if self.hidden_weight > 0:
            assert teacher is not None, "hidden_weight needs a ranker as teacher"
            errors = losses.relative_error(hidden, teacher.hidden, where=is_token)
            per_group = errors.sum(axis=(-2, -1)) / jnp.maximum(
                is_token.sum(axis=(-2, -1), dtype=jnp.float32), 1.0
            )
            total += self.hidden_weight * logits.shape[1] * per_group.sum()
            metrics["hidden_error"] = per_group.mean()
        return total, count, metrics | losses.token_counts(batch.prefix_ids > 0, is_token)

    def of_logits(
        self,
        logits: Float[Array, "b q c"],
        batch: RankerBatch,
        teacher_logits: Float[Array, "b q c"] | None = None,
    ):
        """The same from logits and the batch's labels: Σ over queries, their number, means of the terms, in nats."""
        teacher = losses.binary_distillation(logits, batch.teacher, where=batch.teacher_where)
        gold = losses.binary_distillation(logits, batch.gold, where=batch.gold_where)
        use_gold = batch.gold_where if self.gold_weight > 0 else jnp.zeros_like(batch.gold_where)
        use_teacher = batch.teacher_where if self.teacher_weight > 0 else jnp.zeros_like(use_gold)
        where = use_gold | use_teacher
        if teacher_logits is None or self.gold_weight > 0:
            targets = jnp.where(use_gold, batch.gold, batch.teacher) / self.list_temperature
        else:
            targets = teacher_logits - jnp.max(
                teacher_logits, axis=-1, keepdims=True, where=where, initial=0.0
            )
        gains = jnp.exp(targets)
        listwise = losses.listwise_softmax(logits, gains, where=where)
        count = jnp.asarray(listwise.size, jnp.float32)
        per_query = (
            self.teacher_weight * _mean(teacher, batch.teacher_where)
            + self.gold_weight * _mean(gold, batch.gold_where)
            + self.list_weight * listwise
        )
        metrics = {
            "teacher": _mean(teacher, batch.teacher_where).mean(),
            "gold": _mean(gold, batch.gold_where).mean(),
            "listwise": listwise.mean(),
            "labelled_share": batch.teacher_where.mean(dtype=jnp.float32),
        }
        return per_query.sum(), count, metrics


def _mean(values: Array, where: Array) -> Array:
    """Mean over the candidates that count; 0 where none does."""
    return values.sum(axis=-1) / jnp.maximum(where.sum(axis=-1), 1).astype(values.dtype)


def encode_request(prompt: PromptEncoder, query_text: str, document_texts: Sequence[str]) -> PromptTokens:
    """The prompt of one query: a shared prefix and one item a document."""
    return prompt.encode({"query": query_text}, [{"document": text} for text in document_texts])


class TextRanker:
    """A ranker with its prompt. `label_ids` are the rows of the output matrix that scoring reads."""

    def __init__(self, ranker: Ranker, prompt: PromptEncoder, *, view: str, version: str = ""):
        self.ranker = ranker
        self.prompt = prompt
        self.view = view
        self.version = version

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompt.tokenizer

    @property
    def decoder(self) -> Decoder:
        return self.ranker.decoder

    @property
    def label_ids(self) -> tuple[int, int]:
        return self.ranker.label_ids

    def request(self, query_text: str, document_texts: Sequence[str]) -> PromptTokens:
        """`encode_request` with this ranker's prompt."""
        return encode_request(self.prompt, query_text, document_texts)

    @staticmethod
    def scores(label_logits: Float[np.ndarray, "c k"]) -> Float[np.ndarray, "c"]:
        """Yes minus no, from the label rows that the scorer returns; unbounded, 0 = undecided."""
        return label_logits[..., 0] - label_logits[..., 1]


def new_ranker(decoder: Decoder, prompt: PromptEncoder, *, view: str, version: str = "") -> TextRanker:
    """A ranker around a decoder; answers are read where the prompt's tokenizer has its labels."""
    return TextRanker(Ranker(decoder, label_ids=label_ids(prompt)), prompt, view=view, version=version)


def label_ids(prompt: PromptEncoder) -> tuple[int, int]:
    """The prompt's token ids of `LABELS`."""
    return prompt.tokenizer.token_id(LABELS[0]), prompt.tokenizer.token_id(LABELS[1])


def load_prompt(directory: str | Path) -> PromptEncoder:
    """The prompt of a folder written by `save_ranker`, without its weights."""
    return PromptEncoder.from_card(
        checkpoints.read_card(Path(directory)), Tokenizer.from_path(Path(directory))
    )


def load_ranker(directory: str | Path, *, dtype=jnp.float32) -> TextRanker:
    """Reads a folder written by `save_ranker`.

    Raises: InputError when the folder holds another kind of model.
    """
    decoder, tokenizer, card = checkpoints.load_decoder(directory, kind="ranker", dtype=dtype)
    prompt = PromptEncoder.from_card(card, tokenizer)
    return new_ranker(decoder, prompt, view=card["view"], version=card["version"])


def save_ranker(directory: str | Path, text_ranker: TextRanker, *, trained: dict[str, Any]) -> None:
    """Writes the folder that `load_ranker` reads; `trained` says on what and how."""
    card = {
        "kind": "ranker",
        "labels": list(LABELS),
        **text_ranker.prompt.card(),
        "view": text_ranker.view,
        "trained": trained,
    }
    checkpoints.save_model(directory, text_ranker.decoder, text_ranker.tokenizer, card)

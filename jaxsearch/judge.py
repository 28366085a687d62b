"""The relevance judge: a decoder that grades a (query, document) pair 0 to 4 under a written policy.

It reads the distribution over the five grade tokens at one position and writes nothing. The policy is one prefix shared
by every pair. `Judge` is the trained module (LoRA on a frozen decoder), `TextJudge` makes prompts from texts.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsearch import checkpoints, losses
from jaxsearch.data.prompts import PromptEncoder, PromptTokens
from jaxsearch.data.records import MAX_GRADE, NUM_GRADES
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.nn.layers import at_ends
from jaxsearch.nn.transformer import Decoder

GRADES = tuple(str(grade) for grade in range(NUM_GRADES))


class Judge(nnx.Module):
    """Prompt tokens to the logits of the five grade tokens, read at each pair's last token."""

    def __init__(self, decoder: Decoder, *, grade_ids: tuple[int, ...]):
        self.decoder = decoder
        self.grade_ids = grade_ids

    def __call__(
        self,
        policy_tokens: Int[Array, "p"],
        tokens: Int[Array, "b w t"],
        segment_ids: Int[Array, "b w t"],
        ends: Int[Array, "b m"],
    ) -> Float[Array, "b m 5"]:
        """Float32 grade logits of b * m pairs that share one policy prefix. The arguments are those of `JudgeBatch`."""
        policy_where = jnp.ones((1, policy_tokens.shape[0]), bool)
        _, prefix = self.decoder.prefill(policy_tokens[None], policy_where)
        groups, rows, length = tokens.shape
        flat, ids = (array.reshape(1, groups * rows, length) for array in (tokens, segment_ids))
        hidden = self.decoder.attend_prefix(flat, ids > 0, prefix, segment_ids=ids)
        answers = at_ends(hidden.reshape(groups, rows, length, -1), ends)
        return self.decoder.logits(answers, jnp.asarray(self.grade_ids, jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JudgeBatch:
    """b groups of m pairs, packed as `data.batches.pack_tokens` does; the distributions that the judge should give."""

    tokens: Int[Any, "b w t"]
    segment_ids: Int[Any, "b w t"]
    ends: Int[Any, "b m"]
    targets: Float[Any, "b m 5"]


@dataclasses.dataclass(frozen=True)
class JudgeLoss:
    """Soft cross-entropy over the grade tokens, in nats a pair."""

    policy_tokens: tuple[int, ...]

    def __call__(self, judge: Judge, batch: JudgeBatch):
        policy = jnp.asarray(self.policy_tokens, jnp.int32)
        logits = judge(policy, batch.tokens, batch.segment_ids, batch.ends)
        loss = losses.soft_cross_entropy(logits, batch.targets)
        agree = logits.argmax(axis=-1) == batch.targets.argmax(axis=-1)
        count = jnp.asarray(agree.size, jnp.float32)
        metrics = {
            "accuracy": agree.mean(dtype=jnp.float32),
            **losses.token_counts(jnp.ones(policy.shape, bool), batch.segment_ids > 0),
        }
        return loss.sum(), count, metrics


def grade_probs(grade_logits: Float[np.ndarray, "*b 5"]) -> Float[np.ndarray, "*b 5"]:
    """Softmax over the five grade tokens.

    Example:
        >>> grade_probs(np.zeros((1, 5))).tolist()
        [[0.2, 0.2, 0.2, 0.2, 0.2]]
    """
    shifted = np.exp(grade_logits - grade_logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def expected_grade(probs: Float[np.ndarray, "*b 5"]) -> Float[np.ndarray, "*b"]:
    """Mean grade in [0, 4] under the judge's distribution.

    Example:
        >>> float(expected_grade(np.array([0.0, 0.5, 0.0, 0.5, 0.0])))
        2.0
    """
    return np.asarray(probs @ np.arange(NUM_GRADES, dtype=probs.dtype))


def predicted_grade(probs: Float[np.ndarray, "*b 5"]) -> Int[np.ndarray, "*b"]:
    """The whole grade nearest to the expected one: what agreement is measured on.

    Example:
        >>> int(predicted_grade(np.array([0.1, 0.1, 0.1, 0.3, 0.4])))
        3
    """
    return np.asarray(np.rint(expected_grade(probs)), np.int64)


def soft_label(probs: Float[np.ndarray, "*b 5"]) -> Float[np.ndarray, "*b"]:
    """Expected grade as a relevance in [0, 1]: what the ranker is distilled from."""
    return np.asarray(expected_grade(probs) / MAX_GRADE)


def grade_targets(grades: Sequence[int], *, smoothing: float) -> Float[np.ndarray, "b 5"]:
    """One-hot grades with `smoothing` of the mass given to the neighbouring grades: a near miss costs less.

    Example:
        >>> grade_targets([0, 2], smoothing=0.5).tolist()
        [[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.25, 0.5, 0.25, 0.0]]
    """
    targets = np.zeros((len(grades), NUM_GRADES), np.float32)
    for row, grade in zip(targets, grades, strict=True):
        neighbours = [other for other in (grade - 1, grade + 1) if 0 <= other < NUM_GRADES]
        row[grade] = 1.0 - smoothing
        row[neighbours] = smoothing / len(neighbours)
    return targets


class TextJudge:
    """A judge with its prompt and policy."""

    def __init__(self, judge: Judge, prompt: PromptEncoder, *, policy: str, view: str, version: str = ""):
        self.judge = judge
        self.prompt = prompt
        self.policy = policy
        self.view = view
        self.version = version

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompt.tokenizer

    @property
    def decoder(self) -> Decoder:
        return self.judge.decoder

    @property
    def label_ids(self) -> tuple[int, ...]:
        return self.judge.grade_ids

    def request(self, query_text: str, document_texts: Sequence[str]) -> PromptTokens:
        """The policy as shared prefix and one item a (query, document) pair."""
        return self.pairs([(query_text, text) for text in document_texts])

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> PromptTokens:
        """As `request`, for pairs of (query text, document text) of any queries."""
        items = [{"query": query, "document": document} for query, document in pairs]
        return self.prompt.encode({"policy": self.policy}, items)


def new_judge(
    decoder: Decoder, prompt: PromptEncoder, *, policy: str, view: str, version: str = ""
) -> TextJudge:
    """A judge around a decoder; grades are read where the prompt's tokenizer has their digits."""
    grade_ids = tuple(prompt.tokenizer.token_id(grade) for grade in GRADES)
    return TextJudge(Judge(decoder, grade_ids=grade_ids), prompt, policy=policy, view=view, version=version)


def load_judge(directory: str | Path, *, dtype=jnp.float32) -> TextJudge:
    """Reads a folder written by `save_judge`.

    Raises: InputError when the folder holds another kind of model.
    """
    decoder, tokenizer, card = checkpoints.load_decoder(directory, kind="judge", dtype=dtype)
    prompt = PromptEncoder.from_card(card, tokenizer)
    return new_judge(decoder, prompt, policy=card["policy_text"], view=card["view"], version=card["version"])


def save_judge(directory: str | Path, text_judge: TextJudge, *, trained: dict[str, Any]) -> None:
    """Writes the folder that `load_judge` reads (merge a LoRA adapter first); policy and prompt travel with it."""
    card = {
        "kind": "judge",
        "labels": list(GRADES),
        "policy_text": text_judge.policy,
        **text_judge.prompt.card(),
        "view": text_judge.view,
        "trained": trained,
    }
    checkpoints.save_model(directory, text_judge.decoder, text_judge.tokenizer, card)

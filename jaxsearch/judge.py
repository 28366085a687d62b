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
from jaxtyping import Array, Bool, Float, Int

from jaxsearch import checkpoints, losses
from jaxsearch.data.prompts import PromptEncoder, PromptTemplate, PromptTokens
from jaxsearch.data.records import MAX_GRADE, NUM_GRADES
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.nn.transformer import Decoder, last_hidden

GRADES = tuple(str(grade) for grade in range(NUM_GRADES))


class Judge(nnx.Module):
    """Prompt tokens to the logits of the five grade tokens."""

    def __init__(self, decoder: Decoder, *, grade_ids: tuple[int, ...]):
        self.decoder = decoder
        self.grade_ids = grade_ids

    def __call__(
        self, policy_tokens: Int[Array, "p"], tokens: Int[Array, "b t"], where: Bool[Array, "b t"]
    ) -> Float[Array, "b 5"]:
        """Float32 grade logits of b pairs that share one policy prefix."""
        policy_where = jnp.ones((1, policy_tokens.shape[0]), bool)
        _, prefix = self.decoder.prefill(policy_tokens[None], policy_where)
        hidden = self.decoder.attend_prefix(tokens[None], where[None], prefix)
        return self.decoder.logits(last_hidden(hidden, where[None]), jnp.asarray(self.grade_ids, jnp.int32))[
            0
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JudgeBatch:
    """b pairs with the distribution over grades that the judge should give."""

    tokens: Int[Any, "b t"]
    where: Bool[Any, "b t"]
    targets: Float[Any, "b 5"]


@dataclasses.dataclass(frozen=True)
class JudgeLoss:
    """Soft cross-entropy over the grade tokens, in nats a pair."""

    policy_tokens: tuple[int, ...]

    def __call__(self, judge: Judge, batch: JudgeBatch):
        logits = judge(jnp.asarray(self.policy_tokens, jnp.int32), batch.tokens, batch.where)
        loss = losses.soft_cross_entropy(logits, batch.targets)
        agree = logits.argmax(axis=-1) == batch.targets.argmax(axis=-1)
        count = jnp.asarray(logits.shape[0], jnp.float32)
        metrics = {
            "accuracy": agree.mean(dtype=jnp.float32),
            "tokens": (batch.where.sum() + len(self.policy_tokens)).astype(jnp.float32),
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
    """A judge with its tokenizer, prompt and policy."""

    def __init__(
        self,
        judge: Judge,
        tokenizer: Tokenizer,
        prompt: PromptEncoder,
        *,
        policy: str,
        view: str,
        version: str = "",
    ):
        self.judge = judge
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.policy = policy
        self.view = view
        self.version = version

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
    decoder: Decoder,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    policy: str,
    view: str,
    max_shared_tokens: int,
    max_item_tokens: int,
) -> TextJudge:
    """A judge around a decoder that was not yet trained to grade."""
    grade_ids = tuple(tokenizer.token_id(grade) for grade in GRADES)
    prompt = PromptEncoder(
        template,
        tokenizer,
        max_shared_tokens=max_shared_tokens,
        max_item_tokens=max_item_tokens,
    )
    return TextJudge(Judge(decoder, grade_ids=grade_ids), tokenizer, prompt, policy=policy, view=view)


def load_judge(directory: str | Path, *, dtype=jnp.float32) -> TextJudge:
    """Reads a folder written by `save_judge`.

    Raises: InputError when the folder holds another kind of model.
    """
    loaded = checkpoints.load_model(directory, dtype=dtype)
    card = loaded.card
    if not card or card["kind"] != "judge" or not isinstance(loaded.model, Decoder):
        found = f"a {card['kind']}" if card else "a model without a card"
        raise InputError(f"{directory} holds {found}, not a judge")
    text_judge = new_judge(
        loaded.model,
        loaded.tokenizer,
        PromptTemplate.from_text(card["prompt_text"]),
        policy=card["policy_text"],
        view=card["view"],
        max_shared_tokens=card["max_shared_tokens"],
        max_item_tokens=card["max_item_tokens"],
    )
    text_judge.version = checkpoints.model_version(directory)
    return text_judge


def save_judge(directory: str | Path, text_judge: TextJudge, *, trained: dict[str, Any]) -> None:
    """Writes the folder that `load_judge` reads (merge a LoRA adapter first); policy and prompt travel with it."""
    card = {
        "kind": "judge",
        "labels": list(GRADES),
        "policy_text": text_judge.policy,
        "prompt_text": text_judge.prompt.template.text,
        "max_shared_tokens": text_judge.prompt.max_shared_tokens,
        "max_item_tokens": text_judge.prompt.max_item_tokens,
        "view": text_judge.view,
        "trained": trained,
    }
    checkpoints.save_model(directory, text_judge.decoder, text_judge.tokenizer, card)

"""A judge that teaches inside the step: it grades every candidate of a batch while the ranker learns from it.

The other way is `train.label`: labels computed once for fixed pairs and read by every run. Both give the same student
on the same pairs; the online teacher also grades candidates that nobody labelled, and pays a forward pass a step for it
(`train.throughput` measures how much).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxsearch import losses
from jaxsearch.data.batches import pack_rows
from jaxsearch.data.records import MAX_GRADE, NUM_GRADES, Collection
from jaxsearch.data.verticals import Vertical
from jaxsearch.judge import Judge, TextJudge
from jaxsearch.ranker import Ranker, RankerBatch, RankerLoss
from train.inputs import pair_texts

Drawn = tuple[str, list[str]]
"""A query and the candidates drawn for it, by id."""


class Taught(nnx.Module):
    """A ranker and the judge that it learns from; only the ranker is trained."""

    def __init__(self, ranker: Ranker, judge: Judge):
        self.ranker, self.judge = ranker, judge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaughtBatch:
    """A ranker's batch and its g groups of candidates again, n = q * c each, as the judge reads them (`JudgeBatch`)."""

    ranker: RankerBatch
    tokens: Int[Any, "g r t"]
    segment_ids: Int[Any, "g r t"]
    ends: Int[Any, "g n"]


@dataclasses.dataclass(frozen=True)
class TaughtLoss:
    """The ranker's loss with the judge's soft labels of this very batch as teacher."""

    loss: RankerLoss
    policy_tokens: tuple[int, ...]

    def __call__(self, model: Taught, batch: TaughtBatch):
        policy = jnp.asarray(self.policy_tokens, jnp.int32)
        logits = model.judge(policy, batch.tokens, batch.segment_ids, batch.ends)
        probs = jax.nn.softmax(jax.lax.stop_gradient(logits))
        expected = probs @ jnp.arange(NUM_GRADES, dtype=probs.dtype)
        teacher = (expected / MAX_GRADE).reshape(batch.ranker.teacher.shape)
        total, count, metrics = self.loss(model.ranker, dataclasses.replace(batch.ranker, teacher=teacher))
        read = losses.token_counts(jnp.ones(policy.shape, bool), batch.segment_ids > 0)
        return total, count, metrics | {"teacher_tokens": read["tokens"]}


class OnlineTeacher:
    """A ranker's batches with what the judge reads of them.

    Args: `drawn` gives the queries and candidates of a step, `batch_of` makes the ranker's batch of them.
    """

    def __init__(
        self,
        judge: TextJudge,
        collection: Collection,
        vertical: Vertical,
        *,
        drawn: Callable[[int], list[Drawn]],
        batch_of: Callable[[Sequence[Drawn]], RankerBatch],
    ):
        self.judge, self.collection, self.vertical = judge, collection, vertical
        self.drawn, self.batch_of = drawn, batch_of
        self.policy_tokens = judge.pairs([]).prefix

    def batch(self, step: int) -> TaughtBatch:
        drawn = self.drawn(step)
        batch = self.batch_of(drawn)
        has_candidate = _has_candidate(drawn, batch.teacher.shape)
        batch = dataclasses.replace(batch, teacher_where=has_candidate)
        return TaughtBatch(batch, *self._read(drawn, *batch.teacher.shape))

    def _read(self, drawn: Sequence[Drawn], groups: int, per_group: int, width: int):
        lists: list[list[Sequence[int]]] = []
        for start in range(0, groups * per_group, per_group):
            items: list[Sequence[int]] = []
            for query_id, keys in drawn[start : start + per_group]:
                pairs = [(query_id, key) for key in keys]
                texts = pair_texts(self.collection, self.vertical, pairs, view=self.judge.view)
                items += [*self.judge.pairs(texts).items, *[()] * (width - len(keys))]
            lists.append(items)
        return pack_rows(
            lists,
            pad_id=self.judge.tokenizer.pad_id,
            step=32,
            longest=self.judge.prompt.max_item_tokens,
        )


def _has_candidate(drawn: Sequence[Drawn], shape: tuple[int, ...]) -> np.ndarray:
    return np.array([[j < len(keys) for j in range(shape[-1])] for _, keys in drawn]).reshape(shape)

"""Teachers inside the step: a judge, or a ranker, reads every candidate of a batch while the ranker learns from it.

A ranker as teacher is how a pruned one is healed: both read the same tokens. A judge reads its own prompts; the other
way to its labels is `train.label`, which computes them once for fixed pairs and every run. Both make the same student
of the same pairs; the online teacher also grades candidates that nobody labelled, and pays a forward pass a step for it
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

from jaxsearch.data.batches import pack_rows
from jaxsearch.data.records import MAX_GRADE, NUM_GRADES, Collection
from jaxsearch.data.verticals import Vertical
from jaxsearch.judge import Judge, TextJudge
from jaxsearch.ranker import Ranker, RankerBatch, RankerLoss
from train.inputs import pair_texts

Drawn = tuple[str, list[str]]
"""A query and the candidates drawn for it, by id."""


class Taught(nnx.Module):
    """A ranker and the judge or ranker that it learns from; only the ranker is trained."""

    def __init__(self, ranker: Ranker, teacher: Judge | Ranker):
        self.ranker = ranker
        self.teacher: Any = teacher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaughtBatch:
    """A ranker's batch and its b groups of candidates again, m = q * c each, as the judge reads them (`JudgeBatch`)."""

    ranker: RankerBatch
    tokens: Int[Any, "b w t"]
    segment_ids: Int[Any, "b w t"]
    ends: Int[Any, "b m"]


@dataclasses.dataclass(frozen=True)
class TaughtLoss:
    """The ranker's loss with the judge's soft labels of this very batch as teacher.

    Tokens and slots are the ranker's alone.
    """

    loss: RankerLoss
    policy_tokens: tuple[int, ...]

    def __call__(self, model: Taught, batch: TaughtBatch):
        policy = jnp.asarray(self.policy_tokens, jnp.int32)
        logits = model.teacher(policy, batch.tokens, batch.segment_ids, batch.ends)
        probs = jax.nn.softmax(logits)
        expected = probs @ jnp.arange(NUM_GRADES, dtype=probs.dtype)
        teacher = (expected / MAX_GRADE).reshape(batch.ranker.teacher.shape)
        return self.loss(model.ranker, dataclasses.replace(batch.ranker, teacher=teacher))


@dataclasses.dataclass(frozen=True)
class DistilledLoss:
    """The ranker's loss with another ranker's answers to this very batch as teacher.

    Tokens and slots are the student's alone.
    """

    loss: RankerLoss

    def __call__(self, model: Taught, batch: RankerBatch):
        shown = model.teacher(
            batch.prefix_tokens, batch.prefix_ids, batch.item_tokens, batch.segment_ids, batch.ends
        )
        taught = dataclasses.replace(batch, teacher=jax.nn.sigmoid(shown.logits))
        return self.loss(model.ranker, taught, shown)


def taught_everywhere(drawn: Sequence[Drawn], batch: RankerBatch) -> RankerBatch:
    """The batch with a teacher for every candidate there is."""
    shape = batch.teacher.shape
    has_candidate = [[j < len(keys) for j in range(shape[-1])] for _, keys in drawn]
    return dataclasses.replace(batch, teacher_where=np.array(has_candidate).reshape(shape))


class OnlineTeacher:
    """A ranker's batches with what the judge reads of them.

    Args: `draw` gives the queries and candidates of a step, `batch_of` makes the ranker's batch of them.
    """

    def __init__(
        self,
        judge: TextJudge,
        collection: Collection,
        vertical: Vertical,
        *,
        draw: Callable[[int], list[Drawn]],
        batch_of: Callable[[Sequence[Drawn]], RankerBatch],
    ):
        self.judge, self.collection, self.vertical = judge, collection, vertical
        self.draw, self.batch_of = draw, batch_of
        self.policy_tokens = judge.pairs([]).prefix

    def batch(self, step: int) -> TaughtBatch:
        drawn = self.draw(step)
        batch = taught_everywhere(drawn, self.batch_of(drawn))
        return TaughtBatch(batch, *self._read(drawn, *batch.teacher.shape))

    def _read(self, drawn: Sequence[Drawn], groups: int, per_group: int, width: int):
        pairs = [(query_id, key) for query_id, keys in drawn for key in keys]
        texts = pair_texts(self.collection, self.vertical, pairs, view=self.judge.view)
        read = iter(self.judge.pairs(texts).items)
        rows = [[*(next(read) for _ in keys), *[()] * (width - len(keys))] for _, keys in drawn]
        starts = range(0, groups * per_group, per_group)
        lists = [[item for row in rows[start : start + per_group] for item in row] for start in starts]
        return pack_rows(
            lists,
            pad_id=self.judge.tokenizer.pad_id,
            step=32,
            longest=self.judge.prompt.max_item_tokens,
        )

"""Trains the ranker: a decoder cut to some of its layers, distilled from the judge, with gold and a list-wise term.

    python -m train.ranker --config configs/demo/ranker.py --workdir work/demo/ranker

A batch holds a few queries with several candidates each; the query's prompt is computed once for all of them.
Writes `model/` and `report.json`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from jaxsearch.checkpoints import model_version, read_card
from jaxsearch.data.assets import resolve
from jaxsearch.data.batches import (
    CandidateSampler,
    group_pairs,
    pack_rows,
    pack_tokens,
    packing_groups,
    row_lengths,
    shuffled,
    step_batches,
)
from jaxsearch.data.prompts import PromptEncoder
from jaxsearch.data.records import MAX_GRADE, Collection, Run
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.judge import TextJudge, load_judge
from jaxsearch.nn.pruning import keep_layers
from jaxsearch.ranker import (
    Ranker,
    RankerBatch,
    RankerLoss,
    TextRanker,
    load_ranker,
    new_ranker,
    save_ranker,
)
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from train.config import Count
from train.first_stage import FirstStage, open_first_stage
from train.inputs import load_base, load_data, load_retriever, offline_scorer, origin, validate
from train.label import Label, read_labels
from train.loop import LoopConfig, OptimizerConfig, fit
from train.options import run, say
from train.processes import leave_to_main
from train.speed import flops_per_token
from train.step import LossFn, batch_pieces
from train.teachers import DistilledLoss, Drawn, OnlineTeacher, Taught, TaughtLoss, taught_everywhere
from train.workdir import claim


@dataclasses.dataclass(frozen=True)
class RankerConfig:
    """The ranker's base, labels, batch and loss."""

    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    view: str = "short"
    """Which view of a document is read."""
    base: str = "smollm2"
    """Asset, hub name or folder of the decoder that is cut and trained."""
    layers: tuple[int, ...] = tuple(range(12))
    """The layers of the base that are kept, in order; none named: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the weights that are trained stay float32."""
    use_remat: bool = False
    """Recompute layers in the backward pass: less memory for more time."""
    labels: str = "work/labels"
    """Workdir of train.label; empty: no stored labels."""
    teacher: str = ""
    """Folder of a judge, or of another ranker with the same prompt, that grades every candidate inside the step;
    `labels` then only say which pairs matter."""
    retriever: str = "minilm"
    """The encoder of the first stage (with BM25 beside it, as a server has it), whose best documents become hard
    negatives and are re-ranked for validation."""
    use_gold: bool = True
    """Graded queries with candidates by their grades, and labelled pairs; without it, labelled pairs alone."""
    use_frozen_embeddings: bool = True
    """Token embeddings get no gradient: they are 28M of SmolLM2's 135M parameters."""
    batch_queries: Count = 4
    candidates_per_query: Count = 8
    mined_depth: Count = 30
    """How many of the first stage's best documents are looked at for hard negatives."""
    random_share: tuple[float, float] = (1.0, 0.5)
    """How many of the negatives are random documents, at the first and at the last step. Hard ones alone leave an
    untrained ranker at the loss of equal scores."""
    max_shared_tokens: Count = 96
    max_item_tokens: Count = 128
    """Longer documents are cut at their end."""
    check_queries: Count = 40
    """Validation queries that are re-ranked at each evaluation."""
    check_depth: Count = 10
    provider: Literal["memory", "grain"] = "memory"
    """Who builds batches: the loop when it needs them, or grain ahead of it."""
    loss: RankerLoss = dataclasses.field(default_factory=RankerLoss)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(num_steps=94))
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4)
    )
    seed: int = 0


class RankerData:
    """Lists of candidates with teacher and gold labels; a batch is a function of its step."""

    def __init__(
        self,
        ranker: TextRanker,
        collection: Collection,
        vertical: Vertical,
        mined: Run,
        labels: Sequence[Label],
        config: RankerConfig,
    ):
        self.config, self.collection, self.vertical = config, collection, vertical
        self.sampler = CandidateSampler(collection, threshold=vertical.relevant_threshold, mined=mined)
        self.teacher = {(label.query_id, label.document_id): label.soft_label for label in labels}
        seen = set(self.sampler.documents)
        self.labelled = group_pairs([pair for pair in self.teacher if pair[1] in seen])
        train = [query.id for query in collection.split("train")] if config.use_gold else []
        self.graded = dict.fromkeys(key for key in train if self.sampler.positives(key))
        labelled = [key for key in self.labelled if collection.query_split[key] == "train"]
        self.queries = [*self.graded, *(key for key in labelled if key not in self.graded)]
        self.num_labels = sum(len(self.labelled.get(key, ())) for key in self.queries)
        if not self.queries:
            raise InputError(
                "no train query has a label or a relevant seen document: there is nothing to learn from"
            )
        texts = [
            vertical.document_text(collection.documents[key], config.view) for key in self.sampler.documents
        ]
        self.items = dict(zip(self.sampler.documents, ranker.request("", texts).items, strict=True))
        self.prefixes = {key: ranker.request(collection.queries[key].text, []).prefix for key in self.queries}
        self.pad_id = ranker.tokenizer.pad_id
        pieces = batch_pieces(config.optimizer, config.loop.mesh)
        self.groups = packing_groups(config.batch_queries, pieces)

    def candidates(self, query_id: str, step: int, rng: np.random.Generator) -> list[str]:
        """Labelled documents first, so that a label is never left unused; of a query without gold, they alone."""
        done = step / self.config.loop.num_steps
        share = float(np.interp(done, (0.0, 1.0), self.config.random_share))
        count = self.config.candidates_per_query
        keys = self.labelled.get(query_id, [])
        chosen = [keys[i] for i in rng.permutation(len(keys))[:count]]
        if query_id in self.graded and len(chosen) < count:
            drawn = self.sampler.pairs(query_id, count, rng, random_share=share)
            chosen += [key for key in drawn if key not in chosen][: count - len(chosen)]
        return chosen

    def draw(self, step: int) -> list[Drawn]:
        """The queries of a step and their candidates."""
        rng = np.random.default_rng((self.config.seed, step))
        rows = shuffled(len(self.queries), self.config.batch_queries, step, seed=self.config.seed)
        return [(self.queries[i], self.candidates(self.queries[i], step, rng)) for i in rows]

    def batch(self, step: int) -> RankerBatch:
        return self.batch_of(self.draw(step))

    def batch_of(self, drawn: Sequence[Drawn]) -> RankerBatch:
        config = self.config
        width = config.candidates_per_query
        shape = (len(drawn), width)
        grouped = (self.groups, -1, width)
        teacher, gold = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        teacher_where, gold_where = np.zeros(shape, bool), np.zeros(shape, bool)
        lists: list[list[Sequence[int]]] = []
        for i, (query_id, keys) in enumerate(drawn):
            lists.append([*(self.items[key] for key in keys), *[()] * (width - len(keys))])
            gold_where[i, : len(keys)] = query_id in self.graded
            for j, key in enumerate(keys):
                gold[i, j] = self.sampler.grade(query_id, key) / MAX_GRADE
                if (query_id, key) in self.teacher:
                    teacher[i, j], teacher_where[i, j] = self.teacher[query_id, key], True
        per_group = len(drawn) // self.groups
        starts = range(0, len(drawn), per_group)
        prefix_tokens, prefix_ids, _ = pack_tokens(
            [[self.prefixes[key] for key, _ in drawn[start : start + per_group]] for start in starts],
            rows=1,
            pad_id=self.pad_id,
            lengths=row_lengths(64, per_group * config.max_shared_tokens),
        )
        tokens, segment_ids, ends = pack_rows(
            [[item for items in lists[start : start + per_group] for item in items] for start in starts],
            pad_id=self.pad_id,
            step=16,
            longest=config.max_item_tokens,
        )
        labels = (array.reshape(grouped) for array in (teacher, teacher_where, gold, gold_where))
        return RankerBatch(
            prefix_tokens[:, 0], prefix_ids[:, 0], tokens, segment_ids, ends.reshape(grouped), *labels
        )


def rerank(
    ranker: TextRanker,
    scorer: PrefillScorer,
    collection: Collection,
    vertical: Vertical,
    candidates: Run,
) -> Run:
    """The ranker's score for every candidate of every query."""
    requests = []
    for query_id, scores in candidates.items():
        texts = [vertical.document_text(collection.documents[key], ranker.view) for key in scores]
        prompt = ranker.request(collection.queries[query_id].text, texts)
        requests.append(ScoreRequest(prompt.prefix, prompt.items))
    reranked: Run = {}
    for (query_id, scores), logits in zip(candidates.items(), scorer.score(requests), strict=True):
        values = ranker.scores(logits)
        reranked[query_id] = {key: float(value) for key, value in zip(scores, values, strict=True)}
    return reranked


class Validation:
    """NDCG@10 of re-ranking the first stage's best seen documents for held-out queries, as training goes on."""

    def __init__(
        self,
        ranker: TextRanker,
        collection: Collection,
        vertical: Vertical,
        stage: FirstStage,
        *,
        num_queries: int,
        depth: int,
    ):
        self.queries = collection.split("validation")[:num_queries]
        self.ranker, self.collection, self.vertical = ranker, collection, vertical
        self.candidates = stage.mine(self.queries, depth=depth)
        self.first_stage_metrics = validate(collection, vertical, self.queries, self.candidates)
        self.scorer = offline_scorer(ranker)

    def __call__(self, model: Ranker | Taught) -> dict[str, float]:
        model = model.ranker if isinstance(model, Taught) else model
        self.scorer.use_weights(model.decoder)
        return self.measure(self.ranker, self.scorer)

    def measure(self, ranker: TextRanker, scorer: PrefillScorer) -> dict[str, float]:
        reranked = rerank(ranker, scorer, self.collection, self.vertical, self.candidates)
        return validate(self.collection, self.vertical, self.queries, reranked)


def is_trained(use_frozen_embeddings: bool):
    """NNX filter: every parameter of the ranker, but for the token embeddings where they are frozen."""

    def accepts(path: Sequence[str], value: object) -> bool:
        is_frozen = "teacher" in path or (use_frozen_embeddings and "embed_tokens" in path)
        return isinstance(value, nnx.Param) and not is_frozen

    return accepts


def load_teacher(folder: str, *, dtype: str) -> TextJudge | TextRanker:
    """A judge or a ranker, whichever the folder holds."""
    is_ranker = read_card(Path(folder)).get("kind") == "ranker"
    return load_ranker(folder, dtype=dtype) if is_ranker else load_judge(folder, dtype=dtype)


def set_up_learning(
    ranker: TextRanker, teacher: TextJudge | TextRanker | None, data: RankerData, loss: RankerLoss
) -> tuple[Ranker | Taught, LossFn, Callable[[int], Any]]:
    """Model, loss and batches of a step, with the teacher in it where there is one.

    `check_teacher` says whether they fit.
    """
    if teacher is None:
        return ranker.ranker, loss, data.batch
    if isinstance(teacher, TextJudge):
        online = OnlineTeacher(
            teacher, data.collection, data.vertical, draw=data.draw, batch_of=data.batch_of
        )
        return Taught(ranker.ranker, teacher.judge), TaughtLoss(loss, online.policy_tokens), online.batch

    def batch(step: int) -> RankerBatch:
        drawn = data.draw(step)
        return taught_everywhere(drawn, data.batch_of(drawn))

    return Taught(ranker.ranker, teacher.ranker), DistilledLoss(loss), batch


def check_teacher(ranker: TextRanker, teacher: TextJudge | TextRanker | None, loss: RankerLoss) -> None:
    """Raises: InputError when a ranker that teaches reads other prompts, or hidden states cannot be compared."""
    if not isinstance(teacher, TextRanker):
        if loss.hidden_weight > 0:
            raise InputError("loss.hidden_weight needs another ranker as teacher; set it to 0")
        return
    if _reads(teacher) != _reads(ranker):
        raise InputError(
            "the ranker that teaches has another prompt, view, vocabulary or token limit than this one: a teacher "
            "inside the step reads the student's own tokens; set max_shared_tokens, max_item_tokens and view as its "
            "jaxsearch.json states them"
        )
    student, other = ranker.decoder.config.embed_dim, teacher.decoder.config.embed_dim
    if loss.hidden_weight > 0 and student != other:
        raise InputError(
            f"hidden states of {student} and {other} channels cannot be compared; set loss.hidden_weight to 0"
        )


def _reads(ranker: TextRanker) -> tuple:
    """What makes the tokens of a prompt; vocabularies of one size and equal labels count as one."""
    return ranker.prompt.card(), ranker.view, ranker.label_ids, ranker.decoder.config.vocab_size


def main(config: RankerConfig, workdir: Path) -> None:
    collection, vertical = load_data(config, needs=("train", "validation"), view=config.view)
    labels = read_labels(config.labels, data=collection.fingerprint()) if config.labels else []
    teacher = load_teacher(config.teacher, dtype=config.dtype) if config.teacher else None
    base, retriever = resolve(config.base), load_retriever(config.retriever)
    claim(
        workdir,
        config,
        data=collection.fingerprint(),
        vertical=vertical.fingerprint(),
        judge=labels[0].judge_version if labels else "none",
        teacher=teacher.version if teacher else "none",
        base=model_version(base),
        retriever=retriever.version,
    )
    prompt = PromptEncoder(
        vertical.prompts["ranker"],
        Tokenizer.from_path(base),
        max_shared_tokens=config.max_shared_tokens,
        max_item_tokens=config.max_item_tokens,
    )
    decoder = load_base(base, dtype=config.dtype, use_remat=config.use_remat)
    layers = config.layers or tuple(range(decoder.config.num_layers))
    ranker = new_ranker(keep_layers(decoder, layers), prompt, view=config.view)
    del decoder
    check_teacher(ranker, teacher, config.loss)
    stage = open_first_stage(collection, vertical, retriever, view=config.view)
    mined = stage.mine(collection.split("train"), depth=config.mined_depth)
    data = RankerData(ranker, collection, vertical, mined, labels, config)
    if labels:
        say(
            f"{data.num_labels} of {len(labels)} labels are on train queries and seen documents, and are learned from"
        )
    evaluate = Validation(
        ranker,
        collection,
        vertical,
        stage,
        num_queries=config.check_queries,
        depth=config.check_depth,
    )
    model, loss, make_batch = set_up_learning(ranker, teacher, data, config.loss)
    result = fit(
        model,
        loss,
        step_batches(make_batch, provider=config.provider),
        loop=config.loop,
        optimizer=config.optimizer,
        dtype=config.dtype,
        token_flops=flops_per_token(ranker.ranker, is_trained(config.use_frozen_embeddings)),
        workdir=workdir,
        trainable=is_trained(config.use_frozen_embeddings),
        evaluate=evaluate,
    )
    leave_to_main()
    report: dict[str, Any] = {
        "validation": {name: result.metrics[name] for name in evaluate.first_stage_metrics},
        "first_stage": evaluate.first_stage_metrics,
        "steps": result.step,
        "labels": len(labels),
        "teacher": teacher.version if teacher else "none",
    }
    trained = {
        **origin(config.base, collection, vertical),
        "layers": list(layers),
        **report,
    }
    save_ranker(workdir / "model", ranker, trained=trained)
    write_json(workdir / "report.json", report)
    say(
        f"NDCG@10 of the first stage's best {config.check_depth} on {len(evaluate.queries)} validation queries: "
        f"{report['validation']['ndcg@10']:.3f} in the ranker's order, {report['first_stage']['ndcg@10']:.3f} as they "
        f"come\nmodel: {workdir / 'model'}"
    )
    if report["validation"]["ndcg@10"] < report["first_stage"]["ndcg@10"]:
        say(
            "this ranker alone orders worse than the first stage that feeds it; export decides what it adds to it"
        )


if __name__ == "__main__":
    run(main, RankerConfig, can_be_several=True)

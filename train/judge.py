"""Trains the relevance judge: LoRA on a frozen decoder, grades under a written policy.

    python -m train.judge --config configs/demo/judge.py --workdir work/demo/judge

Writes `model/` (the merged judge, an ordinary HF folder; what it was trained on is in its `jaxsearch.json`) and
`report.json` (agreement with gold grades).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from flax import nnx

from jaxsearch.checkpoints import model_version
from jaxsearch.data.assets import resolve
from jaxsearch.data.batches import pack_rows, packing_groups, shuffled, step_batches
from jaxsearch.data.prompts import PromptEncoder
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.files import write_json
from jaxsearch.judge import (
    JudgeBatch,
    JudgeLoss,
    TextJudge,
    grade_probs,
    grade_targets,
    new_judge,
    predicted_grade,
    save_judge,
)
from jaxsearch.metrics import kappa_interval
from jaxsearch.nn.lora import LoRAParam, add_lora, merge_lora
from jaxsearch.scoring.prefill import ScoreRequest
from train.config import Count, Rate, Share
from train.first_stage import open_first_stage
from train.inputs import (
    load_base,
    load_data,
    load_retriever,
    offline_scorer,
    origin,
    pair_texts,
    sample_pairs,
)
from train.loop import LoopConfig, OptimizerConfig, fit
from train.options import run, say
from train.processes import leave_to_main
from train.step import batch_pieces
from train.workdir import claim

CHECK_RANDOM_SHARE = 0.5
"""`random_share` of the pairs that agreement is measured on, whatever the judge was trained on."""


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The judge's base, adapter, pairs and loss."""

    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet); its grades are the gold."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    view: str = "short"
    """Which view of a document is read."""
    base: str = "smollm2"
    """Asset, hub name or folder of the decoder."""
    retriever: str = "minilm"
    """The encoder of the first stage, whose best documents become hard negatives."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the weights that are trained stay float32."""
    use_remat: bool = False
    """Recompute layers in the backward pass: less memory for more time."""
    lora_rank: Count = 16
    lora_alpha: Rate = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    lora_targets: str = r"(q|k|v|o|gate|up|down)_proj"
    """Regular expression over the paths of the kernels that get an adapter."""
    pairs_per_query: Count = 8
    mined_depth: Count = 30
    """How many of the first stage's best documents are looked at for hard negatives."""
    random_share: Share = 0.5
    """Of a train query's documents below the threshold, how many are random instead of graded or mined ones."""
    batch_pairs: Count = 16
    grade_smoothing: Share = 0.1
    """Share of the target that goes to the neighbouring grades."""
    max_shared_tokens: Count = 512
    max_item_tokens: Count = 160
    """Longer documents are cut at their end."""
    check_queries: Count = 25
    """Held-out queries of each split on which agreement is measured, `pairs_per_query` pairs each."""
    provider: Literal["memory", "grain"] = "memory"
    """Who builds batches: the loop when it needs them, or grain ahead of it."""
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(num_steps=64))
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4)
    )
    seed: int = 0


class JudgeData:
    """Graded pairs as batches; a batch is a function of its step."""

    def __init__(
        self, judge: TextJudge, texts: list[tuple[str, str]], grades: list[int], config: JudgeConfig
    ):
        encoded = judge.pairs(texts)
        self.policy_tokens = encoded.prefix
        self.items = encoded.items
        self.targets = grade_targets(grades, smoothing=config.grade_smoothing)
        self.pad_id = judge.tokenizer.pad_id
        self.config = config
        pieces = batch_pieces(config.optimizer, config.loop.mesh)
        self.groups = packing_groups(config.batch_pairs, pieces, most=config.batch_pairs)

    def batch(self, step: int) -> JudgeBatch:
        config = self.config
        chosen = shuffled(len(self.items), config.batch_pairs, step, seed=config.seed)
        chosen = chosen.reshape(self.groups, -1)
        packed = pack_rows(
            [[self.items[i] for i in group] for group in chosen],
            pad_id=self.pad_id,
            step=32,
            longest=config.max_item_tokens,
        )
        return JudgeBatch(*packed, self.targets[chosen])


def agreement(
    judge: TextJudge, texts: list[tuple[str, str]], grades: list[int], groups: list[str]
) -> dict[str, float]:
    """Linear weighted kappa against the gold grades, with a 95 % interval that resamples `groups` (queries)."""
    encoded = judge.pairs(texts)
    scorer = offline_scorer(judge)
    logits = scorer.score([ScoreRequest(encoded.prefix, encoded.items)])[0]
    predicted = predicted_grade(grade_probs(logits))
    kappa = kappa_interval(grades, predicted, groups=groups)
    return {
        "weighted_kappa": kappa.value,
        "weighted_kappa_low": kappa.low,
        "weighted_kappa_high": kappa.high,
        "accuracy": float((np.array(grades) == predicted).mean()),
        "pairs": float(len(grades)),
    }


def main(config: JudgeConfig, workdir: Path) -> None:
    collection, vertical = load_data(config, needs=("train", "validation", "test"), view=config.view)
    base, retriever = resolve(config.base), load_retriever(config.retriever)
    claim(
        workdir,
        config,
        data=collection.fingerprint(),
        vertical=vertical.fingerprint(),
        base=model_version(base),
        retriever=retriever.version,
    )
    decoder = load_base(base, dtype=config.dtype, use_remat=config.use_remat)
    prompt = PromptEncoder(
        vertical.prompts["judge"],
        Tokenizer.from_path(base),
        max_shared_tokens=config.max_shared_tokens,
        max_item_tokens=config.max_item_tokens,
    )
    judge = new_judge(decoder, prompt, policy=vertical.policy, view=config.view)
    add_lora(
        decoder,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets,
        rngs=nnx.Rngs(config.seed),
    )

    stage = open_first_stage(collection, vertical, retriever, view=config.view)

    def sample(
        split: str, num_queries: int, random_share: float
    ) -> tuple[list[tuple[str, str]], list[int], list[str]]:
        pairs = sample_pairs(
            stage,
            split=split,
            num_queries=num_queries,
            per_query=config.pairs_per_query,
            depth=config.mined_depth,
            random_share=random_share,
            seed=config.seed,
            is_graded=True,
        )
        texts = pair_texts(collection, vertical, pairs, view=config.view)
        return texts, [collection.grade(*pair) for pair in pairs], [pair[0] for pair in pairs]

    num_queries = -(-config.loop.num_steps * config.batch_pairs // config.pairs_per_query)
    texts, grades, _ = sample("train", num_queries, config.random_share)
    data = JudgeData(judge, texts, grades, config)
    result = fit(
        judge.judge,
        JudgeLoss(data.policy_tokens),
        step_batches(data.batch, provider=config.provider),
        loop=config.loop,
        optimizer=config.optimizer,
        dtype=config.dtype,
        workdir=workdir,
        trainable=LoRAParam,
    )
    leave_to_main()
    merge_lora(decoder)
    report = {
        split: agreement(judge, *sample(split, config.check_queries, CHECK_RANDOM_SHARE))
        for split in ("validation", "test")
    }
    trained = {
        **origin(config.base, collection, vertical),
        "steps": result.step,
        "agreement": report,
    }
    save_judge(workdir / "model", judge, trained=trained)
    write_json(workdir / "report.json", report)
    for split, found in report.items():
        kappa, low, high = (found[f"weighted_kappa{end}"] for end in ("", "_low", "_high"))
        say(f"{split}: weighted kappa {kappa:z.3f} [{low:z.3f}, {high:z.3f}], {found['pairs']:.0f} pairs")
    if report["validation"]["weighted_kappa_low"] <= 0:
        say("this judge does not tell grades apart: its labels teach nothing yet; give it more graded pairs")
    say(f"model: {workdir / 'model'}")


if __name__ == "__main__":
    run(main, JudgeConfig, can_be_several=True)

"""Prunes a ranker by structure: whole layers, then neurons and heads, all measured on its own prompts.

    python -m train.prune --config configs/demo/prune.py --workdir work/demo/prune

Writes `model/`, a ranker like any other, and `report.json`: what went, what each map lost, and NDCG@10 before and after
on validation queries. What was lost is won back by training: `train.ranker` with `base` the pruned folder and `teacher`
the ranker that it was cut from.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch import losses
from jaxsearch.checkpoints import read_card
from jaxsearch.data.batches import group_pairs, pack_rows
from jaxsearch.data.prompts import PromptTokens
from jaxsearch.data.records import Collection
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.nn.attention import segment_positions
from jaxsearch.nn.pruning import (
    Dropped,
    PackedTokens,
    Search,
    Widths,
    collect_moments,
    drop_layers,
    keep_layers,
    prune_widths,
    tokens_needed,
)
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.ranker import Ranker, TextRanker, load_ranker, save_ranker
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from jaxsearch.sharding import batch_sharding, batch_ways, make_mesh, put_batch, shard_model
from train.config import Count, CountOrNone
from train.first_stage import FirstStage, open_first_stage
from train.inputs import load_data, load_retriever, offline_scorer, pair_texts, sample_pairs
from train.options import progress, run, say
from train.ranker import Validation
from train.workdir import claim

TEXTS_PER_BATCH = 32
"""Prompts of one pass over the calibration texts, on each device."""


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What is cut from which ranker, and on what that is decided."""

    ranker: str = "work/demo/ranker/model"
    """Folder of the ranker that is cut."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    retriever: str = "minilm"
    """The encoder of the first stage, whose best documents stand beside random ones in the calibration prompts and are
    re-ranked for validation."""
    drop_layers: CountOrNone = 0
    """Whole layers that go, one by one: each time the one without which the scores change least."""
    mlp_dim: CountOrNone = 0
    """Neurons that every layer keeps; 0: all."""
    num_heads: CountOrNone = 0
    """Query heads that every layer keeps, equally many of each key/value head; 0: all."""
    num_kv_heads: CountOrNone = 0
    """Key/value heads that every layer keeps, with all their query heads; 0: all."""
    search: Search = dataclasses.field(default_factory=Search)
    calibration_queries: Count = 96
    """Train queries whose prompts the neurons and heads are chosen on."""
    per_query: Count = 8
    """Documents to each of them, half of them the first stage's best."""
    layer_queries: Count = 16
    """Calibration queries by which layers are chosen: a pass over them for each layer that could go."""
    mined_depth: Count = 30
    check_queries: Count = 40
    """Validation queries that are re-ranked before and after."""
    check_depth: Count = 10
    seed: int = 0

    @property
    def widths(self) -> Widths:
        return Widths(self.mlp_dim or None, self.num_heads or None, self.num_kv_heads or None)


class Damage:
    """Mean KL divergence of a smaller decoder's answers from the whole one's, over all documents, in nats."""

    def __init__(self, ranker: TextRanker, prompts: Sequence[PromptTokens]):
        self.ranker = ranker
        self.requests = [ScoreRequest(prompt.prefix, prompt.items) for prompt in prompts]
        self.scorer: PrefillScorer | None = None
        self.num_layers = 0
        self.targets = jax.nn.sigmoid(self.logits(ranker.decoder))
        self.least = self.cross_entropy(ranker.decoder)

    def __call__(self, decoder: Decoder) -> float:
        return self.cross_entropy(decoder) - self.least

    def cross_entropy(self, decoder: Decoder) -> float:
        return float(losses.binary_distillation(self.logits(decoder), self.targets).mean())

    def logits(self, decoder: Decoder) -> jax.Array:
        if self.scorer is None or self.num_layers != decoder.config.num_layers:
            self.scorer = offline_scorer(with_decoder(self.ranker, decoder))
            self.num_layers = decoder.config.num_layers
        else:
            self.scorer.use_weights(decoder)
        scored = self.scorer.score(self.requests)
        return jnp.asarray(np.concatenate([self.ranker.scores(logits) for logits in scored]))


def with_decoder(ranker: TextRanker, decoder: Decoder) -> TextRanker:
    """The same prompt and labels around another decoder."""
    return TextRanker(Ranker(decoder, label_ids=ranker.label_ids), ranker.prompt, view=ranker.view)


def calibration_prompts(
    config: PruneConfig,
    ranker: TextRanker,
    collection: Collection,
    vertical: Vertical,
    stage: FirstStage,
) -> list[PromptTokens]:
    """Prompts of train queries with documents of all grades."""
    pairs = sample_pairs(
        stage,
        split="train",
        num_queries=config.calibration_queries,
        per_query=config.per_query,
        depth=config.mined_depth,
        random_share=0.5,
        seed=config.seed,
        is_graded=True,
    )
    prompts = []
    for query_id, keys in group_pairs(pairs).items():
        texts = pair_texts(collection, vertical, [(query_id, key) for key in keys], view=ranker.view)
        prompts.append(ranker.request(texts[0][0], [document for _, document in texts]))
    return prompts


def check_calibration(widths: Widths, decoder: DecoderConfig, prompts: Sequence[PromptTokens]) -> None:
    """Whether the prompts have tokens enough for the channels that are cut.

    Raises: InputError when they do not.
    """
    num_tokens = sum(len(prompt.prefix) + sum(map(len, prompt.items)) for prompt in prompts)
    needed = tokens_needed(widths, decoder)
    if num_tokens < needed:
        raise InputError(
            f"the calibration prompts have {num_tokens} tokens, these cuts need {needed}: raise calibration_queries "
            "or per_query"
        )


def packed_batches(
    prompts: Sequence[PromptTokens], *, pad_id: int, longest: int, pieces: int
) -> Iterator[PackedTokens]:
    """Every prompt in full, several to a row; a query's shared prefix counts once, as it is computed when served."""
    texts = [
        ([*prompt.prefix, *item], len(prompt.prefix) if place else 0)
        for prompt in prompts
        for place, item in enumerate(prompt.items)
    ]
    size = TEXTS_PER_BATCH * pieces
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        part += [([], 0)] * (size - len(part))
        tokens, segment_ids, _ = pack_rows(
            [[text for text, _ in part]], pad_id=pad_id, step=32, longest=longest, pieces=pieces
        )
        skipped = np.array([0, *(skip for _, skip in part)])
        is_counted = np.asarray(segment_positions(jnp.asarray(segment_ids[0]))) >= skipped[segment_ids[0]]
        yield PackedTokens(tokens[0], segment_ids[0], is_counted & (segment_ids[0] > 0))


def find_layers(
    config: PruneConfig, ranker: TextRanker, prompts: Sequence[PromptTokens]
) -> tuple[list[int], list[Dropped]]:
    damage, count = Damage(ranker, prompts[: config.layer_queries]), config.drop_layers
    total = sum(ranker.decoder.config.num_layers - went for went in range(count))
    with progress("layers", total) as advance:

        def measured(decoder: Decoder) -> float:
            found = damage(decoder)
            advance(1, f"{found:.4f} nats")
            return found

        return drop_layers(ranker.decoder, count, measured)


def cut(
    config: PruneConfig, ranker: TextRanker, prompts: Sequence[PromptTokens]
) -> tuple[Decoder, dict[str, Any]]:
    """The smaller decoder, and what the report says of how it was found."""
    decoder, found = ranker.decoder, {}
    if config.drop_layers:
        kept, dropped = find_layers(config, ranker, prompts)
        decoder = keep_layers(decoder, kept)
        found = {"kept_layers": kept, "dropped": [went._asdict() for went in dropped]}
    if config.widths == Widths():
        return decoder, found
    mesh = make_mesh()
    shard_model(decoder, mesh)
    batches = packed_batches(
        prompts,
        pad_id=ranker.tokenizer.pad_id,
        longest=ranker.prompt.max_shared_tokens + ranker.prompt.max_item_tokens,
        pieces=batch_ways(mesh),
    )
    placed = (PackedTokens(*(put_batch(array, batch_sharding(mesh)) for array in batch)) for batch in batches)
    say("reading the calibration prompts")
    moments = collect_moments(decoder, placed)
    say(f"choosing neurons and heads by {config.search.method} on {moments.num_tokens} tokens")
    pruned, errors = prune_widths(decoder, moments, config.widths, config.search)
    return pruned, found | {"lost_energy": errors._asdict(), "calibration_tokens": moments.num_tokens}


def num_weights(decoder: Decoder) -> dict[str, int]:
    """Of the layers, and of all."""

    def count(module: nnx.Module) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))

    return {"layers": count(decoder.layers), "all": count(decoder)}


def main(config: PruneConfig, workdir: Path) -> None:
    if config.num_heads and config.num_kv_heads:
        raise InputError(
            f"num_heads={config.num_heads} and num_kv_heads={config.num_kv_heads}: heads are cut by one of them, set "
            "the other to 0"
        )
    if config.widths == Widths() and not config.drop_layers:
        raise InputError("nothing is to be cut: set drop_layers, mlp_dim, num_heads or num_kv_heads")
    ranker, retriever = load_ranker(config.ranker), load_retriever(config.retriever)
    config.widths.applied(ranker.decoder.config)
    if config.drop_layers >= (num_layers := ranker.decoder.config.num_layers):
        raise InputError(f"drop_layers is {config.drop_layers} of {num_layers}: at least one must stay")
    collection, vertical = load_data(config, needs=("train", "validation"), view=ranker.view)
    claim(
        workdir,
        config,
        data=collection.fingerprint(),
        vertical=vertical.fingerprint(),
        ranker=ranker.version,
        retriever=retriever.version,
    )
    stage = open_first_stage(collection, vertical, retriever, view=ranker.view)
    prompts = calibration_prompts(config, ranker, collection, vertical, stage)
    check_calibration(config.widths, ranker.decoder.config, prompts)
    evaluate = Validation(
        ranker,
        collection,
        vertical,
        stage,
        num_queries=config.check_queries,
        depth=config.check_depth,
    )
    before = evaluate(ranker.ranker)
    decoder, found = cut(config, ranker, prompts)
    pruned = with_decoder(ranker, decoder)
    after = evaluate.measure(pruned, offline_scorer(pruned))
    weights = {"before": num_weights(ranker.decoder), "after": num_weights(decoder)}
    report = {
        "method": config.search.method,
        "validation": {"before": before, "after": after},
        "first_stage": evaluate.first_stage_metrics,
        "weights": weights,
        "config": dataclasses.asdict(decoder.config),
        **found,
    }
    made_of = read_card(Path(config.ranker)).get("trained", {})
    kept = {name: made_of[name] for name in ("base", "licence", "collection", "vertical") if name in made_of}
    trained = {"pruned_from": ranker.version, "method": config.search.method, "validation": after, **found}
    save_ranker(workdir / "model", pruned, trained=kept | trained)
    write_json(workdir / "report.json", report)
    share = weights["after"]["layers"] / weights["before"]["layers"]
    say(
        f"{share:.0%} of the layers' weights stay; validation NDCG@10 {before['ndcg@10']:.3f} → "
        f"{after['ndcg@10']:.3f}, not healed\nmodel: {workdir / 'model'}"
    )


if __name__ == "__main__":
    run(main, PruneConfig)

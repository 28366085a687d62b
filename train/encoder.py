"""Fine-tunes the bi-encoder: InfoNCE + margin, negatives by grade, hard negatives mined with the current model.

    python -m train.encoder --config configs/demo/encoder.py --workdir work/demo/encoder

Training runs in rounds; before each, the current model mines its own hard negatives on the train queries. A round that
does not raise NDCG@10 on the validation queries is undone. Writes `model/` and `report.json`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from flax import nnx

from jaxsearch.checkpoints import model_version
from jaxsearch.data.assets import resolve
from jaxsearch.data.batches import (
    CandidateSampler,
    allowed_in_batch,
    pack_rows,
    shuffled,
    step_batches,
)
from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import Encoder, EncoderBatch, EncoderLoss, TextEncoder, save_encoder
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.nn.convert import load_pretrained
from jaxsearch.retrieval import to_run
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.search.candidates import RETRIEVE_DEPTH
from train.config import Bound, Count
from train.first_stage import embed_corpus
from train.inputs import load_data, origin, validate
from train.loop import LoopConfig, OptimizerConfig, fit
from train.options import run, say
from train.processes import leave_to_main
from train.step import batch_pieces
from train.workdir import claim

VALIDATION_METRICS = ("ndcg@10", "recall@100")
"""What a round is judged by, on the validation queries and seen documents."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The bi-encoder's data, batch, loss and rounds."""

    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    view: str = "short"
    """Which view of a document is embedded."""
    backbone: str = "minilm"
    """Asset, hub name or folder; a BERT, or a decoder with pooling=last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the weights that are trained stay float32."""
    pooling: str = "mean"
    """mean or last."""
    rounds: Count = 1
    """Before each round the current model mines its own hard negatives; a round has its own schedule."""
    batch_queries: Count = 16
    documents_per_query: Annotated[int, Bound(2)] = 5
    """One positive, the rest negatives by grade."""
    mined_depth: Count = 30
    """How many of the model's best documents are looked at for hard negatives."""
    max_query_tokens: Count = 64
    max_document_tokens: Count = 128
    provider: Literal["memory", "grain"] = "memory"
    """Who builds batches: the loop when it needs them, or grain ahead of it."""
    loss: EncoderLoss = dataclasses.field(default_factory=EncoderLoss)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(num_steps=92))
    """Steps of all rounds together."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-5)
    )
    seed: int = 0


class EncoderData:
    """Queries with one positive and negatives by grade; a batch is a function of its step."""

    def __init__(
        self,
        encoder: TextEncoder,
        collection: Collection,
        vertical: Vertical,
        mined: Run,
        config: EncoderConfig,
    ):
        self.config = config
        self.sampler = CandidateSampler(collection, threshold=vertical.relevant_threshold, mined=mined)
        self.queries = [query.id for query in collection.split("train") if self.sampler.positives(query.id)]
        if not self.queries:
            raise InputError("no train query has a relevant seen document: there is nothing to learn from")
        encoded = encoder.encode_queries([collection.queries[key].text for key in self.queries])
        self.query_tokens = dict(zip(self.queries, encoded, strict=True))
        texts = [
            vertical.document_text(collection.documents[key], config.view) for key in self.sampler.documents
        ]
        encoded = encoder.encode_documents(texts)
        self.document_tokens = dict(zip(self.sampler.documents, encoded, strict=True))
        self.pad_id = encoder.tokenizer.pad_id
        self.pieces = batch_pieces(config.optimizer, config.loop.mesh)

    def batch(self, step: int) -> EncoderBatch:
        config = self.config
        rows = shuffled(len(self.queries), config.batch_queries, step, seed=config.seed)
        rng = np.random.default_rng((config.seed, step))
        query_ids = [self.queries[i] for i in rows]
        documents = [
            [
                str(rng.choice(self.sampler.positives(key))),
                *self.sampler.negatives(key, config.documents_per_query - 1, rng),
            ]
            for key in query_ids
        ]
        texts = [self.query_tokens[key] for key in query_ids]
        texts += [self.document_tokens[key] for keys in documents for key in keys]
        longest = max(config.max_query_tokens, config.max_document_tokens)
        tokens, segment_ids, ends = pack_rows(
            [texts], pad_id=self.pad_id, step=16, longest=longest, pieces=self.pieces
        )
        query_ends, document_ends = np.split(ends[0], [len(query_ids)])
        return EncoderBatch(
            tokens[0],
            segment_ids[0],
            query_ends,
            document_ends.reshape(len(query_ids), -1),
            allowed_in_batch(self.sampler, query_ids, documents),
        )


class SeenCorpus:
    """The seen documents of a collection as an encoder finds them; embedded once for given weights, when first needed.

    An encoder learns from its own errors; all else mines with the whole first stage (`FirstStage.mine`).
    """

    def __init__(
        self, encoder: TextEncoder, collection: Collection, vertical: Vertical, *, view: str
    ) -> None:
        self._encoder = encoder
        self._keys = [key for key in collection.documents if key not in collection.unseen_documents]
        self._texts = [vertical.document_text(collection.documents[key], view) for key in self._keys]
        self._index: ExactIndex | None = None

    def use_weights(self, encoder: Encoder) -> None:
        """Embeds with this encoder's weights from now on."""
        self._encoder.use_weights(encoder)
        self._index = None

    def mine(self, queries: Sequence[Query], *, depth: int) -> Run:
        """The best `depth` documents for each query, with cosine scores."""
        if self._index is None:
            self._index = ExactIndex(embed_corpus(self._encoder, self._texts), self._keys)
        embeds = self._encoder.embed_queries([query.text for query in queries])
        hits = self._index.search(embeds, min(depth, len(self._keys)))
        return to_run(hits, [query.id for query in queries], self._keys)


def main(config: EncoderConfig, workdir: Path) -> None:
    if config.optimizer.accumulate != 1:
        raise InputError("the encoder's negatives are the whole batch: leave optimizer.accumulate at 1")
    if config.loop.num_steps < config.rounds:
        raise InputError(f"loop.num_steps must be at least rounds: one step for each of {config.rounds}")
    collection, vertical = load_data(config, needs=("train", "validation"), view=config.view)
    directory = resolve(config.backbone)
    claim(
        workdir,
        config,
        data=collection.fingerprint(),
        vertical=vertical.fingerprint(),
        backbone=model_version(directory),
    )
    encoder = Encoder(load_pretrained(directory, dtype=config.dtype), pooling=config.pooling)
    tokenizer = Tokenizer.from_path(directory)

    text_encoder = TextEncoder(
        encoder,
        tokenizer,
        query_instruction=vertical.query_instruction,
        max_query_tokens=config.max_query_tokens,
        max_document_tokens=config.max_document_tokens,
    )
    train_queries, held_out = collection.split("train"), collection.split("validation")

    corpus = SeenCorpus(text_encoder, collection, vertical, view=config.view)

    def evaluate(model: Encoder) -> dict[str, float]:
        corpus.use_weights(model)
        return validate(
            collection, vertical, held_out, corpus.mine(held_out, depth=RETRIEVE_DEPTH), VALIDATION_METRICS
        )

    report = {"before": evaluate(encoder)}
    kept, best = "before", jax.tree.map(np.array, nnx.state(encoder))
    per_round = -(-config.loop.num_steps // config.rounds)
    steps = 0
    for number in range(config.rounds):
        mined = corpus.mine(train_queries, depth=config.mined_depth)
        round_config = dataclasses.replace(config, seed=config.seed + number)
        data = EncoderData(text_encoder, collection, vertical, mined, round_config)
        result = fit(
            encoder,
            config.loss,
            step_batches(data.batch, provider=config.provider),
            loop=dataclasses.replace(config.loop, num_steps=per_round),
            optimizer=config.optimizer,
            workdir=workdir / f"round-{number}",
            dtype=config.dtype,
            evaluate=evaluate,
        )
        steps += result.step
        report[f"round-{number}"] = {name: result.metrics[name] for name in VALIDATION_METRICS}
        if report[f"round-{number}"]["ndcg@10"] > report[kept]["ndcg@10"]:
            kept, best = f"round-{number}", jax.tree.map(np.array, nnx.state(encoder))
        else:
            nnx.update(encoder, best)
        corpus.use_weights(encoder)
    leave_to_main()
    trained = {
        **origin(config.backbone, collection, vertical),
        "steps": steps,
        "validation": report,
        "kept": kept,
    }
    save_encoder(workdir / "model", text_encoder, trained=trained)
    write_json(workdir / "report.json", report | {"kept": kept})
    shown = ", ".join(f"{name} {metrics['ndcg@10']:.3f}" for name, metrics in report.items())
    say(f"validation NDCG@10: {shown}; kept: {kept}\nmodel: {workdir / 'model'}")


if __name__ == "__main__":
    run(main, EncoderConfig, can_be_several=True)

"""How fast a training step is beside the same step in torch: same weights, same examples, alternating in one run.

    python -m train.throughput --config configs/throughput.py --workdir work/throughput

Three ways of one step: `packed`, as the trainers take it; `padded`, our networks on torch's very arrays; `torch` (see
`train.torch_peer`). Tokens are those of the examples, every pair with its whole prompt: one number for all ways. First
losses must agree. Then the ranker's step with labels stored beside labels from a judge inside the step. Needs
torch: `make throughput` runs it in the environment that has it. Writes `report.json` and `report.md`.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.checkpoints import save_model
from jaxsearch.data.assets import resolve
from jaxsearch.data.batches import MOST_PER_GROUP, pad_tokens
from jaxsearch.data.prompts import PromptEncoder
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.encoder import Encoder, EncoderBatch, EncoderLoss, TextEncoder
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.judge import new_judge
from jaxsearch.nn.convert import load_pretrained
from jaxsearch.nn.layers import last_hidden
from jaxsearch.nn.pruning import keep_layers
from jaxsearch.ranker import Ranker, RankerBatch, RankerLoss, new_ranker
from train.config import Count
from train.encoder import EncoderConfig, EncoderData
from train.inputs import load_base, load_data
from train.judge import JudgeConfig
from train.options import progress, run, say
from train.ranker import RankerConfig, RankerData, is_trained
from train.speed import commit, matmul_peak, spread, take_turns
from train.step import MeshConfig, OptimizerConfig, TrainStep
from train.teachers import OnlineTeacher, Taught, TaughtLoss

LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest relative difference of first losses; measured 5e-7 and 5.6e-3."""


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """What is measured: the steps of these configs."""

    steps: tuple[str, ...] = ("ranker", "encoder", "teacher")
    ranker: RankerConfig = dataclasses.field(default_factory=RankerConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    num_batches: Count = 1
    """Different batches; a repeat takes a step with each."""
    repeats: Count = 5


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to take a step: `take(i)` with batch i gives a loss, perhaps still being computed.

    `slots` are the token places that all batches compute.
    """

    take: Callable[[int], Any]
    slots: int


def seconds_of(ways: dict[str, Way], num_batches: int, repeats: int, advance: Callable[..., None]):
    """First losses, and the seconds of each repeat, the ways taking turns; everything is compiled before."""
    first = {name: float(way.take(0)) for name, way in ways.items()}

    def take_all(way: Way) -> list[Any]:
        return [jax.block_until_ready(way.take(i)) for i in range(num_batches)]

    calls = {name: functools.partial(take_all, way) for name, way in ways.items()}
    for call in calls.values():
        call()
    return first, take_turns(calls, repeats, advance)


def our_step(
    model: nnx.Module, loss: Callable, batches: Sequence[Any], optimizer: OptimizerConfig, trainable: Any
):
    """Steps of `train.step` on these batches."""
    step = TrainStep(
        model,
        loss,
        optimizer=optimizer,
        mesh=MeshConfig(data=1),
        num_steps=1000,
        seed=0,
        trainable=trainable,
    )
    state = step.initial_state()

    def take(i: int) -> Any:
        nonlocal state
        state, metrics = step.take(state, batches[i])
        return metrics["loss"]

    return take


def texts_of(tokens: np.ndarray, segment_ids: np.ndarray) -> list[list[int]]:
    """The packed texts of one group again, in order."""
    return [tokens[segment_ids == number].tolist() for number in range(1, int(segment_ids.max()) + 1)]


def pad_to_longest(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """To a multiple of 8 tokens, as torch's collators do."""
    return pad_tokens(rows, pad_id=pad_id, lengths=(-(-max(map(len, rows)) // 8) * 8,))


def padded_ranker_loss(loss: RankerLoss) -> Callable:
    """`loss` on rows of whole prompts: (tokens, where, the packed batch with its labels)."""

    def of(ranker: Ranker, batch: tuple[Any, Any, RankerBatch]):
        tokens, where, packed = batch
        answers = last_hidden(ranker.decoder(tokens, where=where), where)
        both = ranker.decoder.logits(answers, jnp.asarray(ranker.label_ids, jnp.int32))
        return loss.of_logits((both[:, 0] - both[:, 1]).reshape(packed.gold.shape), packed)

    return of


def padded_encoder_loss(loss: EncoderLoss) -> Callable:
    """`loss` on queries and documents padded apart: ((tokens, where) of both, the packed batch)."""

    def of(encoder: Encoder, batch: tuple[tuple[Any, Any], tuple[Any, Any], EncoderBatch]):
        queries, documents, packed = batch
        return loss.of_vectors(encoder(*queries), encoder(*documents), packed.allowed)

    return of


def slots_of(arrays: Sequence[np.ndarray]) -> int:
    return sum(array.size for array in arrays)


class RankerParts:
    """A ranker as its trainer makes it, before its first step, without hard negatives and labels."""

    def __init__(self, config: RankerConfig, dtype: str):
        self.config = dataclasses.replace(config, dtype=dtype, labels="")
        self.collection, self.vertical = load_data(self.config, needs=("train",), view=config.view)
        base = resolve(config.base)
        self.tokenizer = Tokenizer.from_path(base)
        prompt = PromptEncoder(
            self.vertical.prompts["ranker"],
            self.tokenizer,
            max_shared_tokens=config.max_shared_tokens,
            max_item_tokens=config.max_item_tokens,
        )
        self.base = load_base(base, dtype=dtype, use_remat=config.use_remat)
        self.ranker = new_ranker(keep_layers(self.base, config.layers), prompt, view=config.view)
        self.data = RankerData(self.ranker, self.collection, self.vertical, {}, [], self.config)
        self.trainable = is_trained(config.use_frozen_embeddings)


def teacher_ways(config: ThroughputConfig, dtype: str, folder: Path) -> tuple[dict[str, Way], int]:
    """A ranker that reads stored labels, and one whose judge, the uncut base, grades inside the step."""
    parts = RankerParts(config.ranker, dtype)
    chosen, vertical, data = parts.config, parts.vertical, parts.data
    prompt = PromptEncoder(
        vertical.prompts["judge"],
        parts.tokenizer,
        max_shared_tokens=JudgeConfig.max_shared_tokens,
        max_item_tokens=JudgeConfig.max_item_tokens,
    )
    judge = new_judge(parts.base, prompt, policy=vertical.policy, view=chosen.view)
    online = OnlineTeacher(judge, parts.collection, vertical, draw=data.draw, batch_of=data.batch_of)
    taught = [online.batch(i) for i in range(config.num_batches)]
    stored = [batch.ranker for batch in taught]
    own = slots_of([array for batch in stored for array in (batch.prefix_ids, batch.segment_ids)])
    read = slots_of([batch.segment_ids for batch in taught]) + len(taught) * len(online.policy_tokens)
    loss = TaughtLoss(chosen.loss, online.policy_tokens)
    model = Taught(parts.ranker.ranker, judge.judge)
    common = (chosen.optimizer, parts.trainable)
    ways = {
        "online teacher": Way(our_step(model, loss, taught, *common), own + read),
        "stored labels": Way(our_step(parts.ranker.ranker, chosen.loss, stored, *common), own),
    }
    return ways, sum(int((batch.segment_ids > 0).sum()) for batch in stored)


def ranker_ways(config: ThroughputConfig, dtype: str, folder: Path) -> tuple[dict[str, Way], int]:
    """Ways, and the tokens of all batches."""
    from train.torch_peer import TorchStep, ranker_loss

    parts = RankerParts(config.ranker, dtype)
    chosen, ranker, data, trainable = parts.config, parts.ranker, parts.data, parts.trainable
    save_model(folder, ranker.decoder, parts.tokenizer, {"kind": "decoder"})
    batches = [data.batch(i) for i in range(config.num_batches)]
    prompts = []
    for batch in batches:
        prefixes, items = (
            texts_of(batch.prefix_tokens, batch.prefix_ids),
            texts_of(batch.item_tokens, batch.segment_ids),
        )
        prompts.append([[*prefixes[i // chosen.candidates_per_query], *item] for i, item in enumerate(items)])
    arrays = [pad_to_longest(rows, data.pad_id) for rows in prompts]
    common = (chosen.optimizer, trainable)
    plain = [(*pair, batch) for pair, batch in zip(arrays, batches, strict=True)]
    peer = TorchStep(
        folder,
        dtype=dtype,
        learning_rate=chosen.optimizer.learning_rate,
        clip_norm=chosen.optimizer.clip_norm,
        frozen="embed_tokens" if chosen.use_frozen_embeddings else "",
    )
    losses = [
        ranker_loss(chosen.loss, pair, batch.gold.reshape(-1, chosen.candidates_per_query), ranker.label_ids)
        for pair, batch in zip(arrays, batches, strict=True)
    ]
    packed_slots = slots_of([array for batch in batches for array in (batch.prefix_ids, batch.segment_ids)])
    padded_slots = slots_of([tokens for tokens, _ in arrays])
    ways = {
        "packed": Way(our_step(ranker.ranker, chosen.loss, batches, *common), packed_slots),
        "padded": Way(our_step(ranker.ranker, padded_ranker_loss(chosen.loss), plain, *common), padded_slots),
        "torch": Way(lambda i: peer.take(losses[i]), padded_slots),
    }
    return ways, sum(len(row) for rows in prompts for row in rows)


def encoder_ways(config: ThroughputConfig, dtype: str, folder: Path) -> tuple[dict[str, Way], int]:
    """Ways, and the tokens of all batches."""
    from train.torch_peer import TorchStep, encoder_loss

    chosen = dataclasses.replace(config.encoder, dtype=dtype)
    if chosen.pooling != "mean":
        raise InputError("the torch side pools by the mean: set encoder.pooling=mean")
    collection, vertical = load_data(chosen, needs=("train",), view=chosen.view)
    directory = resolve(chosen.backbone)
    encoder, tokenizer = Encoder(load_pretrained(directory, dtype=dtype)), Tokenizer.from_path(directory)
    save_model(folder, encoder.backbone, tokenizer, {"kind": "encoder"})
    text_encoder = TextEncoder(
        encoder,
        tokenizer,
        query_instruction=vertical.query_instruction,
        max_query_tokens=chosen.max_query_tokens,
        max_document_tokens=chosen.max_document_tokens,
    )
    data = EncoderData(text_encoder, collection, vertical, {}, chosen)
    batches = [data.batch(i) for i in range(config.num_batches)]
    texts = [texts_of(batch.tokens, batch.segment_ids) for batch in batches]
    size = chosen.batch_queries
    arrays = [
        (pad_to_longest(rows[:size], data.pad_id), pad_to_longest(rows[size:], data.pad_id)) for rows in texts
    ]
    plain = [(*pair, batch) for pair, batch in zip(arrays, batches, strict=True)]
    peer = TorchStep(
        folder,
        dtype=dtype,
        learning_rate=chosen.optimizer.learning_rate,
        clip_norm=chosen.optimizer.clip_norm,
    )
    losses = [
        encoder_loss(chosen.loss, *pair, batch.allowed) for pair, batch in zip(arrays, batches, strict=True)
    ]
    padded_slots = slots_of([tokens for pair in arrays for tokens, _ in pair])
    common = (chosen.optimizer, nnx.Param)
    ways = {
        "packed": Way(
            our_step(encoder, chosen.loss, batches, *common),
            slots_of([batch.segment_ids for batch in batches]),
        ),
        "padded": Way(our_step(encoder, padded_encoder_loss(chosen.loss), plain, *common), padded_slots),
        "torch": Way(lambda i: peer.take(losses[i]), padded_slots),
    }
    return ways, sum(len(row) for rows in texts for row in rows)


def measure(kind: str, dtype: str, config: ThroughputConfig, advance: Callable[..., None]) -> dict[str, Any]:
    """One table row a way: tokens/s, how often the last way's time goes into its own, places computed for each token.

    Raises: InputError when the first losses differ from torch's: then not the same step is timed.
    """
    make = STEPS[kind]
    with tempfile.TemporaryDirectory() as folder:
        ways, tokens = make(config, dtype, Path(folder) / "model")
        first, seconds = seconds_of(ways, config.num_batches, config.repeats, advance)
    base = list(ways)[-1]
    furthest = float(np.max([abs(loss / first[base] - 1) for loss in first.values()]))  # NaN stays NaN
    if base == "torch" and not furthest <= LOSS_TOLERANCE[dtype]:
        raise InputError(f"{kind}, {dtype}: first losses differ, so not the same step is timed: {first}")
    rates = {name: [tokens / value for value in seconds[name]] for name in ways}
    return {
        name: {
            "tokens_per_second": spread(rates[name]),
            "speed": spread(
                [theirs / mine for theirs, mine in zip(seconds[base], seconds[name], strict=True)]
            ),
            "slots_per_token": way.slots / tokens,
            "first_loss": first[name],
        }
        for name, way in ways.items()
    }


def markdown(report: dict[str, Any]) -> str:
    peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {dtype}" for dtype, value in report["peaks"].items())
    lines = [
        f"# Training steps beside torch, {report['date']}",
        "",
        f"{report['device']}, {report['threads']} cores; jax {report['jax']}, torch {report['torch']}, transformers "
        f"{report['transformers']} (eager); commit {report['commit']}; peaks of a matrix product: {peaks}. The demo's "
        "models and batches without hard negatives and labels, weights the same, first losses equal within "
        f"{LOSS_TOLERANCE['float32']} and {LOSS_TOLERANCE['bfloat16']} (bfloat16), "
        f"{report['repeats']} repeats of {report['num_batches']} steps, the ways taking turns. *speed*: tokens "
        "a second over those of the last way of its block on the same examples, median [minimum, maximum]. *places*: "
        "token places computed for each token of the examples (ranker: every pair with its whole prompt; teacher: the "
        "ranker's items).",
        "",
        "| step | dtype | way | speed | places |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for kind, dtypes in report["figures"].items():
        for dtype, ways in dtypes.items():
            for name, row in ways.items():
                ratio = "{median:.2f} [{minimum:.2f}, {maximum:.2f}]".format(**row["speed"])
                lines.append(f"| {kind} | {dtype} | {name} | {ratio} | {row['slots_per_token']:.2f} |")
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else "none"


STEPS: dict[str, Callable[[ThroughputConfig, str, Path], tuple[dict[str, Way], int]]] = {
    "ranker": ranker_ways,
    "encoder": encoder_ways,
    "teacher": teacher_ways,
}


NUM_WAYS = {"ranker": 3, "encoder": 3, "teacher": 2}


def check_comparable(config: ThroughputConfig) -> None:
    """Whether both sides can do the same.

    Raises: InputError for an unknown step, no torch, anything but one CPU device, microbatches, several groups of
        queries, or a gradient that is not clipped.
    """
    if unknown := set(config.steps) - STEPS.keys():
        raise InputError(f"steps: {', '.join(sorted(unknown))} unknown; there are {', '.join(STEPS)}")
    if set(config.steps) - {"teacher"} and importlib.util.find_spec("torch") is None:
        raise InputError(
            "torch is not installed here: `make throughput` runs this in an environment that has it"
        )
    if jax.default_backend() != "cpu" or jax.device_count() != 1:
        raise InputError("torch runs on the CPU here: set JAX_PLATFORMS=cpu, and one device")
    for name, part in (("ranker", config.ranker), ("encoder", config.encoder)):
        if part.optimizer.accumulate != 1 or part.optimizer.clip_norm <= 0:
            raise InputError(f"{name}.optimizer: compared is accumulate=1 with a positive clip_norm")
    if config.ranker.batch_queries > MOST_PER_GROUP:
        raise InputError(
            f"ranker.batch_queries: compared is one packed group, of at most {MOST_PER_GROUP} queries"
        )


def main(config: ThroughputConfig, workdir: Path) -> None:
    check_comparable(config)
    figures: dict[str, Any] = {}
    ways = sum(NUM_WAYS[kind] for kind in config.steps)
    with progress("measuring", ways * len(config.dtypes) * config.repeats) as advance:
        for kind in config.steps:
            figures[kind] = {dtype: measure(kind, dtype, config, advance) for dtype in config.dtypes}
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "commit": commit(),
        "peaks": {dtype: matmul_peak(dtype) for dtype in config.dtypes},
        "num_batches": config.num_batches,
        "repeats": config.repeats,
        "figures": figures,
    }
    write_json(workdir / "report.json", report)
    (workdir / "report.md").write_text(markdown(report), encoding="utf-8")
    say(markdown(report))


if __name__ == "__main__":
    run(main, ThroughputConfig)

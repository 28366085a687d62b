"""What to run on an accelerator, in one command: parity, training, scoring, attention, retrieval, then a recipe.

    python -m train.gpu_suite --config configs/gpu_suite.py --workdir work/gpu_suite

Each figure is measured in this process on random weights of the stated shape. Scoring is measured without and with the
attention kernel; on CPU, where a kernel is interpreted, its error alone. Writes `report.json` and `report.md`, after
every section. `--quick` is a tiny shape that any CPU runs in a minute. Needs neither grain, tensorflow-datasets, scann,
bm25s nor a web framework.
"""

import dataclasses
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.buckets import Lattice
from jaxsearch.files import write_json
from jaxsearch.nn.layers import last_hidden
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.ranker import Ranker, RankerBatch, RankerLoss
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.scoring.packing import Launch, ScoreRequest, Shapes
from jaxsearch.scoring.prefill import PrefillScorer
from train.config import Count
from train.launch_parts import attention_layers, launch_parts
from train.options import run
from train.speed import commit, flops_per_token, matmul_rates, spread, timed
from train.step import MeshConfig, OptimizerConfig, TrainStep

LABEL_IDS = (9, 10)


@dataclasses.dataclass(frozen=True)
class GpuSuiteConfig:
    """Shapes and repeats of every measurement. The decoder's default is the shape of a 0.6B decoder (Qwen3-0.6B)."""

    embed_dim: Count = 1024
    mlp_dim: Count = 3072
    num_layers: Count = 28
    num_heads: Count = 16
    num_kv_heads: Count = 8
    head_dim: Count = 128
    vocab_size: Count = 151_936
    repeats: Count = 7
    """Timed runs after one warm-up; medians are reported with minimum and maximum."""
    matmul_size: Count = 8192
    """Side of the square bf16 product that stands for the device's peak."""
    train_queries: Count = 8
    train_candidates: Count = 8
    train_item_tokens: Count = 256
    prefix_tokens: Count = 60
    item_tokens: Count = 150
    items: Count = 50
    p95_items: Count = 16
    requests: Count = 40
    """Requests whose latencies give the 95th percentile."""
    max_batch_tokens: Count = 8192
    documents: Count = 2_000_000
    embed_size: Count = 384
    queries: Count = 64
    recipe: str = ""
    """Pipeline config that is run at the end, for example configs/reference/pipeline.py."""


def new_decoder(config: GpuSuiteConfig, dtype: Any) -> Decoder:
    shape = DecoderConfig(
        "qwen3",
        config.vocab_size,
        config.embed_dim,
        config.mlp_dim,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        max_positions=4096,
        use_qk_norm=True,
        tie_embeddings=True,
    )
    return Decoder(shape, rngs=nnx.Rngs(0), dtype=dtype)


def matmul_weights(config: GpuSuiteConfig) -> int:
    """Weights that every token is multiplied with; embeddings and attention products not counted."""
    return flops_per_token(nnx.eval_shape(lambda: new_decoder(config, jnp.bfloat16)), nnx.Param) // 6


def parity(config: GpuSuiteConfig) -> dict[str, float]:
    """Largest difference of bf16 from float32 logits over all positions, relative to the largest float32 logit."""
    decoder, half = new_decoder(config, jnp.float32), new_decoder(config, jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(1), (2, config.item_tokens), 0, config.vocab_size)

    def logits(model: Decoder) -> np.ndarray:
        run_ = nnx.jit(lambda m, t: m.logits(m(t), jnp.arange(64, dtype=jnp.int32)))
        return np.asarray(run_(model, tokens), np.float32)

    full, low = logits(decoder), logits(half)
    where = jnp.ones(tokens.shape, bool)
    split = config.prefix_tokens // 2

    def shared(model: Decoder, t: jax.Array) -> jax.Array:
        _, prefix = model.prefill(t[:, :split], where[:, :split])
        hidden = model.attend_prefix(t[:, None, split:], where[:, None, split:], prefix)
        return model.logits(
            last_hidden(hidden, where[:, None, split:])[:, 0], jnp.arange(64, dtype=jnp.int32)
        )

    behind_prefix = np.asarray(nnx.jit(shared)(decoder, tokens), np.float32)
    scale = float(np.abs(full).max())
    return {
        "bf16_max_error": float(np.abs(full - low).max()) / scale,
        "shared_prefix_max_error": float(np.abs(behind_prefix - full[:, -1]).max()) / scale,
    }


def training(config: GpuSuiteConfig, peak: float) -> dict[str, Any]:
    """Tokens/s of the ranker's training step in bf16 with float32 masters, and its share of the peak."""
    ranker = Ranker(new_decoder(config, jnp.bfloat16), label_ids=LABEL_IDS)
    step = TrainStep(
        ranker,
        RankerLoss(),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        mesh=MeshConfig(),
        num_steps=100,
        seed=0,
        trainable=nnx.Param,
    )
    queries, per_query, length = config.train_queries, config.train_candidates, config.train_item_tokens
    shape = (queries, 1, per_query)
    rng = np.random.default_rng(0)
    rows = np.arange(1, per_query + 1, dtype=np.int32)
    batch = RankerBatch(
        rng.integers(0, config.vocab_size, (queries, config.prefix_tokens)).astype(np.int32),
        np.ones((queries, config.prefix_tokens), np.int32),
        rng.integers(0, config.vocab_size, (queries, per_query, length)).astype(np.int32),
        np.broadcast_to(rows[None, :, None], (queries, per_query, length)),
        np.broadcast_to(length * rows - 1, shape),
        rng.random(shape, np.float32),
        np.ones(shape, bool),
        rng.random(shape, np.float32),
        np.ones(shape, bool),
    )
    state = step.initial_state()

    def take() -> Any:
        nonlocal state
        state, metrics = step.take(state, batch)
        return metrics["loss"]

    tokens = queries * (config.prefix_tokens + per_query * length)
    rates = [tokens / seconds for seconds in timed(take, config.repeats)]
    return {
        "tokens_per_second": spread(rates),
        "share_of_matmul_peak": statistics.median(rates) * 6 * matmul_weights(config) / peak,
        "tokens_per_step": tokens,
    }


def lattice_of(config: GpuSuiteConfig) -> Lattice:
    return Lattice.for_prompts(
        max_prefix_tokens=config.prefix_tokens,
        max_item_tokens=config.item_tokens,
        max_batch_tokens=config.max_batch_tokens,
    )


def scoring(config: GpuSuiteConfig, peak: float, *, use_kernel: bool = False) -> dict[str, Any]:
    """Items/s of the prefill scorer in bf16, each request with a new prefix, and p95 latency of a small request."""
    decoder = new_decoder(config, jnp.bfloat16)
    scorer = PrefillScorer(decoder, LABEL_IDS, lattice_of(config), use_kernel=use_kernel)
    rng = np.random.default_rng(0)

    def request(count: int) -> ScoreRequest:
        prefix = tuple(rng.integers(0, config.vocab_size, config.prefix_tokens).tolist())
        return ScoreRequest(prefix, rng.integers(0, config.vocab_size, (count, config.item_tokens)).tolist())

    seconds = timed(lambda: scorer.score([request(config.items)])[0], config.repeats)
    small = timed(lambda: scorer.score([request(config.p95_items)])[0], config.requests)
    items_per_second = [config.items / value for value in seconds]
    tokens = (config.prefix_tokens + config.items * config.item_tokens) / config.items
    flops_per_item = 2 * matmul_weights(config) * tokens
    parts = launch_parts(scorer, decoder, request(config.items), config.repeats)
    return {
        "items_per_second": spread(items_per_second),
        "share_of_matmul_peak": statistics.median(items_per_second) * flops_per_item / peak,
        "p95_milliseconds": float(np.percentile(small, 95)) * 1e3,
        "p50_milliseconds": float(np.percentile(small, 50)) * 1e3,
        **{f"share_of_a_launch_in_{name}": share for name, share in parts.items()},
    }


def attention(config: GpuSuiteConfig) -> dict[str, Any]:
    """Of a full launch: all layers' attention alone in bf16, as XLA operations and as the kernel.

    Errors are the largest differences from float32 in one layer, of values near 1.
    """
    shapes = Shapes(lattice_of(config))
    launch = Launch(shapes)
    request = ScoreRequest((0,) * config.prefix_tokens, [[0] * config.item_tokens] * config.items)
    while launch.add(0, request, list(range(config.items))):
        pass
    groups = config.num_heads // config.num_kv_heads
    shape = (launch.padded_tokens, config.num_kv_heads, groups + 2, config.head_dim)
    heads = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    exact = attention_layers(launch, heads.astype(jnp.float32), 1)()
    figures: dict[str, Any] = {"tokens": launch.num_tokens}
    for name, use_kernel in (("xla", False), ("kernel", True)):
        found = attention_layers(launch, heads, 1, use_kernel=use_kernel)()
        figures[f"{name}_max_error"] = float(jnp.max(jnp.abs(found.astype(jnp.float32) - exact)))
        if jax.default_backend() != "cpu" or not use_kernel:
            layers = attention_layers(launch, heads, config.num_layers, use_kernel=use_kernel)
            seconds = timed(layers, config.repeats)
            figures[f"{name}_milliseconds"] = spread([1e3 * value for value in seconds])
    return figures


def retrieval(config: GpuSuiteConfig) -> dict[str, Any]:
    """Documents/s and bytes/s of exhaustive top-100 over random bf16 embeddings."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((config.documents, config.embed_size), np.float32)
    ids = [str(i) for i in range(config.documents)]
    index = ExactIndex(embeds, ids, dtype=jnp.bfloat16, max_queries=config.queries)
    queries = rng.standard_normal((config.queries, config.embed_size), np.float32)
    many = timed(lambda: index.search(queries, 100).scores, config.repeats)
    one = timed(lambda: index.search(queries[:1], 100).scores, config.repeats)
    size_bytes = config.documents * config.embed_size * 2
    return {
        "query_documents_per_second": spread([config.queries * config.documents / value for value in many]),
        "bytes_per_second_one_query": spread([size_bytes / value for value in one]),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: what ran where, then one row a figure."""
    lines = [
        f"# Accelerator suite, {report['date']}",
        "",
        f"Device {report['device']}, jax {report['jax']}, commit {report['commit']}. Random weights, "
        f"{report['weights'] / 1e6:.0f}M multiplied per token; shapes in report.json. Shares are of the bf16 "
        "product that was measured in the same run.",
        "",
        "| figure | median | minimum | maximum |",
        "| --- | ---: | ---: | ---: |",
    ]
    for section, figures in report["figures"].items():
        for name, value in figures.items():
            cells = list(value.values()) if isinstance(value, dict) else [value]
            shown = [f"{cell:,.4g}" for cell in cells] + ["–"] * (3 - len(cells))
            lines.append(f"| {section}: {name.replace('_', ' ')} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main(config: GpuSuiteConfig, workdir: Path) -> None:
    peak = spread(matmul_rates("bfloat16", config.matmul_size, config.repeats))
    figures: dict[str, Any] = {"matmul": {"flops_per_second": peak}}
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": lambda: parity(config),
        "training": lambda: training(config, peak["median"]),
        "scoring": lambda: scoring(config, peak["median"]),
        "retrieval": lambda: retrieval(config),
        "attention": lambda: attention(config),
    }
    if jax.default_backend() != "cpu":
        measurements["scoring_with_kernel"] = lambda: scoring(config, peak["median"], use_kernel=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit(),
        "weights": matmul_weights(config),
        "config": dataclasses.asdict(config),
        "figures": figures,
    }
    for name, measure in measurements.items():
        print(f"measuring {name} …", flush=True)
        figures[name] = measure()
        jax.clear_caches()
        write_json(workdir / "report.json", report)
        (workdir / "report.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    if config.recipe:
        command = ["-m", "train.demo", "--config", config.recipe, "--workdir", str(workdir / "recipe")]
        raise SystemExit(subprocess.run([sys.executable, *command], check=False).returncode)


if __name__ == "__main__":
    run(main, GpuSuiteConfig)

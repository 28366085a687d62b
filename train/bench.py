"""How fast many documents are scored for one query, beside the libraries that people use: same weights, same tokens.

    python -m train.bench --config configs/bench.py --workdir work/bench

All ways score the same requests, taking turns; their scores must agree. Ours build on one another: each item alone,
items in batches with their whole prompts, and the shared prefix computed once. Afterwards random requests of all kinds
must compile nothing. Needs torch: `make bench` runs it in the environment that has it; llama.cpp has its rows where the
extra `llama` is installed. Writes `report.json` and `report.md`.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.monitoring
import numpy as np

from jaxsearch.buckets import COMPILE_EVENT
from jaxsearch.checkpoints import save_model
from jaxsearch.data.assets import resolve
from jaxsearch.data.prompts import PromptEncoder
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.data.verticals import load_vertical
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.nn.pruning import keep_layers
from jaxsearch.ranker import TextRanker, new_ranker
from jaxsearch.scoring.packing import MAX_LABELS, ScoreRequest
from train.config import Count
from train.inputs import load_base, load_data, offline_scorer
from train.launch_parts import launch_parts
from train.options import progress, run, say
from train.speed import commit, matmul_peak, spread, take_turns, weights_per_token
from train.ways import (
    Request,
    Way,
    check_agreement,
    has_llama,
    llama_ways,
    missing_libraries,
    our_ways,
    their_ways,
)

LENGTH_SPREAD = 0.35
"""Standard deviation of the logarithm of a document's length; half of them are within 25 % of the middle."""
REFERENCE, BASE = "transformers, one by one", "transformers, batches"
"""Whose scores the others must equal, and whose speed they are stated of."""
PACKAGES, LLAMA = ("jax", "torch", "transformers", "sentence-transformers"), "llama-cpp-python"
"""Whose versions the report states; without the last its rows are absent."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is scored by what."""

    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    view: str = "full"
    """Which view of a document is read, as far as its drawn length goes."""
    base: str = "smollm2"
    """Asset, hub name or folder of the decoder, as it comes: speed does not depend on what it learned."""
    layers: tuple[int, ...] = ()
    """The layers of the base that are kept; none named: all."""
    num_items: Count = 50
    """Documents to a query."""
    num_requests: Count = 1
    """Queries that a repeat scores."""
    queries_joined: Count = 5
    """Queries of the collection that make one, so that a prefix has about 60 tokens."""
    document_tokens: Count = 138
    """Median length of a document; around it a log-normal distribution. The prompt adds about a dozen."""
    max_shared_tokens: Count = 128
    max_item_tokens: Count = 320
    max_batch_tokens: Count = 2048
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    repeats: Count = 5
    random_requests: Count = 10_000
    """Requests of random lengths, labels and company that must compile nothing once the scorer is ready."""
    seed: int = 0


def draw_requests(config: BenchConfig, ranker: TextRanker) -> list[Request]:
    """Queries and documents of the collection, no document twice, each cut at a drawn length."""
    collection, vertical = load_data(config, view=config.view)
    rng = np.random.default_rng(config.seed)
    queries, keys = list(collection.queries.values()), list(collection.documents)
    needed = config.num_items * config.num_requests
    if needed > len(keys) or config.num_requests * config.queries_joined > len(queries):
        raise InputError(
            f"{config.num_requests} requests need {needed} documents and {config.queries_joined} queries each; "
            f"{collection.name} has {len(keys)} and {len(queries)}"
        )
    drawn = iter(rng.permutation(len(keys))[:needed])
    asked = iter(rng.permutation(len(queries)))
    requests = []
    for _ in range(config.num_requests):
        query = " ".join(queries[next(asked)].text for _ in range(config.queries_joined))
        documents = []
        for _ in range(config.num_items):
            text = vertical.document_text(collection.documents[keys[next(drawn)]], config.view)
            tokens = ranker.tokenizer.encode_batch([text])[0]
            length = config.document_tokens * np.exp(LENGTH_SPREAD * rng.standard_normal())
            documents.append(ranker.tokenizer.decode(tokens[: max(int(length), 1)]))
        requests.append(Request(query, documents, ranker.request(query, documents)))
    return requests


def make_ranker(config: BenchConfig, dtype: str) -> TextRanker:
    vertical = load_vertical(config.vertical)
    directory = resolve(config.base)
    prompt = PromptEncoder(
        vertical.prompts["ranker"],
        Tokenizer.from_path(directory),
        max_shared_tokens=config.max_shared_tokens,
        max_item_tokens=config.max_item_tokens,
    )
    base = load_base(directory, dtype=dtype, use_remat=False)
    layers = config.layers or tuple(range(base.config.num_layers))
    return new_ranker(keep_layers(base, layers), prompt, view=config.view)


def parts_and_peaks(config: BenchConfig) -> list[dict[str, Any]]:
    """For each dtype the parts of a launch of the shared prefix, and the peak of a product over float32's."""
    rows = []
    for dtype in (*config.dtypes, "int8"):
        row: dict[str, Any] = {
            "dtype": dtype,
            "peak_over_float32": matmul_peak(dtype) / matmul_peak("float32"),
        }
        if dtype in config.dtypes:
            ranker = make_ranker(config, dtype)
            prompt = draw_requests(config, ranker)[0].prompt
            request = ScoreRequest(prompt.prefix, prompt.items)
            scorer = offline_scorer(ranker, max_batch_tokens=config.max_batch_tokens)
            row |= launch_parts(scorer, ranker.decoder, request, config.repeats)
        rows.append(row)
    return rows


def measure(config: BenchConfig, folder: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The tokens of all requests, and a row for each way in each dtype."""
    ways: dict[tuple[str, str], Way] = {}
    rankers = {dtype: make_ranker(config, dtype) for dtype in config.dtypes}
    requests = draw_requests(config, rankers[config.dtypes[0]])
    lengths = [len(item) for request in requests for item in request.prompt.items]
    for dtype, ranker in rankers.items():
        ours = our_ways(ranker, max_batch_tokens=config.max_batch_tokens)
        save_model(folder / dtype, ranker.decoder, ranker.tokenizer, {"kind": "decoder"})
        made = their_ways(folder / dtype, ranker.prompt, ranker.label_ids, dtype)
        if has_llama():
            made |= llama_ways(ranker, folder / f"llama {dtype}", dtype)
        made |= {f"jaxsearch, {name}": ours[name] for name in ours}
        ways |= {(dtype, name): way for name, way in made.items()}

    def score_all(way: Way) -> None:
        for request in requests:
            way.score(request)

    with progress("measuring", (1 + config.repeats) * len(ways)) as advance:
        scores = {
            key: np.concatenate([way.score(request) for request in requests]) for key, way in ways.items()
        }
        differences = check_agreement(scores, REFERENCE, ways)
        advance(len(ways))
        calls = {key: functools.partial(score_all, way) for key, way in ways.items()}
        seconds = take_turns(calls, config.repeats, advance)
    prefixes = sum(len(request.prompt.prefix) for request in requests)
    whole = sum(len(prompt) for request in requests for prompt in request.whole_prompts())
    tokens = {"prefix": prefixes, "items": sum(lengths), "whole": whole}
    weights = weights_per_token(rankers[config.dtypes[0]].decoder)
    base = seconds[config.dtypes[0], BASE]
    rows = []
    for (dtype, name), way in ways.items():
        taken = seconds[dtype, name]
        row: dict[str, Any] = {
            "dtype": dtype,
            "way": name,
            "speed": spread([theirs / mine for theirs, mine in zip(base, taken, strict=True)]),
            "items_per_second": spread([len(lengths) / value for value in taken]),
            "share_of_peak": spread(
                [2 * weights * (prefixes + sum(lengths)) / value / matmul_peak(dtype) for value in taken]
            ),
            "largest_difference": differences[dtype, name],
        }
        if way.places is not None:
            row["computed_tokens"] = sum(way.places(request).padded for request in requests) / len(lengths)
        rows.append(row)
    return tokens, rows


def compilations_after_ready(config: BenchConfig) -> int:
    """How many times XLA compiles while random requests are scored, by a decoder of one layer in the same shapes."""
    ranker = make_ranker(dataclasses.replace(config, layers=(0,)), config.dtypes[0])
    scorer = offline_scorer(ranker, max_batch_tokens=config.max_batch_tokens)
    scorer.compile()
    rng = np.random.default_rng(config.seed)
    vocab_size = ranker.decoder.config.vocab_size

    def tokens(most: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(1, most + 1)).tolist()

    def draw() -> ScoreRequest:
        items = [tokens(config.max_item_tokens) for _ in range(rng.geometric(0.5))]
        labels = tuple(rng.integers(0, vocab_size, rng.integers(1, MAX_LABELS + 1)).tolist())
        return ScoreRequest(tuple(tokens(config.max_shared_tokens)), items, labels)

    compiled = 0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compiled
        compiled += event == COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with progress("random requests", config.random_requests) as advance:
            left = config.random_requests
            while left:
                company = min(int(rng.integers(1, 40)), left)
                scorer.score([draw() for _ in range(company)])
                left -= company
                advance(company)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return compiled


def markdown(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {report[name]}" for name in (*PACKAGES, LLAMA) if name in report)
    others = (
        f"{LLAMA} is not installed here, so that llama.cpp has no rows."
        if LLAMA not in report
        else "llama.cpp has as many as cores; *flash* is its kernel that rounds keys and values to F16."
    )
    lines = [
        f"# Scoring beside torch, {report['date']}",
        "",
        f"{report['device']}, {report['threads']} cores; {versions}; commit {report['commit']}. "
        f"{report['num_items']} documents a query, {report['repeats']} repeats, the ways taking "
        f"turns, from texts to scores; {report['tokens']['prefix']} prefix and {report['tokens']['items']} item "
        f"tokens, {report['tokens']['whole']} in whole prompts. *speed*: items a second over those of {BASE} in "
        f"{report['rows'][0]['dtype']}, median [minimum, maximum]. *computed*: token places computed for each item. "
        f"torch has {report['torch threads']} threads. {others} *share of peak*: FLOPs of the tokens that are "
        "needed (prefix once, items; two a weight, attention not counted) over the peak of a matrix product in that "
        "dtype. Compilations in "
        f"{report['random_requests']:,} random requests after ready: {report['compilations']}.",
        "",
        "| dtype | way | speed | computed | share of peak |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        ratio = "{median:.2f} [{minimum:.2f}, {maximum:.2f}]".format(**row["speed"])
        computed = f"{row['computed_tokens']:.0f}" if "computed_tokens" in row else "not known"
        share = f"{row['share_of_peak']['median']:.0%}"
        lines.append(f"| {row['dtype']} | {row['way']} | {ratio} | {computed} | {share} |")
    lines += [
        "",
        "What a launch's time goes to with a shared prefix, in shares of it: the parts as programs of their own, taking"
        " turns with the whole, one launch at a time, that of the longest items. What is left is norms, rotations,"
        " SiLU, copies and the last layer. *peak*: of a matrix product over float32's (int8, which nothing here uses, "
        "is summed in int32).",
        "",
        "| dtype | linear maps | attention | peak |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in report["launches"]:
        shares = [
            "{median:.0%} [{minimum:.0%}, {maximum:.0%}]".format(**row[part]) if part in row else "–"
            for part in ("linear_maps", "attention")
        ]
        lines.append(f"| {row['dtype']} | {' | '.join(shares)} | {row['peak_over_float32']:.2f} |")
    return "\n".join(lines) + "\n"


def main(config: BenchConfig, workdir: Path) -> None:
    if missing := missing_libraries():
        raise InputError(
            f"{', '.join(missing)} not installed here: `make bench` runs this in an environment that has them"
        )
    from train.torch_scorers import num_threads

    if not config.dtypes:
        raise InputError("dtypes: name float32, bfloat16 or both")
    if jax.default_backend() != "cpu":
        raise InputError("torch runs on the CPU here: set JAX_PLATFORMS=cpu")
    with tempfile.TemporaryDirectory() as folder:
        tokens, rows = measure(config, Path(folder))
    compiled = compilations_after_ready(config)
    packages = (*PACKAGES, LLAMA) if has_llama() else PACKAGES
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "torch threads": num_threads(),
        **{package: importlib.metadata.version(package) for package in packages},
        "commit": commit(),
        "num_items": config.num_items,
        "repeats": config.repeats,
        "tokens": tokens,
        "rows": rows,
        "launches": parts_and_peaks(config),
        "random_requests": config.random_requests,
        "compilations": compiled,
    }
    write_json(workdir / "report.json", report)
    (workdir / "report.md").write_text(markdown(report), encoding="utf-8")
    say(markdown(report))


if __name__ == "__main__":
    run(main, BenchConfig)

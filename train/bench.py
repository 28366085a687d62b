"""How fast many documents are scored for one query, beside the libraries that people use: same weights, same tokens.

    python -m train.bench --config configs/bench.py --workdir work/bench

All ways score the same requests, taking turns; their scores must agree. Ours build on one another: each item alone,
items in batches with their whole prompts, and the shared prefix computed once. Needs torch: `make bench` runs it in the
environment that has it. Writes `report.json` and `report.md`.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxsearch.buckets import Buckets
from jaxsearch.checkpoints import save_model
from jaxsearch.data.assets import resolve
from jaxsearch.data.prompts import PromptEncoder, PromptTokens
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.data.verticals import load_vertical
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.nn.pruning import keep_layers
from jaxsearch.ranker import TextRanker, new_ranker
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from train.config import Count
from train.inputs import load_base, load_data
from train.options import progress, run, say
from train.speed import commit, matmul_peak, spread, take_turns, weights_per_token

AGREEMENT = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest difference between the scores (yes minus no) of one dtype's ways; measured 1.5e-5 and 0.15."""
LENGTH_SPREAD = 0.35
"""Standard deviation of the logarithm of a document's length; half of them are within 25 % of the middle."""
BATCHED = 16
"""Prompts of a padded batch in torch."""
ITEM_BUCKETS = 16
REFERENCE, BASE = "transformers, one by one", "transformers, batches"
"""Whose scores the others must equal, and whose speed they are stated of."""


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
    seed: int = 0


class Request(NamedTuple):
    """One query with its documents, as texts and as tokens."""

    query: str
    documents: list[str]
    prompt: PromptTokens

    def whole_prompts(self) -> list[list[int]]:
        return [[*self.prompt.prefix, *item] for item in self.prompt.items]


@dataclasses.dataclass
class Way:
    """One way to score; `padded_tokens` says what a pass over a request computes, None where it is not known."""

    score: Callable[[Request], Float[np.ndarray, "c"]]
    padded_tokens: Callable[[Request], int] | None = None


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


def our_ways(config: BenchConfig, ranker: TextRanker) -> dict[str, Way]:
    """From texts to scores, tokenisation included; shapes are fitted to other documents than are timed."""
    earlier = draw_requests(dataclasses.replace(config, seed=config.seed + 1), ranker)
    items = [len(item) for request in earlier for item in request.prompt.items]
    wholes = [len(prompt) - 1 for request in earlier for prompt in request.whole_prompts()]
    most = {"items": config.max_item_tokens, "wholes": config.max_shared_tokens + config.max_item_tokens}

    def scorer(sizes: Sequence[int], largest: int, prefixes: Sequence[int]) -> PrefillScorer:
        return PrefillScorer(
            ranker.decoder,
            ranker.label_ids,
            prefix_buckets=prefixes,
            item_buckets=Buckets.fit(sizes, count=ITEM_BUCKETS, largest=largest),
            max_batch_tokens=config.max_batch_tokens,
            prefix_cache_size=1,
        )

    def way(scorer: PrefillScorer, arrange: Callable[[PromptTokens], list[ScoreRequest]]) -> Way:
        def score(request: Request) -> np.ndarray:
            scorer.forget_prefixes()
            prompt = ranker.request(request.query, request.documents)
            scored = [scorer.score([part])[0] for part in arrange(prompt)]
            return np.concatenate([ranker.scores(logits) for logits in scored])

        def padded(request: Request) -> int:
            batches = [batch for part in arrange(request.prompt) for batch in scorer.plan([part])]
            prefixes = {batch.prefix for batch in batches}
            return sum(batch.padded_tokens for batch in batches) + sum(
                scorer.prefix_buckets.bucket_of(len(prefix)) for prefix in prefixes
            )

        return Way(score, padded)

    def whole(prompt: PromptTokens) -> ScoreRequest:
        """Nothing shared but the first token."""
        first, *rest = prompt.prefix
        return ScoreRequest((first,), [[*rest, *item] for item in prompt.items])

    def alone(prompt: PromptTokens) -> list[ScoreRequest]:
        request = whole(prompt)
        return [ScoreRequest(request.prefix, [item]) for item in request.items]

    plain = scorer(wholes, most["wholes"], [8])
    shared = scorer(items, most["items"], [config.max_shared_tokens // 2, config.max_shared_tokens])
    return {
        "jaxsearch, one by one": way(plain, alone),
        "jaxsearch, batches": way(plain, lambda prompt: [whole(prompt)]),
        "jaxsearch, shared prefix": way(shared, lambda prompt: [ScoreRequest(prompt.prefix, prompt.items)]),
    }


def their_ways(config: BenchConfig, ranker: TextRanker, folder: Path, dtype: str) -> dict[str, Way]:
    """Torch with the same weights. Decoders get our tokens; the cross-encoder gets texts that it tokenises to them."""
    from train.torch_scorers import CrossEncoderScorer, DecoderScorer

    save_model(folder, ranker.decoder, ranker.tokenizer, {"kind": "decoder"})
    decode = ranker.tokenizer.decode
    limit = config.max_shared_tokens + config.max_item_tokens
    encoder = CrossEncoderScorer(folder, ranker.label_ids, dtype=dtype, batch_size=BATCHED, max_tokens=limit)

    @functools.cache
    def pairs(query: str, documents: tuple[str, ...]) -> list[tuple[str, str]]:
        """Made at the first call, which is not timed."""
        prompt = ranker.request(query, documents)
        return [(decode(prompt.prefix), decode(item)) for item in prompt.items]

    def plain(batch_size: int) -> Way:
        scorer = DecoderScorer(folder, ranker.label_ids, dtype=dtype, batch_size=batch_size)

        def score(request: Request) -> np.ndarray:
            prompt = ranker.request(request.query, request.documents)
            return scorer(request._replace(prompt=prompt).whole_prompts())

        return Way(score, lambda request: padded_tokens(request.whole_prompts(), batch_size))

    return {
        REFERENCE: plain(1),
        BASE: plain(BATCHED),
        "sentence-transformers": Way(lambda request: encoder(pairs(request.query, tuple(request.documents)))),
    }


def padded_tokens(prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """Of batches of prompts sorted by length.

    Example:
        >>> padded_tokens([[1], [1, 2], [1, 2, 3]], 2)
        7
    """
    sizes = sorted(map(len, prompts), reverse=True)
    parts = [sizes[start : start + batch_size] for start in range(0, len(sizes), batch_size)]
    return sum(part[0] * len(part) for part in parts)


def check_agreement(ways: Mapping[tuple[str, str], Way], requests: Sequence[Request]) -> dict[Any, float]:
    """Each way's largest difference from `transformers` one by one in its dtype.

    Raises: InputError when scores differ: then not the same is timed.
    """
    scores = {key: np.concatenate([way.score(request) for request in requests]) for key, way in ways.items()}
    differences = {
        (dtype, name): float(np.abs(found - scores[dtype, REFERENCE]).max())
        for (dtype, name), found in scores.items()
    }
    if wrong := {key: value for key, value in differences.items() if not value <= AGREEMENT[key[0]]}:
        raise InputError(f"scores differ, so not the same is timed: {wrong}")
    return differences


def measure(config: BenchConfig, folder: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The tokens of all requests, and a row for each way in each dtype."""
    ways: dict[tuple[str, str], Way] = {}
    rankers = {dtype: make_ranker(config, dtype) for dtype in config.dtypes}
    requests = draw_requests(config, rankers[config.dtypes[0]])
    lengths = [len(item) for request in requests for item in request.prompt.items]
    for dtype, ranker in rankers.items():
        made = their_ways(config, ranker, folder / dtype, dtype) | our_ways(config, ranker)
        ways |= {(dtype, name): way for name, way in made.items()}

    def score_all(way: Way) -> None:
        for request in requests:
            way.score(request)

    with progress("measuring", (1 + config.repeats) * len(ways)) as advance:
        differences = check_agreement(ways, requests)
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
        if way.padded_tokens is not None:
            row["computed_tokens"] = sum(map(way.padded_tokens, requests)) / len(lengths)
        rows.append(row)
    return tokens, rows


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Scoring beside torch, {report['date']}",
        "",
        f"{report['device']}, {report['threads']} cores; jax {report['jax']}, torch {report['torch']}, transformers "
        f"{report['transformers']}, sentence-transformers {report['sentence-transformers']}; commit "
        f"{report['commit']}. {report['num_items']} documents a query, {report['repeats']} repeats, the ways taking "
        f"turns, from texts to scores; {report['tokens']['prefix']} prefix and {report['tokens']['items']} item "
        f"tokens, {report['tokens']['whole']} in whole prompts. *speed*: items a second over those of {BASE} in "
        f"{report['rows'][0]['dtype']}, median [minimum, maximum]. *computed*: token places computed for each item. "
        f"torch has {report['torch threads']} threads. *share of peak*: FLOPs of the tokens that are needed (prefix "
        "once, items; two a weight, attention not "
        "counted) over the peak of a matrix product in that dtype.",
        "",
        "| dtype | way | speed | computed | share of peak |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        ratio = "{median:.2f} [{minimum:.2f}, {maximum:.2f}]".format(**row["speed"])
        computed = f"{row['computed_tokens']:.0f}" if "computed_tokens" in row else "not known"
        share = f"{row['share_of_peak']['median']:.0%}"
        lines.append(f"| {row['dtype']} | {row['way']} | {ratio} | {computed} | {share} |")
    return "\n".join(lines) + "\n"


def main(config: BenchConfig, workdir: Path) -> None:
    if missing := [name for name in ("torch", "sentence_transformers") if not importlib.util.find_spec(name)]:
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
    packages = ("jax", "torch", "transformers", "sentence-transformers")
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
    }
    write_json(workdir / "report.json", report)
    (workdir / "report.md").write_text(markdown(report), encoding="utf-8")
    say(markdown(report))


if __name__ == "__main__":
    run(main, BenchConfig)

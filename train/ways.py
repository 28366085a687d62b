"""Ways to score a query's documents, from texts to scores, tokenisation included: ours, and others' on our weights.

Ours build on one another: each item alone, items in batches with their whole prompts, the shared prefix computed once.
All of ours multiply the label rows of the output matrix only. What is timed with them is `bench`'s and `ladder`'s.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsearch.buckets import Lattice
from jaxsearch.data.prompts import PromptEncoder, PromptTokens
from jaxsearch.errors import InputError
from jaxsearch.nn.convert import save_pretrained
from jaxsearch.ranker import TextRanker, encode_request
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from train.inputs import offline_scorer

AGREEMENT = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest difference between the scores (yes minus no) of one dtype's ways; measured 1.5e-5 and 0.15."""
BATCHED = 16
"""Prompts of a padded batch in torch."""
LIBRARIES = ("torch", "transformers", "sentence-transformers")
"""What `their_ways` uses; the last may be missing."""
F16_AGREEMENT = 0.05
"""The same where keys and values are rounded to F16 in float32; measured 3e-3."""
SHARED_PREFIX = "shared prefix"
"""The last of `our_ways`, for those who want one alone."""
Tokens = Sequence[int]
Key = tuple[str, str]
"""A dtype and a way's name."""


class Request(NamedTuple):
    """One query with its documents, as texts and as tokens."""

    query: str
    documents: list[str]
    prompt: PromptTokens

    def whole_prompts(self) -> list[list[int]]:
        return [[*self.prompt.prefix, *item] for item in self.prompt.items]


class Places(NamedTuple):
    """Token places of all that is computed for a request: those with a token, and all, padding included."""

    filled: int
    padded: int


@dataclasses.dataclass
class Way:
    """One way to score; `places` says what a pass over a request computes, None where it is not known.

    `agreement` stands for its dtype's where it computes at less precision than that.
    """

    score: Callable[[Request], Float[np.ndarray, "c"]]
    places: Callable[[Request], Places] | None = None
    agreement: float | None = None


def our_ways(ranker: TextRanker, *, max_batch_tokens: int = 2048) -> dict[str, Way]:
    """`one by one`, `batches` and `shared prefix`; a shape is compiled at its first use."""
    shared = offline_scorer(ranker, max_batch_tokens=max_batch_tokens)
    for_whole = Lattice.for_prompts(
        max_prefix_tokens=1,
        max_item_tokens=ranker.prompt.max_shared_tokens + ranker.prompt.max_item_tokens,
        max_batch_tokens=max_batch_tokens,
    )
    unshared = PrefillScorer(ranker.decoder, ranker.label_ids, for_whole)

    def way(scorer: PrefillScorer, arrange: Callable[[PromptTokens], list[ScoreRequest]]) -> Way:
        def score(request: Request) -> np.ndarray:
            prompt = ranker.request(request.query, request.documents)
            scored = [scorer.score([part])[0] for part in arrange(prompt)]
            return np.concatenate([ranker.scores(logits) for logits in scored])

        def places(request: Request) -> Places:
            launches = [launch for part in arrange(request.prompt) for launch in scorer.plan([part])]
            filled = sum(part.num_tokens for launch in launches for part in launch.parts)
            return Places(filled, sum(launch.padded_tokens for launch in launches))

        return Way(score, places)

    def whole(prompt: PromptTokens) -> list[ScoreRequest]:
        """Nothing shared but the first token."""
        first, *rest = prompt.prefix
        return [ScoreRequest((first,), [[*rest, *item] for item in prompt.items])]

    def alone(prompt: PromptTokens) -> list[ScoreRequest]:
        return [ScoreRequest(prompt.prefix, [item]) for item in prompt.items]

    return {
        "one by one": way(shared, alone),
        "batches": way(unshared, whole),
        SHARED_PREFIX: way(shared, lambda prompt: [ScoreRequest(prompt.prefix, prompt.items)]),
    }


def missing_libraries() -> list[str]:
    return [name for name in LIBRARIES if not importlib.util.find_spec(name.replace("-", "_"))]


def their_ways(folder: Path, prompt: PromptEncoder, label_ids: tuple[int, int], dtype: str) -> dict[str, Way]:
    """Torch with the weights and the tokenizer of `folder`, read at their first use; needs torch and transformers.

    Decoders get our tokens; the cross-encoder, left out where sentence-transformers is not installed, gets texts that
    it tokenises to them.
    """
    from train.torch_scorers import CrossEncoderScorer, DecoderScorer

    @functools.cache
    def decoder() -> DecoderScorer:
        return DecoderScorer(folder, label_ids, dtype=dtype)

    def plain(batch_size: int) -> Way:
        def score(request: Request) -> np.ndarray:
            encoded = encode_request(prompt, request.query, request.documents)
            return decoder()(request._replace(prompt=encoded).whole_prompts(), batch_size)

        def places(request: Request) -> Places:
            prompts = request.whole_prompts()
            return Places(sum(map(len, prompts)), padded_tokens(prompts, batch_size))

        return Way(score, places)

    ways = {"transformers, one by one": plain(1), "transformers, batches": plain(BATCHED)}
    if "sentence-transformers" in missing_libraries():
        return ways

    @functools.cache
    def encoder() -> CrossEncoderScorer:
        limit = prompt.max_shared_tokens + prompt.max_item_tokens
        return CrossEncoderScorer(folder, label_ids, dtype=dtype, batch_size=BATCHED, max_tokens=limit)

    @functools.cache
    def pairs(query: str, documents: tuple[str, ...]) -> list[tuple[str, str]]:
        """Made at the first call, which is not timed."""
        encoded, decode = encode_request(prompt, query, documents), prompt.tokenizer.decode
        return [(decode(encoded.prefix), decode(item)) for item in encoded.items]

    def score_pairs(request: Request) -> np.ndarray:
        return encoder()(pairs(request.query, tuple(request.documents)))

    return ways | {"sentence-transformers": Way(score_pairs)}


def has_llama() -> bool:
    """Whether `llama_ways` can run; nothing asks for it, since it builds for a quarter of an hour."""
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def llama_ways(ranker: TextRanker, folder: Path, dtype: str) -> dict[str, Way]:
    """llama.cpp with the same weights, which are written to `folder`, on our tokens; in BF16 for bfloat16.

    Whole prompts in batches, and the prefix computed once, its cache shared by the items. Flash attention rounds keys
    and values to F16: float32 has it as well as plain attention, which does not.
    """
    from train.llama_scorer import WEIGHTS, LlamaScorer, write_gguf

    save_pretrained(ranker.decoder, folder)
    path = folder / "model.gguf"
    write_gguf(path, folder, ranker.decoder.config, dtype)
    most_tokens = ranker.prompt.max_shared_tokens + ranker.prompt.max_item_tokens

    def pair(use_flash: bool) -> dict[str, Way]:
        scorer = LlamaScorer(path, ranker.label_ids, dtype=dtype, max_tokens=most_tokens, use_flash=use_flash)
        agreement = F16_AGREEMENT if use_flash and dtype == "float32" else None

        def way(arrange: Callable[[Request], tuple[Tokens, Sequence[Tokens]]]) -> Way:
            def score(request: Request) -> np.ndarray:
                prompt = ranker.request(request.query, request.documents)
                return scorer(*arrange(request._replace(prompt=prompt)))

            def places(request: Request) -> Places:
                prefix, items = arrange(request)
                computed = len(prefix) + sum(map(len, items))
                return Places(computed, computed)

            return Way(score, places, agreement)

        name = f"llama.cpp {WEIGHTS[dtype]}{' flash' if use_flash else ''}"
        return {
            f"{name}, batches": way(lambda request: ((), request.whole_prompts())),
            f"{name}, shared prefix": way(lambda request: (request.prompt.prefix, request.prompt.items)),
        }

    return pair(False) | pair(True) if dtype == "float32" else pair(True)


def padded_tokens(prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """Of batches of prompts sorted by length.

    Example:
        >>> padded_tokens([[1], [1, 2], [1, 2, 3]], 2)
        7
    """
    sizes = sorted(map(len, prompts), reverse=True)
    parts = [sizes[start : start + batch_size] for start in range(0, len(sizes), batch_size)]
    return sum(part[0] * len(part) for part in parts)


def check_agreement(
    scores: Mapping[Key, Float[np.ndarray, "m"]], reference: str, ways: Mapping[Key, Way] | None = None
) -> dict[Key, float]:
    """Each way's largest difference from the way named `reference` in its dtype.

    Raises: InputError when scores differ by more than their dtype's agreement, or their own where one of `ways` has
        one: then not the same is timed.
    """
    differences = {
        (dtype, name): float(np.abs(found - scores[dtype, reference]).max())
        for (dtype, name), found in scores.items()
    }
    limits = {key: AGREEMENT[key[0]] for key in scores}
    limits |= {key: way.agreement for key, way in (ways or {}).items() if way.agreement is not None}
    if wrong := {key: value for key, value in differences.items() if not value <= limits[key]}:
        raise InputError(f"scores differ, so not the same is timed: {wrong}")
    return differences

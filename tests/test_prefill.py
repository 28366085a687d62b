import dataclasses
import functools

import jax
import jax.monitoring
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.buckets import Lattice
from jaxsearch.errors import InputError
from jaxsearch.nn.layers import last_hidden
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.scoring.packing import MAX_LABELS, ScoreRequest
from jaxsearch.scoring.prefill import PrefillScorer

VOCAB_SIZE = 97
LABELS = (5, 11)


@functools.cache
def tiny_decoder(dtype="float32") -> Decoder:
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB_SIZE,
        embed_dim=32,
        mlp_dim=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        max_positions=128,
        use_qk_norm=False,
        use_qkv_bias=False,
        use_output_bias=False,
        use_mlp_bias=False,
        tie_embeddings=True,
    )
    return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


@functools.cache
def other_decoder() -> Decoder:
    """With an output matrix of its own, biases and normed queries and keys, none of them at its start."""
    config = dataclasses.replace(
        tiny_decoder().config,
        family="qwen3",
        num_layers=2,
        num_kv_heads=1,
        use_qk_norm=True,
        use_qkv_bias=True,
        use_output_bias=True,
        use_mlp_bias=True,
        tie_embeddings=False,
    )
    decoder = Decoder(config, rngs=nnx.Rngs(1))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    state = nnx.state(decoder)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state))
    return decoder


LATTICE = Lattice.for_prompts(max_prefix_tokens=24, max_item_tokens=32, max_batch_tokens=384)
BASE = tuple(range(40, 53))


def decoder_of(kind) -> Decoder:
    if kind == "another family":
        return other_decoder()
    return tiny_decoder("bfloat16" if "bfloat16" in kind else "float32")


@functools.cache
def ready_scorer(kind="plain") -> PrefillScorer:
    options = {
        "plain": {},
        "behind a base": {"base": BASE},
        "batch-invariant": {"is_batch_invariant": True},
        "another family": {},
        "bfloat16 behind a base": {"base": BASE},
        "bfloat16 batch-invariant": {"is_batch_invariant": True},
    }
    scorer = PrefillScorer(decoder_of(kind), LABELS, LATTICE, **options[kind])
    assert scorer.compile() == scorer.num_compilations == len(scorer.shapes.launches)
    return scorer


@nnx.jit
def one_by_one(decoder, tokens, where):
    return decoder.logits(last_hidden(decoder(tokens, where=where), where))


def reference(prefix, item, decoder=None):
    """All logits of prefix + item alone, padded to one length so that jit compiles once."""
    tokens = np.zeros((1, 80), np.int32)
    both = [*prefix, *item]
    tokens[0, : len(both)] = both
    return np.asarray(one_by_one(decoder or tiny_decoder(), tokens, np.arange(80)[None] < len(both)))[0]


tokens = st.integers(0, VOCAB_SIZE - 1)
requests = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=24).map(tuple),
        st.lists(st.lists(tokens, min_size=1, max_size=32), max_size=9),
        st.none() | st.lists(tokens, min_size=1, max_size=MAX_LABELS).map(tuple),
    ),
    max_size=4,
)


TOLERANCE = {"float32": 1e-5, "bfloat16": 0.01}
"""Measured maximum: 1.2e-7 over 300 random mixes of each kind, 1.5e-3 over 100 in bfloat16."""


@pytest.mark.parametrize(
    "kind", ["plain", "behind a base", "batch-invariant", "another family", "bfloat16 behind a base"]
)
@settings(deadline=None, max_examples=40)
@given(parts=requests)
def test_packed_scores_equal_one_by_one_scores(kind, parts):
    scorer = ready_scorer(kind)
    mix = [ScoreRequest((*scorer.base, *prefix), *rest) for prefix, *rest in parts]
    results = scorer.score(mix)
    assert len(results) == len(mix)
    for request, logits in zip(mix, results, strict=True):
        labels = list(request.label_token_ids or LABELS)
        assert logits.shape == (len(request.items), len(labels))
        assert logits.dtype == np.float32
        for item, row in zip(request.items, logits, strict=True):
            expected = reference(request.prefix, item, decoder_of(kind))
            tolerance = TOLERANCE["bfloat16" if "bfloat16" in kind else "float32"]
            np.testing.assert_allclose(row, expected[labels], atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["batch-invariant", "bfloat16 batch-invariant"])
@settings(deadline=None, max_examples=40)
@given(requests, requests)
def test_a_batch_invariant_score_is_the_same_bit_for_bit_beside_any_neighbours(kind, parts, others):
    scorer = ready_scorer(kind)
    mix = [ScoreRequest(*part) for part in parts]
    beside = scorer.score([ScoreRequest(*part) for part in others] + mix)[len(others) :]
    for request, logits in zip(mix, beside, strict=True):
        for item, row in zip(request.items, logits, strict=True):
            alone = scorer.score([ScoreRequest(request.prefix, [item], request.label_token_ids)])[0][0]
            assert alone.tobytes() == row.tobytes()


@settings(deadline=None, max_examples=200)
@given(requests)
def test_nothing_compiles_once_ready(parts):
    mix = [ScoreRequest(*part) for part in parts]
    scorer = ready_scorer()
    compiled = []

    def listen(event, duration, **kwargs):
        if "compile" in event:
            compiled.append(event)

    before = scorer.num_compilations
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        scorer.score(mix)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert scorer.num_compilations == before


def test_programs_are_made_once_and_only_for_sizes_that_occur():
    scorer = PrefillScorer(tiny_decoder(), LABELS, LATTICE)
    assert scorer.num_compilations == 0
    scorer.score([ScoreRequest((1, 2), [[3], [4]])])
    assert scorer.num_compilations == 1
    scorer.score([ScoreRequest((7,), [[9, 9]] * 4)])
    assert scorer.num_compilations == 1
    scorer.score([ScoreRequest((7,), [list(range(30))] * 4)])
    assert scorer.num_compilations == 1
    scorer.score([ScoreRequest((7,), [list(range(30))] * 5)])
    assert scorer.num_compilations == 2
    scorer.score([ScoreRequest((7,), [list(range(30))] * 25)])  # 384 + 384 at once, and 128
    assert scorer.num_compilations == 3


def test_other_weights_are_used_from_then_on_behind_the_base_too():
    scorer = PrefillScorer(tiny_decoder(), LABELS, LATTICE, base=BASE)
    request = ScoreRequest((*BASE, 3), [[4, 5]])
    before = scorer.score([request])[0]
    other = Decoder(tiny_decoder().config, rngs=nnx.Rngs(7))
    scorer.use_weights(other)
    after = scorer.score([request])[0]
    fresh = PrefillScorer(other, LABELS, LATTICE, base=BASE).score([request])[0]
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, fresh)
    assert scorer.num_compilations == 1


def test_several_requests_share_a_launch_and_a_long_one_takes_several():
    scorer = ready_scorer()
    small = ScoreRequest((1, 2), [[3]] * 2)
    launches = scorer.plan([small, ScoreRequest((5,), [[4]] * 2), small])
    assert [[part.owner for part in launch.parts] for launch in launches] == [[0, 1, 2]]
    many = ScoreRequest((1,) * 20, [[2] * 30] * 40)
    launches = scorer.plan([many])
    assert len(launches) == 4
    positions = [position for launch in launches for part in launch.parts for position in part.positions]
    assert sorted(positions) == list(range(40))
    assert all(launch.padded_tokens <= 384 for launch in launches)


def test_a_prefix_must_begin_with_the_base():
    with pytest.raises(InputError, match="does not begin with the scorer's 13 base tokens"):
        ready_scorer("behind a base").score([ScoreRequest((1, 2), [[3]])])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest((), [[1]]), "prefix has no tokens"),
        (ScoreRequest((1,), [[]]), "item without tokens"),
        (ScoreRequest((1,) * 25, [[1]]), "a prefix of 25 tokens does not fit"),
        (ScoreRequest((1,), [[1] * 33]), "an item of 33 tokens does not fit"),
        (ScoreRequest((1,), [[1]], (VOCAB_SIZE,)), "label token ids must be in 0..96"),
        (ScoreRequest((1,), [[1]], ()), "1 to 16 label tokens"),
        (ScoreRequest((1,), [[1, VOCAB_SIZE]]), "token ids must be in 0..96; got 1..97"),
        (ScoreRequest((-1,), [[1]]), "token ids must be in 0..96; got -1..-1"),
    ],
)
def test_requests_that_cannot_be_scored_say_why(request_, message):
    with pytest.raises(InputError, match=message):
        ready_scorer().score([request_])


def test_a_prompt_longer_than_the_model_is_refused():
    with pytest.raises(InputError, match="the model has 128 positions"):
        PrefillScorer(tiny_decoder(), LABELS, Lattice.for_prompts(max_prefix_tokens=64, max_item_tokens=65))

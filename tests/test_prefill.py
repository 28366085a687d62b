import functools

import jax
import jax.monitoring
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.errors import InputError
from jaxsearch.nn.layers import last_hidden
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.scoring.prefill import MAX_LABELS, PrefillScorer, ScoreRequest

VOCAB_SIZE = 97
LABELS = (5, 11)


@functools.cache
def tiny_decoder() -> Decoder:
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
    return Decoder(config, rngs=nnx.Rngs(0))


@functools.cache
def ready_scorer() -> PrefillScorer:
    scorer = PrefillScorer(
        tiny_decoder(), LABELS, prefix_buckets=[8, 24], item_buckets=[8, 16, 32], max_batch_tokens=64
    )
    assert scorer.compile() == scorer.num_compilations == 2 + 2 * len(scorer.lattice.shapes)
    return scorer


@nnx.jit
def one_by_one(decoder, tokens, where):
    return decoder.logits(last_hidden(decoder(tokens, where=where), where))


def reference(prefix, item):
    """All logits of prefix + item alone, padded to one length so that jit compiles once."""
    tokens = np.zeros((1, 64), np.int32)
    both = [*prefix, *item]
    tokens[0, : len(both)] = both
    return np.asarray(one_by_one(tiny_decoder(), tokens, np.arange(64)[None] < len(both)))[0]


tokens = st.integers(0, VOCAB_SIZE - 1)
requests = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=24).map(tuple),
        st.lists(st.lists(tokens, min_size=1, max_size=32), max_size=9),
        st.none() | st.lists(tokens, min_size=1, max_size=MAX_LABELS).map(tuple),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=40)
@given(requests)
def test_shared_prefix_scores_equal_one_by_one_scores(parts):
    mix = [ScoreRequest(*part) for part in parts]
    results = ready_scorer().score(mix)
    assert len(results) == len(mix)
    for request, logits in zip(mix, results, strict=True):
        labels = list(request.label_token_ids or LABELS)
        assert logits.shape == (len(request.items), len(labels))
        assert logits.dtype == np.float32
        for item, row in zip(request.items, logits, strict=True):
            np.testing.assert_allclose(row, reference(request.prefix, item)[labels], atol=TOLERANCE, rtol=0)


TOLERANCE = 1e-5  # measured maximum over 300 random mixes: 1.2e-7


@settings(deadline=None, max_examples=25)
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


def test_programs_are_made_once_and_only_for_shapes_that_occur():
    scorer = PrefillScorer(tiny_decoder(), LABELS, prefix_buckets=[8], item_buckets=[8, 16])
    assert scorer.num_compilations == 0
    scorer.score([ScoreRequest((1, 2), [[3], [4]])])
    assert scorer.num_compilations == 2
    scorer.score([ScoreRequest((7,), [[9, 9]] * 4)])
    assert scorer.num_compilations == 2
    scorer.score([ScoreRequest((7,), [list(range(12))] * 4)])
    assert scorer.num_compilations == 3


def test_a_prefix_is_computed_once_while_it_is_in_use():
    scorer = PrefillScorer(tiny_decoder(), LABELS, prefix_buckets=[8], item_buckets=[8], prefix_cache_size=2)
    policy = ScoreRequest((1, 2, 3), [[4, 5]])
    scorer.score([policy, policy, ScoreRequest((1, 2, 3), [[6]])])
    scorer.score([policy])
    assert scorer.num_prefix_runs == 1
    for start in (10, 20, 30):
        scorer.score([ScoreRequest((start,), [[4]])])
    scorer.score([policy])
    assert scorer.num_prefix_runs == 5


def test_requests_with_one_prefix_share_a_launch():
    scorer = ready_scorer()
    batches = scorer.plan([ScoreRequest((1, 2), [[3]] * 2), ScoreRequest((1, 2), [[4]] * 2)])
    assert [batch.owners for batch in batches] == [((0, 0), (0, 1), (1, 0), (1, 1))]
    assert batches[0].num_tokens == 4
    assert batches[0].padded_tokens == 4 * 8


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest((), [[1]]), "prefix has no tokens"),
        (ScoreRequest((1,), [[]]), "item without tokens"),
        (ScoreRequest((1,) * 25, [[1]]), "25 tokens do not fit"),
        (ScoreRequest((1,), [[1] * 33]), "33 tokens do not fit"),
        (ScoreRequest((1,), [[1]], (VOCAB_SIZE,)), "label token ids must be in 0..96"),
        (ScoreRequest((1,), [[1]], ()), "1 to 16 label tokens"),
    ],
)
def test_requests_that_cannot_be_scored_say_why(request_, message):
    with pytest.raises(InputError, match=message):
        ready_scorer().score([request_])


def test_a_prompt_longer_than_the_model_is_refused():
    with pytest.raises(InputError, match="the model has 128 positions"):
        PrefillScorer(tiny_decoder(), LABELS, prefix_buckets=[64], item_buckets=[65])

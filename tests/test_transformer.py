"""The decoder: rotary scalings by hand, padding and neighbours change nothing, items behind a prefix equal one by one.

Against the reference implementation: `tests/parity`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.data.batches import pack_tokens
from jaxsearch.errors import InputError
from jaxsearch.nn.layers import RMSNorm, RopeScaling, last_hidden, rope_frequencies, rotate
from jaxsearch.nn.transformer import Decoder, DecoderConfig

LLAMA = DecoderConfig("llama", 61, 16, 24, 3, 4, 2, 4, tie_embeddings=True)
EVERYTHING = DecoderConfig(
    "qwen3",
    61,
    16,
    24,
    2,
    4,
    1,
    6,
    rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=16),
    use_qk_norm=True,
    use_qkv_bias=True,
    use_output_bias=True,
    use_mlp_bias=True,
)
CONFIGS = {"llama": LLAMA, "everything": EVERYTHING}
TOLERANCE = 5e-6  # hidden states have unit scale; measured maximum 1.2e-6 over 60 random cases
BY_HAND = 5e-7  # relative, to numbers worked out by hand; measured maximum 4.8e-8


@functools.cache
def _model(config=LLAMA, **options):
    """Weights five times their usual spread, biases included, so that attention is not nearly uniform. Shared."""
    model = Decoder(config, rngs=nnx.Rngs(0), **options)
    state = nnx.state(model)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
    nnx.update(
        model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), state)
    )
    return model


@nnx.jit
def _forward(model, tokens, where):
    return model(tokens, where=where)


@nnx.jit
def _behind_prefix(model, prefix, prefix_where, items, where, segment_ids=None):
    prefix = model.prefill(prefix, prefix_where)[1]
    return model.attend_prefix(items, where, prefix, segment_ids=segment_ids)


@nnx.jit
def _packed(model, tokens, segment_ids):
    return model(tokens, where=segment_ids > 0, segment_ids=segment_ids)


@nnx.jit
def _behind_prefixes(model, prefix_tokens, prefix_ids, tokens, segment_ids):
    prefix = model.prefill(prefix_tokens, prefix_ids > 0, segment_ids=prefix_ids)[1]
    return model.attend_prefix(
        tokens, segment_ids > 0, prefix, segment_ids=segment_ids, prefix_ids=(segment_ids + 1) // 2
    )


def _random_tokens(rng, *shape):
    return jnp.asarray(rng.integers(0, 61, shape), jnp.int32)


def _up_to(lengths, size):
    return jnp.asarray(np.arange(size) < np.asarray(lengths)[..., None])


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_neighbours_change_nothing(name):
    model, rng = _model(CONFIGS[name]), np.random.default_rng(0)
    tokens, lengths = _random_tokens(rng, 3, 8), [8, 5, 1]
    together = _forward(model, tokens, _up_to(lengths, 8))
    alone = _forward(model, tokens[1:2, :5], jnp.ones((1, 5), bool))
    np.testing.assert_allclose(together[1, :5], alone[0], atol=TOLERANCE)
    others = _forward(model, tokens.at[0].set(7).at[:, 5:].set(9), _up_to([2, 5, 3], 8))
    np.testing.assert_allclose(together[1, :5], others[1, :5], atol=TOLERANCE)


def test_left_padding_equals_right_padding():
    model, rng = _model(), np.random.default_rng(0)
    tokens, padding = _random_tokens(rng, 1, 5), jnp.zeros((1, 3), jnp.int32)
    is_kept = jnp.asarray([[False] * 3 + [True] * 5])
    left = _forward(model, jnp.concatenate([padding, tokens], 1), is_kept)
    right = _forward(model, jnp.concatenate([tokens, padding], 1), is_kept[:, ::-1])
    np.testing.assert_allclose(left[:, 3:], right[:, :5], atol=TOLERANCE)


def test_later_tokens_change_nothing_earlier():
    model, rng = _model(), np.random.default_rng(0)
    tokens, where = _random_tokens(rng, 1, 6), jnp.ones((1, 6), bool)
    before = _forward(model, tokens, where)
    after = _forward(model, tokens.at[0, 4].set((tokens[0, 4] + 1) % 61), where)
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert float(jnp.abs(after[:, 4:] - before[:, 4:]).max()) > 1e-3


@settings(deadline=None, max_examples=15)
@given(name=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 10**6))
def test_items_behind_a_prefix_equal_one_by_one(name, seed):
    model, rng = _model(CONFIGS[name]), np.random.default_rng(seed)
    prefix, items = _random_tokens(rng, 2, 5), _random_tokens(rng, 2, 3, 4)
    prefix_lengths, lengths = rng.integers(0, 6, 2), rng.integers(0, 5, (2, 3))
    shared = _behind_prefix(model, prefix, _up_to(prefix_lengths, 5), items, _up_to(lengths, 4))
    starts, ends = np.repeat(prefix_lengths, 3), np.repeat(prefix_lengths, 3) + lengths.ravel()
    rows = np.zeros((6, 9), np.int32)
    for row, start, end in zip(range(6), starts, ends, strict=True):
        rows[row, :start] = prefix[row // 3, :start]
        rows[row, start:end] = items[row // 3, row % 3, : end - start]
    alone = np.asarray(_forward(model, jnp.asarray(rows), _up_to(ends, 9)))
    for row, start, end in zip(range(6), starts, ends, strict=True):
        one = shared[row // 3, row % 3, : end - start]
        np.testing.assert_allclose(one, alone[row, start:end], atol=TOLERANCE)
    assert bool(jnp.isfinite(shared).all())


@settings(deadline=None, max_examples=15)
@given(name=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 10**6))
def test_items_in_one_row_equal_items_in_rows_of_their_own(name, seed):
    model, rng = _model(CONFIGS[name]), np.random.default_rng(seed)
    prefix, prefix_where = _random_tokens(rng, 2, 5), _up_to(rng.integers(0, 6, 2), 5)
    items, lengths = _random_tokens(rng, 2, 3, 4), rng.integers(1, 5, (2, 3))
    where = _up_to(lengths, 4)
    apart = _behind_prefix(model, prefix, prefix_where, items, where)
    row, segment_ids = np.zeros((2, 1, 14), np.int32), np.zeros((2, 1, 14), np.int32)
    for q in range(2):
        row[q, 0, : lengths[q].sum()] = items[q][where[q]]
        segment_ids[q, 0, : lengths[q].sum()] = np.repeat([1, 2, 3], lengths[q])
    segment_ids = jnp.asarray(segment_ids)
    packed = _behind_prefix(model, prefix, prefix_where, jnp.asarray(row), segment_ids > 0, segment_ids)
    for q in range(2):
        np.testing.assert_allclose(packed[q, 0, : lengths[q].sum()], apart[q][where[q]], atol=TOLERANCE)
    assert bool(jnp.isfinite(packed).all())


@settings(deadline=None, max_examples=15)
@given(name=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 10**6))
def test_texts_in_one_row_equal_texts_in_rows_of_their_own(name, seed):
    model, rng = _model(CONFIGS[name]), np.random.default_rng(seed)
    texts = [rng.integers(0, 61, size).tolist() for size in rng.integers(1, 6, 5)]
    tokens, segment_ids, _ = pack_tokens([texts], rows=2, pad_id=0, lengths=(20,))
    ids = jnp.asarray(segment_ids[0])
    packed = _packed(model, jnp.asarray(tokens[0]), ids)
    for number, text in enumerate(texts, start=1):
        alone = np.zeros((1, 6), np.int32)
        alone[0, : len(text)] = text
        expected = _forward(model, jnp.asarray(alone), _up_to([len(text)], 6))[0, : len(text)]
        np.testing.assert_allclose(packed[ids == number], expected, atol=TOLERANCE)


@settings(deadline=None, max_examples=15)
@given(name=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 10**6))
def test_items_of_several_queries_in_one_row_follow_their_own_prefix(name, seed):
    model, rng = _model(CONFIGS[name]), np.random.default_rng(seed)
    prefixes = [rng.integers(0, 61, size).tolist() for size in rng.integers(1, 6, 2)]
    items = [rng.integers(0, 61, size).tolist() for size in rng.integers(1, 5, 4)]  # two a query
    prefix_tokens, prefix_ids, _ = pack_tokens([prefixes], rows=1, pad_id=0, lengths=(12,))
    tokens, segment_ids, _ = pack_tokens([items], rows=2, pad_id=0, lengths=(16,))
    packed = _behind_prefixes(
        model, *map(jnp.asarray, (prefix_tokens[:, 0], prefix_ids[:, 0], tokens, segment_ids))
    )
    for number, item in enumerate(items):
        whole = [*prefixes[number // 2], *item]
        alone = np.zeros((1, 10), np.int32)
        alone[0, : len(whole)] = whole
        expected = _forward(model, jnp.asarray(alone), _up_to([len(whole)], 10))[
            0, len(whole) - len(item) : len(whole)
        ]
        np.testing.assert_allclose(packed[segment_ids == number + 1], expected, atol=TOLERANCE)


@pytest.mark.parametrize("use_remat", [False, True])
def test_gradients_through_a_prefix_equal_one_by_one(use_remat):
    model, rng = _model(use_remat=use_remat), np.random.default_rng(3)
    prefix, items = _random_tokens(rng, 1, 4), _random_tokens(rng, 1, 3, 3)
    where = _up_to([[3, 2, 3]], 3)

    def shared(model):
        hidden = _behind_prefix(model, prefix, jnp.ones((1, 4), bool), items, where)
        return jnp.sum(jnp.sin(last_hidden(hidden, where)))

    def copied(model):
        tokens = jnp.concatenate([jnp.repeat(prefix, 3, 0), items[0]], 1)
        kept = jnp.concatenate([jnp.ones((3, 4), bool), where[0]], 1)
        return jnp.sum(jnp.sin(last_hidden(model(tokens, where=kept), kept)))

    left, right = (nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)) for loss in (shared, copied))
    for (path, one), (_, other) in zip(left, right, strict=True):
        scale = float(jnp.abs(other[...]).max())
        assert scale > 0, path
        # relative to the largest entry; measured maximum 5.4e-7
        np.testing.assert_allclose(one[...] / scale, other[...] / scale, atol=1e-5, err_msg=str(path))


def test_padded_rows_have_finite_gradients():
    model = _model()
    tokens, where = jnp.zeros((2, 4), jnp.int32), _up_to([2, 0], 4)
    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.square(model(tokens, where=where)))))(model)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_stored_keys():
    model, rng = _model(), np.random.default_rng(0)
    tokens, where = _random_tokens(rng, 2, 5), _up_to([5, 2], 5)
    hidden, prefix = model.prefill(tokens, where)
    assert prefix.k.shape == prefix.v.shape == (3, 2, 5, 2, 4)
    assert prefix.where.tolist() == where.tolist()
    np.testing.assert_allclose(hidden, _forward(model, tokens, where), atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_label_logits_are_rows_of_all_logits(name):
    model = _model(CONFIGS[name])
    hidden, ids = model(jnp.asarray([[1, 2, 3]], jnp.int32)), jnp.asarray([60, 0, 7])
    everything = model.logits(hidden)
    assert everything.shape == (1, 3, 61)
    np.testing.assert_allclose(
        model.logits(hidden, ids), everything[..., ids], atol=1e-6
    )  # measured maximum 1.2e-7


def test_bf16_compute_keeps_float32_masters_and_logits():
    wide, narrow = _model(), _model(dtype=jnp.bfloat16)
    tokens = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    where = jnp.ones((1, 4), bool)
    hidden = _forward(narrow, tokens, where)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype(jnp.float32)}
    logits, reference = narrow.logits(hidden), wide.logits(_forward(wide, tokens, where))
    assert logits.dtype == jnp.float32
    scale = float(jnp.abs(reference).max())
    np.testing.assert_allclose(logits / scale, reference / scale, atol=0.02)  # measured maximum 0.0053


def test_float32_products_are_never_narrowed():
    """On accelerators default precision would mean TF32: every product of the program asks for the highest."""
    model, tokens = _model(), jnp.asarray([[1, 2, 3]], jnp.int32)
    where = jnp.ones((1, 3), bool)
    structure, state = nnx.split(model)

    def program(state):
        model = nnx.merge(structure, state)
        prefix = model.prefill(tokens, where)[1]
        return model.logits(model.attend_prefix(tokens[None], where[None], prefix))

    text = jax.jit(jax.grad(lambda state: program(state).sum())).lower(state).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 30
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_parameters_name_their_axes():
    for config in CONFIGS.values():
        model = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        for path, param in nnx.to_flat_state(nnx.state(model)):
            axes = param.get_metadata("axes")
            assert len(axes) == len(param.shape), path
            assert (axes[0] == "layers") == (path[0] == "layers"), path


def test_unknown_token_is_visible():
    assert bool(jnp.isnan(_model()(jnp.asarray([[61]], jnp.int32))).all())


def test_last_hidden_by_hand():
    hidden = jnp.arange(12, dtype=jnp.float32).reshape(3, 4, 1)
    where = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool)
    assert last_hidden(hidden, where).tolist() == [[1.0], [7.0], [10.0]]


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0, rngs=nnx.Rngs(0))
    norm.weight[...] = jnp.asarray([1.0, 2.0])
    # mean square of [3, 4] is 12.5
    expected = [[3 / 12.5**0.5, 8 / 12.5**0.5]]
    np.testing.assert_allclose(norm(jnp.asarray([[3.0, 4.0]])), expected, rtol=BY_HAND)


def test_rotation_depends_on_distance_alone():
    frequencies, _ = rope_frequencies(4, 100.0, None, 64)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=BY_HAND)
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 4)), jnp.float32) for _ in "qk")

    def product(query_position, key_position):
        angles = [jnp.asarray(position * frequencies)[None] for position in (query_position, key_position)]
        turned = [rotate(x, jnp.cos(a), jnp.sin(a)) for x, a in zip((query, key), angles, strict=True)]
        return float(jnp.sum(turned[0] * turned[1]))

    # measured maximum 9.5e-7 over 300 seeds
    assert product(7, 3) == pytest.approx(product(24, 20), abs=5e-6)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)


def test_linear_scaling_divides_frequencies():
    plain, scaled = (rope_frequencies(8, 1e4, s, 64)[0] for s in (None, RopeScaling("linear", 4.0)))
    np.testing.assert_allclose(scaled, plain / 4, rtol=BY_HAND)


def test_llama3_scaling_keeps_fast_and_divides_slow_channels():
    scaling = RopeScaling("llama3", 8.0, original_max_positions=64, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = rope_frequencies(8, 1e4, None, 64)[
        0
    ]  # 1, .1, .01, .001: 10.2, 1.02, 0.1, 0.01 turns in 64 positions
    scaled, amplitude = rope_frequencies(8, 1e4, scaling, 512)
    kept = (64 * 0.1 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(scaled, expected, rtol=BY_HAND)
    assert (plain[0], amplitude) == (1.0, 1.0)


def test_yarn_scaling_ramps_and_amplifies():
    scaling = RopeScaling("yarn", 4.0, original_max_positions=2048)
    plain = rope_frequencies(8, 1e4, None, 2048)[0]
    scaled, amplitude = rope_frequencies(8, 1e4, scaling, 8192)
    # channels with 32 and 1 turns in 2048 positions: 8 ln(2048 / 2π n) / (2 ln 1e4) = 1.008 and 2.513 → from 1 to 3
    np.testing.assert_allclose(scaled / plain, [1.0, 1.0, 0.5 + 0.5 / 4, 0.25], rtol=BY_HAND)
    assert amplitude == pytest.approx(0.1 * math.log(4) + 1)
    assert rope_frequencies(8, 1e4, dataclasses.replace(scaling, attention_factor=0.5), 64)[1] == 0.5
    both = dataclasses.replace(scaling, mscale=1.0, mscale_all_dim=1.0)
    assert rope_frequencies(8, 1e4, both, 64)[1] == 1.0


def test_dynamic_scaling_is_plain_within_its_length_and_refuses_more():
    scaled = dataclasses.replace(LLAMA, rope_scaling=RopeScaling("dynamic", 2.0), max_positions=6)
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]], jnp.int32)
    where = jnp.ones((1, 6), bool)
    np.testing.assert_array_equal(_forward(_model(scaled), tokens, where), _forward(_model(), tokens, where))
    with pytest.raises(InputError, match="7 positions with dynamic RoPE"):
        _model(scaled)(jnp.ones((1, 7), jnp.int32))
    model, where = _model(scaled), where[:, :4]
    prefix = model.prefill(tokens[:, :4], where)[1]
    with pytest.raises(InputError, match="8 positions with dynamic RoPE"):
        model.attend_prefix(tokens[:, None, :4], where[:, None], prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt2"}, "'gpt2' is unknown; use one of llama, qwen2, qwen3"),
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LLAMA, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported"),
        ({"rope_type": "linear", "factor": 0.5}, "factor 0.5 is below 1"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "needs high_freq_factor"),
    ],
)
def test_unsupported_scalings_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        RopeScaling(**arguments)


def test_a_prefix_with_segments_is_not_attended_as_one():
    model, tokens = _model(), jnp.ones((1, 4), jnp.int32)
    where, ids = jnp.ones((1, 4), bool), jnp.asarray([[1, 1, 2, 2]])
    items, kept = tokens[:, None], where[:, None]
    with pytest.raises(AssertionError, match="prefix_ids"):
        model.attend_prefix(items, kept, model.prefill(tokens, where, segment_ids=ids)[1])
    with pytest.raises(AssertionError, match="prefix_ids"):
        model.attend_prefix(items, kept, model.prefill(tokens, where)[1], prefix_ids=ids[:, None])

"""Cutting decoders: keep-all is the identity, what is kept is what was there, what adds nothing goes first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.nn.lora import LoRAParam, add_lora
from jaxsearch.nn.osscar import channels_of
from jaxsearch.nn.pruning import (
    Moments,
    PackedTokens,
    Search,
    Widths,
    collect_moments,
    drop_layers,
    keep_layers,
    prune_widths,
)
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from tests import small_models

CONFIG = DecoderConfig("llama", 61, 16, 24, 4, 4, 2, 4, tie_embeddings=True)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)


def _model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def test_keeping_all_layers_is_the_identity():
    model = _model()
    pruned = keep_layers(model, range(4))
    assert pruned.config == CONFIG
    np.testing.assert_array_equal(pruned(TOKENS), model(TOKENS))


def test_layers_that_add_nothing_can_be_dropped():
    model = _model()
    for kernel in (model.layers.self_attn.o_proj.kernel, model.layers.mlp.down_proj.kernel):
        kernel[...] = kernel[...].at[jnp.asarray([0, 2])].set(0.0)
    pruned = keep_layers(model, [1, 3])
    assert pruned.config == dataclasses.replace(CONFIG, num_layers=2)
    np.testing.assert_array_equal(pruned(TOKENS), model(TOKENS))


def test_kept_rows_are_the_originals_and_share_no_buffer():
    model = _model()
    pruned = keep_layers(model, [0, 3])
    np.testing.assert_array_equal(
        pruned.layers.mlp.up_proj.kernel[...], model.layers.mlp.up_proj.kernel[...][jnp.asarray([0, 3])]
    )
    before = np.asarray(model.embed_tokens.weight[...])
    for leaf in jax.tree.leaves(nnx.state(pruned)):
        leaf.delete()
    np.testing.assert_array_equal(model.embed_tokens.weight[...], before)
    assert bool(jnp.isfinite(model(TOKENS)).all())


def test_adapters_stay_with_their_layers():
    model = _model()
    add_lora(model, rank=2, alpha=2.0, targets="v_proj", rngs=nnx.Rngs(1))
    pruned = keep_layers(model, [2])
    assert {leaf.shape[0] for leaf in jax.tree.leaves(nnx.state(pruned, LoRAParam))} == {1}
    assert pruned(TOKENS).shape == (2, 5, 16)


@pytest.mark.parametrize("keep", [[], [1, 0], [1, 1], [-1, 0], [0, 4]])
def test_impossible_choices_are_refused(keep):
    with pytest.raises(InputError, match="rising indices from 0 to 3"):
        keep_layers(_model(), keep)


def test_layers_that_add_nothing_go_first():
    model = _model()
    for kernel in (model.layers.self_attn.o_proj.kernel, model.layers.mlp.down_proj.kernel):
        kernel[...] = kernel[...].at[jnp.asarray([1, 3])].set(0.0)
    whole = model(TOKENS)
    kept, dropped = drop_layers(model, 3, lambda smaller: float(jnp.abs(smaller(TOKENS) - whole).max()))
    assert {went.layer for went in dropped[:2]} == {1, 3}
    assert [went.damage for went in dropped[:2]] == [0.0, 0.0]
    assert dropped[2].damage > 1e-3
    assert kept == [({0, 2} - {dropped[2].layer}).pop()]
    with pytest.raises(InputError, match="at least one must stay"):
        drop_layers(model, 4, lambda _: 0.0)


def test_a_layer_without_which_nothing_is_a_number_stays():
    damages = iter([0.3, float("nan"), 0.1, 0.2])
    assert drop_layers(_model(), 1, lambda _: next(damages)) == ([0, 1, 3], [(2, 0.1)])


def batches(config, count=3, seed=0):
    """Rows of two packed texts and padding, of which the first tokens do not count."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        tokens = random.integers(0, config.vocab_size, (4, 24)).astype(np.int32)
        segment_ids = np.repeat([1, 2, 0], [9, 11, 4])[None].repeat(4, axis=0).astype(np.int32)
        where = (segment_ids > 0) & (np.arange(24) > 1)
        yield PackedTokens(tokens, segment_ids, where)


CASES = {name: config for name, config in small_models.CONFIGS.items() if name != "bert"}


@pytest.fixture(scope="module", params=CASES)
def whole(request):
    config = dataclasses.replace(CASES[request.param], num_heads=6, num_kv_heads=3)
    model = small_models.make(config)
    return model, collect_moments(model, batches(config))


def zeroed(model, neurons=None, heads=None):
    """A copy whose given neurons [l, n] and channels of heads [l, n] reach nothing."""
    structure, state = nnx.split(model)
    model = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    layers = jnp.arange(model.config.num_layers)[:, None]
    for kernel, gone in (
        (model.layers.mlp.down_proj.kernel, neurons),
        (model.layers.self_attn.o_proj.kernel, heads),
    ):
        if gone is not None:
            kernel[...] = kernel[...].at[layers, jnp.asarray(gone)].set(0.0)
    return model


def test_keeping_all_widths_is_the_identity(whole):
    model, moments = whole
    for widths in (Widths(), Widths(mlp_dim=24, num_heads=6), Widths(num_kv_heads=3)):
        pruned, errors = prune_widths(model, moments, widths)
        assert pruned.config == model.config
        small_models.assert_same_bits(pruned, model)
        assert errors.mlp == errors.heads == [0.0] * model.config.num_layers


WIDTHS = [Widths(mlp_dim=10), Widths(num_heads=3), Widths(num_kv_heads=1), Widths(mlp_dim=10, num_kv_heads=2)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_channels_that_reach_nothing_can_go(whole, widths):
    """Those that reach nothing are chosen by every method that looks, and the smaller model says the same."""
    model, _ = whole
    config, random = model.config, np.random.default_rng(0)
    smaller = widths.applied(config)
    neurons = [random.permutation(24)[smaller.mlp_dim :] for _ in range(config.num_layers)]
    if widths.num_heads:
        gone = [[2 * k + int(random.integers(2)) for k in range(3)] for _ in range(config.num_layers)]
    else:
        groups = [random.permutation(3)[smaller.num_kv_heads :] for _ in range(config.num_layers)]
        gone = [[2 * int(k) + j for k in each for j in range(2)] for each in groups]
    heads = [channels_of(each, config.head_dim) for each in gone]
    sparse = zeroed(model, neurons, heads)
    moments = collect_moments(sparse, batches(config))
    tokens = TOKENS % config.vocab_size
    for search in (Search(method="magnitude"), Search(chunk=4)):
        pruned, errors = prune_widths(sparse, moments, widths, search)
        assert pruned.config == smaller
        np.testing.assert_allclose(pruned(tokens), sparse(tokens), atol=2e-5)  # measured 3.3e-6
        assert max(errors.mlp + errors.heads) < 1e-9


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_a_cut_model_is_the_whole_one_without_those_channels(whole, widths):
    model, moments = whole
    config = model.config
    pruned, errors = prune_widths(model, moments, widths, Search(method="random", seed=3))
    down, out = pruned.layers.mlp.down_proj.kernel[...], pruned.layers.self_attn.o_proj.kernel[...]

    def absent(kernel, kept):
        """Rows of the whole kernel that are not among those kept, per layer."""
        is_kept = (kernel[:, :, None, :] == kept[:, None, :, :]).all(-1).any(-1)
        return [np.flatnonzero(~np.asarray(each)) for each in is_kept]

    neurons = absent(model.layers.mlp.down_proj.kernel[...], down)
    heads = absent(model.layers.self_attn.o_proj.kernel[...], out)
    assert {len(each) for each in neurons} == {config.mlp_dim - pruned.config.mlp_dim}
    assert {len(each) for each in heads} == {(config.num_heads - pruned.config.num_heads) * config.head_dim}
    tokens = TOKENS % config.vocab_size
    expected = zeroed(model, neurons, heads)(tokens)
    np.testing.assert_allclose(pruned(tokens), expected, atol=2e-5)  # measured 2.5e-6
    assert (max(errors.mlp) > 0.01) == (widths.mlp_dim is not None)


def test_moments_are_those_of_float64_and_of_the_tokens_that_count(whole):
    model, moments = whole
    mlp, heads = 0.0, 0.0
    for batch in batches(model.config):
        seen = model.observe(
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.segment_ids > 0),
            lambda states: (states.widened, states.mixed),
            segment_ids=jnp.asarray(batch.segment_ids),
        )[1]
        widened, mixed = (np.asarray(each, np.float64)[:, batch.where] for each in seen)
        mlp, heads = (
            mlp + np.einsum("lti,ltj->lij", widened, widened),
            heads + np.einsum("lti,ltj->lij", mixed, mixed),
        )
    assert moments.num_tokens == 3 * 4 * 18
    for found, exact in ((moments.mlp, mlp), (moments.heads, heads)):
        assert np.abs(found - exact).max() / np.abs(exact).max() < 2e-6  # measured 2.5e-7


def test_refitting_loses_less_than_leaving_rows_as_they_are(whole):
    model, moments = whole
    lost = {
        method: prune_widths(model, moments, Widths(mlp_dim=10, num_kv_heads=2), Search(method=method))[1]
        for method in ("osscar", "magnitude", "random")
    }
    for layer in range(model.config.num_layers):
        for part in ("mlp", "heads"):
            osscar, magnitude, random = (getattr(lost[name], part)[layer] for name in lost)
            assert osscar < min(magnitude, random)


def test_what_cannot_be_cut_is_refused(whole):
    model, moments = whole
    for widths, message in (
        (Widths(mlp_dim=25), "mlp_dim 25 is not from 1 to the decoder's 24"),
        (Widths(num_kv_heads=4), "num_kv_heads 4 is not"),
        (Widths(num_heads=4), "multiple of num_kv_heads"),
        (Widths(num_heads=3, num_kv_heads=1), "not both"),
    ):
        with pytest.raises(InputError, match=message):
            prune_widths(model, moments, widths)
    with pytest.raises(InputError, match="need at least 96 calibration tokens, there are 95"):
        prune_widths(model, Moments(moments.mlp, moments.heads, 95), Widths(mlp_dim=10))
    with pytest.raises(InputError, match="no tokens to calibrate"):
        collect_moments(model, [])
    adapted = small_models.make(model.config)
    add_lora(adapted, rank=2, alpha=2.0, targets="down_proj", rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="merge the model's adapters"):
        prune_widths(adapted, moments, Widths(mlp_dim=10))

"""Dropping layers: keep-all is the identity, and what is kept is what was there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.nn.lora import LoRAParam, add_lora
from jaxsearch.nn.pruning import keep_layers
from jaxsearch.nn.transformer import Decoder, DecoderConfig

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

"""Adapters: identity at first, merged equals unmerged, only they get gradients, any kernel can have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.nn.layers import Linear
from jaxsearch.nn.lora import LoRAParam, add_lora, merge_lora
from jaxsearch.nn.transformer import Decoder, DecoderConfig

CONFIG = DecoderConfig("qwen3", 61, 16, 24, 3, 4, 2, 4, use_qk_norm=True, use_qkv_bias=True)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)
KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def _logits(model):
    return model.logits(model(TOKENS))


def _adapted(targets, seed=1):
    """A model whose adapters are no longer zero."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    add_lora(model, rank=2, alpha=4.0, targets=targets, rngs=nnx.Rngs(seed))
    state = nnx.state(model, LoRAParam)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    nnx.update(model, jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), state))
    return model


@pytest.mark.parametrize("target", KERNELS)
def test_zero_b_is_the_identity(target):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    before = _logits(model)
    (path,) = add_lora(model, rank=2, alpha=4.0, targets=target, rngs=nnx.Rngs(1))
    assert path.endswith(target)
    # adding zero is exact, but fused differently; measured maximum 1.5e-8
    np.testing.assert_allclose(_logits(model), before, atol=1e-7)


@pytest.mark.parametrize("target", KERNELS)
def test_merged_equals_unmerged_and_differs_from_the_base(target):
    model = _adapted(target)
    adapted, base = _logits(model), _logits(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    assert float(jnp.abs(adapted - base).max()) > 1e-3
    assert len(merge_lora(model)) == 1
    np.testing.assert_allclose(_logits(model), adapted, atol=1e-6)  # measured maximum 1.1e-7


def test_merging_restores_the_structure():
    plain, model = Decoder(CONFIG, rngs=nnx.Rngs(0)), _adapted("_proj")
    assert len(merge_lora(model)) == 7
    assert nnx.to_flat_state(nnx.state(model)).paths == nnx.to_flat_state(nnx.state(plain)).paths
    assert merge_lora(model) == []


def test_label_columns_of_an_adapted_head():
    model = _adapted("lm_head")
    hidden, ids = model(TOKENS), jnp.asarray([7, 0, 60])
    # measured maximum 2.4e-7
    np.testing.assert_allclose(model.logits(hidden, ids), model.logits(hidden)[..., ids], atol=2e-6)


@pytest.mark.parametrize("use_remat", [False, True])
def test_gradients_reach_every_adapter_and_nothing_else(use_remat):
    model = _adapted("_proj")
    model.use_remat = use_remat

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda model: _logits(model).sum(), argnums=nnx.DiffState(0, LoRAParam))(model)

    leaves = jax.tree.leaves(gradients(model))
    assert len(leaves) == 14
    for leaf in leaves:
        assert leaf.shape[0] == 3
        assert bool((jnp.abs(leaf).max(axis=(1, 2)) > 0).all())  # in every layer


def test_adapters_name_their_axes_and_keep_the_kernel_dtype():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    add_lora(model, rank=2, alpha=4.0, targets="q_proj|lm_head", rngs=nnx.Rngs(1))
    stacked, single = model.layers.self_attn.q_proj, model.lm_head
    assert stacked.lora_a.get_metadata("axes") == ("layers", "embed", "lora_rank")
    assert stacked.lora_b.get_metadata("axes") == ("layers", "lora_rank", "heads")
    assert single.lora_b.get_metadata("axes") == ("lora_rank", "vocab")
    assert {stacked.lora_a.dtype, single.lora_b.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert model(TOKENS).dtype == jnp.bfloat16


def test_a_linear_without_layers_by_hand():
    class Pair(nnx.Module):
        def __init__(self):
            self.only = Linear(2, 2, axes=("embed", "mlp"), rngs=nnx.Rngs(0))

    pair = Pair()
    pair.only.kernel[...] = jnp.eye(2)
    add_lora(pair, rank=1, alpha=3.0, targets="only", rngs=nnx.Rngs(1))
    pair.only.lora_a[...], pair.only.lora_b[...] = jnp.asarray([[1.0], [2.0]]), jnp.asarray([[0.0, 1.0]])
    # x = [1, 1]: base [1, 1]; x a = 3; 3 b = [0, 3]; times alpha / rank = 3
    assert pair.only(jnp.ones((1, 2))).tolist() == [[1.0, 10.0]]
    merge_lora(pair)
    assert pair.only.kernel[...].tolist() == [[1.0, 3.0], [0.0, 7.0]]


def test_bad_requests_are_refused():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"matches none of: .*layers\.self_attn\.q_proj"):
        add_lora(model, rank=2, alpha=4.0, targets="wq", rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="rank is 0"):
        add_lora(model, rank=0, alpha=4.0, targets="q_proj", rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="not a regular expression"):
        add_lora(model, rank=1, alpha=4.0, targets="(q_proj", rngs=nnx.Rngs(1))
    add_lora(model, rank=1, alpha=4.0, targets="q_proj", rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="merge_lora first"):
        add_lora(model, rank=1, alpha=4.0, targets="k_proj", rngs=nnx.Rngs(1))

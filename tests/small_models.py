"""Small models with random weights, and what two of them have in common."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.nn.bert import Bert, BertConfig
from jaxsearch.nn.transformer import Decoder, DecoderConfig

LLAMA = DecoderConfig("llama", 48, 16, 24, 3, 4, 2, 4, tie_embeddings=True)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", use_qkv_bias=True, tie_embeddings=False)
QWEN3 = dataclasses.replace(
    LLAMA, family="qwen3", head_dim=8, use_qk_norm=True, use_qkv_bias=True, use_output_bias=True
)
FULL_LLAMA = dataclasses.replace(
    LLAMA, use_qkv_bias=True, use_output_bias=True, use_mlp_bias=True, tie_embeddings=False
)
BERT = BertConfig(48, 16, 24, 2, 4, max_positions=12)
CONFIGS = {"llama": LLAMA, "full llama": FULL_LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "bert": BERT}


def make(config, param_dtype=jnp.float32, seed=0, **options):
    """Every parameter random, so that no two tensors can be exchanged unnoticed; compiles nothing."""
    kind = Bert if isinstance(config, BertConfig) else Decoder
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, **options))
    random = np.random.default_rng(seed)
    for path, param in params(model).items():
        is_norm_weight = "norm" in path[-2].lower() and path[-1] == "weight"
        values = is_norm_weight + 0.25 * random.standard_normal(param.shape)
        param.set_value(jax.device_put(values.astype(param.dtype)))
    return model


def params(model):
    return {path: param for path, param in nnx.iter_graph(model) if isinstance(param, nnx.Param)}


def assert_same_bits(first, second):
    first, second = params(first), params(second)
    assert first.keys() == second.keys()
    for path, param in first.items():
        assert param.dtype == second[path].dtype
        assert np.asarray(param[...]).tobytes() == np.asarray(second[path][...]).tobytes(), path

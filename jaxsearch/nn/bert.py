"""The bidirectional encoder of the BERT family (MiniLM, BGE): hidden states of every token, no pooling, no dropout.

Attributes are named as Hugging Face names them, so that `convert` needs no table of exceptions. Pooling and
normalisation belong to `jaxsearch.encoder`. The pooler and the pre-training heads of checkpoints are not part of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsearch.errors import InputError
from jaxsearch.nn.attention import dense_attention, segment_mask, segment_positions
from jaxsearch.nn.layers import Embedding, Linear, make_param

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder.

    Raises: InputError when heads do not divide `embed_dim` or the activation is unknown.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    num_token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"hidden size {self.embed_dim} is not a multiple of {self.num_heads} heads; correct the config"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation {self.activation!r} is not supported in BERT; use one of {', '.join(ACTIVATIONS)}"
            )


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32; keeps the input's dtype."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        num_layers: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        self.weight = make_param(ones, rngs, (dim,), ("norm",), param_dtype, num_layers=num_layers)
        self.bias = make_param(zeros, rngs, (dim,), ("norm",), param_dtype, num_layers=num_layers)
        self.eps = eps

    def __call__(self, inputs: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        wide = inputs.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        weight, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.weight, self.bias))
        return (centred * scale * weight + bias).astype(inputs.dtype)


class Embeddings(nnx.Module):
    """Word + position + token type (always the first), normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        dim, common = config.embed_dim, {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        rows = ("positions", "embed")  # a few hundred rows: never split
        self.word_embeddings = Embedding(config.vocab_size, dim, **common)
        self.position_embeddings = Embedding(config.max_positions, dim, axes=rows, **common)
        self.token_type_embeddings = Embedding(config.num_token_types, dim, axes=rows, **common)
        self.LayerNorm = LayerNorm(dim, eps=config.norm_eps, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, tokens: Int[Array, "b t"], positions: Int[Array, "#b t"]) -> Float[Array, "b t d"]:
        token_types = self.token_type_embeddings(jnp.zeros_like(tokens[:1, :1]))
        return self.LayerNorm(
            self.word_embeddings(tokens) + self.position_embeddings(positions) + token_types
        )


class SelfAttention(nnx.Module):
    """Every token attends to every token that the mask keeps."""

    def __init__(self, config: BertConfig, **options):
        shape = {"in_dim": config.embed_dim, "out_dim": config.embed_dim, "axes": ("embed", "heads")}
        self.query = Linear(**shape, use_bias=True, **options)
        self.key = Linear(**shape, use_bias=True, **options)
        self.value = Linear(**shape, use_bias=True, **options)
        self.num_heads = config.num_heads

    def __call__(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b #t t"]) -> Float[Array, "b t d"]:
        queries, keys, values = (
            p(hidden).reshape(*hidden.shape[:2], self.num_heads, -1)
            for p in (self.query, self.key, self.value)
        )
        attended = dense_attention(queries[:, :, :, None], keys, values, mask)  # b t k 1 h
        return attended.reshape(hidden.shape)


class Residual(nnx.Module):
    """Projects, adds what came in, normalises."""

    def __init__(self, in_dim: int, config: BertConfig, *, axis: str, **options):
        self.dense = Linear(in_dim, config.embed_dim, axes=(axis, "embed"), use_bias=True, **options)
        norm_options = {key: value for key, value in options.items() if key != "dtype"}
        self.LayerNorm = LayerNorm(config.embed_dim, eps=config.norm_eps, **norm_options)

    def __call__(self, update: Float[Array, "b t f"], hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.LayerNorm(self.dense(update) + hidden)


class Attention(nnx.Module):
    """Self-attention and its residual."""

    def __init__(self, config: BertConfig, **options):
        self.self = SelfAttention(config, **options)
        self.output = Residual(config.embed_dim, config, axis="heads", **options)

    def __call__(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b #t t"]) -> Float[Array, "b t d"]:
        return self.output(self.self(hidden, mask), hidden)


class Intermediate(nnx.Module):
    """The widening half of the MLP."""

    def __init__(self, config: BertConfig, **options):
        self.dense = Linear(config.embed_dim, config.mlp_dim, axes=("embed", "mlp"), use_bias=True, **options)
        self.activation = config.activation

    def __call__(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        return ACTIVATIONS[self.activation](self.dense(hidden))


class Layer(nnx.Module):
    """Attention, then MLP, each with its residual and norm after the sum."""

    def __init__(self, config: BertConfig, **options):
        self.attention = Attention(config, **options)
        self.intermediate = Intermediate(config, **options)
        self.output = Residual(config.mlp_dim, config, axis="mlp", **options)

    def __call__(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b #t t"]) -> Float[Array, "b t d"]:
        hidden = self.attention(hidden, mask)
        return self.output(self.intermediate(hidden), hidden)


class Stack(nnx.Module):
    """All layers, their parameters stacked on a leading axis."""

    def __init__(self, config: BertConfig, *, use_remat: bool, **options):
        self.layer = Layer(config, num_layers=config.num_layers, **options)
        self.use_remat = use_remat

    def __call__(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b #t t"]) -> Float[Array, "b t d"]:
        graph, stacked = nnx.split(self.layer)

        def step(hidden, params):
            return nnx.merge(graph, params)(hidden, mask), None

        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if not self.use_remat else None
        step = jax.checkpoint(step, prevent_cse=False, policy=saved)
        return jax.lax.scan(step, hidden, stacked)[0]


class Bert(nnx.Module):
    """A BERT encoder with random weights; `nnx.Param`s in `param_dtype`, activations in `dtype`.

    Source: Devlin et al. 2019, https://arxiv.org/abs/1810.04805; equality with `transformers` is measured in
    tests/parity/test_parity_bert.py.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        use_remat: bool = False,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.embeddings = Embeddings(config, **options)
        self.encoder = Stack(config, use_remat=use_remat, **options)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        where: Bool[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Hidden states after the last layer.

        Args:
            tokens: Ids, padded on the right.
            where: True for real tokens; what is False is attended by nobody and its own states mean nothing.
            segment_ids: Where rows hold several texts one after another, which of them a token belongs to (from 1;
                0 for padding); they do not see one another, and each has the positions it has alone.

        Returns:
            States in the compute dtype; those of real tokens do not depend on the padding.

        Raises:
            InputError: more positions than the model has (of packed texts each may have as many; not checked).
        """
        if segment_ids is None and tokens.shape[1] > self.config.max_positions:
            raise InputError(
                f"{tokens.shape[1]} tokens exceed the {self.config.max_positions} positions of this model; "
                "shorten the texts (max_document_tokens, max_query_tokens)"
            )
        mask, positions = where[:, None, :], jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if segment_ids is not None:
            mask, positions = mask & segment_mask(segment_ids), segment_positions(segment_ids)
        return self.encoder(self.embeddings(tokens, positions), mask)

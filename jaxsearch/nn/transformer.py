"""The one decoder: Llama, Qwen2 and Qwen3 families, for encoder, judge and ranker.

`Decoder(...)` runs whole sequences; `prefill` + `attend_prefix` run many items behind one shared prefix and give the
same hidden states; `read_packed` gives those of many prompts' ends, for scoring. The layers are one module whose
parameters have a leading layer axis, scanned. Read-outs and losses live with the models; loading and saving in
`convert`; adapters in `lora`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsearch.errors import InputError
from jaxsearch.nn.attention import causal_within, dense_attention, shared_prefix_attention
from jaxsearch.nn.layers import (
    Embedding,
    Linear,
    RMSNorm,
    RopeScaling,
    layer_at,
    matmul_precision,
    narrowed,
    rope_frequencies,
    rotate,
    rows_at,
)
from jaxsearch.nn.packed import PackedPrompts, packed_attention

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder: `family` names the checkpoint layout, the options say what is computed.

    Raises: InputError when the numbers do not fit together.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    max_positions: int = 2048
    use_qk_norm: bool = False
    use_qkv_bias: bool = False
    use_output_bias: bool = False
    use_mlp_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(f"decoder family {self.family!r} is unknown; use one of {', '.join(FAMILIES)}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim {self.head_dim} must be even: rotary positions turn pairs of channels"
            )


class KeyValues(NamedTuple):
    """Keys (rotated) and values of a prefix, per layer, and which of its positions count.

    `segment_ids` (from 1) tell several prefixes apart that stand one after another.
    """

    k: Float[Array, "l q s k h"]
    v: Float[Array, "l q s k h"]
    where: Bool[Array, "q s"]
    segment_ids: Int[Array, "q s"] | None = None


class LayerStates(NamedTuple):
    """What a layer computes on its way: (rotated) keys and values, and the inputs of its two maps back to the stream.

    `mixed` is what the heads attended to, side by side; `widened` are the MLP's neurons.
    """

    keys: Float[Array, "*b s k h"]
    values: Float[Array, "*b s k h"]
    mixed: Float[Array, "*b t channels"]
    widened: Float[Array, "*b t f"]


class Attention(nnx.Module):
    """Projections around an attention function; heads are [... t k g h] between them."""

    def __init__(self, config: DecoderConfig, **common):
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        into, bias = config.embed_dim, config.use_qkv_bias
        self.q_proj = Linear(into, q_dim, axes=("embed", "heads"), use_bias=bias, **common)
        self.k_proj = Linear(into, kv_dim, axes=("embed", "kv_heads"), use_bias=bias, **common)
        self.v_proj = Linear(into, kv_dim, axes=("embed", "kv_heads"), use_bias=bias, **common)
        out_bias = config.use_output_bias
        self.o_proj = Linear(q_dim, into, axes=("heads", "embed"), use_bias=out_bias, **common)
        norm: dict[str, Any] = {key: common[key] for key in ("rngs", "num_layers", "param_dtype")}
        norm["eps"] = config.norm_eps
        self.q_norm = RMSNorm(config.head_dim, **norm) if config.use_qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, **norm) if config.use_qk_norm else None
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim

    def mix(
        self, inputs: Array, rotation: tuple[Array, Array], attend: Callable, places: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """What the heads attended to, side by side, and the (rotated) keys and values: all but `o_proj`.

        With `places` only they have queries.
        """
        heads = (*inputs.shape[:-1], -1, self.head_dim)
        asking = inputs if places is None else rows_at(inputs, places)
        turned = rotation if places is None else tuple(rows_at(each, places) for each in rotation)
        lead = asking.shape[:-1]
        queries = self.q_proj(asking).reshape(*lead, -1, self.head_dim)
        keys = self.k_proj(inputs).reshape(heads)
        values = self.v_proj(inputs).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries, *turned), rotate(keys, *rotation)
        grouped = queries.reshape(*lead, self.num_kv_heads, -1, self.head_dim)
        attended = attend(grouped, keys, values)
        return attended.reshape(*lead, -1), keys, values


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, **common):
        narrow, wide, bias = config.embed_dim, config.mlp_dim, config.use_mlp_bias
        self.gate_proj = Linear(narrow, wide, axes=("embed", "mlp"), use_bias=bias, **common)
        self.up_proj = Linear(narrow, wide, axes=("embed", "mlp"), use_bias=bias, **common)
        self.down_proj = Linear(wide, narrow, axes=("mlp", "embed"), use_bias=bias, **common)

    def widen(self, inputs: Array) -> Array:
        """The neurons: all but `down_proj`."""
        gate, up = self.gate_proj(inputs), self.up_proj(inputs)
        return narrowed(jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32), gate.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, **common):
        norm: dict[str, Any] = {key: common[key] for key in ("num_layers", "param_dtype")}
        norm |= {"eps": config.norm_eps, "rngs": rngs}
        self.input_layernorm = RMSNorm(config.embed_dim, **norm)
        self.self_attn = Attention(config, rngs=rngs, **common)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, **norm)
        self.mlp = GatedMlp(config, rngs=rngs, **common)

    def __call__(
        self, inputs: Array, rotation: tuple[Array, Array], attend: Callable, places: Array | None = None
    ) -> tuple[Array, LayerStates]:
        """Outputs of all positions, or of `places` alone: then the others give keys and values and nothing else."""
        mixed, keys, values = self.self_attn.mix(self.input_layernorm(inputs), rotation, attend, places)
        stream = inputs if places is None else rows_at(inputs, places)
        middle = stream + self.self_attn.o_proj(mixed)
        widened = self.mlp.widen(self.post_attention_layernorm(middle))
        return middle + self.mlp.down_proj(widened), LayerStates(keys, values, mixed, widened)


class Decoder(nnx.Module):
    """Causal transformer from tokens to hidden states and logits.

    Args:
        config: shape and options.
        rngs: source of the initial weights (normal, 0.02).
        dtype: of the computation; norms, softmax, SiLU, rotations and logits are float32 in any case.
        param_dtype: of the stored weights.
        use_remat: in the backward pass recompute whole layers, holding one layer's activations. False keeps the
            outputs of the linear maps and recomputes the rest (measured: as fast as keeping everything).
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        use_remat: bool = False,
    ):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.use_remat = config, use_remat
        self.embed_tokens = Embedding(config.vocab_size, config.embed_dim, rngs=rngs, **kinds)
        self.layers = DecoderLayer(config, rngs=rngs, num_layers=config.num_layers, **kinds)
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.embed_dim, config.vocab_size, axes=("embed", "vocab"), rngs=rngs, **kinds)
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        where: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Hidden states after the final norm. Positions count the kept tokens: padding changes no other row.

        Args:
            tokens: ids from 0 to vocab_size - 1; others are not refused (see `Embedding`).
            where: tokens that are there (default: all); rows of the others are finite and meaningless.
            segment_ids: where rows hold several texts one after another, which of them a token belongs to (from 1;
                0 where nothing is kept); they do not see one another, and each has the positions it has alone.
        Raises: InputError for "dynamic" RoPE scaling and t > max_positions (see `rope_frequencies`); of packed texts
            each may have as many, which is not checked.
        """
        if where is None:
            where = jnp.ones(tokens.shape, bool)
        return self._run_causal(tokens, where, segment_ids, lambda _: ())[0]

    def observe(
        self,
        tokens: Int[Array, "b t"],
        where: Bool[Array, "b t"],
        read: Callable[[LayerStates], Any],
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Like a call, and what `read` makes of each layer's states, with a leading axis of layers."""
        return self._run_causal(tokens, where, segment_ids, read)

    def prefill(
        self,
        tokens: Int[Array, "q s"],
        where: Bool[Array, "q s"],
        *,
        segment_ids: Int[Array, "q s"] | None = None,
    ) -> tuple[Float[Array, "q s d"], KeyValues]:
        """Like a call, and keeps every layer's keys and values for `attend_prefix`.

        Args: `segment_ids` as of a call: several prefixes stand in a row, and `attend_prefix` needs `prefix_ids`.
        """
        hidden, (k, v) = self.observe(
            tokens, where, lambda states: (states.keys, states.values), segment_ids=segment_ids
        )
        return hidden, KeyValues(k, v, where, segment_ids)

    def attend_prefix(
        self,
        tokens: Int[Array, "q c t"],
        where: Bool[Array, "q c t"],
        prefix: KeyValues,
        *,
        segment_ids: Int[Array, "q c t"] | None = None,
        prefix_ids: Int[Array, "q c t"] | None = None,
    ) -> Float[Array, "q c t d"]:
        """Hidden states of items that each follow their query's prefix and do not see one another.

        Equal to a call on prefix + item (fp32: within 1e-5) for the price of the item alone: the prefix's
        keys and values are shared by a query's items, and differentiated through. A prefix may be empty.

        Args:
            segment_ids: where rows hold several items one after another, which of them a token belongs to;
                they do not see one another either, and each starts right behind the prefix.
            prefix_ids: where the prefix has segments, which of them a token follows.
        """
        if segment_ids is None:
            self._check_length(prefix.where.shape[-1] + tokens.shape[-1])
        mask, counts = causal_within(where, segment_ids)
        follows = prefix.where[:, None, None]
        assert (prefix.segment_ids is None) == (prefix_ids is None), "a prefix with segments needs prefix_ids"
        if prefix_ids is not None and prefix.segment_ids is not None:
            follows &= prefix.segment_ids[:, None, None] == prefix_ids[..., None]
        start = jnp.sum(follows, axis=-1, dtype=jnp.int32)

        def attend(layer_prefix, queries, keys, values):
            shared_keys, shared_values = layer_prefix
            return shared_prefix_attention(
                queries,
                keys,
                values,
                mask,
                prefix_keys=shared_keys,
                prefix_values=shared_values,
                prefix_mask=follows,
                is_causal=True,
            )

        return self._run(tokens, start + counts, attend, (prefix.k, prefix.v), lambda _: ())[0]

    def read_packed(
        self,
        prompts: PackedPrompts,
        windows: tuple[tuple[int, int], ...],
        base: KeyValues | None = None,
        use_kernel: bool = False,
    ) -> Float[Array, "m d"]:
        """Hidden states at the ends of a launch's items, each as if it stood alone behind its prefix; for scoring.

        The last layer computes the ends only, so it stands alone. A loop over indices copies no weights, a slice of
        the stack would.

        Args:
            windows, use_kernel: of `packed_attention`.
            base: keys and values of a text that all prefixes begin with, and that the tokens leave out.
        """
        rotation = self._rotation(prompts.positions)
        structure, stacked = nnx.split(self.layers)
        per_layer = () if base is None else (base.k[:, 0], base.v[:, 0])

        def run_layer(index: int | Array, hidden: Array, places: Array | None = None) -> Array:
            weights, extra = jax.tree.map(lambda leaf: layer_at(leaf, index), (stacked, per_layer))
            seen = prompts.seen if places is None else prompts.ends

            def attend(queries, keys, values):
                return packed_attention(queries, keys, values, seen, windows, extra or None, use_kernel)

            return nnx.merge(structure, weights)(hidden, rotation, attend, places)[0]

        last = self.config.num_layers - 1
        hidden = jax.lax.fori_loop(0, last, run_layer, self.embed_tokens(prompts.tokens))
        return self.norm(run_layer(last, hidden, prompts.ends.places))

    def logits(
        self,
        hidden: Float[Array, "*b d"],
        token_ids: Int[Array, "k"] | Int[Array, "*b k"] | None = None,
    ) -> Float[Array, "*b k"]:
        """Output logits in float32: of the whole vocabulary, of `token_ids` alone, or of those of each state."""
        if self.lm_head is None:
            table = self.embed_tokens.weight[...]
            table = table if token_ids is None else table[token_ids]
        else:
            table = jnp.moveaxis(self.lm_head.columns(token_ids), 0, -1)
        options = {"precision": matmul_precision(hidden.dtype), "preferred_element_type": jnp.float32}
        return jnp.einsum("...d,...kd->...k", hidden, table.astype(hidden.dtype), **options)

    def _run_causal(
        self, tokens: Array, where: Array, segment_ids: Array | None, read: Callable[[LayerStates], Any]
    ) -> tuple[Array, Any]:
        if segment_ids is None:
            self._check_length(tokens.shape[-1])
        mask, positions = causal_within(where, segment_ids)

        def attend(_, queries, keys, values):
            return dense_attention(queries, keys, values, mask, is_causal=True)

        return self._run(tokens, positions, attend, (), read)

    def _run(
        self,
        tokens: Array,
        positions: Array,
        attend: Callable,
        per_layer: tuple,
        read: Callable[[LayerStates], Any],
    ) -> tuple[Array, Any]:
        """Embeds, scans the layers (`attend` gets its slice of `per_layer` first), applies the final norm."""
        rotation = self._rotation(positions)
        structure, stacked = nnx.split(self.layers)

        def step(hidden, inputs):
            weights, extra = inputs
            layer = nnx.merge(structure, weights)
            hidden, states = layer(hidden, rotation, lambda *heads: attend(extra, *heads))
            return hidden, read(states)

        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if not self.use_remat else None
        step = jax.checkpoint(step, prevent_cse=False, policy=saved)
        hidden, kept = jax.lax.scan(step, self.embed_tokens(tokens), (stacked, per_layer))
        return self.norm(hidden), kept

    def _rotation(self, positions: Array) -> tuple[Array, Array]:
        config = self.config
        frequencies, amplitude = rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_positions
        )
        angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(
            frequencies, range(positions.ndim)
        )
        return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude

    def _check_length(self, length: int) -> None:
        config = self.config
        if config.rope_scaling is None or config.rope_scaling.rope_type != "dynamic":
            return
        if length > config.max_positions:
            raise InputError(
                f"{length} positions with dynamic RoPE scaling, whose limit here is max_positions = "
                f"{config.max_positions}; shorten the input or use a model with yarn or llama3 scaling"
            )

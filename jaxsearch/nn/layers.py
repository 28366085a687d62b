"""The leaves of the networks: linear map, RMS norm, embedding table, rotary positions.

Parameters carry `axes`, the logical name of each dimension; `jaxsearch.sharding` derives placement from it.
A leaf made with `num_layers` has a leading layer axis on every parameter and is applied one layer at a time,
inside a `jax.lax.scan`. Kernels are stored (in, out), `weight` of norms and embeddings as in the checkpoint.

Norms and rotations are computed in float32 whatever the compute dtype. Next: `attention`, `transformer`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxsearch.errors import InputError

Model = TypeVar("Model", bound=nnx.Module)
INIT_STD = 0.02
ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Full float32 products for float32 (accelerators would round to TF32 or bf16), native ones otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def _is_emulated(dtype: DTypeLike) -> bool:
    """XLA's CPU backend has native bfloat16 products, and takes everything else in that dtype through float32."""
    return jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu"


def narrowed(values: Float[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b"]:
    """`values` in `dtype`, to nearest even; on CPU half the time of XLA's own conversion to bfloat16."""
    is_slow = _is_emulated(dtype) and values.dtype == jnp.float32
    return _to_bfloat16(values) if is_slow else values.astype(dtype)


def layer_at(stacked: Array, index: int | Array) -> Array:
    """One layer of a stack. Without the barrier XLA's CPU backend makes float32 of all of a bfloat16 stack."""
    if _is_emulated(stacked.dtype):
        stacked, index = jax.lax.optimization_barrier((stacked, jnp.asarray(index)))
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


@jax.custom_jvp
def _to_bfloat16(values: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1)))
    rounded = jnp.where(jnp.isnan(values), bits | np.uint32(0x10000), rounded)
    return jax.lax.bitcast_convert_type((rounded >> 16).astype(jnp.uint16), jnp.bfloat16)


@_to_bfloat16.defjvp
def _to_bfloat16_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


@jax.custom_vjp
def matmul(rows: Float[Array, "b i"], kernel: Float[Array, "i o"]) -> Float[Array, "b o"]:
    """rows @ kernel, products summed in float32; the result and both gradients have the operands' dtype.

    The gradient is written out because of bfloat16 on CPUs that have it: XLA computes such a product natively
    only when its result is float32 and its left operand is contracted along the last axis, else in float32.
    """
    return _contract(rows, kernel, 1, 0)


def _contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    product = jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=matmul_precision(left.dtype),
        preferred_element_type=jnp.float32,
    )
    return narrowed(product, left.dtype)


def _matmul_forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _contract(rows, kernel, 1, 0), (rows, kernel)


def _matmul_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    rows, kernel = saved
    by_rows = _contract(cotangent, kernel, 1, 1)
    if rows.dtype == jnp.float32 or jax.default_backend() != "cpu":
        return by_rows, _contract(rows, cotangent, 0, 0)
    if rows.shape[1] <= cotangent.shape[1]:
        return by_rows, _contract_first_axes(rows, cotangent)
    return by_rows, _contract_first_axes(cotangent, rows).T


def _contract_first_axes(narrow: Array, wide: Array) -> Array:
    """narrow.T @ wide; the padding keeps XLA from folding the transpose into the product."""
    turned = jnp.pad(narrow.T, ((0, 8), (0, 0)))
    return _contract(turned, wide, 1, 0)[: narrow.shape[1]]


matmul.defvjp(_matmul_forward, _matmul_backward)


def project(inputs: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """inputs @ kernel in their dtype, rows flattened.

    With one contracted axis XLA's CPU backend needs no transposed copy of the activations for the kernel's
    gradient; with `*b` kept apart it makes one, and computes what feeds it with strided access.
    """
    *lead, in_dim = inputs.shape
    rows = inputs.reshape(math.prod(lead), in_dim)
    return matmul(rows, kernel).reshape(*lead, kernel.shape[1])


def make_param(
    initializer: Callable,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: DTypeLike,
    *,
    num_layers: int | None = None,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A parameter with logical axis names; `num_layers` puts a "layers" axis in front of shape and names."""
    if num_layers is not None:
        shape, axes = (num_layers, *shape), ("layers", *axes)
    return kind(initializer(rngs.params(), shape, dtype), axes=axes)


def _along_last(vector: Array, ndim: int) -> Array:
    """[d] → [1 ... 1 d] with `ndim` axes: ranks are never promoted silently."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


class Linear(nnx.Module):
    """y = x @ kernel + bias, computed in `dtype`; `kernel` (in, out) is kept in `param_dtype`."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        use_bias: bool = False,
        num_layers: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        normal = jax.nn.initializers.normal(INIT_STD)
        self.kernel = make_param(normal, rngs, (in_dim, out_dim), axes, param_dtype, num_layers=num_layers)
        self.bias = (
            make_param(
                jax.nn.initializers.zeros, rngs, (out_dim,), axes[1:], param_dtype, num_layers=num_layers
            )
            if use_bias
            else None
        )
        self.dtype = jnp.dtype(dtype)

    def __call__(self, inputs: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        outputs = project(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            outputs += _along_last(self.bias[...].astype(self.dtype), outputs.ndim)
        return outputs

    def columns(self, ids: Int[Array, "*k"] | None = None) -> Float[Array, "i *k"]:
        """The kernel's columns `ids` (default: all) in `param_dtype`; not for stacked layers."""
        return self.kernel[...] if ids is None else self.kernel[:, ids]


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis, in float32; the result has the input's dtype."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        num_layers: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.weight = make_param(
            jax.nn.initializers.ones, rngs, (dim,), ("norm",), param_dtype, num_layers=num_layers
        )
        self.eps = eps

    def __call__(self, inputs: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = inputs.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = _along_last(self.weight[...].astype(jnp.float32), inputs.ndim)
        return narrowed(wide * scale * weight, inputs.dtype)


class Embedding(nnx.Module):
    """Rows of a table `weight` (num_rows, dim), given in `dtype`.

    Nothing checks ids: from num_rows on they give NaN, negative ones count from the table's end.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        axes: tuple[str, str] = ("vocab", "embed"),
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        normal = jax.nn.initializers.normal(INIT_STD)
        self.weight = make_param(normal, rngs, (num_rows, dim), axes, param_dtype)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        return jnp.take(self.weight[...], ids, axis=0).astype(self.dtype)


def narrow_weights(model: Model) -> Model:
    """A model whose linear maps and tables keep their weights in the dtype they compute in, for scoring.

    They round them to it at every use: no result changes (but with adapters on the output matrix), and each pass reads
    half of the bytes in bfloat16. Norms stay, they compute in float32. Arrays that need no rounding are shared.
    """
    structure, state = nnx.split(model)
    narrowed_model = nnx.merge(structure, jax.tree.map(lambda leaf: leaf, state))  # variables of its own
    for _, module in nnx.iter_modules(narrowed_model):
        if isinstance(module, Linear | Embedding):
            for param in vars(module).values():
                if isinstance(param, nnx.Param) and param.dtype.itemsize > module.dtype.itemsize:
                    param.set_value(param[...].astype(module.dtype))
    return narrowed_model


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training length, in the words of Hugging Face configs.

    `rope_type` is one of linear, dynamic, llama3, yarn; `original_max_positions` None means the model's
    `max_positions`; low/high_freq_factor are llama3's; attention_factor to truncate are yarn's.

    Raises: InputError for another type (longrope among them) or a factor below 1.
    """

    rope_type: str
    factor: float
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise InputError(
                f"RoPE scaling {self.rope_type!r} is not supported; "
                f"use a model with one of {', '.join(ROPE_TYPES)}"
            )
        if self.factor < 1.0:
            raise InputError(
                f"RoPE scaling factor {self.factor} is below 1; correct rope_scaling in the config"
            )
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                "RoPE scaling llama3 needs high_freq_factor > low_freq_factor; correct the config"
            )


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, max_positions: int
) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of channels [head_dim / 2], and the factor on cos and sin.

    Computed in float32 like the implementations that the checkpoints were trained with. "dynamic" changes
    nothing up to `max_positions`; beyond it the frequencies would depend on the longest sequence of the
    batch, and a score on its neighbours: `Decoder` refuses such lengths instead.

    Source: Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN) §3; the Llama 3.1 reference code (llama3).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(theta), exponents)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor), 1.0
    original = scaling.original_max_positions or max_positions
    if scaling.rope_type == "llama3":
        turns = original * frequencies / np.float32(2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(blend, 0.0, 1.0)
        return (kept * frequencies + (1 - kept) * frequencies / scaling.factor).astype(np.float32), 1.0
    kept = 1 - _yarn_ramp(head_dim, theta, scaling, original)
    stretched = kept * frequencies + (1 - kept) * frequencies / np.float32(scaling.factor)
    return stretched.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling, original: int) -> np.ndarray:
    """0 for channels that turn often enough within the training length to be kept, 1 for those to stretch."""

    def channel(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rotate(
    heads: Float[Array, "*b t n h"], cos: Float[Array, "*b t half"], sin: Float[Array, "*b t half"]
) -> Float[Array, "*b t n h"]:
    """Turns channel pairs (i, i + h/2) of each head by the position's angles, in float32."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return narrowed(turned, heads.dtype)


def rows_at(rows: Array, places: Int[Array, "*b t"]) -> Array:
    """Rows [*b t x] of [*b s x] at `places`."""
    return jnp.take_along_axis(rows, places[..., None], axis=-2)


def last_hidden(hidden: Float[Array, "*b t d"], where: Bool[Array, "*b t"]) -> Float[Array, "*b d"]:
    """The hidden state of each row's last kept position (of position t - 1 where nothing is kept)."""
    trailing = jnp.argmax(jnp.flip(where, axis=-1), axis=-1)
    last = where.shape[-1] - 1 - trailing
    return jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]


def at_ends(hidden: Float[Array, "b w t d"], ends: Int[Array, "b *m"]) -> Float[Array, "b *m d"]:
    """The hidden states at `ends`, places in a group's rows put end to end (see `data.batches.pack_tokens`)."""
    rows = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])  # [b (w t) d]
    places = ends.reshape(hidden.shape[0], -1, 1)
    return jnp.take_along_axis(rows, places, axis=1).reshape(*ends.shape, hidden.shape[-1])

"""Attention over a launch as one kernel that keeps its scores on the chip, for accelerators.

A block of queries reads the keys of its request's prefix and those of its own texts, a key block after the other, with
the softmax carried along; its other keys cost nothing, and no window has to be chosen. One kernel, two forms of it:

* "tpu" (Mosaic): grid [k blocks], what a block reads prefetched as scalars, a head's keys and values in VMEM;
* "gpu" (Triton): grid [blocks k tiles of g], everything read where it lies, products of at most 128 rows.

Both are checked in interpret mode and not yet run on hardware. Without a device they compile in float32 and bfloat16:
"tpu" by libtpu 0.0.42 for v5e, v5p, v6e and v7x (v4 lacks an operation), "gpu" by Triton 3.9 (not XLA's own) for
compute capability 8.0 and 9.0. Pallas is imported where a kernel is built: servers on CPU do without. Used by `packed`,
which has the same function in XLA operations.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxsearch.errors import InputError
from jaxsearch.nn.attention import EMPTY_LSE
from jaxsearch.nn.layers import matmul_precision

Form = Literal["tpu", "gpu"]
VMEM_BYTES = 8 << 20
"""For all but keys and values, which take their own size twice: the next head's are fetched beside them."""


def form_here() -> tuple[Form, bool]:
    """The form for this backend, and whether it is interpreted: where there is neither TPU nor GPU."""
    backend = jax.default_backend()
    return ("tpu" if backend == "tpu" else "gpu"), backend == "cpu"


def check_width(width: int) -> None:
    """Raises: InputError when a head so wide does not fit the form for this backend."""
    if form_here() == ("gpu", False) and (width < 16 or width & (width - 1)):
        raise InputError(
            f"the attention kernel takes heads of a power of two from 16 on, this model's have {width}; do without it"
        )


def key_block_of(form: Form, dtype: DTypeLike) -> int:
    """Keys in one product: a row of lanes on TPU; on GPU as many as registers hold beside what is carried."""
    if form == "tpu":
        return 128
    return 16 if jnp.dtype(dtype) == jnp.float32 else 64


def attend_blocks(
    queries: Float[Array, "s k g h"],
    keys: Float[Array, "s k h"],
    values: Float[Array, "s k h"],
    *,
    starts: Int[Array, "s"],
    prefix_lengths: Int[Array, "s"],
    block_starts: Int[Array, "blocks"],
    block_prefixes: Int[Array, "blocks"],
    num_blocks: Int[Array, ""],
    dtype: DTypeLike,
    form: Form,
    is_interpreted: bool = False,
) -> tuple[Float[Array, "s k g h"], Float[Array, "s k g"]]:
    """What the query at each place sees of a launch, as `packed.PackedQueries` says it, and its log-sum-exp.

    Args:
        num_blocks: how many blocks are computed; the queries of others get 0, and `EMPTY_LSE`.
        form: on GPU h must be a power of two, at least 16.
    Returns: attended values in `dtype`, log-sum-exp in float32.
    Accuracy: against dense attention as the XLA form, measured in `tests/test_packed_kernel.py`.
    """
    key_block = key_block_of(form, keys.dtype)
    assert len(keys) >= key_block, f"{len(keys)} keys are fewer than a key block of {key_block}"
    reads = _reads(prefix_lengths, block_starts, block_prefixes, num_blocks, key_block)
    build = _tpu_call if form == "tpu" else _gpu_call
    return build(queries, keys, values, starts, prefix_lengths, reads, dtype, is_interpreted)


def _reads(
    prefix_lengths: Array, block_starts: Array, block_prefixes: Array, num_blocks: Array, key_block: int
) -> Int[Array, "5 blocks"]:
    """Of each block: the prefix's place, then first key and number of key blocks of the prefix and of its own texts.

    First keys are rounded down to a multiple of the block of queries: tiles are aligned, and a text that begins at one
    is split in the same way wherever it stands.
    """
    count = len(block_starts)
    size = len(prefix_lengths) // count
    order = jnp.arange(count, dtype=jnp.int32)
    longest = jnp.max(prefix_lengths.reshape(count, size), axis=1)
    first_shared, first_own = block_prefixes // size * size, block_starts // size * size
    shared = jnp.where(longest > 0, block_prefixes + longest - first_shared, 0)
    own = (order + 1) * size - first_own
    is_computed = order < num_blocks
    shared, own = (jnp.where(is_computed, (each + key_block - 1) // key_block, 0) for each in (shared, own))
    return jnp.stack([block_prefixes, first_shared, shared, first_own, own])


def _attend(
    reads: Any,
    starts: Any,
    prefix_lengths: Any,
    queries: Any,
    keys: Any,
    values: Any,
    attended: Any,
    lse: Any,
    *,
    block_axis: int,
    head_axis: int,
    key_block: int,
) -> None:
    """One block of queries of one key/value head; all are references, `queries` [t g h] or, `head_axis` 0, [g t h]."""
    from jax.experimental import pallas as pl

    shape, width = queries.shape, queries.shape[-1]
    size, rows = shape[1 - head_axis], shape[0] * shape[1]
    block = pl.program_id(block_axis)
    asking = queries[...].reshape(rows, width)
    products = {"precision": matmul_precision(asking.dtype), "preferred_element_type": jnp.float32}

    def per_row(each: Array) -> Array:
        """[t 1] → [rows 1]."""
        return jnp.broadcast_to(jnp.expand_dims(each, head_axis), (*shape[:2], 1)).reshape(rows, 1)

    def read(first: Array, count: Array, low: Array, high: Array, carry: tuple) -> tuple:
        """Adds the keys from `low` to before `high`, of `count` key blocks from `first` on."""

        def step(index: Array, carry: tuple) -> tuple:
            peak, total, mixed = carry
            wanted = first + index * key_block
            start = pl.multiple_of(jnp.minimum(wanted, keys.shape[0] - key_block), math.gcd(size, key_block))
            places = start + jax.lax.broadcasted_iota(jnp.int32, (1, key_block), 1)
            is_seen = (places >= jnp.maximum(low, wanted)) & (places < high)
            scores = jax.lax.dot_general(
                asking, keys[pl.ds(start, key_block), :], (((1,), (1,)), ((), ())), **products
            )
            scores = jnp.where(is_seen, scores * (1.0 / math.sqrt(width)), EMPTY_LSE)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
            # Weights of a row that has seen nothing yet are 1; its first key turns their share into 0.
            weights, share = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
            seen_values = values[pl.ds(start, key_block), :]
            more = jax.lax.dot_general(
                weights.astype(seen_values.dtype), seen_values, (((1,), (0,)), ((), ())), **products
            )
            total = share * total + jnp.sum(weights, axis=1, keepdims=True)
            return new_peak, total, share * mixed + more

        return jax.lax.fori_loop(0, count, step, carry)

    prefix = reads[0, block]
    after_prefix = prefix + per_row(prefix_lengths[...].reshape(size, 1))
    own_start = per_row(starts[...].reshape(size, 1))
    after_own = per_row(block * size + 1 + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0))
    carry = (
        jnp.full((rows, 1), EMPTY_LSE, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    carry = read(reads[1, block], reads[2, block], prefix, after_prefix, carry)
    peak, total, mixed = read(reads[3, block], reads[4, block], own_start, after_own, carry)
    total = jnp.where(total == 0.0, 1.0, total)  # of a block that is not computed
    attended[...] = (mixed / total).astype(attended.dtype).reshape(shape)
    lse[...] = (peak + jnp.log(total)).reshape(shape[:2])


def _gpu_call(
    queries: Array,
    keys: Array,
    values: Array,
    starts: Array,
    prefix_lengths: Array,
    reads: Array,
    dtype: DTypeLike,
    is_interpreted: bool,
) -> tuple[Array, Array]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    count, num_kv_heads, groups, width = queries.shape
    size, key_block = count // reads.shape[1], key_block_of("gpu", keys.dtype)
    heads = math.gcd(groups, 2)  # a power of two that divides g: nothing is padded
    per_query = pl.BlockSpec((size,), lambda block, head, tile: (block,))
    per_head = pl.BlockSpec((count, None, width), lambda block, head, tile: (0, head, 0))
    per_rows = pl.BlockSpec((size, None, heads, width), lambda block, head, tile: (block, head, tile, 0))
    call = pl.pallas_call(
        functools.partial(_attend, block_axis=0, head_axis=1, key_block=key_block),
        grid=(count // size, num_kv_heads, groups // heads),
        in_specs=[
            pl.BlockSpec(reads.shape, lambda block, head, tile: (0, 0)),
            per_query,
            per_query,
            per_rows,
            per_head,
            per_head,
        ],
        out_specs=[
            per_rows,
            pl.BlockSpec((size, None, heads), lambda block, head, tile: (block, head, tile)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, dtype),
            jax.ShapeDtypeStruct(queries.shape[:-1], jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4 * heads, num_stages=2),
        interpret=is_interpreted,
        name="packed_attention",
    )
    return tuple(call(reads, starts, prefix_lengths, queries, keys, values))


def _tpu_call(
    queries: Array,
    keys: Array,
    values: Array,
    starts: Array,
    prefix_lengths: Array,
    reads: Array,
    dtype: DTypeLike,
    is_interpreted: bool,
) -> tuple[Array, Array]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    count, num_kv_heads, groups, width = queries.shape
    blocks = reads.shape[1]
    size, key_block = count // blocks, key_block_of("tpu", keys.dtype)
    per_query = pl.BlockSpec((None, 1, size), lambda head, block, reads: (block, 0, 0))
    per_head = pl.BlockSpec((None, count, width), lambda head, block, reads: (head, 0, 0))
    per_rows = pl.BlockSpec((None, groups, size, width), lambda head, block, reads: (head, 0, block, 0))
    lse_spec = pl.BlockSpec((None, None, groups, size), lambda head, block, reads: (head, block, 0, 0))
    call = pl.pallas_call(
        functools.partial(_attend, block_axis=1, head_axis=0, key_block=key_block),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_kv_heads, blocks),
            in_specs=[per_query, per_query, per_rows, per_head, per_head],
            out_specs=[per_rows, lse_spec],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, groups, count, width), dtype),
            jax.ShapeDtypeStruct((num_kv_heads, blocks, groups, size), jnp.float32),
        ],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=VMEM_BYTES + 4 * count * max(width, 128) * keys.dtype.itemsize,
        ),
        interpret=is_interpreted,
        name="packed_attention",
    )
    per_block = [each.reshape(blocks, 1, size) for each in (starts, prefix_lengths)]
    rows = jnp.moveaxis(queries, 0, 2)  # [k g s h]
    attended, lse = call(reads, *per_block, rows, jnp.moveaxis(keys, 1, 0), jnp.moveaxis(values, 1, 0))
    return jnp.moveaxis(attended, 2, 0), jnp.moveaxis(lse, (0, 2), (2, 3)).reshape(queries.shape[:-1])

"""Attention over a launch: the prompts of many requests put end to end in one row of tokens.

A request's prefix stands first and its items behind it; a token attends to what precedes it in its own text and, in an
item, to all of its request's prefix. Requests start at multiples of `BLOCK_TOKENS`, so that a block of queries has one
prefix. Each group of blocks reads windows of keys just large enough for it: what is computed follows the lengths that
there are, and a program depends on the launch's size alone. Who fills launches: `scoring.packing`; the same as one
kernel, for accelerators: `packed_kernel`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsearch.nn.attention import EMPTY_LSE, attention_with_lse, merge_attention
from jaxsearch.nn.layers import matmul_precision, narrowed
from jaxsearch.nn.packed_kernel import attend_blocks, form_here

BLOCK_TOKENS = 64


class PackedQueries(NamedTuple):
    """What each of t queries sees among a launch's s keys; blocks are equal runs of queries, groups of blocks.

    `places` are the queries' own places among the keys. A query sees the keys from its `starts` to its place, and
    `prefix_lengths` keys from its block's `block_prefixes` on. `block_starts` are the least `starts` of each block,
    `windows` say for each group which of the window sizes holds what it sees; only `num_groups` groups are computed.
    """

    places: Int[Array, "t"]
    starts: Int[Array, "t"]
    prefix_lengths: Int[Array, "t"]
    block_starts: Int[Array, "blocks"]
    block_prefixes: Int[Array, "blocks"]
    windows: Int[Array, "groups"]
    num_groups: Int[Array, ""]


class PackedPrompts(NamedTuple):
    """A launch: its tokens with their positions and what they see, and the `ends` whose hidden states are wanted."""

    tokens: Int[Array, "s"]
    positions: Int[Array, "s"]
    seen: PackedQueries
    ends: PackedQueries


def packed_attention(
    queries: Float[Array, "t k g h"],
    keys: Float[Array, "s k h"],
    values: Float[Array, "s k h"],
    seen: PackedQueries,
    windows: tuple[tuple[int, int], ...],
    base: tuple[Float[Array, "p k h"], Float[Array, "p k h"]] | None = None,
    use_kernel: bool = False,
) -> Float[Array, "t k g h"]:
    """Attention of every query to what `seen` says, and to all keys of `base`, which every request begins with.

    Args: `windows` are (own, prefix) numbers of keys that a block may read. Queries of groups that are not computed
        see `base` alone, and get 0 without one. `use_kernel` takes `packed_kernel` where the queries are the launch's
        own, one for each key.
        The result has the queries' dtype; equal to dense attention (fp32: 1e-6).
    """
    kept = queries.dtype if base is None else jnp.dtype(jnp.float32)
    if use_kernel and queries.shape[0] == keys.shape[0]:
        attended, lse = _attend_by_kernel(queries, keys, values, seen, kept)
    else:
        attended, lse = _attend_by_groups(queries, keys, values, seen, windows, kept)
    if base is None:
        return attended
    everywhere = jnp.ones((1, base[0].shape[0]), bool)
    first, first_lse = attention_with_lse(queries, *base, everywhere)
    return narrowed(merge_attention(first, first_lse, attended, lse), queries.dtype)


def _attend_by_kernel(
    queries: Array, keys: Array, values: Array, seen: PackedQueries, kept: jnp.dtype
) -> tuple[Array, Array]:
    """Attended values in the dtype `kept`, and their log-sum-exp: 0 and `EMPTY_LSE` where nothing is computed."""
    form, is_interpreted = form_here()
    return attend_blocks(
        queries,
        keys,
        values,
        starts=seen.starts,
        prefix_lengths=seen.prefix_lengths,
        block_starts=seen.block_starts,
        block_prefixes=seen.block_prefixes,
        num_blocks=seen.num_groups * (seen.block_starts.shape[0] // seen.windows.shape[0]),
        dtype=kept,
        form=form,
        is_interpreted=is_interpreted,
    )


def _attend_by_groups(
    queries: Array,
    keys: Array,
    values: Array,
    seen: PackedQueries,
    windows: tuple[tuple[int, int], ...],
    kept: jnp.dtype,
) -> tuple[Array, Array]:
    """As `_attend_by_kernel`, for any queries: a product for each group and the window that it needs."""
    num_groups, num_blocks = seen.windows.shape[0], seen.block_starts.shape[0]
    blocks, size = num_blocks // num_groups, queries.shape[0] // num_blocks
    grouped = queries.reshape(num_groups, blocks, size, *queries.shape[1:])
    per_query = [each.reshape(num_groups, blocks, size, 1) for each in seen[:3]]
    per_block = [each.reshape(num_groups, blocks) for each in seen[3:5]]
    keys, values = jnp.moveaxis(keys, 0, -1), jnp.moveaxis(values, 0, -2)  # [k h s], [k s h]

    def attend(window: tuple[int, int], group: Array) -> tuple[Array, Array]:
        places, starts, prefix_lengths = (each[group] for each in per_query)
        own, own_places = _windows(per_block[0][group], min(window[0], keys.shape[-1]), keys, values)
        shared, shared_places = _windows(per_block[1][group], min(window[1], keys.shape[-1]), keys, values)
        after = shared_places - per_block[1][group][:, None, None]
        is_shared = (after >= 0) & (after < prefix_lengths)
        is_own = (own_places >= starts) & (own_places <= places)
        seen_keys = jnp.concatenate([shared[0], own[0]], axis=-1)
        seen_values = jnp.concatenate([shared[1], own[1]], axis=-2)
        mask = jnp.concatenate([is_shared, is_own], axis=-1)  # [blocks size s]
        bias = jax.lax.optimization_barrier(jnp.where(mask, 0.0, EMPTY_LSE))
        return _attend(grouped[group], seen_keys, seen_values, bias)

    branches = [lambda group, window=window: attend(window, group) for window in windows]

    def step(group: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        found = jax.lax.switch(seen.windows[group], branches, group)
        return tuple(  # pyright: ignore[reportReturnType]
            jax.lax.dynamic_update_index_in_dim(into, narrowed(part, into.dtype), group, 0)
            for into, part in zip(done, found, strict=True)
        )

    done = jnp.zeros(grouped.shape, kept), jnp.full(grouped.shape[:-1], EMPTY_LSE, jnp.float32)
    attended, lse = jax.lax.fori_loop(0, seen.num_groups, step, done)
    return attended.reshape(queries.shape), lse.reshape(queries.shape[:-1])


def _attend(queries: Array, keys: Array, values: Array, bias: Array) -> tuple[Array, Array]:
    """Of queries [blocks t k g h], keys [blocks k h s], values [blocks k s h]; every query sees at least itself."""
    accumulate = {"precision": matmul_precision(queries.dtype), "preferred_element_type": jnp.float32}
    num_blocks, size, heads, groups, width = queries.shape
    rows = jnp.moveaxis(queries, 1, -2).reshape(num_blocks, heads, groups * size, width)
    scores = jnp.einsum("bkth,bkhs->bkts", rows, keys, **accumulate)
    scores = (
        scores.reshape(num_blocks, heads, groups, size, -1) * (1.0 / math.sqrt(width)) + bias[:, None, None]
    )
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    rows = narrowed(weights, values.dtype).reshape(num_blocks, heads, groups * size, -1)
    attended = jnp.einsum("bkts,bksh->bkth", rows, values, **accumulate)
    attended = attended.reshape(num_blocks, heads, groups, size, width) / total
    return jnp.moveaxis(attended, -2, 1), jnp.moveaxis((peak + jnp.log(total))[..., 0], -1, 1)


def _windows(
    starts: Array, size: int, keys: Array, values: Array
) -> tuple[tuple[Array, Array], Int[Array, "blocks 1 size"]]:
    """`size` of keys [k h s] and values [k s h] from each start on, or the last where fewer follow; their places."""
    starts = jnp.clip(starts, 0, keys.shape[-1] - size)

    def cut(rows: Array, axis: int) -> Array:
        if starts.shape[0] == 1:
            return jax.lax.dynamic_slice_in_dim(rows, starts[0], size, axis)[None]
        return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(rows, start, size, axis))(starts)

    return (cut(keys, 2), cut(values, 1)), starts[:, None, None] + jnp.arange(size)[None, None]

"""Attention as pure functions: dense, with its log-sum-exp, merged, over a shared prefix.

Query heads come grouped by the key/value head that they read: queries [... t k g h], keys and values
[... s k h]. Scores, softmax and merge are float32; products take the inputs' dtype and accumulate in float32.
A row whose mask is False everywhere gives 0 and zero gradients. Projections, positions: see `transformer`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsearch.nn.layers import matmul_precision

EMPTY_LSE = -1e30
"""Log-sum-exp of a row that attends to nothing: finite, so that merging never computes inf - inf."""
QUERY_BLOCK, MOST_BLOCKS = 48, 8
"""Queries of a block on CPU, and how many blocks there may be: each is compiled. With SmolLM2's heads and 12 items of
168 tokens in float32 on two cores, query heads as rows are 2.2 times as fast as apart, and in blocks 3.8 times."""


def causal_mask(where: Bool[Array, "*b t"]) -> Bool[Array, "*b t t"]:
    """Each position sees itself and what precedes it, of what `where` keeps."""
    order = jnp.arange(where.shape[-1])
    earlier = order[None, :] <= order[:, None]
    return where[..., None, :] & jnp.expand_dims(earlier, tuple(range(where.ndim - 1)))


def segment_mask(segment_ids: Int[Array, "*b t"]) -> Bool[Array, "*b t t"]:
    """True where two positions have the same segment id; padding (0) is to be masked by `where` besides."""
    return segment_ids[..., :, None] == segment_ids[..., None, :]


def segment_positions(segment_ids: Int[Array, "*b t"]) -> Int[Array, "*b t"]:
    """The place of each position in its segment, from 0; a segment's positions stand side by side. Padding has 0."""
    order = jnp.broadcast_to(jnp.arange(segment_ids.shape[-1], dtype=jnp.int32), segment_ids.shape)
    is_first = jnp.diff(segment_ids, axis=-1, prepend=segment_ids[..., :1] - 1) != 0
    places = order - jax.lax.cummax(jnp.where(is_first, order, 0), axis=order.ndim - 1)
    return jnp.where(segment_ids > 0, places, 0)


def causal_within(
    where: Bool[Array, "*b t"], segment_ids: Int[Array, "*b t"] | None
) -> tuple[Bool[Array, "*b t t"], Int[Array, "*b t"]]:
    """What each position sees, and its place from 0: over the kept tokens, or in its segment."""
    mask = causal_mask(where)
    if segment_ids is not None:
        return mask & segment_mask(segment_ids), segment_positions(segment_ids)
    return mask, jnp.maximum(jnp.cumsum(where, axis=-1, dtype=jnp.int32) - 1, 0)


def dense_attention(
    queries: Float[Array, "*b t k g h"],
    keys: Float[Array, "*b s k h"],
    values: Float[Array, "*b s k h"],
    mask: Bool[Array, "*b #t s"],
    *,
    is_causal: bool = False,
) -> Float[Array, "*b t k g h"]:
    """Softmax attention with scale 1/sqrt(h); `mask` True = attend. The result has the queries' dtype."""
    return attention_with_lse(queries, keys, values, mask, is_causal=is_causal)[0].astype(queries.dtype)


def attention_with_lse(
    queries: Float[Array, "*b t k g h"],
    keys: Float[Array, "*b s k h"],
    values: Float[Array, "*b s k h"],
    mask: Bool[Array, "*b #t s"],
    *,
    is_causal: bool = False,
) -> tuple[Float[Array, "*b t k g h"], Float[Array, "*b t k g"]]:
    """Attention in float32, and the log of its softmax denominator (`EMPTY_LSE` where nothing is attended).

    A key/value head's query heads are rows of one product. On CPU queries go in blocks whose scores stay in the cache.

    Args: `is_causal` says that `mask` is False at keys after each query, with t = s: blocks then leave those keys out.
    """
    length = queries.shape[-4]
    assert not is_causal or length == keys.shape[-3], "causal attention has as many keys as queries"
    size = length
    if jax.default_backend() == "cpu":
        size = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    queries = jnp.moveaxis(queries, -4, -2)  # [... k g t h]
    keys, values = jnp.moveaxis(keys, -2, -3), jnp.moveaxis(values, -2, -3)  # [... k s h]
    parts = []
    for start in range(0, length, size):
        end = min(start + size, length)
        seen = end if is_causal else keys.shape[-2]
        rows = mask if mask.shape[-2] == 1 else mask[..., start:end, :]
        parts.append(
            _attend(queries[..., start:end, :], keys[..., :seen, :], values[..., :seen, :], rows[..., :seen])
        )
    attended, lse = (
        jnp.concatenate(each, axis=axis)
        for each, axis in zip(zip(*parts, strict=True), (-2, -1), strict=True)
    )
    return jnp.moveaxis(attended, -2, -4), jnp.moveaxis(lse, -1, -3)


def _attend(queries: Array, keys: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Of queries [... k g t h], keys and values [... k s h]: [... k g t h] and [... k g t].

    The denominator divides after the product with the values: on [t h], not on [t s].
    """
    accumulate = {
        "precision": matmul_precision(queries.dtype),
        "preferred_element_type": jnp.float32,
    }
    *lead, groups, length, size = queries.shape
    rows = queries.reshape(*lead, groups * length, size)
    scores = jnp.einsum("...th,...sh->...ts", rows, keys, **accumulate)
    scores = scores.reshape(*lead, groups, length, keys.shape[-2])
    scores = jnp.where(jnp.expand_dims(mask, (-4, -3)), scores * (1.0 / math.sqrt(size)), EMPTY_LSE)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    rows = weights.astype(values.dtype).reshape(*lead, groups * length, keys.shape[-2])
    attended = jnp.einsum("...ts,...sh->...th", rows, values, **accumulate)
    # Where nothing is attended all weights are 1: of finite numbers, that this leaves out.
    is_empty = peak == EMPTY_LSE
    attended = jnp.where(is_empty, 0.0, attended.reshape(*lead, groups, length, size) / total)
    return attended, jnp.where(is_empty, EMPTY_LSE, peak + jnp.log(total))[..., 0]


def merge_attention(
    first: Float[Array, "*b h"],
    first_lse: Float[Array, "*b"],
    second: Float[Array, "*b h"],
    second_lse: Float[Array, "*b"],
) -> Float[Array, "*b h"]:
    """Attention over the union of two disjoint key sets, from the attention over each and its log-sum-exp.

    Where both sets are empty both inputs are 0, and so is the result.
    """
    share = jax.nn.sigmoid(first_lse - second_lse)[..., None]
    return share * first + (1.0 - share) * second


def shared_prefix_attention(
    queries: Float[Array, "q c t k g h"],
    keys: Float[Array, "q c t k h"],
    values: Float[Array, "q c t k h"],
    mask: Bool[Array, "q c t t"],
    *,
    prefix_keys: Float[Array, "q s k h"],
    prefix_values: Float[Array, "q s k h"],
    prefix_mask: Bool[Array, "q c t s"] | Bool[Array, "q 1 1 s"],
    is_causal: bool = False,
) -> Float[Array, "q c t k g h"]:
    """Every item of a query attends to what `prefix_mask` keeps of the query's prefix and, under `mask`, to itself.

    `is_causal` as of `attention_with_lse`. The prefix stays one array per query: its products contract all items at
    once, no copy per item is made.
    The result has the queries' dtype and equals dense attention over the concatenation of prefix and item.
    """
    own, own_lse = attention_with_lse(queries, keys, values, mask, is_causal=is_causal)
    num_queries, num_items, length = queries.shape[:3]
    rows = queries.reshape(num_queries, num_items * length, *queries.shape[3:])  # [q (c t) k g h]
    prefix_mask = prefix_mask.reshape(num_queries, -1, prefix_mask.shape[-1])  # [q 1 s] or [q (c t) s]
    shared, shared_lse = attention_with_lse(rows, prefix_keys, prefix_values, prefix_mask)
    shared, shared_lse = shared.reshape(own.shape), shared_lse.reshape(own_lse.shape)
    return merge_attention(shared, shared_lse, own, own_lse).astype(queries.dtype)

"""Attention against a float64 loop, merged against whole, shared prefix against concatenation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.nn import attention
from jaxsearch.nn.attention import (
    EMPTY_LSE,
    attention_with_lse,
    causal_mask,
    dense_attention,
    merge_attention,
    shared_prefix_attention,
)

TOLERANCE = 2e-6  # measured maximum 7.2e-7 over 60 seeds


def _heads(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _reference(queries, keys, values, mask):
    """One row at a time in float64: what the definition says."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    mask = np.broadcast_to(np.asarray(mask), (*queries.shape[:2], keys.shape[1]))
    out = np.zeros_like(queries)
    for b, t, k, g in np.ndindex(queries.shape[:-1]):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = keys[b, seen, k] @ queries[b, t, k, g] / math.sqrt(queries.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, t, k, g] = weights @ values[b, seen, k] / weights.sum()
    return out


@pytest.mark.parametrize("seed", range(3))
def test_dense_attention_is_the_definition(seed):
    rng = np.random.default_rng(seed)
    queries, keys, values = _heads(rng, 2, 5, 2, 3, 4), _heads(rng, 2, 7, 2, 4), _heads(rng, 2, 7, 2, 4)
    mask = jnp.asarray(rng.random((2, 5, 7)) < 0.4)
    attended = dense_attention(queries, keys, values, mask)
    np.testing.assert_allclose(attended, _reference(queries, keys, values, mask), atol=TOLERANCE)


@pytest.mark.parametrize("is_causal", [True, False])
def test_queries_in_blocks_attend_to_what_they_attend_to_at_once(is_causal, monkeypatch):
    """130 queries make three blocks on CPU, of which a causal one leaves keys out; some rows see nothing."""
    assert attention.QUERY_BLOCK == 48
    rng = np.random.default_rng(0)
    queries, keys, values = (
        _heads(rng, 2, 130, 2, 3, 4),
        _heads(rng, 2, 130, 2, 4),
        _heads(rng, 2, 130, 2, 4),
    )
    where = jnp.asarray(rng.random((2, 130)) < 0.8).at[:, :5].set(False)
    mask = causal_mask(where) if is_causal else where[:, None] & jnp.asarray(rng.random((2, 130, 130)) < 0.5)

    def sum_and_states(*heads):
        attended, lse = attention_with_lse(*heads, mask, is_causal=is_causal)
        return jnp.sum(jnp.sin(attended)) + jnp.sum(jnp.where(lse > EMPTY_LSE, lse, 0.0)), (attended, lse)

    run = jax.value_and_grad(sum_and_states, argnums=(0, 1, 2), has_aux=True)
    (_, (blocks, lse)), gradients = run(queries, keys, values)
    np.testing.assert_allclose(blocks, _reference(queries, keys, values, mask), atol=TOLERANCE)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 1000)
    (_, (whole, whole_lse)), whole_gradients = run(queries, keys, values)
    np.testing.assert_allclose(blocks, whole, atol=TOLERANCE)
    np.testing.assert_allclose(lse, whole_lse, atol=TOLERANCE)
    for found, expected in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(
            found, expected, atol=5e-5
        )  # measured 9.5e-6, where the largest are near 10
        assert float(jnp.abs(expected).max()) > 0.1


def test_causal_mask_by_hand():
    mask = causal_mask(jnp.asarray([[True, False, True]]))
    assert mask.tolist() == [[[True, False, False], [True, False, False], [True, False, True]]]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), split=st.integers(0, 8))
def test_merged_halves_equal_the_whole(seed, split):
    rng = np.random.default_rng(seed)
    queries, keys, values = _heads(rng, 1, 3, 2, 2, 4), _heads(rng, 1, 8, 2, 4), _heads(rng, 1, 8, 2, 4)
    mask = jnp.asarray(rng.random((1, 3, 8)) < 0.5)
    is_first = jnp.arange(8)[None, None] < split
    first = attention_with_lse(queries, keys, values, mask & is_first)
    second = attention_with_lse(queries, keys, values, mask & ~is_first)
    whole = dense_attention(queries, keys, values, mask)
    np.testing.assert_allclose(merge_attention(*first, *second), whole, atol=TOLERANCE)


def test_large_scores_do_not_overflow():
    queries = jnp.full((1, 1, 1, 1, 2), 1e4)
    keys = jnp.asarray([[[[1e4, 0.0]], [[-1e4, 0.0]]]])
    values = jnp.asarray([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    attended = dense_attention(queries, keys, values, jnp.ones((1, 1, 2), bool))
    assert attended.ravel().tolist() == [1.0, 2.0]


def test_rows_that_see_nothing_give_zero_and_zero_gradients():
    rng = np.random.default_rng(0)
    queries, keys, values = _heads(rng, 1, 2, 1, 2, 4), _heads(rng, 1, 3, 1, 4), _heads(rng, 1, 3, 1, 4)
    nothing = jnp.zeros((1, 2, 3), bool)
    attended, lse = attention_with_lse(queries, keys, values, nothing)
    assert not attended.any()
    assert bool((lse == EMPTY_LSE).all())

    def merged(queries, keys, values):
        empty = attention_with_lse(queries, keys, values, nothing)
        return jnp.sum(merge_attention(*empty, *empty) ** 2 + merge_attention(*empty, *empty))

    for gradient in jax.grad(merged, argnums=(0, 1, 2))(queries, keys, values):
        assert not gradient.any()


def _prefix_case(seed, prefix_lengths):
    rng = np.random.default_rng(seed)
    num_prefix, num_queries = max(prefix_lengths), len(prefix_lengths)
    own = (_heads(rng, num_queries, 3, 4, 2, 2, 4), *(_heads(rng, num_queries, 3, 4, 2, 4) for _ in "kv"))
    prefix = tuple(_heads(rng, num_queries, num_prefix, 2, 4) for _ in "kv")
    prefix_where = jnp.arange(num_prefix)[None] < jnp.asarray(prefix_lengths)[:, None]
    where = jnp.arange(4)[None, None] < jnp.asarray(rng.integers(0, 5, (num_queries, 3)))[..., None]
    return own, prefix, prefix_where, where


def _by_concatenation(own, prefix, prefix_where, where):
    """The same with a copy of the prefix in front of each item."""
    queries, keys, values = own
    copies = [jnp.repeat(part[:, None], 3, axis=1) for part in prefix]
    keys, values = jnp.concatenate([copies[0], keys], 2), jnp.concatenate([copies[1], values], 2)
    seen = jnp.broadcast_to(prefix_where[:, None, None], (*where.shape, prefix_where.shape[1]))
    return dense_attention(queries, keys, values, jnp.concatenate([seen, causal_mask(where)], -1))


def _shared(own, prefix, prefix_where, where):
    keys, values = prefix
    return shared_prefix_attention(
        *own,
        causal_mask(where),
        prefix_keys=keys,
        prefix_values=values,
        prefix_mask=prefix_where[:, None, None],
    )


@pytest.mark.parametrize("prefix_lengths", [(5,), (0,), (6, 0, 3)])
def test_shared_prefix_equals_concatenation(prefix_lengths):
    if prefix_lengths == (0,):
        own, prefix, prefix_where, where = _prefix_case(1, (2,))
        prefix_where = jnp.zeros_like(prefix_where)
    else:
        own, prefix, prefix_where, where = _prefix_case(1, prefix_lengths)
    shared = _shared(own, prefix, prefix_where, where)
    np.testing.assert_allclose(shared, _by_concatenation(own, prefix, prefix_where, where), atol=TOLERANCE)


def test_shared_prefix_gradients_equal_concatenation():
    own, prefix, prefix_where, where = _prefix_case(2, (4, 0))

    def loss(attend):
        return lambda own, prefix: jnp.sum(jnp.sin(attend(own, prefix, prefix_where, where)))

    shared = jax.grad(loss(_shared), argnums=(0, 1))(own, prefix)
    copied = jax.grad(loss(_by_concatenation), argnums=(0, 1))(own, prefix)
    for left, right in zip(jax.tree.leaves(shared), jax.tree.leaves(copied), strict=True):
        np.testing.assert_allclose(left, right, atol=TOLERANCE)


def test_no_copy_of_the_prefix_per_item():
    num_prefix, num_items = 64, 32
    rng = np.random.default_rng(0)
    queries = _heads(rng, 1, num_items, 2, 1, 1, 4)
    keys, values = _heads(rng, 1, num_items, 2, 1, 4), _heads(rng, 1, num_items, 2, 1, 4)
    where = jnp.ones((1, num_items, 2), bool)
    prefix = _heads(rng, 1, num_prefix, 1, 4), _heads(rng, 1, num_prefix, 1, 4)
    graph = jax.make_jaxpr(
        lambda: _shared((queries, keys, values), prefix, jnp.ones((1, num_prefix), bool), where)
    )()
    largest = max(math.prod(out.aval.shape) for equation in graph.jaxpr.eqns for out in equation.outvars)
    assert largest <= num_items * 2 * num_prefix  # the scores; a copied prefix would hold twice as much
    assert largest < num_items * num_prefix * 4


def test_bf16_inputs_give_bf16_close_to_float32():
    rng = np.random.default_rng(0)
    queries, keys, values = _heads(rng, 2, 5, 2, 3, 8), _heads(rng, 2, 7, 2, 8), _heads(rng, 2, 7, 2, 8)
    mask = jnp.ones((2, 5, 7), bool)
    narrow = dense_attention(*(x.astype(jnp.bfloat16) for x in (queries, keys, values)), mask)
    assert narrow.dtype == jnp.bfloat16
    wide = dense_attention(queries, keys, values, mask)
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=0.02)  # measured maximum 0.0069

"""The kernel equals dense attention in both forms, serves whole scorers, and lowers for hardware that is not there."""

import functools


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.launches import SHAPES, check, sizes_of_requests

from jaxsearch.buckets import Lattice
from jaxsearch.nn.packed import BLOCK_TOKENS, packed_attention
from jaxsearch.nn.packed_kernel import attend_blocks
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.scoring.packing import ScoreRequest
from jaxsearch.scoring.prefill import PrefillScorer

TOLERANCE = {"float32": 2e-6, "bfloat16": 0.03}
SCORE_TOLERANCE = 1e-5
FORMS = ["tpu", "gpu"]


@functools.partial(jax.jit, static_argnames=("form", "is_interpreted"))
def by_kernel(queries, keys, values, seen, *, form, is_interpreted=True):
    return attend_blocks(
        queries,
        keys,
        values,
        starts=seen.starts,
        prefix_lengths=seen.prefix_lengths,
        block_starts=seen.block_starts,
        block_prefixes=seen.block_prefixes,
        num_blocks=seen.num_groups * (len(seen.block_starts) // len(seen.windows)),
        dtype=queries.dtype,
        form=form,
        is_interpreted=is_interpreted,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=10)
@given(sizes=sizes_of_requests)
def test_the_kernel_equals_dense_attention(form, groups, dtype, sizes):
    def attend(queries, keys, values, seen, base):
        return by_kernel(queries, keys, values, seen, form=form)

    check(attend, dtype, 0, sizes, TOLERANCE[dtype], heads=(2, groups, 64), has_ends=False)


jitted = jax.jit(packed_attention, static_argnums=(4, 6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_tokens", [0, 9])
@settings(deadline=None, max_examples=10)
@given(sizes=sizes_of_requests)
def test_packed_attention_with_the_kernel_equals_dense_attention(dtype, base_tokens, sizes):
    def attend(queries, keys, values, seen, base):
        return (jitted(queries, keys, values, seen, SHAPES.windows, base, True),)

    check(attend, dtype, base_tokens, sizes, TOLERANCE[dtype], heads=(2, 2, 64))

"""Attention over a launch equals dense attention over what each query sees."""

import jax
import pytest
from hypothesis import given, settings

from jaxsearch.nn.packed import packed_attention
from jaxsearch.scoring.packing import Shapes
from tests.launches import SHAPES, check, sizes_of_requests

TOLERANCE = {"float32": 2e-6, "bfloat16": 0.03}  # measured maximum over 40 launches each: 7.2e-7, 0.016

jitted = jax.jit(packed_attention, static_argnums=4)


def attend(queries, keys, values, seen, base):
    return (jitted(queries, keys, values, seen, SHAPES.windows, base),)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_tokens", [0, 9])
@settings(deadline=None, max_examples=15)
@given(sizes=sizes_of_requests)
def test_packed_attention_equals_dense_attention(dtype, base_tokens, sizes):
    check(attend, dtype, base_tokens, sizes, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_one_group_too(dtype):
    """As on an accelerator: all blocks at once."""
    shapes = Shapes(SHAPES.lattice, is_blockwise=False)
    assert shapes.windows == SHAPES.windows
    sizes = [(70, [200, 1, 64]), (1, [1]), (30, [130])]
    check(attend, dtype, 9, sizes, TOLERANCE[dtype], shapes=shapes)

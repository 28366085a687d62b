"""The kernel equals dense attention in both forms, serves whole scorers, and lowers for hardware that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.buckets import Buckets, Lattice
from jaxsearch.nn.packed import BLOCK_TOKENS, PackedQueries, packed_attention
from jaxsearch.nn.packed_kernel import attend_blocks
from jaxsearch.scoring.packing import ScoreRequest
from jaxsearch.scoring.prefill import PrefillScorer
from tests.launches import SHAPES, check, prompts_of, sizes_of_requests
from tests.small_models import QWEN3, make

# Measured maximum over 40 launches of each kind: 8.9e-7, 0.0078, and 9.5e-7 of log-sum-exps.
TOLERANCE = {"float32": 2e-6, "bfloat16": 0.02}


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


@pytest.mark.parametrize("form", ["tpu", "gpu"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=6)
@given(sizes=sizes_of_requests)
def test_the_kernel_equals_dense_attention(form, groups, dtype, sizes):
    def attend(queries, keys, values, seen, base):
        return by_kernel(queries, keys, values, seen, form=form)

    check(attend, dtype, 0, sizes, TOLERANCE[dtype], heads=(2, groups, 64), has_ends=False)


jitted = jax.jit(packed_attention, static_argnums=(4, 6))


@pytest.mark.parametrize(("dtype", "base_tokens"), [("float32", 0), ("float32", 9), ("bfloat16", 9)])
@settings(deadline=None, max_examples=6)
@given(sizes=sizes_of_requests)
def test_packed_attention_with_the_kernel_equals_dense_attention(dtype, base_tokens, sizes):
    def attend(queries, keys, values, seen, base):
        return (jitted(queries, keys, values, seen, SHAPES.windows, base, True),)

    check(attend, dtype, base_tokens, sizes, TOLERANCE[dtype], heads=(2, 2, 64), has_ends=False)


@pytest.mark.parametrize("form", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("hidden", "asking"), [(slice(0, 64), slice(320, 384)), (slice(320, 384), slice(0, 64))]
)
def test_a_block_does_not_read_what_lies_far_from_its_texts(form, hidden, asking):
    """A mask hides NaN after reading it, and 0 * NaN shows."""
    prompts, size = prompts_of([(60, [4]), (60, [140]), (60, [4])])
    keys = jnp.ones((size, 1, 64), jnp.float32)
    values = keys.at[hidden].set(jnp.nan)
    attended = by_kernel(keys[:, :, None], keys, values, prompts.seen, form=form)[0]
    np.testing.assert_allclose(attended[asking], 1.0, rtol=1e-6)
    assert jnp.isnan(attended[hidden]).all()


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_a_request_is_the_same_bit_for_bit_wherever_it_stands(form):
    heads = jax.random.normal(jax.random.key(0), (160, 1, 4, 64))
    found = []
    for place, sizes in ((0, [(60, [100])]), (64, [(20, [30]), (60, [100])])):
        prompts, size = prompts_of(sizes)
        moved = jnp.zeros((size, 1, 4, 64)).at[place : place + 160].set(heads)
        attended = by_kernel(moved[:, :, :2], moved[:, :, 2], moved[:, :, 3], prompts.seen, form=form)[0]
        found.append(np.asarray(attended[place : place + 160]).tobytes())
    assert found[0] == found[1]


LATTICE = Lattice(Buckets([256]), max_prefix_tokens=64, max_item_tokens=40)
BASE = (7, 8, 9)
tokens = st.integers(0, QWEN3.vocab_size - 1)
requests = st.lists(
    st.tuples(
        st.lists(tokens, max_size=60).map(lambda prefix: (*BASE, 1, *prefix)),
        st.lists(st.lists(tokens, min_size=1, max_size=40), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


@functools.cache
def scorer(**options):
    return PrefillScorer(make(QWEN3), (1, 2), LATTICE, **options)


@settings(deadline=None, max_examples=10)
@given(requests)
def test_scores_with_the_kernel_are_those_without(parts):
    mix = [ScoreRequest(*part) for part in parts]
    with_kernel, without = (scorer(base=BASE, use_kernel=use) for use in (True, False))
    for found, expected in zip(with_kernel.score(mix), without.score(mix), strict=True):
        # Measured maximum over 20 mixes: 9.8e-7 of logits up to 2.2.
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=10)
@given(requests)
def test_batch_invariance_holds_bit_for_bit_with_the_kernel(parts):
    ready, mix = scorer(is_batch_invariant=True, use_kernel=True), [ScoreRequest(*part) for part in parts]
    for request, logits in zip(mix, ready.score(mix), strict=True):
        alone = ready.score([ScoreRequest(request.prefix, request.items[:1])])[0][0]
        assert alone.tobytes() == logits[0].tobytes()


@pytest.mark.parametrize(
    ("form", "platform", "call"), [("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "triton")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("groups", "width"), [(1, 64), (3, 64), (2, 128), (8, 128)])
def test_it_lowers_for_hardware(form, platform, call, dtype, groups, width):
    """Illegal block shapes and operations that a form does not have are errors here; no device is needed."""
    size = 1024
    blocks = size // BLOCK_TOKENS
    ints = [(size,), (size,), (size,), (blocks,), (blocks,), (1,), ()]
    seen = PackedQueries(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ints))
    queries, keys = (jax.ShapeDtypeStruct((size, 2, *kinds, width), dtype) for kinds in ((groups,), ()))
    traced = by_kernel.trace(queries, keys, keys, seen, form=form, is_interpreted=False)
    try:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "does not have a Triton compilation handler" not in str(error):
            raise
        pytest.skip("after jaxlib 0.10 what is lowered for a GPU is compiled too, by its plugin")
    assert call in text

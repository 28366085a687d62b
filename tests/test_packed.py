"""Attention over a launch equals dense attention over what each query sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.buckets import Buckets, Lattice
from jaxsearch.nn.attention import dense_attention
from jaxsearch.nn.packed import packed_attention
from jaxsearch.scoring.packing import Launch, ScoreRequest, Shapes, longest_first, unpack

SHAPES = Shapes(Lattice(Buckets([512]), max_prefix_tokens=70, max_item_tokens=200))
TOLERANCE = {"float32": 2e-6, "bfloat16": 0.03}  # measured maximum over 40 launches each: 7.2e-7, 0.016


jitted, dense = jax.jit(packed_attention, static_argnums=4), jax.jit(dense_attention)


sizes_of_requests = st.lists(
    st.tuples(st.integers(1, 70), st.lists(st.integers(1, 200), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_tokens", [0, 9])
@settings(deadline=None, max_examples=15)
@given(sizes=sizes_of_requests)
def test_packed_attention_equals_dense_attention(dtype, base_tokens, sizes):
    check(dtype, base_tokens, sizes)


def test_in_one_group_too():
    """As on an accelerator: all blocks at once."""
    check("float32", 9, [(70, [200, 1, 64]), (1, [1]), (30, [130])], Shapes(SHAPES.lattice, has_groups=False))


def check(dtype, base_tokens, sizes, shapes=SHAPES):
    launch = Launch(shapes)
    for owner, (prefix, items) in enumerate(sizes):
        request = ScoreRequest((1,) * prefix, [[2] * n for n in items])
        launch.add(owner, request, longest_first(request.items))
    prompts = unpack(jnp.asarray(launch.arrays()[0]), shapes.structure(launch.padded_tokens))
    rng = np.random.default_rng(0)

    def heads(count, *kinds):
        return jnp.asarray(rng.standard_normal((count, *kinds, 8)), dtype)

    keys, values = heads(launch.padded_tokens, 2), heads(launch.padded_tokens, 2)
    base = (heads(base_tokens, 2), heads(base_tokens, 2)) if base_tokens else None
    order = np.arange(launch.padded_tokens)
    for seen in (prompts.seen, prompts.ends):
        queries = heads(len(seen.places), 2, 3)
        found = jitted(queries, keys, values, seen, shapes.windows, base)
        assert found.dtype == queries.dtype
        places, starts, lengths = (np.asarray(each)[:, None] for each in seen[:3])
        prefixes = np.repeat(np.asarray(seen.block_prefixes), len(places) // len(seen.block_prefixes))[
            :, None
        ]
        mask = (order >= starts) & (order <= places)
        mask |= (order >= prefixes) & (order < prefixes + lengths)
        both = keys, values
        if base is not None:
            both = [jnp.concatenate(pair) for pair in zip(base, both, strict=True)]
            mask = np.concatenate([np.ones((len(places), base_tokens), bool), mask], axis=1)
        expected = dense(queries[None], both[0][None], both[1][None], jnp.asarray(mask)[None])[0]
        computed = len(places) // len(seen.windows) * int(seen.num_groups)
        np.testing.assert_allclose(
            found[:computed].astype(np.float32),
            expected[:computed].astype(np.float32),
            atol=TOLERANCE[dtype],
            rtol=0,
        )
        if base is None:
            assert not np.asarray(found[computed:].astype(np.float32)).any()

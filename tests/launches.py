"""Random launches, and attention over one beside dense attention over what each of its queries sees."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxsearch.buckets import Buckets, Lattice
from jaxsearch.nn.attention import attention_with_lse
from jaxsearch.scoring.packing import Launch, ScoreRequest, Shapes, longest_first, unpack

SHAPES = Shapes(Lattice(Buckets([512]), max_prefix_tokens=70, max_item_tokens=200))

sizes_of_requests = st.lists(
    st.tuples(st.integers(1, 70), st.lists(st.integers(1, 200), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)

dense = jax.jit(attention_with_lse)


def prompts_of(sizes, shapes=SHAPES):
    """A launch of requests with these (prefix, items) numbers of tokens, as far as they fit, and its size."""
    launch = Launch(shapes)
    for owner, (prefix, items) in enumerate(sizes):
        request = ScoreRequest((1,) * prefix, [[2] * n for n in items])
        launch.add(owner, request, longest_first(request.items))
    size = launch.padded_tokens
    return unpack(jnp.asarray(launch.arrays()[0]), shapes.structure(size)), size


def check(attend, dtype, base_tokens, sizes, tolerance, *, shapes=SHAPES, heads=(2, 3, 8), has_ends=True):
    """`attend(queries, keys, values, seen, base)` gives attended values and, if it likes, their log-sum-exp."""
    prompts, size = prompts_of(sizes, shapes)
    rng = np.random.default_rng(0)
    num_kv_heads, groups, width = heads

    def normal(count, *kinds):
        return jnp.asarray(rng.standard_normal((count, num_kv_heads, *kinds, width)), dtype)

    keys, values = normal(size), normal(size)
    base = (normal(base_tokens), normal(base_tokens)) if base_tokens else None
    order = np.arange(size)
    for seen in (prompts.seen, prompts.ends) if has_ends else (prompts.seen,):
        queries = normal(len(seen.places), groups)
        attended, *lse = attend(queries, keys, values, seen, base)
        assert attended.dtype == queries.dtype
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
        expected, expected_lse = dense(queries, *both, jnp.asarray(mask))
        computed = len(places) // len(seen.windows) * int(seen.num_groups)
        pairs = [(attended, expected.astype(attended.dtype)), *((each, expected_lse) for each in lse)]
        for found, wanted in pairs:
            np.testing.assert_allclose(
                found[:computed].astype(np.float32),
                wanted[:computed].astype(np.float32),
                atol=tolerance,
                rtol=0,
            )
        rest = attended[computed:].astype(np.float32)
        if base is None:
            assert not np.asarray(rest).any()
        else:
            alone = dense(queries, *base, jnp.ones((1, base_tokens), bool))[0][computed:]
            np.testing.assert_allclose(rest, alone, atol=tolerance, rtol=0)

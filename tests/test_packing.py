"""Filling launches: every item once, within their limits, little padding; and the arrays that say what tokens see."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.buckets import Lattice
from jaxsearch.nn.packed import BLOCK_TOKENS
from jaxsearch.scoring.packing import END_TOKENS, Launch, ScoreRequest, Shapes, fill_launches, unpack

LATTICE = Lattice.for_prompts(max_prefix_tokens=40, max_item_tokens=90, max_batch_tokens=640)
PLAIN, INVARIANT = Shapes(LATTICE), Shapes(LATTICE, is_batch_invariant=True)

sizes = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 90), min_size=1, max_size=30)),
    min_size=1,
    max_size=6,
)


def requests(drawn):
    return [ScoreRequest((1,) * prefix, [[2] * n for n in items], (5,)) for prefix, items in drawn]


@pytest.mark.parametrize("shapes", [PLAIN, INVARIANT])
@settings(deadline=None)
@given(drawn=sizes)
def test_every_item_is_in_one_launch_within_its_limits(shapes, drawn):
    mix = requests(drawn)
    launches = fill_launches(shapes, mix)
    found = sorted(
        (part.owner, position) for launch in launches for part in launch.parts for position in part.positions
    )
    assert found == [
        (owner, place) for owner, request in enumerate(mix) for place in range(len(request.items))
    ]
    for launch in launches:
        assert launch.num_tokens <= launch.padded_tokens - shapes.tail
        assert launch.padded_tokens in shapes.launches
        assert sum(len(part.items) for part in launch.parts) <= shapes.ends(launch.padded_tokens)


@pytest.mark.parametrize("shapes", [PLAIN, INVARIANT])
@settings(deadline=None)
@given(drawn=sizes)
def test_every_token_sees_its_own_text_up_to_itself_and_items_their_whole_prefix(shapes, drawn):
    for launch in fill_launches(shapes, requests(drawn)):
        ints, labels = launch.arrays(base_tokens=7)
        structure = shapes.structure(launch.padded_tokens)
        prompts = unpack(ints, structure)
        leaves = jax.tree.leaves(structure, is_leaf=lambda node: type(node) is tuple)
        assert len(ints) == sum(math.prod(shape) for shape in leaves)
        seen, ends = prompts.seen, iter(prompts.ends.places)
        row = 0
        for part in launch.parts:
            prefix = None
            for item in part.items:
                end = next(ends)
                start = seen.starts[end]
                assert end - start == len(item) - 1
                np.testing.assert_array_equal(prompts.tokens[start : end + 1], item)
                np.testing.assert_array_equal(
                    prompts.positions[start : end + 1], 7 + len(part.prefix) + np.arange(len(item))
                )
                assert set(seen.prefix_lengths[start : end + 1]) == {len(part.prefix)}
                blocks = set(seen.block_prefixes[start // BLOCK_TOKENS : end // BLOCK_TOKENS + 1])
                assert len(blocks) == 1
                assert prefix in (None, *blocks)
                (prefix,) = blocks
                assert labels[row, 0] == 5
                row += 1
            np.testing.assert_array_equal(prompts.tokens[prefix : prefix + len(part.prefix)], part.prefix)
            assert not seen.prefix_lengths[prefix : prefix + len(part.prefix)].any()


@pytest.mark.parametrize("shapes", [PLAIN, INVARIANT])
@settings(deadline=None)
@given(drawn=sizes)
def test_the_windows_of_a_group_hold_what_its_queries_see(shapes, drawn):
    for launch in fill_launches(shapes, requests(drawn)):
        prompts = unpack(launch.arrays()[0], shapes.structure(launch.padded_tokens))
        for queries in (prompts.seen, prompts.ends):
            per_group = len(queries.places) // len(queries.windows)
            per_block = len(queries.places) // len(queries.block_starts)
            for group in range(int(queries.num_groups)):
                own, shared = shapes.windows[queries.windows[group]]
                for place in range(group * per_group, (group + 1) * per_group):
                    block = place // per_block
                    assert queries.block_starts[block] <= queries.starts[place]
                    assert queries.places[place] - queries.block_starts[block] < own
                    assert queries.prefix_lengths[place] <= shared


def test_short_items_fill_what_long_ones_leave():
    lengths = [90, 10, 80, 20, 70, 30, 60, 40, 50, 5] * 4
    mix = [ScoreRequest((1,) * 30, [[2] * n for n in lengths], (5,))]
    launches = fill_launches(PLAIN, mix)
    real, padded = (
        sum(getattr(launch, name) for launch in launches) for name in ("num_tokens", "padded_tokens")
    )
    assert 1 - real / padded <= 0.1


def test_a_request_waits_where_its_prefix_would_be_most_of_what_fits():
    launch = Launch(PLAIN)
    assert launch.add(0, ScoreRequest((1,), [[2] * 90] * 6), list(range(6))) == 6
    waiting = list(range(9))
    assert launch.add(1, ScoreRequest((1,) * 40, [[2] * 20] * 9), waiting) == 0
    assert waiting == list(range(9))
    assert launch.add(2, ScoreRequest((1,) * 4, [[2] * 10] * 2), [0, 1]) == 2


def test_many_short_items_are_limited_by_their_number():
    (first, *_) = fill_launches(PLAIN, [ScoreRequest((1, 1), [[2]] * 100, (5,))])
    assert len(first.parts[0].items) == 640 // END_TOKENS
    assert first.padded_tokens == 640


def test_ends_that_need_room_do_not_push_the_next_request_away():
    launch = Launch(PLAIN)
    assert launch.add(0, ScoreRequest((1, 1), [[2]] * 30, ()), list(range(30))) == 30
    assert launch.add(1, ScoreRequest((1,) * 30, [[2] * 90] * 2, ()), [0, 1]) == 2
    assert launch.padded_tokens == 512
    ends = unpack(launch.arrays()[0], PLAIN.structure(512)).ends.places
    assert ends[31] == 64 + 30 + 180 - 1

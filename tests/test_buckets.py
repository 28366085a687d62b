import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsearch.buckets import LAUNCH_GROWTH, LAUNCH_MULTIPLE, Buckets, Lattice, round_up
from jaxsearch.errors import InputError


def test_the_smallest_bucket_that_holds_a_size():
    buckets = Buckets([64, 16, 16, 32])
    assert buckets.sizes == (16, 32, 64)
    assert [buckets.bucket_of(size) for size in (1, 16, 17, 64)] == [16, 16, 32, 64]
    with pytest.raises(InputError, match="65 tokens do not fit: the largest bucket holds 64"):
        buckets.bucket_of(65)


@pytest.mark.parametrize("sizes", [[], [0, 8], [-1]])
def test_no_buckets_or_empty_ones_are_refused(sizes):
    with pytest.raises(InputError, match="at least one"):
        Buckets(sizes)


@given(st.integers(1, 64), st.integers(1, 2048))
def test_geometric_sizes_end_at_the_largest_and_bound_the_padding(smallest, largest):
    buckets = Buckets.geometric(smallest, largest)
    assert buckets.largest == round_up(largest, 8)
    assert all(size % 8 == 0 for size in buckets.sizes)
    for small, large in itertools.pairwise(buckets.sizes):
        assert large <= max(1.5 * small + 8, small + 16)


@given(st.lists(st.integers(1, 80), max_size=12), st.integers(1, 4))
def test_fitted_sizes_have_the_least_padding_of_all_choices(lengths, count):
    largest = 64
    fitted = Buckets.fit(lengths, count=count, largest=largest)
    clipped = [min(length, largest) for length in lengths]

    def padded(sizes):
        return sum(Buckets([*sizes, largest]).bucket_of(length) for length in clipped)

    choices = itertools.combinations(range(8, largest, 8), min(count, 8) - 1)
    assert len(fitted.sizes) <= count
    assert fitted.largest == largest
    assert padded(fitted.sizes) == min(padded(choice) for choice in choices)


@given(st.integers(1, 200), st.integers(1, 700), st.integers(1, 4096))
def test_a_lattice_holds_the_longest_prompt_and_pads_large_launches_little(prefix, item, most):
    lattice = Lattice.for_prompts(max_prefix_tokens=prefix, max_item_tokens=item, max_batch_tokens=most)
    assert lattice.max_batch_tokens >= max(most, prefix + item)
    assert lattice.max_batch_tokens < max(most, prefix + item) + LAUNCH_MULTIPLE
    for small, large in itertools.pairwise(lattice.launches.sizes):
        assert large - small <= max(LAUNCH_MULTIPLE, (LAUNCH_GROWTH - 1) * small + LAUNCH_MULTIPLE)
    assert lattice.prefix_windows().largest >= prefix
    assert lattice.own_windows(64).largest >= max(prefix, item) + 63


def test_a_lattice_survives_json():
    lattice = Lattice.for_prompts(max_prefix_tokens=60, max_item_tokens=300)
    assert Lattice.from_json(json.loads(json.dumps(lattice.to_json()))) == lattice


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"launches": [128], "max_prefix_tokens": 100, "max_item_tokens": 29}, "largest launch holds 128"),
        ({"launches": [100], "max_prefix_tokens": 8, "max_item_tokens": 8}, "multiples of 128"),
        ({"launches": [128], "max_prefix_tokens": 8}, "no lattice"),
        ({"launches": ["many"], "max_prefix_tokens": 8, "max_item_tokens": 8}, "no lattice"),
    ],
)
def test_a_lattice_that_cannot_be_says_why(value, message):
    with pytest.raises(InputError, match=message):
        Lattice.from_json(value)

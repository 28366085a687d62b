import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsearch.buckets import LAUNCH_TOKENS, Buckets, ItemLattice, round_up
from jaxsearch.errors import InputError

lengths_of_items = st.lists(st.integers(1, 64), min_size=1, max_size=40)


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


@given(lengths_of_items)
def test_a_plan_holds_every_item_once_in_a_shape_of_the_lattice(lengths):
    lattice = ItemLattice(Buckets([8, 24, 64]), max_batch_tokens=256)
    batches = lattice.plan(lengths)
    assert sorted(i for batch in batches for i in batch.positions) == list(range(len(lengths)))
    for batch in batches:
        assert (batch.count, batch.length) in lattice.shapes
        assert batch.padded_tokens <= 256
        assert len(batch.positions) <= batch.count
        assert max(lengths[i] for i in batch.positions) <= batch.length


@given(st.lists(st.integers(1, 64), min_size=1, max_size=7))
def test_a_plan_is_the_cheapest_split_of_the_sorted_items(lengths):
    lattice = ItemLattice(Buckets([16, 64]), max_batch_tokens=256)
    ordered = sorted(lengths, reverse=True)

    def cheapest(rest):
        if not rest:
            return 0
        return min(
            LAUNCH_TOKENS + count * length + cheapest(rest[count:])
            for count, length in lattice.shapes
            if length >= rest[0]
        )

    planned = sum(LAUNCH_TOKENS + batch.padded_tokens for batch in lattice.plan(lengths))
    assert planned == cheapest(ordered)


def test_few_items_do_not_pay_for_a_full_batch():
    lattice = ItemLattice(Buckets([32]), max_batch_tokens=2048)
    assert lattice.counts[32] == (1, 4, 16, 64)
    assert sorted(batch.count for batch in lattice.plan([30] * 5)) == [1, 4]
    assert [batch.count for batch in lattice.plan([30] * 60)] == [64]


def test_what_cannot_be_planned_says_why():
    lattice = ItemLattice(Buckets([32]), max_batch_tokens=64)
    with pytest.raises(InputError, match="without tokens"):
        lattice.plan([3, 0])
    with pytest.raises(InputError, match="33 tokens do not fit"):
        lattice.plan([33])
    with pytest.raises(InputError, match="max_batch_tokens is 16"):
        ItemLattice(Buckets([32]), max_batch_tokens=16)

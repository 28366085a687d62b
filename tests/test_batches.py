"""Batches: padding, epochs, sampling by grade, false negatives, and iterators that start anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.data.batches import (
    CandidateSampler,
    allowed_in_batch,
    group_pairs,
    pack_rows,
    pack_tokens,
    packing_groups,
    pad_tokens,
    shuffled,
    step_batches,
)
from jaxsearch.data.records import Collection, Document, Query
from jaxsearch.errors import InputError

GRADES = {"q0": {"d0": 4, "d1": 2, "d2": 1}, "q1": {"d1": 3, "d9": 4}}


def collection():
    return Collection(
        "small",
        {key: Query(key, f"query {key}") for key in ("q0", "q1")},
        {f"d{i}": Document(f"d{i}", {"title": str(i)}) for i in range(10)},
        GRADES,
        {"q0": "train", "q1": "train"},
        frozenset({"d9"}),
    )


def sampler(**options):
    return CandidateSampler(collection(), threshold=2, **options)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=5))
def test_padding_keeps_every_token_that_fits(rows):
    tokens, where = pad_tokens(rows, pad_id=0, lengths=(4, 8))
    assert tokens.shape[1] == (4 if max(map(len, rows)) <= 4 else 8)
    for row, kept, mask in zip(rows, tokens, where, strict=True):
        assert kept[mask].tolist() == row[:8]
        assert (kept[~mask] == 0).all()


@settings(max_examples=30)
@given(size=st.integers(1, 20), batch=st.integers(1, 7), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation_whatever_the_batch_size(size, batch, seed):
    steps = -(-3 * size // batch)
    stream = np.concatenate([shuffled(size, batch, step, seed=seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 9))
def test_groups_are_equal_small_and_shared_by_all(ways, per_way, most):
    size = ways * per_way
    groups = packing_groups(size, ways, most=most)
    assert size % groups == 0
    assert groups % ways == 0
    assert size // groups <= most


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="a batch of 6 cannot be cut into 4"):
        packing_groups(6, 4)


def test_packed_rows_are_full():
    rng = np.random.default_rng(0)
    texts = [[1] * size for size in rng.integers(8, 96, 96)]
    tokens, segment_ids, _ = pack_rows([texts], pad_id=0, step=16, longest=96, pieces=8)
    assert tokens.shape[1] == 24
    assert (segment_ids > 0).mean() > 0.9  # measured .93


@given(
    st.integers(1, 4).flatmap(
        lambda c: st.lists(
            st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=c, max_size=c), min_size=1, max_size=3
        )
    ),
    st.integers(1, 3),
)
def test_packed_items_stand_whole_and_end_where_it_is_said(lists, rows):
    tokens, segment_ids, ends = pack_tokens(lists, rows=rows, pad_id=0, lengths=(3, 30))
    assert tokens.shape == segment_ids.shape == (len(lists), rows, tokens.shape[2])
    assert (tokens[segment_ids == 0] == 0).all()
    for items, row_tokens, row_segments, row_ends in zip(lists, tokens, segment_ids, ends, strict=True):
        for number, (item, end) in enumerate(zip(items, row_ends, strict=True), start=1):
            places = np.flatnonzero(row_segments == number)
            assert row_tokens.ravel()[places].tolist() == item
            assert len({place // tokens.shape[2] for place in places}) <= 1
            assert places.tolist() == list(range(end + 1 - len(item), end + 1)) or not item


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(InputError, match="5 tokens do not fit into a row of 4"):
        pack_tokens([[[1, 2, 3], [4, 5]]], rows=1, pad_id=0, lengths=(4,))


def test_epochs_differ():
    first, second = (shuffled(50, 50, step, seed=0).tolist() for step in (0, 1))
    assert first != second


@pytest.mark.parametrize("provider", ["memory", "grain"])
def test_an_iterator_may_start_at_any_step(provider):
    if provider == "grain":
        pytest.importorskip("grain")
    batches = step_batches(lambda step: int(step) ** 2, provider=provider)
    assert list(itertools.islice(batches(3), 4)) == [9, 16, 25, 36]


def test_unknown_provider_is_refused():
    with pytest.raises(InputError, match="memory"):
        step_batches(lambda step: step, provider="disk")


def test_unseen_documents_are_never_drawn():
    drawn = sampler(mined={"q1": {"d9": 1.0, "d3": 0.5}})
    assert drawn.positives("q1") == ["d1"]
    assert drawn.buckets("q1")["mined"] == ["d3"]
    for seed in range(20):
        assert "d9" not in drawn.pairs("q1", 6, np.random.default_rng(seed))


def test_negatives_come_from_graded_and_mined_buckets_before_random_ones():
    drawn = sampler(mined={"q0": {"d5": 0.9, "d0": 0.8, "d6": 0.7}})
    for seed in range(10):
        negatives = drawn.negatives("q0", 4, np.random.default_rng(seed))
        assert {"d2", "d5", "d6"} == set(negatives[:3])
        assert len(set(negatives)) == 4
        assert not {"d0", "d1"} & set(negatives)


@pytest.mark.parametrize(("share", "num_hard"), [(0.0, 3), (0.5, 2), (1.0, 0)])
def test_a_share_of_the_negatives_is_random(share, num_hard):
    drawn = sampler(mined={"q0": {"d5": 0.9, "d0": 0.8, "d6": 0.7}})
    hard, found = {"d2", "d5", "d6"}, set()
    for seed in range(40):
        negatives = drawn.negatives("q0", 4, np.random.default_rng(seed), random_share=share)
        assert len(set(negatives)) == 4
        assert len(hard & set(negatives[:num_hard])) == num_hard
        found |= set(negatives[num_hard:])
    assert found >= {"d3", "d4"}
    assert not found & {"d0", "d1"}


def test_pairs_hold_positives_and_negatives_each_once():
    pairs = sampler().pairs("q0", 6, np.random.default_rng(0))
    assert len(set(pairs)) == 6
    assert {"d0", "d1", "d2"} <= set(pairs)


def test_relevant_and_repeated_documents_do_not_stand_against_a_query():
    drawn = sampler()
    allowed = allowed_in_batch(drawn, ["q0", "q1"], [["d0", "d5"], ["d1", "d5"]])
    # q0: its positive d0, d5; d1 is relevant to it, the second d5 is a repetition. q1: d0 is no answer to it.
    assert allowed.tolist() == [[True, True, False, False], [True, False, True, True]]


def test_pairs_are_grouped_by_query_in_order():
    assert group_pairs([("a", "x"), ("b", "y"), ("a", "z"), ("a", "x")]) == {"a": ["x", "z"], "b": ["y"]}

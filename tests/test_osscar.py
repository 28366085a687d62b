"""OSSCAR against brute force, and what must hold for any channels."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.errors import InputError
from jaxsearch.nn.osscar import channels_of, keep_rows, prune, refit


def problem(seed, channels, out=3, rank=3):
    """Correlated inputs (as activations are) and a kernel."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, channels)) + rng.normal(size=(200, rank)) @ rng.normal(
        size=(rank, channels)
    )
    return inputs, inputs.T @ inputs, rng.normal(size=(channels, out))


def error_of(inputs, kernel, kept, size=1):
    whole = inputs @ kernel
    lost = whole - inputs[:, channels_of(kept.groups, size)] @ kept.kernel
    return np.square(lost).sum() / np.square(whole).sum()


def brute_force(gram, kernel, num_keep, size=1):
    groups = range(len(gram) // size)
    return min(
        (refit(gram, kernel, chosen, group_size=size) for chosen in itertools.combinations(groups, num_keep)),
        key=lambda kept: kept.relative_error,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 3), st.booleans())
def test_the_error_is_that_of_the_outputs(seed, groups, size, use_refit):
    inputs, gram, kernel = problem(seed, groups * size)
    num_keep = max(1, groups // 2)
    if use_refit:
        kept = prune(gram, kernel, num_keep, group_size=size)
    else:
        kept = keep_rows(gram, kernel, range(num_keep), group_size=size)
    assert kept.relative_error == pytest.approx(error_of(inputs, kernel, kept, size), rel=1e-6, abs=1e-12)


def test_keeping_all_is_the_identity():
    _, gram, kernel = problem(0, 6)
    kept = prune(gram, kernel, 6)
    assert kept.groups == tuple(range(6))
    assert np.array_equal(kept.kernel, kernel)
    assert kept.relative_error == 0.0


@pytest.mark.parametrize(("size", "groups"), [(1, 12), (2, 8)])
def test_local_search_agrees_with_brute_force(size, groups):
    """Removal and exchanges find the best choice of all in nearly every small problem, and are never far from it."""
    ratios = []
    for seed in range(60):
        _, gram, kernel = problem(seed, groups * size)
        found = prune(gram, kernel, groups // 2, group_size=size, num_swaps=20, swap_candidates=groups)
        best = brute_force(gram, kernel, groups // 2, size)
        ratios.append(found.relative_error / best.relative_error)
    assert min(ratios) > 1 - 1e-9
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.95  # measured 0.98 and 0.97
    assert max(ratios) < 1.2  # measured 1.13 and 1.17


def test_exchanges_only_help():
    for seed in range(20):
        _, gram, kernel = problem(seed, 24, rank=6)
        errors = [prune(gram, kernel, 10, chunk=7, num_swaps=swaps).relative_error for swaps in (0, 1, 30)]
        assert errors[0] >= errors[1] >= errors[2]


def test_removing_one_at_a_time_is_the_exact_greedy_choice():
    for seed in range(20):
        _, gram, kernel = problem(seed, 8)
        best = brute_force(gram, kernel, 7)
        assert prune(gram, kernel, 7).groups == best.groups


def test_channels_that_are_never_used_go_first_and_cost_nothing():
    inputs, _, kernel = problem(3, 8)
    inputs[:, [1, 4, 6]] = 0.0
    kept = prune(inputs.T @ inputs, kernel, 5)
    assert kept.groups == (0, 2, 3, 5, 7)
    assert kept.relative_error < 1e-6
    np.testing.assert_allclose(kept.kernel, kernel[[0, 2, 3, 5, 7]], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 5])
def test_of_every_class_equally_many_stay(chunk):
    for seed in range(20):
        inputs, gram, kernel = problem(seed, 24)
        kernel[:12] *= 0.01  # without classes the first half would go
        kept = prune(
            gram, kernel, 6, group_size=2, num_classes=3, chunk=chunk, num_swaps=5, swap_candidates=12
        )
        assert np.bincount(np.array(kept.groups) // 4, minlength=3).tolist() == [2, 2, 2]
        assert kept.relative_error == pytest.approx(error_of(inputs, kernel, kept, 2), rel=1e-6)


@pytest.mark.parametrize(("num_keep", "size", "classes"), [(0, 1, 1), (7, 1, 1), (2, 4, 1), (3, 1, 2)])
def test_sizes_that_do_not_fit_are_refused(num_keep, size, classes):
    _, gram, kernel = problem(0, 6)
    with pytest.raises(InputError):
        prune(gram, kernel, num_keep, group_size=size, num_classes=classes)
    with pytest.raises(InputError, match="at least one group goes at a time"):
        prune(gram, kernel, 3, chunk=0)

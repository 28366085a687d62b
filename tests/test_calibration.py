"""Calibration: pooled by hand, monotone, unchanged order, files that are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.calibration import IsotonicMap, calibration_error, fit_isotonic
from jaxsearch.errors import InputError


def test_recovers_probabilities_from_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=20_000)
    labels = (rng.uniform(size=logits.size) < 1 / (1 + np.exp(-logits))).astype(float)
    fitted = fit_isotonic(3 * logits + 1, labels)
    probs = fitted(3 * logits + 1)
    assert np.abs(probs - 1 / (1 + np.exp(-logits))).mean() < 0.02  # measured .0108
    assert calibration_error(probs, labels) < 0.005  # measured .0007
    assert calibration_error(1 / (1 + np.exp(-3 * logits - 1)), labels) > 0.05


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1)), min_size=1, max_size=40))
def test_order_is_never_reversed(pairs):
    scores, targets = map(np.array, zip(*pairs, strict=True))
    calibrated = fit_isotonic(scores, targets)(np.sort(scores))
    assert (np.diff(calibrated) >= 0).all()
    assert (calibrated >= targets.min() - 1e-9).all()
    assert (calibrated <= targets.max() + 1e-9).all()


def test_masked_pairs_do_not_count():
    scores, targets = np.array([1.0, 2.0, 3.0]), np.array([0.0, np.nan, 1.0])
    where = np.array([True, False, True])
    assert fit_isotonic(scores, targets, where=where) == fit_isotonic(scores[where], targets[where])


def test_constant_outside_and_any_shape():
    fitted = IsotonicMap((0.0, 1.0), (0.2, 0.6))
    np.testing.assert_allclose(fitted(np.array([[-5.0, 9.0]])), [[0.2, 0.6]])
    assert IsotonicMap((3.0,), (0.5,))(np.zeros((2, 3))).shape == (2, 3)


@pytest.mark.parametrize(
    ("x", "y"),
    [((1.0,), (0.1, 0.2)), ((2.0, 1.0), (0.0, 1.0)), ((1.0, 2.0), (1.0, 0.0)), ((), ()), ((1.0,), (np.nan,))],
)
def test_points_that_make_no_map_are_refused(x, y):
    with pytest.raises(InputError, match="a calibration map"):
        IsotonicMap(x, y)


@pytest.mark.parametrize(
    ("scores", "targets"), [([], []), ([1.0], [1.0, 2.0]), ([np.inf], [1.0]), ([1.0], [np.nan])]
)
def test_unusable_pairs_are_refused(scores, targets):
    with pytest.raises(InputError, match=r"calibration needs|equally long"):
        fit_isotonic(scores, targets)

"""Losses: numbers worked out by hand, masked == sliced, extreme inputs, float64 as the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsearch import losses


def _log_softmax64(x):
    x = np.asarray(x, np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


ROWWISE = {
    "soft_cross_entropy": lambda x, y, w: losses.soft_cross_entropy(x, jax.nn.softmax(y), where=w),
    "distillation_kl": lambda x, y, w: losses.distillation_kl(x, y, temperature=2.0, where=w),
    "binary_distillation": lambda x, y, w: losses.binary_distillation(
        x[:, 0], jax.nn.sigmoid(y[:, 0]), where=w
    ),
    "margin_loss": lambda x, y, w: losses.margin_loss(x[:, 0], y[:, 0], margin=0.5, where=w),
    "relative_error": lambda x, y, w: losses.relative_error(x, y + 1, where=w),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_masked_rows_equal_sliced_rows(name):
    x, y = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    where = np.array([True, False, True, True, False, True])
    loss = ROWWISE[name]
    dirty = jnp.where(where[:, None], x, jnp.nan)
    masked = np.asarray(loss(dirty, jnp.asarray(y), jnp.asarray(where)))
    sliced = np.asarray(loss(jnp.asarray(x[where]), jnp.asarray(y[where]), None))
    np.testing.assert_array_equal(masked[where], sliced)
    np.testing.assert_array_equal(masked[~where], 0.0)


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 1e30])
def test_all_masked_is_zero_with_finite_gradient(name, fill):
    inputs = jnp.full((3, 4), fill, jnp.float32)
    where = jnp.zeros(3, bool)
    value, gradient = jax.value_and_grad(lambda x: ROWWISE[name](x, jnp.zeros((3, 4)), where).sum())(inputs)
    assert value == 0.0
    np.testing.assert_array_equal(np.asarray(gradient), 0.0)


@pytest.mark.parametrize("function", [losses.listwise_softmax, losses.pairwise_logistic])
def test_list_losses_ignore_masked_candidates(function):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 7)).astype(np.float32)
    gains = rng.integers(0, 5, (5, 7))
    dirty = jnp.asarray(logits).at[:, 4:].set(jnp.nan)
    where = jnp.broadcast_to(jnp.arange(7) < 4, (5, 7))
    masked = function(dirty, jnp.asarray(gains), where=where)
    sliced = function(jnp.asarray(logits[:, :4]), jnp.asarray(gains[:, :4]))
    np.testing.assert_allclose(masked, sliced, atol=1e-6)  # measured max 1.2e-7
    order = np.array([6, 3, 1, 0, 5, 2, 4])
    shuffled = function(dirty[:, order], jnp.asarray(gains[:, order]), where=where[:, order])
    np.testing.assert_allclose(shuffled, masked, atol=1e-6)  # measured max 2.4e-7

    def total(x):
        return function(x, jnp.asarray(gains), where=where).sum()

    assert np.isfinite(np.asarray(jax.grad(total)(dirty))).all()


@pytest.mark.parametrize("function", [losses.listwise_softmax, losses.pairwise_logistic])
@pytest.mark.parametrize("where", [None, jnp.zeros((2, 3), bool)])
def test_lists_that_say_nothing_count_zero(function, where):
    value, gradient = jax.value_and_grad(lambda x: function(x, jnp.zeros((2, 3), int), where=where).sum())(
        jnp.array([[100.0, -100.0, 0.0], [1.0, 2.0, 3.0]])
    )
    assert value == 0.0
    np.testing.assert_array_equal(np.asarray(gradient), 0.0)


def test_pairwise_logistic_matches_a_loop_over_pairs():
    rng = np.random.default_rng(2)
    logits, gains = rng.normal(size=8).astype(np.float32), rng.integers(0, 5, 8)
    pairs = [
        np.log1p(np.exp(np.float64(logits[j]) - np.float64(logits[i])))
        for i in range(8)
        for j in range(8)
        if gains[i] > gains[j]
    ]
    value = losses.pairwise_logistic(jnp.asarray(logits), jnp.asarray(gains))
    np.testing.assert_allclose(value, np.mean(pairs), rtol=1e-6)  # measured 2.5e-8


def test_info_nce_masks_documents_and_whole_queries():
    rng = np.random.default_rng(3)
    queries = jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32))
    documents = jnp.asarray(rng.normal(size=(5, 4)).astype(np.float32))
    positive = jnp.array([0, 1, 2])
    where = jnp.ones((3, 5), bool).at[:, 3:].set(False)
    masked = losses.info_nce(queries, documents, positive, temperature=0.1, where=where)
    sliced = losses.info_nce(queries, documents[:3], positive, temperature=0.1)
    np.testing.assert_allclose(masked, sliced, rtol=1e-6)  # measured 0
    without_positive = where.at[1, 1].set(False)
    dropped = losses.info_nce(queries, documents, positive, temperature=0.1, where=without_positive)
    np.testing.assert_array_equal(dropped, masked.at[1].set(0.0))
    only_positive = jnp.eye(3, 5, dtype=bool)

    def total(x):
        return losses.info_nce(x, documents, positive, temperature=0.01, where=only_positive).sum()

    value, gradient = jax.value_and_grad(total)(queries)
    assert value == 0.0
    np.testing.assert_array_equal(np.asarray(gradient), 0.0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_batch_shape(shape):
    logits = jnp.ones((*shape, 5))
    assert losses.soft_cross_entropy(logits, logits / 5).shape == shape
    assert losses.distillation_kl(logits, logits, where=jnp.ones(shape, bool)).shape == shape
    assert losses.listwise_softmax(logits, logits).shape == shape
    assert losses.pairwise_logistic(logits, logits).shape == shape


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_matches_float64(scale):
    x, y = np.random.default_rng(4).uniform(-scale, scale, size=(2, 200, 5)).astype(np.float32)
    target = np.exp(_log_softmax64(y))
    expected = -(target * _log_softmax64(x)).sum(-1)
    got = losses.soft_cross_entropy(jnp.asarray(x), jnp.asarray(target.astype(np.float32)))
    np.testing.assert_allclose(
        got, expected, rtol=1e-6, atol=1e-6
    )  # measured 1.4e-7 relative, 2.4e-7 absolute at scale 1
    divergence = (target * (_log_softmax64(y) - _log_softmax64(x))).sum(-1)
    got = losses.distillation_kl(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(got, divergence, rtol=1e-6, atol=1e-6)  # measured 1.6e-7 beyond rtol
    states, targets = np.float64(x), np.float64(y)
    error = ((states - targets) ** 2).sum(-1) / (targets**2).sum(-1)
    got = losses.relative_error(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(got, error, rtol=1e-6)  # measured 3.3e-7 over 60 seeds


def test_a_teachers_states_get_no_gradient():
    x, y = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3, 4)), jnp.float32)
    to_student, to_teacher = jax.grad(lambda x, y: losses.relative_error(x, y).sum(), argnums=(0, 1))(x, y)
    assert jnp.abs(to_student).min() > 0
    np.testing.assert_array_equal(to_teacher, 0.0)


def test_half_precision_logits_are_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(4, 5)), jnp.bfloat16)
    target = jax.nn.softmax(jnp.ones((4, 5)))
    half = losses.soft_cross_entropy(logits, target)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, losses.soft_cross_entropy(logits.astype(jnp.float32), target))


def test_extreme_logits_stay_finite():
    logits = jnp.array([1e4, -1e4, 0.0])
    for value in (
        losses.binary_distillation(logits, jnp.array([0.0, 1.0, 0.5])),
        losses.distillation_kl(logits, -logits),
        losses.listwise_softmax(logits, jnp.array([0.0, 1.0, 2.0])),
        losses.pairwise_logistic(logits, jnp.array([0.0, 1.0, 2.0])),
    ):
        assert np.isfinite(np.asarray(value)).all()

"""Leaves in half precision: native products, sums in float32, gradients of the operands' dtype, narrow weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxsearch.nn.layers import layer_at, matmul, narrow_weights, narrowed, project
from jaxsearch.sharding import flatten_state, param_axes
from tests.small_models import QWEN2, make

RNG = np.random.default_rng(0)
ROWS, KERNEL, WEIGHT = (RNG.normal(size=shape).astype(np.float32) for shape in ((37, 64), (64, 24), (37, 24)))
NARROWING = ROWS, KERNEL, WEIGHT
WIDENING = WEIGHT, KERNEL.T, ROWS


def value_and_gradients(product, dtype, arrays):
    """Of a weighted sum of the product, the product itself, and the gradients by both operands."""
    rows, kernel = (jnp.asarray(array, dtype) for array in arrays[:2])

    def total(rows, kernel):
        made = product(rows, kernel)
        return (made.astype(jnp.float32) * arrays[2]).sum(), made

    gradients, made = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(rows, kernel)
    return made, *gradients


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.01)])
@pytest.mark.parametrize("arrays", [NARROWING, WIDENING], ids=["narrowing", "widening"])
def test_products_and_gradients_are_those_of_float64(dtype, bound, arrays):
    wide = [np.asarray(jnp.asarray(array, dtype), np.float64) for array in arrays]
    rows, kernel, weight = wide
    expected = rows @ kernel, weight @ kernel.T, rows.T @ weight
    for found, exact in zip(value_and_gradients(matmul, dtype, arrays), expected, strict=True):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
        assert error < bound  # measured 2.5e-7 in float32, 2.6e-3 in bfloat16


def test_half_precision_sums_in_float32():
    """4,096 ones: bfloat16 partial sums would stop at 256."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(matmul(ones, ones.T)[0, 0]) == 4096


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_any_rank_are_projected_alike(dtype):
    rows = jnp.asarray(ROWS[:36], dtype).reshape(3, 2, 6, 64)
    flat = matmul(rows.reshape(36, 64), jnp.asarray(KERNEL, dtype))
    np.testing.assert_array_equal(project(rows, jnp.asarray(KERNEL, dtype)).reshape(36, 24), flat)


def test_narrowing_is_to_nearest_even_and_keeps_what_is_no_number():
    bits = RNG.integers(0, 2**32, 20_000, dtype=np.uint32)
    edges = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000001, 0x7FFFFFFF, 0xFFC00000]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    found = np.asarray(jax.jit(narrowed, static_argnums=1)(values, jnp.bfloat16))
    with np.errstate(invalid="ignore"):
        expected, is_number = values.astype(ml_dtypes.bfloat16), ~np.isnan(values)
        np.testing.assert_array_equal(np.isnan(found), ~is_number)
    np.testing.assert_array_equal(found.view(np.uint16)[is_number], expected.view(np.uint16)[is_number])
    assert narrowed(jnp.ones(3), jnp.float32).dtype == jnp.float32


def test_gradients_pass_through_narrowing():
    @jax.jit
    @jax.grad
    def gradient(values):
        return (narrowed(values, jnp.bfloat16).astype(jnp.float32) * WEIGHT).sum()

    np.testing.assert_allclose(gradient(ROWS[:, :24]), WEIGHT, rtol=2**-8)  # the cotangent is bfloat16's


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_are_read_in_place_and_as_they_are(dtype):
    """XLA's CPU backend makes a float32 copy of a bfloat16 stack for a loop that takes slices of it."""
    stack = jnp.asarray(RNG.normal(size=(8, 64, 64)) / 8, dtype)

    @jax.jit
    def chain(stack, rows):
        return jax.lax.fori_loop(0, 8, lambda i, rows: matmul(rows, layer_at(stack, i)), rows)

    rows = jnp.asarray(ROWS, dtype)
    assert chain.lower(stack, rows).compile().memory_analysis().temp_size_in_bytes < stack.nbytes / 2
    expected = rows
    for kernel in stack:
        expected = matmul(expected, kernel)
    np.testing.assert_array_equal(chain(stack, rows), expected)


def test_narrow_weights_change_no_bit_of_what_is_computed():
    whole = make(QWEN2, dtype=jnp.bfloat16)  # with biases
    narrow = narrow_weights(whole)
    tokens = jnp.asarray(RNG.integers(0, QWEN2.vocab_size, (2, 9)), jnp.int32)
    compute = nnx.jit(lambda decoder, tokens: decoder.logits(decoder(tokens, where=tokens >= 0)))
    assert np.array_equal(compute(whole, tokens), compute(narrow, tokens))
    kept, axes = flatten_state(nnx.state(narrow)), param_axes(narrow)
    assert {leaf.dtype for leaf in flatten_state(nnx.state(whole)).values()} == {jnp.dtype(jnp.float32)}
    for name, leaf in kept.items():
        assert leaf.dtype == (jnp.float32 if axes[name][-1] == "norm" else jnp.bfloat16), name


def test_weights_that_are_narrow_enough_are_shared():
    for dtype, param_dtype in ((jnp.float32, jnp.float32), (jnp.float32, jnp.bfloat16)):
        whole = make(QWEN2, dtype=dtype, param_dtype=param_dtype)
        pairs = zip(
            *(flatten_state(nnx.state(model)).values() for model in (whole, narrow_weights(whole))),
            strict=True,
        )
        assert all(mine is theirs for mine, theirs in pairs)

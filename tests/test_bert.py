"""BERT by its properties; equality with the reference implementation is measured in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.data.batches import pack_tokens
from jaxsearch.errors import InputError
from jaxsearch.nn.bert import BertConfig
from tests.small_models import make, params

CONFIG = BertConfig(vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=3, num_heads=4, max_positions=24)


run = nnx.jit(lambda model, tokens, where: model(tokens, where=where))


def tokens_of(*lengths):
    where = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(0).integers(1, CONFIG.vocab_size, where.shape)
    return jnp.asarray(np.where(where, tokens, 0), jnp.int32), jnp.asarray(where)


def test_padding_and_neighbours_change_nothing():
    model, (tokens, where) = make(CONFIG), tokens_of(12, 5, 9)
    together = run(model, tokens, where)
    for row, length in enumerate((12, 5, 9)):
        alone = run(model, tokens[row : row + 1, :length], where[row : row + 1, :length])
        # fp32; max 1.8e-6
        np.testing.assert_allclose(together[row, :length], alone[0], atol=1e-5, rtol=0)


def test_padded_token_ids_are_not_read():
    model, (tokens, where) = make(CONFIG), tokens_of(12, 5)
    other = jnp.where(where, tokens, 7)
    real = np.asarray(where)
    first, second = run(model, tokens, where), run(model, other, where)
    np.testing.assert_array_equal(np.asarray(first)[real], np.asarray(second)[real])


def test_every_real_token_reaches_every_other():
    model, (tokens, where) = make(CONFIG), tokens_of(6)
    base = np.asarray(model(tokens, where=where))[0]
    for position in range(6):
        changed = tokens.at[0, position].set((tokens[0, position] + 1) % CONFIG.vocab_size)
        moved = np.abs(np.asarray(run(model, changed, where))[0] - base).max(-1)
        assert (moved > 1e-4).all()


def test_order_matters():
    model, (tokens, where) = make(CONFIG), tokens_of(6)
    forward, backward = run(model, tokens, where), run(model, tokens[:, ::-1], where)
    assert float(jnp.abs(forward - backward[:, ::-1]).max()) > 1e-2


def test_scan_equals_layers_one_by_one():
    model, (tokens, where) = make(CONFIG), tokens_of(10, 4)
    graph, stacked = nnx.split(model.encoder.layer)
    hidden = model.embeddings(tokens, jnp.arange(tokens.shape[1])[None])
    for index in range(CONFIG.num_layers):
        layer = nnx.merge(graph, jax.tree.map(lambda values, index=index: values[index], stacked))
        hidden = layer(hidden, where[:, None])
    # fp32; max 1.4e-6
    np.testing.assert_allclose(model(tokens, where=where), hidden, atol=1e-5, rtol=0)


def test_all_masked_is_finite_and_so_is_its_gradient():
    model, (tokens, _) = make(CONFIG), tokens_of(5)
    nowhere = jnp.zeros(tokens.shape, bool)
    loss, gradient = nnx.jit(nnx.value_and_grad(lambda m: m(tokens, where=nowhere).sum()))(model)
    assert jnp.isfinite(loss)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_remat_changes_no_gradient():
    (tokens, where), gradients = tokens_of(8, 3), []
    for use_remat in (False, True):
        model = make(CONFIG, use_remat=use_remat)
        gradients.append(
            nnx.jit(nnx.grad(lambda m: jnp.square(m(tokens, where=where)[..., 0]).mean()))(model)
        )
    plain, remat = (jax.tree.leaves(gradient) for gradient in gradients)
    assert len(plain) == len(remat) > 0
    for first, second in zip(plain, remat, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-6, rtol=1e-5)  # max 3.0e-7 of gradients up to 1.2


def test_dtypes_and_axes():
    model = make(CONFIG, jnp.float32, dtype=jnp.bfloat16)
    tokens, where = tokens_of(7, 3)
    hidden = run(model, tokens, where)
    assert hidden.dtype == jnp.bfloat16
    exact = run(make(CONFIG), tokens, where)
    # bf16 has 8 bits: measured .038 of states up to 2.2
    assert float(jnp.abs(hidden.astype(jnp.float32) - exact).max()) < 0.1
    for path, param in params(model).items():
        assert param.dtype == jnp.float32
        assert len(param.axes) == param.ndim, path


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads": 5}, "not a multiple of 5 heads"), ({"activation": "swish"}, "'swish' is not supported")],
)
def test_wrong_configs(change, message):
    with pytest.raises(InputError, match=message):
        BertConfig(
            **{"vocab_size": 8, "embed_dim": 32, "mlp_dim": 8, "num_layers": 1, "num_heads": 4} | change
        )


def test_too_many_tokens():
    tokens, where = tokens_of(25)
    with pytest.raises(InputError, match="25 tokens exceed the 24 positions"):
        make(CONFIG)(tokens, where=where)


def test_packed_texts_do_not_feel_padding_that_is_longer_than_the_model():
    model = make(CONFIG)
    texts = [[5, 6, 7], [9, 8], [3] * 20]
    tokens, segment_ids, _ = map(jnp.asarray, pack_tokens([texts], rows=3, pad_id=0, lengths=(64,)))
    states = model(tokens[0], where=segment_ids[0] > 0, segment_ids=segment_ids[0])
    assert bool(jnp.isfinite(states).all())
    for number, text in enumerate(texts, start=1):
        alone = model(jnp.asarray([text], jnp.int32), where=jnp.ones((1, len(text)), bool))[0]
        packed = states[segment_ids[0] == number]
        np.testing.assert_allclose(packed, alone, atol=1e-5, rtol=0)  # measured maximum 1.2e-6

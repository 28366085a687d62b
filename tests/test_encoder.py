"""The bi-encoder: pooling, padding, its loss, and the folder round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.data.assets import fetch
from jaxsearch.data.batches import pack_tokens
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.encoder import Encoder, EncoderBatch, EncoderLoss, TextEncoder, load_encoder, save_encoder
from jaxsearch.errors import InputError
from tests.small_models import BERT, LLAMA, make
from tests.tiny_bundle import tiny_tokenizer, write_parts

LENGTH = 6
TOLERANCE = 4e-6  # of unit vectors, and of losses relative to them; measured maximum 7.2e-7 over 60 seeds


@pytest.fixture(params=["mean", "last"])
def encoder(request):
    return Encoder(make(BERT if request.param == "mean" else LLAMA), pooling=request.param)


def random_tokens(rows, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(1, 48, (rows, length)).astype(np.int32)


def test_rows_are_unit_vectors_and_padding_changes_nothing(encoder):
    tokens = random_tokens(3)
    where = np.ones(tokens.shape, bool)
    plain = encoder(jnp.asarray(tokens), jnp.asarray(where))
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1.0, atol=TOLERANCE)
    padded = np.pad(tokens, ((0, 0), (0, 4)), constant_values=7)
    kept = np.pad(where, ((0, 0), (0, 4)))
    np.testing.assert_allclose(encoder(jnp.asarray(padded), jnp.asarray(kept)), plain, atol=TOLERANCE)


def test_mean_pooling_is_the_mean_of_the_hidden_states():
    bert = make(BERT)
    tokens, where = jnp.asarray(random_tokens(1)), jnp.asarray([[True, True, True, False, False, False]])
    hidden = bert(tokens, where=where)[0, :3].mean(axis=0)
    expected = hidden / jnp.linalg.norm(hidden)
    np.testing.assert_allclose(Encoder(bert)(tokens, where)[0], expected, atol=TOLERANCE)


def test_unknown_pooling_is_refused():
    with pytest.raises(InputError, match="mean"):
        Encoder(make(BERT), pooling="max")


DOCUMENTS = random_tokens(6, seed=2)
QUERIES = random_tokens(2, seed=1)


def batch(allowed):
    """Two queries with three documents each, packed into three rows."""
    texts = [*QUERIES.tolist(), *DOCUMENTS.tolist()]
    tokens, segment_ids, ends = map(jnp.asarray, pack_tokens([texts], rows=3, pad_id=0, lengths=(24,)))
    return EncoderBatch(
        tokens[0], segment_ids[0], ends[0, :2], ends[0, 2:].reshape(2, 3), jnp.asarray(allowed)
    )


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("backbone", [BERT, LLAMA])
def test_packed_texts_have_the_vectors_that_they_have_alone(backbone, pooling):
    encoder, rng = Encoder(make(backbone), pooling=pooling), np.random.default_rng(0)
    texts = [rng.integers(1, 40, size).tolist() for size in (3, 7, 1, 5, 2)]
    tokens, segment_ids, ends = map(jnp.asarray, pack_tokens([texts], rows=2, pad_id=0, lengths=(16,)))
    packed = nnx.jit(Encoder.packed)(encoder, tokens[0], segment_ids[0], ends[0])
    empty = pack_tokens([[texts[0], []]], rows=1, pad_id=0, lengths=(16,))
    zero = encoder.packed(*(jnp.asarray(array[0]) for array in empty))[1]
    assert not zero.any()
    assert not encoder(jnp.ones((1, 4), jnp.int32), jnp.zeros((1, 4), bool)).any()
    for text, vector in zip(texts, packed, strict=True):
        alone = encoder(jnp.asarray([text], jnp.int32), jnp.ones((1, len(text)), bool))
        np.testing.assert_allclose(vector, alone[0], atol=TOLERANCE)


def test_a_document_that_is_not_allowed_takes_no_part_in_the_softmax():
    bert = Encoder(make(BERT))
    allowed = np.ones((2, 6), bool)
    allowed[0, 3] = False
    loss = EncoderLoss(temperature=0.1, margin_weight=0.0)
    total, count, metrics = loss(bert, batch(allowed))
    queries = bert(jnp.asarray(QUERIES), jnp.ones((2, LENGTH), bool))
    documents = bert(jnp.asarray(DOCUMENTS), jnp.ones((6, LENGTH), bool))
    scores = np.asarray(queries @ documents.T) / 0.1
    first = np.log(np.exp(np.delete(scores[0], 3)).sum()) - scores[0, 0]
    second = np.log(np.exp(scores[1]).sum()) - scores[1, 3]
    assert float(count) == 2.0
    assert float(metrics["tokens"]) == 2 * LENGTH + 6 * LENGTH
    np.testing.assert_allclose(float(total), first + second, rtol=TOLERANCE)


def test_the_margin_counts_the_queries_own_negatives():
    bert = Encoder(make(BERT))
    alone = EncoderLoss(margin=1.0, margin_weight=0.0)(bert, batch(np.ones((2, 6), bool)))[0]
    total, _, metrics = EncoderLoss(margin=1.0, margin_weight=0.5)(bert, batch(np.ones((2, 6), bool)))
    np.testing.assert_allclose(float(total - alone), 0.5 * 2 * float(metrics["margin"]), rtol=TOLERANCE)
    assert float(metrics["margin"]) > 0


def test_training_reduces_the_loss_of_a_batch():
    bert = Encoder(make(BERT))
    data, loss = batch(np.ones((2, 6), bool)), EncoderLoss()
    graph, state = nnx.split(bert)
    value = jax.jit(lambda s: loss(nnx.merge(graph, s), data)[0])
    gradient = jax.grad(lambda s: loss(nnx.merge(graph, s), data)[0])(state)
    stepped = jax.tree.map(lambda p, g: p - 0.01 * g, state, gradient)
    assert float(value(stepped)) < float(value(state))


def test_texts_are_embedded_in_any_order_and_number(tmp_path):
    parts = write_parts(tmp_path)
    encoder = load_encoder(parts["encoder"])
    texts = [f"text number {i} " + "word " * (i % 5) for i in range(11)]
    together = encoder.embed_documents(texts)
    alone = np.concatenate([encoder.embed_documents([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)


def test_nothing_compiles_after_compile(tmp_path):
    encoder = load_encoder(write_parts(tmp_path)["encoder"])
    programs = encoder.compile(documents=True)
    encoder.embed_queries(["a", "much longer query with many words in it"])
    encoder.embed_documents(["x " * 90] * 70)
    assert encoder.num_compilations == programs


def test_long_texts_keep_their_closing_special_token_where_there_is_one():
    bert, text = Encoder(make(BERT)), "a long text about bread and how it is baked"
    for tokenizer, num_closing in ((tiny_tokenizer(), 0), (Tokenizer.from_path(fetch("minilm")), 1)):
        whole = tokenizer.encode_batch([text], special=True)[0]
        short = TextEncoder(bert, tokenizer, max_query_tokens=8, max_document_tokens=8)
        cut = short.encode_documents([text])[0]
        assert cut == [*whole[: 8 - num_closing], *whole[len(whole) - num_closing :]]


def test_more_tokens_than_positions_are_refused_at_once():
    with pytest.raises(InputError, match="has 12 positions: texts of 13 tokens do not fit"):
        TextEncoder(Encoder(make(BERT)), tiny_tokenizer(), max_query_tokens=12, max_document_tokens=13)


def test_a_saved_encoder_embeds_as_before(tmp_path):
    parts = write_parts(tmp_path)
    encoder = load_encoder(parts["encoder"])
    assert encoder.query_instruction == "Find: "
    save_encoder(tmp_path / "again", encoder, trained={"steps": 1})
    again = load_encoder(tmp_path / "again")
    assert np.array_equal(again.embed_queries(["bread"]), encoder.embed_queries(["bread"]))
    assert again.version != encoder.version


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="ranker"):
        load_encoder(write_parts(tmp_path)["ranker"])

"""The ranker: shared prefix in training, its loss and masks, and the folder round trip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.data.batches import pack_tokens
from jaxsearch.errors import InputError
from jaxsearch.nn.layers import last_hidden
from jaxsearch.ranker import Ranker, RankerBatch, RankerLoss, TextRanker, load_ranker, save_ranker
from tests.small_models import LLAMA, make
from tests.tiny_bundle import write_parts

LABEL_IDS = (3, 5)


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    where = np.ones((2, 3, 5), bool)
    where[0, 1, 3:] = False
    where[:, 2, 4:] = False
    prefixes = [rng.integers(0, 48, size).tolist() for size in (4, 3)]
    items = [rng.integers(0, 48, kept.sum()).tolist() for rows in where for kept in rows]
    prefix_tokens, prefix_ids, _ = pack_tokens([prefixes], rows=1, pad_id=0, lengths=(8,))
    tokens, segment_ids, ends = pack_tokens([items], rows=2, pad_id=0, lengths=(20,))
    packed = map(
        jnp.asarray, (prefix_tokens[:, 0], prefix_ids[:, 0], tokens, segment_ids, ends.reshape(1, 2, 3))
    )
    return RankerBatch(
        *packed,
        jnp.asarray(rng.random((1, 2, 3)), jnp.float32),
        jnp.asarray([[[True, True, False], [True, False, True]]]),
        jnp.asarray(rng.integers(0, 5, (1, 2, 3)) / 4, jnp.float32),
        jnp.ones((1, 2, 3), bool),
    )


def test_a_logit_is_that_of_the_whole_prompt_alone():
    decoder, batch = make(LLAMA), random_batch()
    ranker = Ranker(decoder, label_ids=LABEL_IDS)
    together = nnx.jit(Ranker.__call__)(
        ranker, batch.prefix_tokens, batch.prefix_ids, batch.item_tokens, batch.segment_ids, batch.ends
    ).logits
    for q in range(2):
        for c in range(3):
            prefix = batch.prefix_tokens[batch.prefix_ids == q + 1]
            item = batch.item_tokens[batch.segment_ids == 3 * q + c + 1]
            tokens = jnp.concatenate([prefix, item])[None]
            hidden = last_hidden(decoder(tokens), jnp.ones(tokens.shape, bool))
            yes, no = decoder.logits(hidden)[0, jnp.asarray(LABEL_IDS)]
            np.testing.assert_allclose(
                together[0, q, c], yes - no, atol=1e-5
            )  # measured max 3.1e-6, 60 seeds


def evaluate(loss, ranker, batch):
    graph, state = nnx.split(ranker)
    return jax.jit(lambda s: loss(nnx.merge(graph, s), batch))(state)


def gradient(loss, batch):
    graph, state = nnx.split(Ranker(make(LLAMA), label_ids=LABEL_IDS))
    return jax.tree.leaves(jax.jit(jax.grad(lambda s: loss(nnx.merge(graph, s), batch)[0]))(state))


def test_labels_that_are_masked_change_nothing():
    loss, batch = RankerLoss(gold_weight=0.0), random_batch()
    noisy = dataclasses.replace(
        batch, teacher=jnp.where(batch.teacher_where, batch.teacher, jnp.float32(0.77))
    )
    for left, right in zip(gradient(loss, batch), gradient(loss, noisy), strict=True):
        assert np.array_equal(left, right)


def test_without_any_label_loss_and_gradient_are_zero():
    nothing = jnp.zeros((1, 2, 3), bool)
    batch = dataclasses.replace(random_batch(), teacher_where=nothing, gold_where=nothing)
    total, _, _ = evaluate(RankerLoss(), Ranker(make(LLAMA), label_ids=LABEL_IDS), batch)
    assert float(total) == 0.0
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in gradient(RankerLoss(), batch))


def test_every_weight_weighs_its_own_term():
    ranker, batch = Ranker(make(LLAMA), label_ids=LABEL_IDS), random_batch()
    terms = {}
    for name in ("teacher_weight", "gold_weight", "list_weight"):
        weights = dict.fromkeys(("teacher_weight", "gold_weight", "list_weight"), 0.0) | {name: 1.0}
        terms[name] = float(evaluate(RankerLoss(**weights), ranker, batch)[0])
    assert terms["teacher_weight"] > 0
    assert terms["gold_weight"] > 0
    both = float(evaluate(RankerLoss(teacher_weight=2.0, gold_weight=3.0, list_weight=0.0), ranker, batch)[0])
    expected = 2 * terms["teacher_weight"] + 3 * terms["gold_weight"]
    np.testing.assert_allclose(both, expected, rtol=1e-6)  # measured maximum 1.0e-7 over 60 seeds


def test_hidden_states_are_compared_at_the_tokens_that_are_there_group_by_group():
    student, teacher = (Ranker(make(LLAMA, seed=seed), label_ids=LABEL_IDS) for seed in (0, 1))
    emptier = random_batch(1)
    kept = jnp.where(emptier.segment_ids <= 2, emptier.segment_ids, 0)
    groups = random_batch(), dataclasses.replace(emptier, segment_ids=kept)
    batch = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *groups)
    read = (batch.prefix_tokens, batch.prefix_ids, batch.item_tokens, batch.segment_ids, batch.ends)
    own, shown = student(*read), teacher(*read)
    loss = RankerLoss(teacher_weight=0.0, gold_weight=0.0, list_weight=0.0, hidden_weight=3.0)
    assert float(loss(student, batch, own)[0]) == 0.0
    errors = []
    for group, segment_ids in enumerate(np.asarray(batch.segment_ids)):
        ours, theirs = (np.float64(output.hidden[group])[segment_ids > 0] for output in (own, shown))
        errors.append((((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)).mean())
    assert abs(errors[0] / errors[1] - 1) > 0.01  # else a mean over all tokens would be the same
    padding = jnp.where(batch.segment_ids[..., None] > 0, shown.hidden, jnp.nan)
    total, count, metrics = loss(student, batch, shown._replace(hidden=padding))
    np.testing.assert_allclose(total, 3.0 * np.mean(errors) * count, rtol=1e-6)  # measured 1.7e-7, 20 seeds
    np.testing.assert_allclose(metrics["hidden_error"], np.mean(errors), rtol=1e-6)


def test_the_list_term_prefers_gold_over_the_teacher():
    ranker, batch = Ranker(make(LLAMA), label_ids=LABEL_IDS), random_batch()
    loss = RankerLoss(teacher_weight=1e-9, gold_weight=1e-9, list_weight=1.0)
    other_teacher = dataclasses.replace(batch, teacher=1.0 - batch.teacher)
    np.testing.assert_allclose(
        evaluate(loss, ranker, batch)[0], evaluate(loss, ranker, other_teacher)[0], rtol=2e-7
    )  # measured 0 over 60 seeds
    other_gold = dataclasses.replace(batch, gold=1.0 - batch.gold)
    assert abs(float(evaluate(loss, ranker, batch)[0] - evaluate(loss, ranker, other_gold)[0])) > 1e-3


def test_scores_are_yes_minus_no():
    assert TextRanker.scores(np.array([[2.0, 0.5], [0.0, 1.0]], np.float32)).tolist() == [1.5, -1.0]


def test_a_saved_ranker_asks_and_answers_as_before(tmp_path):
    ranker = load_ranker(write_parts(tmp_path)["ranker"])
    save_ranker(tmp_path / "again", ranker, trained={"steps": 2})
    again = load_ranker(tmp_path / "again")
    prompt = ranker.request("bake", ["Baker", "Nurse"])
    assert again.request("bake", ["Baker", "Nurse"]) == prompt
    assert ranker.tokenizer.decode(list(prompt.prefix)).count("bake") == 1
    assert (again.view, again.label_ids) == (ranker.view, ranker.label_ids)
    tokens = jnp.asarray([prompt.prefix], jnp.int32)
    assert np.array_equal(again.decoder(tokens), ranker.decoder(tokens))


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="of kind encoder, not of kind ranker"):
        load_ranker(write_parts(tmp_path)["encoder"])
